#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The file system below fills up in the middle of a merge, of growth, of compaction or
# at a snapshot: the operation ends with ENOSPC, also while writes are parked; what it
# did is undone or kept, the device goes on, the parked writes end well when there is
# space again, and the operation can then be run to its end.
# timeout: 450
. "$(dirname "$0")/lib.sh"

seed=${SEED:-$RANDOM}
note "seed $seed"
# The destination of a merge, or the growing image, is where space is short.
scratch_fs tmpfs 1 size=24M
small=$SCRATCH-1
mkdir -p "$SCRATCH"
mount -t tmpfs -o size=256M tmpfs "$SCRATCH"

full() { dd if=/dev/zero of="$small/filler" bs=4k status=none 2>/dev/null || true; }

# put MIB: one MiB of other data, to the disk and the model.
put() {
    dd if=/dev/urandom of="$TEST_DIR/part" bs=1M count=1 status=none
    dd if="$TEST_DIR/part" of="$TEST_DIR/model" bs=1M seek="$1" conv=notrunc status=none
    timeout "$(limit "${2:-20}")" dd if="$TEST_DIR/part" of="$device" bs=1M seek="$1" \
        oflag=direct conv=notrunc status=none
}

same() {
    drop_caches
    timeout "$(limit 60)" dd if="$device" iflag=direct bs=1M count=64 status=none |
        cmp -n $((64 << 20)) - "$TEST_DIR/model" >&2 || die "$1: the disk is wrong"
}

