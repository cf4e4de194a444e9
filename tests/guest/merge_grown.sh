#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A delta that was grown past what the index of the one below has room for is merged
# into it: what stands in the way there is moved first, under reads of it, and every
# byte stays. The same for a middle pair, and with a raw base.
# timeout: 240
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
# 8176 clusters of 32K are what one cluster of index has room for.
small=$((8000 * 32)) large=$((8400 * 32))


same() {
    drop_caches
    expect_same_bytes "$device" "$TEST_DIR/model"
}

# put CLUSTERS SEEK: random bytes to disk and model.
put() {
    head -c $(($1 * 32768)) /dev/urandom >"$TEST_DIR/piece"
    dd if="$TEST_DIR/piece" of="$device" bs=32k seek="$2" oflag=direct conv=notrunc status=none
    dd if="$TEST_DIR/piece" of="$TEST_DIR/model" bs=32k seek="$2" conv=notrunc status=none
}

snapshot() {
    ploopctl create -s "$2K" -b 32K "$SCRATCH/$1.img" >/dev/null
    plooptest snapshot --cluster-log 6 "$device" "$SCRATCH/$1.img"
}

# try ploop1|raw
try() {
    note "base $1"
    rm -f "$SCRATCH"/*.img "$TEST_DIR/model"
    truncate -s "${small}K" "$TEST_DIR/model"
    if [[ $1 == raw ]]; then
        truncate -s "${small}K" "$SCRATCH/0.img"
        device=$(attach -f raw -b 32K "$SCRATCH/0.img")
    else
        ploopctl create -s "${small}K" -b 32K "$SCRATCH/0.img" >/dev/null
        device=$(attach "$SCRATCH/0.img")
    fi
    # In the first slots, so that they are in the way.
    put 3 0
    put 2 7990
    snapshot 1 "$small"
    put 2 1
    plooptest op "$device" grow $((large * 2))
    truncate -s "${large}K" "$TEST_DIR/model"
    put 3 8300
    same
    snapshot 2 "$large"
    put 1 0
    put 2 8301
    # The middle pair, while somebody reads what is moved.
    (while :; do dd if="$device" of=/dev/null bs=32k count=4 iflag=direct status=none || exit 1; done) &
    reader=$!
    plooptest op "$device" merge 1
    same
    plooptest op "$device" merge top
    kill "$reader" && wait "$reader" 2>/dev/null || true
    same
    detach "$device"
    if [[ $1 == raw ]]; then
        expect_same_bytes "$SCRATCH/0.img" "$TEST_DIR/model"
    else
        ploopctl check "$SCRATCH/0.img" >&2
        device=$(attach "$SCRATCH/0.img")
        same
        detach "$device"
    fi
}

try ploop1
try raw

note 'an uneven delta over a raw base, whose length says where the disk ends'
truncate -s 640K "$SCRATCH/raw"
ploopctl create -s 672K -b 64K "$SCRATCH/uneven.img" >/dev/null
device=$(attach -f raw -b 64K "$SCRATCH/raw" "$SCRATCH/uneven.img")
head -c 32K /dev/urandom >"$TEST_DIR/piece"
dd if="$TEST_DIR/piece" of="$device" bs=32k seek=20 oflag=direct conv=notrunc,fsync status=none
if plooptest op "$device" merge top >"$TEST_DIR/why" 2>&1; then die 'it was merged'; fi
grep -qE 'errno 22$|os error 22\)' "$TEST_DIR/why" || die "merge: $(<"$TEST_DIR/why")"
expect_same "$(stat -c %s "$SCRATCH/raw")" 655360 'length of the raw base'
cmp -i 655360:0 "$device" "$TEST_DIR/piece" >&2 || die 'the end of the disk is lost'
detach "$device"
