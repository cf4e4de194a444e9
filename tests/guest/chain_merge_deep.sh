#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A chain of 64 deltas (soak: 255), each made by a snapshot of the running disk and
# written to. The disk is right all the time, so it is when all are merged down to
# one, the middle and the top by turns, and when that one is attached.
# timeout: 300
. "$(dirname "$0")/lib.sh"

scratch_fs xfs
levels=$(share 64 255)
# Clusters of 32K, three for each level.
c=32768 size=$(((levels + 1) * 3))
truncate -s $((size * c)) "$TEST_DIR/model"
head -c 16M /dev/urandom >"$TEST_DIR/random"

new() { ploopctl create -s $((size * c)) -b 32K "$SCRATCH/$1.img" >/dev/null; }

# put N: some bytes in a cluster of its own, in one that the level below wrote, and
# in one that all write.
put() {
    local at
    for at in $(($1 * 3 * c + 4096)) $((($1 - 1) * 3 * c + 8192)) $(((size - 1) * c + $1 % 8 * 4096)); do
        ((at > 0)) || continue
        dd if="$TEST_DIR/random" bs=4k count=1 skip=$(((at / 4096 + $1) % 4096)) seek=$((at / 4096)) conv=notrunc of="$TEST_DIR/model" status=none
        dd if="$TEST_DIR/random" bs=4k count=1 skip=$(((at / 4096 + $1) % 4096)) seek=$((at / 4096)) conv=notrunc oflag=direct of="$device" status=none
    done
}

same() { dd if="$device" iflag=direct bs=1M status=none | cmp - "$TEST_DIR/model" >&2 || die "$1: the disk is wrong"; }

new 0
device=$(attach "$SCRATCH/0.img")
put 0
for ((n = 1; n < levels; n++)); do
    new "$n"
    timeout "$(limit 30)" plooptest snapshot --cluster-log 6 "$device" "$SCRATCH/$n.img" || die "snapshot $n failed"
    put "$n"
done
expect_same "$(nr_levels "$device")" "$levels" levels
same 'built'

note 'merging'
for ((n = levels - 1; n > 0; n--)); do
    case $((n % 4)) in
        0) level=top ;;
        1) level=1 ;;
        2) level=$((n / 2 + 1)) ;;
        3) level=$n ;;
    esac
    timeout "$(limit 60)" plooptest op "$device" merge "$level" || die "merge of $level of $n failed"
    ((n % 32 > 0)) || same "$n levels left"
    ((n % 50 > 0)) || put "$n"
done
expect_same "$(nr_levels "$device")" 1 levels
same 'merged'
detach "$device"
device=$(attach "$SCRATCH/0.img")
same 'attached again'
detach "$device"
ploopctl check "$SCRATCH/0.img" >&2
