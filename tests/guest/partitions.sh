#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A GPT on the disk makes partitions, now and at the next attach, and they go
# away with the disk.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
ploopctl create -s 200M "$SCRATCH/disk.img" >/dev/null
device=$(attach "$SCRATCH/disk.img")
printf 'label: gpt\nsize=64MiB\nsize=32MiB\n' | sfdisk -q "$device"
retry 10 test -b "${device}p2" || die "no partition appeared"
expect_same "$(blockdev --getsize64 "${device}p1")" $((64 << 20)) "size of the first partition"
mkfs.ext4 -q "${device}p1"
mkdir -p "$TEST_DIR/mnt"
mount "${device}p1" "$TEST_DIR/mnt"
echo hello >"$TEST_DIR/mnt/file"
expect_fail ploopctl detach "$device"
umount "$TEST_DIR/mnt"
detach "$device"
[[ ! -e /sys/class/block/${device##*/}p1 ]] || die "the partition outlived the disk"

device=$(attach "$SCRATCH/disk.img")
retry 10 test -b "${device}p1" || die "no partition after attach"
mount "${device}p1" "$TEST_DIR/mnt"
expect_same "$(<"$TEST_DIR/mnt/file")" hello "the file's contents"
umount "$TEST_DIR/mnt"
detach "$device"

# More than the disk has minors for: their file systems are frozen like others, and no image of the disk
# may be on them, which would wait for itself.
ploopctl create -s 200M -b 64K "$SCRATCH/many.img" >/dev/null
device=$(attach "$SCRATCH/many.img")
{ echo 'label: gpt' && printf 'size=8MiB\n%.0s' {1..18}; } | sfdisk -q "$device"
retry 10 test -b "${device}p18" || die 'partitions are missing'
mkfs.ext4 -q "${device}p18"
mount "${device}p18" "$TEST_DIR/mnt"
ploopctl create -s 200M -b 64K "$TEST_DIR/mnt/own.img" >/dev/null
status=0
timeout "$(limit 30)" plooptest snapshot --freeze --cluster-log 7 "$device" "$TEST_DIR/mnt/own.img" \
    >"$TEST_DIR/said" 2>&1 || status=$?
((status == 1)) && grep -qE 'errno 40$|symbolic links' "$TEST_DIR/said" || die "an image on the disk itself: $status, $(<"$TEST_DIR/said")"
left_frozen "$device" "$TEST_DIR/mnt"
umount "$TEST_DIR/mnt"
detach "$device"
