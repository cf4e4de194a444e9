#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Checkpoints tell what was written to the disk since they started: all that differs, and
# nothing that was not written; several at once, at different times, one that a snapshot
# starts. They go on while the disk grows, deltas are merged and clusters discarded.
# timeout: 400
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
g=65536
ploopctl create -s 64M -b 256K "$SCRATCH/0.img" >/dev/null
device=$(attach "$SCRATCH/0.img")
extents() { plooptest checkpoint read "$device" "$1"; }

# put GRANULE BYTES: other data there.
put() { head -c "$2" /dev/urandom | dd of="$device" bs="$2" seek=$(($1 * g)) oflag=seek_bytes,direct iflag=fullblock conv=notrunc status=none; }

expect_fail plooptest checkpoint read "$device" 1
expect_fail plooptest checkpoint drop "$device" 1
expect_fail plooptest checkpoint start --granularity 5000 "$device" 1
expect_fail plooptest checkpoint start --granularity 2048 "$device" 1
expect_fail plooptest checkpoint start "$device" 0
plooptest checkpoint start "$device" 1
expect_fail plooptest checkpoint start "$device" 1
expect_same "$(extents 1)" '' extents
put 3 4096
put 5 131072
expect_same "$(extents 1)" "$((3 * g)) $g
$((5 * g)) $((2 * g))" extents
plooptest checkpoint start --granularity 4096 "$device" 2
put 3 512
expect_same "$(extents 2)" "$((3 * g)) 4096" extents
blkdiscard -o $((8 << 20)) -l $((1 << 20)) "$device"
expect_same "$(extents 2)" "$((3 * g)) 4096" 'extents after a discard of nothing'
put 160 1048576
blkdiscard -o $((10 << 20)) -l $((1 << 20)) "$device"
expect_same "$(extents 2)" "$((3 * g)) 4096
$((10 << 20)) $((1 << 20))" 'extents after a discard'

note 'one that a snapshot starts'
plooptest checkpoint arm "$device" 3
expect_fail plooptest checkpoint read "$device" 3
put 20 4096
ploopctl create -s 64M -b 256K "$SCRATCH/1.img" >/dev/null
plooptest snapshot --cluster-log 9 "$device" "$SCRATCH/1.img"
expect_same "$(extents 3)" '' 'extents at the snapshot'
put 21 4096
expect_same "$(extents 3)" "$((21 * g)) $g" extents
plooptest op "$device" merge top
expect_same "$(extents 3)" "$((21 * g)) $g" 'extents after a merge'
plooptest checkpoint list "$device" >&2
expect_same "$(points)" 3 checkpoints

note 'a larger disk'
plooptest op "$device" grow $((100 << 11))
expect_same "$(extents 3)" "$((21 * g)) $g" 'extents after growth'
put 1500 65536
expect_same "$(extents 3)" "$((21 * g)) $g
$((1500 * g)) $g" extents

note 'nothing is missed under load'
plooptest checkpoint drop "$device" 1
plooptest checkpoint drop "$device" 2
expect_same "$(points)" 1 checkpoints
blkdiscard -f -z "$device"
from=()
for ((round = 1; round <= $(share 2 20); round++)); do
    begin_load --seed $((round + RANDOM)) --discard --seconds 60 "${from[@]}" --save "$TEST_DIR/model" "$device"
    sleep 0.5
    ploopctl create -s 100M -b 256K "$SCRATCH/s.img" >/dev/null
    plooptest checkpoint arm "$device" $((10 + round))
    plooptest snapshot --cluster-log 9 "$device" "$SCRATCH/s.img"
    cp --sparse=always "$SCRATCH/0.img" "$TEST_DIR/then.img"
    sleep 0.7
    touch "$TEST_DIR/stop"
    wait "$load" || die 'the load found something wrong'
    from=(--from "$TEST_DIR/model")
    # What it tells, taken from the disk as it is now, makes that of what was then.
    at=$(attach "$TEST_DIR/then.img")
    extents $((10 + round)) >"$TEST_DIR/extents"
    copy_extents "$device" "$at" <"$TEST_DIR/extents"
    note "$(wc -l <"$TEST_DIR/extents") extents"
    expect_same_bytes "$at" "$device"
    detach "$at"
    plooptest checkpoint drop "$device" $((10 + round))
    plooptest op "$device" merge top
    rm "$SCRATCH/s.img"
done
detach "$device"
ploopctl check "$SCRATCH/0.img" >&2

note 'more memory than may be had'
truncate -s 8T "$SCRATCH/large"
device=$(attach -f raw "$SCRATCH/large")
# 256 MiB of bits; the limit is a sixteenth of the memory.
expect_fail plooptest checkpoint start --granularity 4096 "$device" 1
plooptest checkpoint start "$device" 1
plooptest checkpoint drop "$device" 1
detach "$device"
rm "$SCRATCH/large"
