#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The write tracker: the top's image is copied while it is written, and when the writing
# has ended and nothing is left to copy, the copy holds what the disk holds. What must not
# happen meanwhile is refused; who goes away leaves nothing behind.
# timeout: 450
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
seed=${SEED:-$RANDOM}
note "seed $seed"
RANDOM=$seed
stop=$TEST_DIR/stop

maintenance() { cat "/sys/block/${device##*/}/pstate/maintenance"; }

# load: in the background until $stop is there.
load() {
    rm -f "$TEST_DIR/model"
    seed=$((seed + 1))
    begin_load --seed "$seed" --discard --seconds 120 --save "$TEST_DIR/model" "$device"
    sleep "0.$((RANDOM % 90 + 10))"
}

# round N IMAGE ATTACH...: a copy under load, compared.
round() {
    local image=$1 copy=$SCRATCH/copy.img at
    shift
    blkdiscard -f -z "$device"
    load
    timeout "$(limit 100)" plooptest track-copy --rounds $((RANDOM % 4)) \
        --quiesce "touch $stop; while [ ! -s $TEST_DIR/model ]; do sleep 0.1; done" \
        "$device" "$image" "$copy" >&2 || die 'the copy failed'
    wait "$load" || die 'the load found something wrong'
    expect_same "$(maintenance)" off maintenance
    at=$(attach "${@:2}" ${1:+"$1"} "$copy")
    expect_same_bytes "$at" "$device"
    detach "$at"
    rm "$copy"
}

note 'one image'
ploopctl create -s 12M -b 64K "$SCRATCH/0.img" >/dev/null
device=$(attach "$SCRATCH/0.img")
for ((run = $(share 3 25); run > 0; run--)); do round "$SCRATCH/0.img" ''; done

note 'what is refused meanwhile, and how it ends'
ploopctl create -s 12M -b 64K "$SCRATCH/1.img" >/dev/null
plooptest checkpoint list "$device"
tracker() { plooptest track-copy --quiesce "$1" "$device" "$SCRATCH/0.img" "$SCRATCH/copy.img"; }
expect_fail tracker "cat /sys/block/${device##*/}/pstate/maintenance >$TEST_DIR/what;
    plooptest snapshot --cluster-log 7 $device $SCRATCH/1.img && exit 0;
    plooptest op $device compact && exit 0;
    plooptest op $device grow 65536 && exit 0;
    exit 3"
expect_same "$(<"$TEST_DIR/what")" track maintenance
# Nobody has it open any more.
udevadm settle -t 10 || true
retry 10 eval '[[ $(maintenance) == off ]]' || die 'the tracker is left'
rm "$SCRATCH/copy.img"
detach "$device"

note 'the top of a chain'
device=$(attach "$SCRATCH/0.img" "$SCRATCH/1.img")
for ((run = $(share 2 25); run > 0; run--)); do round "$SCRATCH/1.img" "$SCRATCH/0.img"; done
detach "$device"
for image in "$SCRATCH"/[01].img; do ploopctl check "$image" >&2; done
