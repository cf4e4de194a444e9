#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# What a snapshot does while it holds the queue: the images are neither synced nor written then, however
# much of the index is dirty and whatever is being written. What has to be made durable is so before or after.
. "$(dirname "$0")/lib.sh"

trace_fs
scratch_fs ext4
host=$(findmnt -no SOURCE "$SCRATCH")
host=$(lsblk -dno MAJ:MIN "$host" | tr -d ' ' | tr : ,)
# 200 pages of index.
ploopctl create -s 12G -b 64K "$SCRATCH/0.img" >/dev/null
device=$(attach "$SCRATCH/0.img")
events=(ploop/ploop_hold ext4/ext4_sync_file_enter block/block_bio_queue)
for event in "${events[@]}"; do echo 1 >"$trace/events/$event/enable"; done
size=$(grep -oE '[0-9]+' "$trace/buffer_size_kb" | tail -n 1)
echo 20000 >"$trace/buffer_size_kb"
echo 0 >"$trace/tracing_on"

for ((round = 1; round <= 3; round++)); do
    ploopctl create -s 12G -b 64K "$SCRATCH/$round.img" >/dev/null
    # First writes all over the disk, none of which is flushed.
    fio --name=load --filename="$device" --direct=1 --ioengine=io_uring --rw=randwrite --bs=4k --iodepth=8 \
        --time_based --runtime=30 --randseed="$round" --minimal >/dev/null &
    load=$!
    sleep 2
    : >"$trace/trace"
    echo 1 >"$trace/tracing_on"
    plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/$round.img"
    echo 0 >"$trace/tracing_on"
    kill "$load"
    wait "$load" || true
    # TASK-PID [CPU] FLAGS TIME: EVENT: ...; tasks may have spaces in their names.
    sed -nE 's/^ *(.*)-[0-9]+ +\[[0-9]+\] \S+ +([0-9.]+): (\S+): (.*)/\3\t\1\t\4/p' "$trace/trace" >"$TEST_DIR/events"
    ! grep -q 'LOST' "$trace/trace" || die 'events were lost'
    awk -F '\t' -v host="$host" '
        $1 == "ploop_hold" { held = ($3 ~ /: 1$/); holds += held }
        $1 == "ext4_sync_file_enter" { syncs++; held_syncs += held }
        $1 == "block_bio_queue" && index($3, host " W") == 1 { writes++; if (held && $2 ~ /^plooptest/) held_writes++ }
        END { print holds + 0, syncs + 0, held_syncs + 0, writes + 0, held_writes + 0 }' "$TEST_DIR/events" >"$TEST_DIR/counts"
    read -r holds syncs held_syncs writes held_writes <"$TEST_DIR/counts"
    note "held $holds times; $syncs syncs, $held_syncs of them meanwhile; $writes writes to the file system, $held_writes of the snapshot's meanwhile"
    ((holds >= 1)) || die 'the queue was not held'
    ((syncs >= 2 && writes >= 10)) || die 'there was nothing to be done'
    ((held_syncs == 0)) || die 'a sync while the queue was held'
    ((held_writes <= 1)) || die 'pages of the index were written while the queue was held'
done
for event in "${events[@]}"; do echo 0 >"$trace/events/$event/enable"; done
echo "$size" >"$trace/buffer_size_kb"
echo 1 >"$trace/tracing_on"
detach "$device"
ploopctl check "$SCRATCH/0.img" >&2
