#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A read-only attach reads, refuses writes and does not change one byte of the
# image, nor its times; several may share it; files on a read-only file system
# and block devices as raw base work.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 64M "$image" >/dev/null
device=$(attach "$image")
head -c 5M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=1M conv=fsync status=none
detach "$device"
before=$(sha256sum <"$image")
changed=$(stat -c '%y %z %s' "$image")

one=$(attach -r "$image")
two=$(attach -r "$image")
expect_same "$(blockdev --getro "$one")" 1 'read-only flag'
expect_same "$(<"/sys/block/${one##*/}/pdelta/0/ro")" 1 ro
cmp -n $((5 << 20)) "$one" "$TEST_DIR/data" || die "reads wrong"
cmp "$one" "$two" || die "two readers differ"
expect_fail dd if=/dev/zero of="$one" bs=4k count=1 oflag=direct conv=notrunc status=none
expect_fail ploopctl attach "$image"
detach "$one" "$two"
expect_same "$(sha256sum <"$image")" "$before" 'the image'
expect_same "$(stat -c '%y %z %s' "$image")" "$changed" 'its times'

mount -o remount,ro "$SCRATCH"
expect_fail ploopctl attach "$image"
one=$(attach -r "$image")
cmp -n $((5 << 20)) "$one" "$TEST_DIR/data" || die "reads wrong from a read-only file system"
detach "$one"

disk=$(scratch_disk 1)
dd if="$TEST_DIR/data" of="$disk" bs=1M conv=fsync status=none
one=$(attach -f raw "$disk")
cmp -n $((5 << 20)) "$one" "$TEST_DIR/data" || die "a block device as raw base reads wrong"
printf changed | dd of="$one" bs=1M seek=2 conv=fsync status=none
detach "$one"
expect_same "$(dd if="$disk" bs=1M skip=2 count=1 status=none | head -c 7)" changed 'the block device'
