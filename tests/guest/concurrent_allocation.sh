#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Several writers fill the same fresh clusters at the same time, each its own
# blocks: every cluster is allocated once and no block is lost, with FUA and
# flushes between and readers beside.
# timeout: 150
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
ploopctl create -s 256M -b 64K "$SCRATCH/disk.img" >/dev/null

# load DEVICE MODE: job j writes the blocks 4n + j of 4 KiB.
load() {
    local jobs=() j
    for j in 0 1 2 3; do
        jobs+=(--name="job$j" --offset=$((j * 4))k --size=24M --rw=write:12k --bs=4k
            --number_ios=800 --fsync=$((j == 1 ? 50 : 0)) --sync=$((j == 2)))
    done
    fio --filename="$1" --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c \
        --verify_fatal=1 --verify_backlog=100 --"$2" --minimal "${jobs[@]}" >/dev/null
}

device=$(attach "$SCRATCH/disk.img")
dd if="$device" of=/dev/null bs=1M iflag=direct status=none &
load "$device" do_verify=1
wait $!
detach "$device"
ploopctl check "$SCRATCH/disk.img" >&2
device=$(attach "$SCRATCH/disk.img")
load "$device" verify_only
detach "$device"
