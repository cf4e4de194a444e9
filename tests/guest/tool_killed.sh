#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# ploopctl killed at any point of attach or detach: the next detach or attach
# copes, nothing stays behind and the data is there.
# timeout: 180
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 64M "$image" >/dev/null
device=$(attach "$image")
head -c 1M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=1M conv=fsync status=none
detach "$device"

# killed MILLISECONDS ARGUMENTS...: ploopctl, killed after that time.
killed() {
    local after=$1 pid
    shift
    ploopctl "$@" >/dev/null 2>&1 &
    pid=$!
    sleep "0.$(printf %03d "$after")"
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

for ((i = 0; i < 12; i++)); do
    killed $((i * 12)) attach "$image"
    if ((i % 2 == 0)); then
        # Whatever is left: detach removes it, or says that there is nothing.
        retry 10 bash -c 'ploopctl detach "$1"; s=$?; ((s == 0 || s == 40))' _ "$image" || die "detach after a killed attach"
    fi
    # The next attach works, or says that the killed one had got through.
    status=0
    device=$(ploopctl attach "$image" 2>"$TEST_DIR/said") || status=$?
    if ((status == 37)); then
        device=$(ploopctl list --json | jq -r '.. | .device? // empty' | head -n 1)
    else
        expect_same "$status" 0 "attach after a killed attach: $(<"$TEST_DIR/said")"
    fi
    udevadm settle -t 10
    killed $((i * 10)) detach "$image"
    status=0
    retry 10 bash -c 'ploopctl detach "$1"; s=$?; ((s == 0 || s == 40))' _ "$image" || die "detach after a killed detach"
done
for left in /sys/block/ploop*; do
    [[ ! -e $left ]] || ploopctl detach "/dev/${left##*/}"
done
device=$(attach "$image")
cmp -n $((1 << 20)) "$device" "$TEST_DIR/data" || die "the data is gone"
detach "$device"
ploopctl check "$image" >&2
