#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# ext4 and xfs on the disk: files written with fsync and without are right, also
# after detach and attach, and the file system's own check finds nothing.
# timeout: 240
. "$(dirname "$0")/lib.sh"

scratch_fs xfs
mkdir -p "$TEST_DIR/mnt"

# Blocks written in random order, some made durable on the way.
load() {
    fio --name=load --filename="$TEST_DIR/mnt/file" --size=6M --ioengine="$2" --rw=randwrite \
        --bs=4k --randseed=11 --fsync=100 --verify=crc32c --verify_fatal=1 --"$1" --minimal >/dev/null
}

try() {
    local fs=$1 engine=$2 image=$SCRATCH/$1.img device
    note "$fs"
    ploopctl create -s 400M "$image" >/dev/null
    device=$(attach "$image")
    "mkfs.$fs" -q "$device"
    mount "$device" "$TEST_DIR/mnt"
    load do_verify=1 "$engine"
    cp -r /usr/lib/udev "$TEST_DIR/mnt/tree"
    (cd "$TEST_DIR/mnt" && find tree -type f -exec sha256sum {} +) >"$TEST_DIR/sums"
    umount "$TEST_DIR/mnt"
    detach "$device"
    device=$(attach "$image")
    if [[ $fs == ext4 ]]; then e2fsck -fn "$device" >&2; else xfs_repair -n "$device" >&2; fi
    mount "$device" "$TEST_DIR/mnt"
    load verify_only "$engine"
    (cd "$TEST_DIR/mnt" && sha256sum --quiet -c "$TEST_DIR/sums") || die "$fs: files changed"
    umount "$TEST_DIR/mnt"
    detach "$device"
    ploopctl check "$image" >&2
}

try ext4 psync
try xfs io_uring
