#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Somebody cuts the image file while it is attached: requests to what is gone
# fail, what is still there is read, nothing crashes and detach works.
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
# A write there may fail or work; it must end.
timeout 20 dd if=/dev/zero of="$device" bs=4k seek=$((14 << 8)) count=1 oflag=direct conv=fsync status=none || (($? != 124))
timeout 20 dd if=/dev/zero of="$device" bs=4k seek=$((40 << 8)) count=1 oflag=direct conv=fsync status=none || (($? != 124))
cmp -n $((7 << 20)) "$device" "$TEST_DIR/data" || die "good clusters cannot be read any more"
detach "$device"
