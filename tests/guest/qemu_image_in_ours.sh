#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# An image that QEMU made and wrote is the same disk here; written by us, QEMU
# finds it clean and reads the same bytes.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/qemu.hds
for size in 64K 1M; do
    rm -f "$image"
    qemu-img create -q -f parallels -o cluster_size=$size "$image" 64M
    qemu-io -f parallels -c 'write -P 0x11 0 64k' -c 'write -P 0x22 5M 192k' \
        -c 'write -P 0x33 63M 1M' "$image" >/dev/null
    qemu-img convert -f parallels -O raw "$image" "$TEST_DIR/before.raw"
    device=$(attach "$image")
    expect_same_bytes "$device" "$TEST_DIR/before.raw"
    head -c 3M /dev/urandom | dd of="$device" bs=64k seek=100 conv=fsync iflag=fullblock status=none
    # Over what QEMU wrote, in part.
    head -c 8k /dev/urandom | dd of="$device" bs=4k seek=1290 conv=fsync status=none
    dd if="$device" of="$TEST_DIR/after.raw" bs=1M status=none
    detach "$device"
    cp "$image" "$TEST_DIR/copy.hds"
    qemu-img check -f parallels "$TEST_DIR/copy.hds" >&2 || die "qemu-img check of a $size image"
    qemu-img compare -f parallels -F raw "$TEST_DIR/copy.hds" "$TEST_DIR/after.raw" >&2
done
