#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The file system below the image is full: writes that need space fail, while
# reads and overwrites go on; with space again all is well, and nothing is lost.
. "$(dirname "$0")/lib.sh"

scratch_fs tmpfs 0 size=8M
image=$SCRATCH/disk.img
ploopctl create -s 32M -b 64K "$image" >/dev/null
device=$(attach "$image")
head -c 1M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=64k oflag=direct conv=fsync status=none
expect_fail timeout 60 dd if=/dev/zero of="$device" bs=64k seek=16 oflag=direct status=none
cmp -n 1048576 "$device" "$TEST_DIR/data" || die "reads wrong while the host is full"
head -c 1M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=64k oflag=direct conv=fsync,notrunc status=none ||
    die "an overwrite failed while the host is full"
mount -o remount,size=64M "$SCRATCH"
retry 20 dd if="$TEST_DIR/data" of="$device" bs=64k seek=400 oflag=direct conv=fsync,notrunc status=none ||
    die "no space after there is space"
detach "$device"
ploopctl check "$image" >&2
device=$(attach "$image")
cmp -n 1048576 "$device" "$TEST_DIR/data" || die "the first data is lost"
cmp -n 1048576 -i $((400 * 65536)):0 "$device" "$TEST_DIR/data" || die "the last data is lost"
detach "$device"
