#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# MAX_DELTA_SIZE limits the image that was the top then, also after STOP and START, and where its
# merge was undone; not the image that it is merged into.
. "$(dirname "$0")/lib.sh"

need perl
STOP=0x5002 START=0x5003 MAX_DELTA_SIZE=0x4008501C

must() { expect_same "$(call "$@")" 0 "errno of ioctl $1"; }

# fill FIRST [NR]: new clusters, more than what the file may have grown ahead by.
fill() { dd if=/dev/urandom of="$device" bs=64k seek="$1" count="${2:-200}" oflag=direct conv=notrunc status=none 2>"$TEST_DIR/said"; }

full() {
    expect_fail fill "$1"
    grep -q 'No space left' "$TEST_DIR/said" || die "$2: $(<"$TEST_DIR/said")"
}

scratch_fs ext4
for i in 0 1; do ploopctl create -s 128M -b 64K "$SCRATCH/$i.img" >/dev/null; done
device=$(attach "$SCRATCH"/[01].img)
# A part of a step by which the file grows.
fill 0 20
plooptest sync "$device"
sleep 1
head=$((1 + $(<"/sys/block/${device##*/}/pstate/allocated_clusters"))) len=$(($(stat -c %s "$SCRATCH/1.img") >> 16))
((head + 1 < len)) || die "the file has not grown ahead: $len clusters, $head in use"
max=$(((head + len) / 2))
must $MAX_DELTA_SIZE Q $((max * 128))
full 200 "limited to $max of the $len clusters that the file has"
used=$((1 + $(<"/sys/block/${device##*/}/pstate/allocated_clusters")))
((used <= max)) || die "$used clusters are in use, not $max at the most"
# Less than what it has.
must $MAX_DELTA_SIZE Q $((8 * 128))
full 100 'limited'
must $STOP
must $START
full 400 'after START'
plooptest op --rate $((64 << 10)) --start "$device" merge top
sleep 1
plooptest op-cancel "$device"
expect_same "$(nr_levels "$device")" 2 levels
full 700 'after a merge that was undone'
plooptest op "$device" merge top
fill 1000 || die "the base is limited: $(<"$TEST_DIR/said")"
must $STOP
must $START
fill 1300 || die "the base is limited after START: $(<"$TEST_DIR/said")"
detach "$device"
for i in 0 1; do ploopctl check "$SCRATCH/$i.img" >&2; done

note 'an index that would be longer than the image may be'
ploopctl create -s 900M -b 64K "$SCRATCH/2.img" >/dev/null
device=$(attach "$SCRATCH/2.img")
fill 0 1
must $MAX_DELTA_SIZE Q $((4 * 128))
if timeout "$(limit 60)" plooptest op "$device" grow $((40 << 21)) >"$TEST_DIR/said" 2>&1; then die 'it has grown'; fi
grep -qE 'errno 28$|os error 28\)' "$TEST_DIR/said" || die "growth: $(<"$TEST_DIR/said")"
# 40 clusters of entries.
(($(stat -c %s "$SCRATCH/2.img") < 40 << 16)) || die 'the file has grown all the same'
detach "$device"
ploopctl check "$SCRATCH/2.img" >&2
