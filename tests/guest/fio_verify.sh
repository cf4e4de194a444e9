#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# What is written to the bare disk is read back, now and after detach and
# attach, for both versions of ploop1, small and large clusters, and raw.
# QEMU's judge finds nothing wrong with the image.
# timeout: 240
. "$(dirname "$0")/lib.sh"

# xfs, where the copies for QEMU cost nothing.
scratch_fs xfs

# load DEVICE MODE [ENGINE]: MODE is do_verify=1 (write, then verify) or verify_only.
# Blocks of 12 KiB cross the borders of clusters.
load() {
    fio --name=load --filename="$1" --direct=1 --ioengine="${3:-libaio}" --iodepth=8 \
        --rw=randwrite --bs=12k --size=128M --io_size=12M --randseed=7 --fsync=50 \
        --verify=crc32c --verify_fatal=1 --"$2" --minimal >/dev/null
}

# try NAME ENGINE ATTACH_OPTIONS -- CREATE_OPTIONS
try() {
    local name=$1 engine=$2 image=$SCRATCH/$1.img options=() device
    shift 2
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    note "$name"
    ploopctl create -s 130M "$@" "$image" >/dev/null
    device=$(attach "${options[@]}" "$image")
    load "$device" do_verify=1 "$engine"
    detach "$device"
    device=$(attach "${options[@]}" "$image")
    load "$device" verify_only "$engine"
    detach "$device"
    if [[ $name != raw ]]; then
        ploopctl check "$image" >&2
        cp --reflink=auto "$image" "$image.copy"
        qemu-img check -f parallels "$image.copy" >&2 || die "qemu-img: $name is not clean"
    fi
    rm -f "$image" "$image.copy"
}

try v2_1M libaio --
try v1_64K psync -- --format-version 1 -b 64K
try v2_32K io_uring -- -b 32K
try v2_64M libaio -- -b 64M
try preallocated libaio -- --preallocate
try raw libaio -f raw -- -f raw
