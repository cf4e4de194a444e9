#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The module cannot be unloaded while a device exists, under I/O or not, and a
# disk cannot be detached while it is open or mounted.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
ploopctl create -s 64M "$SCRATCH/disk.img" >/dev/null
device=$(attach "$SCRATCH/disk.img")
expect_fail rmmod ploop
dd if=/dev/urandom of="$device" bs=64k oflag=direct conv=notrunc status=none 2>/dev/null &
writer=$!
exec 5<"$device"
for _ in 1 2 3; do
    expect_fail rmmod ploop
    status=0
    ploopctl detach "$device" 2>"$TEST_DIR/said" || status=$?
    expect_same "$status" 17 'status of detach of an open disk'
done
kill "$writer" 2>/dev/null || true
wait "$writer" || true
exec 5<&-

udevadm settle -t 10
mkfs.ext4 -q "$device"
mkdir -p "$TEST_DIR/mnt"
mount "$device" "$TEST_DIR/mnt"
status=0
ploopctl detach "$device" || status=$?
expect_same "$status" 17 'status of detach of a mounted disk'
echo still-here >"$TEST_DIR/mnt/file"
sync -f "$TEST_DIR/mnt/file"
expect_fail rmmod ploop
umount "$TEST_DIR/mnt"
detach "$device"
rmmod ploop
insmod "$BIN/ploop.ko"
