#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Power cuts as in power_cut.sh, over a base full of data: every acknowledged
# write is there, and around the writes is what the base has, never zeros: the
# copy was durable before its cluster was found in the top.
# timeout: 240
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/power-cut-lib"

# shellcheck disable=SC2034 # for power-cut-lib
size=48M

# The base: random bytes, but zeros where the load will write.
make_base() {
    local device
    ploopctl create -s "$size" -b 64K "$SCRATCH/base.img" >/dev/null
    device=$(attach "$SCRATCH/base.img")
    head -c "$size" /dev/urandom | dd of="$device" bs=64k iflag=fullblock conv=fsync status=none
    blank "$device"
    dd if="$device" of="$TEST_DIR/model" bs=1M status=none
    detach "$device"
}

# blank FILE: zeros at all places of the load.
blank() { plooptest seqwrite "$1" --prefill --count 0 --ack /dev/null --blocks "$blocks" >/dev/null; }

# Without the load's writes the disk is the base.
judge_rest() {
    # The caller does not end at an error.
    dd if="$1" of="$TEST_DIR/copy" bs=1M status=none || die 'cannot read the disk found'
    blank "$TEST_DIR/copy" || die 'cannot blank its copy'
    expect_same_bytes "$TEST_DIR/copy" "$TEST_DIR/model"
}

cuts=$(share 6 100)
record flush "$cuts"
for ((cut = 1; cut <= cuts; cut++)); do
    keeps "$cut" || die "cut $cut lost acknowledged writes"
done
