#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Somebody cuts the image file while it is attached: requests to what is gone
# fail and do not make the file longer again, which would hide that data is gone;
# what is still there is read; detach says that the image is not clean, and the
# next attach refuses it until somebody has decided to do without. With the
# blocks pinned nobody can: see inline_io.
# module: bdev=0
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 64M "$image" >/dev/null
device=$(attach "$image")
head -c 16M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=1M conv=fsync oflag=direct status=none
truncate -s 9M "$image"
drop_caches
cmp -n $((7 << 20)) "$device" "$TEST_DIR/data" || die "good clusters cannot be read"
expect_fail dd if="$device" of=/dev/null bs=1M skip=12 count=1 iflag=direct status=none
for cluster in 14 40; do
    expect_fail timeout 20 dd if="$TEST_DIR/data" of="$device" bs=4k seek=$((cluster << 8)) count=1 oflag=direct status=none
done
expect_same "$(stat -c %s "$image")" $((9 << 20)) 'length after writes behind the end'
cmp -n $((7 << 20)) "$device" "$TEST_DIR/data" || die "good clusters cannot be read any more"

udevadm settle -t 10 || true
expect_fail ploopctl detach "$device"
[[ ! -e /sys/block/${device##*/} ]] || die "the device is still there"
expect_same "$(stat -c %s "$image")" $((9 << 20)) 'length after detach'
expect_fail ploopctl attach "$image"
ploopctl check --repair "$image" >&2
device=$(attach "$image")
cmp -n $((7 << 20)) "$device" "$TEST_DIR/data" || die "good clusters were lost by the repair"
detach "$device"
