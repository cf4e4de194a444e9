#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# An image file works on ext4, xfs, btrfs and tmpfs, and on a file system
# without direct I/O (ramfs): thin, synced, and the same after attach again.
# timeout: 240
. "$(dirname "$0")/lib.sh"

# Nothing that compression or a search for zeros makes smaller.
head -c 16M /dev/urandom >"$TEST_DIR/data"

use() {
    local kind=$1 image=$SCRATCH/disk.img device
    note "$kind"
    ploopctl create -s 256M -b 64K "$image" >/dev/null
    device=$(attach "$image")
    dd if="$TEST_DIR/data" of="$device" bs=256K seek=100 oflag=direct conv=fsync status=none
    dd if="$TEST_DIR/data" of="$device" bs=4k count=1 seek=40000 conv=fsync status=none
    drop_caches
    cmp <(dd if="$device" bs=256K skip=100 count=64 status=none) "$TEST_DIR/data" ||
        die "$kind: reads back wrong"
    detach "$device"
    (($(stat -c %s "$image") <= 20 << 20)) || die "$kind: the image is not thin"
    ploopctl check "$image" >&2
    device=$(attach "$image")
    cmp <(dd if="$device" bs=256K skip=100 count=64 status=none) "$TEST_DIR/data" ||
        die "$kind: wrong after attach again"
    cmp -n 4096 -i 163840000:0 "$device" "$TEST_DIR/data" || die "$kind: the small write is lost"
    detach "$device"
}

for kind in ext4 xfs btrfs tmpfs; do
    scratch_fs "$kind"
    use "$kind"
    umount "$SCRATCH"
done
mkdir -p "$SCRATCH"
mount -t ramfs ramfs "$SCRATCH"
use ramfs
umount "$SCRATCH"
