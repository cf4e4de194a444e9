#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# An image that we made and wrote: QEMU finds it clean, reads the same bytes and
# can write on; attached again, we read what QEMU wrote.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
for options in '-b 64K' '-b 1M --preallocate' '--format-version 1 -b 1M'; do
    rm -f "$image"
    # shellcheck disable=SC2086 # words
    ploopctl create -s 64M $options "$image" >/dev/null
    device=$(attach "$image")
    for at in 0 77 4000 16000; do
        head -c 300k /dev/urandom | dd of="$device" bs=4k seek=$at conv=fsync status=none
    done
    dd if="$device" of="$TEST_DIR/ours.raw" bs=1M status=none
    detach "$device"
    cp --sparse=always "$image" "$TEST_DIR/copy.hds"
    qemu-img check -f parallels "$TEST_DIR/copy.hds" >&2 || die "qemu-img check ($options)"
    qemu-img compare -f parallels -F raw "$TEST_DIR/copy.hds" "$TEST_DIR/ours.raw" >&2
    qemu-io -f parallels -c 'write -P 0x44 30M 100k' "$TEST_DIR/copy.hds" >/dev/null
    qemu-io -f raw -c 'write -P 0x44 30M 100k' "$TEST_DIR/ours.raw" >/dev/null
    device=$(attach "$TEST_DIR/copy.hds")
    expect_same_bytes "$device" "$TEST_DIR/ours.raw"
    detach "$device"
    rm -f "$TEST_DIR/copy.hds"
done