no_space() {
    if timeout "$(limit 60)" "$@" >"$TEST_DIR/why" 2>&1; then die "succeeded without space: $*"; fi
    grep -qE 'errno 28$|os error 28\)' "$TEST_DIR/why" || die "$*: $(<"$TEST_DIR/why")"
    expect_same "$(cat "/sys/block/${device##*/}/pstate/aborted")" 0 aborted
}

# build: 8 MiB in the base, 12 in the top, over another.
build() {
    local i
    rm -f "$small"/* "$SCRATCH"/* "$TEST_DIR/model"
    truncate -s 64M "$TEST_DIR/model"
    ploopctl create -s 64M -b 64K "$small/0.img" >/dev/null
    device=$(attach "$small/0.img")
    for i in {0..7}; do put "$i"; done
    ploopctl create -s 64M -b 64K "$SCRATCH/1.img" >/dev/null
    plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/1.img"
    for i in {4..15}; do put "$i"; done
    plooptest sync "$device"
    full
}

end() {
    detach "$device"
    for i in "$@"; do ploopctl check "$i" >&2 || die "$i is damaged"; done
    device=$(attach "$@")
    same 'attached again'
    detach "$device"
}

note 'merge of the top'
build
no_space plooptest op "$device" merge top
expect_same "$(nr_levels "$device")" 2 levels
same 'merge without space'
# The top has space.
put 30
same 'written after it'
rm "$small/filler"
timeout "$(limit 60)" plooptest op "$device" merge top || die 'the merge fails with space'
end "$small/0.img"

note 'the same, and writes are parked in the destination'
build
# Slow, so that the writes come while it runs.
plooptest op --start --rate 500000 "$device" merge top
sleep 0.5
writers=()
for i in 32 40 48 56; do
    dd if=/dev/urandom of="$TEST_DIR/random$i" bs=1M count=1 status=none
    for ((at = i; at < i + 5; at++)); do
        dd if="$TEST_DIR/random$i" of="$TEST_DIR/model" bs=1M seek=$at conv=notrunc status=none
    done
    (for ((at = i; at < i + 5; at++)); do
        timeout "$(limit 100)" dd if="$TEST_DIR/random$i" of="$device" bs=1M seek=$at count=1 \
            oflag=direct conv=notrunc status=none || exit 1
    done) &
    writers+=($!)
done
sleep 2
plooptest op-rate "$device" 0
# The deltas can be put in order only when no write is on its way.
timeout "$(limit 5)" plooptest op-wait "$device" >"$TEST_DIR/why" 2>&1 && die 'the merge succeeded without space'
timeout "$(limit 10)" cmp -n $((12 << 20)) "$device" "$TEST_DIR/model" >&2 || die 'reads are wrong without space'
rm "$small/filler"
mount -o remount,size=128M "$small"
timeout "$(limit 60)" plooptest op-wait "$device" >"$TEST_DIR/why" 2>&1 || true
note "$(<"$TEST_DIR/why"), $(nr_levels "$device") levels"
for i in "${writers[@]}"; do wait "$i" || die 'a parked write failed'; done
same 'parked writes'
(($(nr_levels "$device") == 1)) || timeout "$(limit 60)" plooptest op "$device" merge top ||
    die 'the merge fails with space'
expect_same "$(nr_levels "$device")" 1 levels
end "$small/0.img"
rm "$small"/*
mount -o remount,size=24M "$small"

note 'merge in the middle'
build
ploopctl create -s 64M -b 64K "$SCRATCH/2.img" >/dev/null
plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/2.img"
put 20
no_space plooptest op "$device" merge 1
expect_same "$(nr_levels "$device")" 3 levels
put 21
same 'merge without space'
rm "$small/filler"
timeout "$(limit 60)" plooptest op "$device" merge 1 || die 'the merge fails with space'
end "$small/0.img" "$SCRATCH/2.img"

note 'a snapshot, and writes that are parked'
build
end "$small/0.img" "$SCRATCH/1.img"
rm "$small/filler"
ploopctl create -s 64M -b 64K "$small/2.img" >/dev/null
ploopctl create -s 64M -b 64K "$SCRATCH/3.img" >/dev/null
device=$(attach "$small/0.img" "$SCRATCH/1.img" "$small/2.img")
full
dd if=/dev/urandom of="$TEST_DIR/part2" bs=1M count=16 status=none
dd if="$TEST_DIR/part2" of="$TEST_DIR/model" bs=1M seek=40 conv=notrunc status=none
timeout "$(limit 100)" dd if="$TEST_DIR/part2" of="$device" bs=1M seek=40 oflag=direct conv=notrunc status=none &
writer=$!
retry 20 space_is full || die 'nothing is parked'
no_space plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/3.img"
expect_same "$(nr_levels "$device")" 3 levels
no_space plooptest op "$device" grow $((65 << 11))
timeout "$(limit 60)" plooptest op "$device" compact && note 'compaction succeeded while writes are parked'
kill -0 "$writer" || die 'the write did not wait'
rm "$small/filler"
mount -o remount,size=128M "$small"
wait "$writer" || die 'the parked write failed'
timeout "$(limit 30)" plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/3.img" || die 'no snapshot with space'
end "$small/0.img" "$SCRATCH/1.img" "$small/2.img" "$SCRATCH/3.img"

note 'growth: a larger index has no space'
rm -f "$small"/* "$SCRATCH"/*
mount -o remount,size=24M "$small"
ploopctl create -s 200M -b 32K "$small/g.img" >/dev/null
device=$(attach "$small/g.img")
rm "$TEST_DIR/model"
truncate -s 64M "$TEST_DIR/model"
for i in 0 1 2; do put "$i"; done
detach "$device"
full
device=$(attach "$small/g.img")
no_space plooptest op "$device" grow $((900 << 11))
same 'growth without space'
expect_same "$(blockdev --getsz "$device")" $((200 << 11)) size
rm "$small/filler"
timeout "$(limit 60)" plooptest op "$device" grow $((900 << 11)) || die 'growth fails with space'
same grown
put 9
end "$small/g.img"

note 'growth of an empty image, and more than there is space for'
rm -f "$small"/*
ploopctl create -s 200M -b 32K "$small/0.img" >/dev/null
device=$(attach "$small/0.img")
# A second cluster of entries.
timeout "$(limit 60)" plooptest op "$device" grow $((300 << 11))
full
no_space plooptest op "$device" grow $((200 << 21))
rm "$small/filler"
# Clusters at both ends of the table, none of them where it is.
for at in 0 290; do
    dd if=/dev/urandom of="$TEST_DIR/part.$at" bs=1M count=1 status=none
    dd if="$TEST_DIR/part.$at" of="$device" bs=1M seek=$at oflag=direct conv=notrunc,fsync status=none
done
detach "$device"
ploopctl check "$small/0.img" >&2 || die 'the image is damaged'
device=$(attach "$small/0.img")
for at in 0 290; do cmp -n 1048576 -i $((at << 20)):0 "$device" "$TEST_DIR/part.$at" >&2 || die "MiB $at is lost"; done
detach "$device"

note 'a raw disk, whose growth waits for nobody: the file is as long as before'
rm -f "$small"/*
truncate -s 40M "$small/raw"
device=$(attach -f raw -b 64K "$small/raw")
full
dd if=/dev/urandom of="$device" bs=1M count=4 oflag=direct conv=notrunc status=none &
writer=$!
retry 20 space_is full || die 'nothing is parked'
no_space plooptest op "$device" grow $((64 << 11))
expect_same "$(stat -c %s "$small/raw")" $((40 << 20)) 'length after growth that failed'
rm "$small/filler"
wait "$writer" || die 'the parked write failed'
timeout "$(limit 60)" plooptest op "$device" grow $((64 << 11)) || die 'growth fails with space'
expect_same "$(stat -c %s "$small/raw")" $((64 << 20)) length
detach "$device"

umount "$small" "$SCRATCH"
