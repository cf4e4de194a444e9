#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# For a minute several images are attached, written, opened, closed and detached
# at once, while others look on; at the end all are sound and nothing is left.
# timeout: 400
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
# One device that stays, so that the module is in use all the time.
ploopctl create -s 64M "$SCRATCH/still.img" >/dev/null
still=$(attach "$SCRATCH/still.img")
end=$((SECONDS + 60))

worker() {
    local image=$SCRATCH/$1.img device rounds=0
    ploopctl create -s 64M -b "$2" "$image" >/dev/null
    while ((SECONDS < end)); do
        device=$(attach "$image")
        head -c 256k /dev/urandom >"$TEST_DIR/$1"
        dd if="$TEST_DIR/$1" of="$device" bs=64k seek=$((RANDOM % 1000)) conv=notrunc status=none &
        dd if="$device" of=/dev/null bs=256k count=20 iflag=direct status=none
        wait $!
        dd if="$TEST_DIR/$1" of="$device" bs=64k seek=$((rounds % 1000)) conv=fsync,notrunc status=none
        cmp -n 262144 -i $((rounds % 1000 * 65536)):0 "$device" "$TEST_DIR/$1" || die "$1 reads wrong"
        detach "$device"
        rounds=$((rounds + 1))
    done
    note "$1: $rounds rounds"
    ploopctl check "$image" >&2
}

# Opens whatever is there, and tries to do what must not be done.
visitor() {
    local node
    while ((SECONDS < end)); do
        for node in /dev/ploop[0-9]*; do
            dd if="$node" of=/dev/null bs=4k count=1 status=none 2>/dev/null || true
        done
        # A read of event waits for one.
        find /sys/block/ploop*/pstate/ /sys/block/ploop*/pdelta/ -type f ! -name event -exec cat {} + >/dev/null 2>&1 || true
        ploopctl list --json >/dev/null || true
        rmmod ploop 2>/dev/null && die "the module was unloaded under load"
        sleep 0.2
    done
}

worker one 64K &
pids=($!)
worker two 1M &
pids+=($!)
worker three 32K &
pids+=($!)
visitor &
pids+=($!)
for pid in "${pids[@]}"; do wait "$pid" || die "a worker failed"; done
detach "$still"
