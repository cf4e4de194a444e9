#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# What a snapshot does while it holds the queue: the images are neither synced nor written then, however
# much of the index is dirty and whatever is being written. What has to be made durable is so before or after.
# And where it has to wait for a request, others are let in meanwhile, which that request may wait for.
. "$(dirname "$0")/lib.sh"

trace_fs
scratch_fs ext4
host=$(findmnt -no SOURCE "$SCRATCH")
host=$(lsblk -dno MAJ:MIN "$host" | tr -d ' ' | tr : ,)
# 200 pages of index.
ploopctl create -s 12G -b 64K "$SCRATCH/0.img" >/dev/null
device=$(attach "$SCRATCH/0.img")
events=(ploop/ploop_hold ext4/ext4_sync_file_enter ext4/ext4_punch_hole block/block_bio_queue)
for event in "${events[@]}"; do echo 1 >"$trace/events/$event/enable"; done
size=$(grep -oE '[0-9]+' "$trace/buffer_size_kb" | tail -n 1)
echo 20000 >"$trace/buffer_size_kb"
echo 0 >"$trace/tracing_on"

# has_new NR: so many clusters of the top were written.
has_new() { (($(cat "/sys/block/${device##*/}/pstate/allocated_clusters") >= before + $1)); }

for ((round = 1; round <= 3; round++)); do
    # The last time with more writes on their way, and pages that each makes dirty, than one batch of a commit has.
    depth=8
    ((round < 3)) || depth=128
    ploopctl create -s 12G -b 64K "$SCRATCH/$round.img" >/dev/null
    # First writes all over the disk, none of which is flushed, until half of the index is to be written.
    before=$(cat "/sys/block/${device##*/}/pstate/allocated_clusters")
    fio --name=load --filename="$device" --direct=1 --ioengine=io_uring --rw=randwrite --bs=4k --iodepth=$depth \
        --time_based --runtime="$(limit 60)" --randseed="$round" --minimal >/dev/null &
    load=$!
    retry 25 has_new 200 || die 'the load does not get on'
    : >"$trace/trace"
    echo 1 >"$trace/tracing_on"
    plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/$round.img"
    echo 0 >"$trace/tracing_on"
    kill "$load" || die 'the snapshot waited for the end of the load'
    wait "$load" || true
    # TASK-PID [CPU] FLAGS TIME: EVENT: ...; tasks may have spaces in their names.
    sed -nE 's/^ *(.*)-[0-9]+ +\[[0-9]+\] \S+ +([0-9.]+): (\S+): (.*)/\3\t\1\t\4/p' "$trace/trace" >"$TEST_DIR/events"
    ! grep -q 'LOST' "$trace/trace" || die 'events were lost'
    awk -F '\t' -v host="$host" '
        # A commit that was under way before goes on beside it, on a worker that it does not wait for.
        $1 == "ploop_hold" { held = ($3 ~ /: 1$/); holds += held }
        $1 == "ext4_sync_file_enter" { syncs++; if (held && $2 ~ /^plooptest/) held_syncs++ }
        $1 == "ext4_punch_hole" { punches++ }
        $1 == "block_bio_queue" && index($3, host " W") == 1 { writes++; if (held && $2 ~ /^plooptest/) held_writes++ }
        END { print holds + 0, syncs + 0, held_syncs + 0, writes + 0, held_writes + 0, punches + 0 }' "$TEST_DIR/events" >"$TEST_DIR/counts"
    read -r holds syncs held_syncs writes held_writes punches <"$TEST_DIR/counts"
    note "held $holds times; $syncs syncs, $held_syncs of the snapshot's meanwhile; $writes writes to the file system, $held_writes of the snapshot's meanwhile"
    ((holds >= 1)) || die 'the queue was not held'
    ((syncs >= 2 && writes >= 10)) || die 'there was nothing to be done'
    ((held_syncs == 0)) || die 'a sync while the queue was held'
    # Nothing of an image in use that may hold data by then.
    ((punches == 0)) || die "$punches parts of images were punched"
    ((held_writes <= 1)) || die 'pages of the index were written while the queue was held'
done
for event in "${events[@]}"; do echo 0 >"$trace/events/$event/enable"; done
echo "$size" >"$trace/buffer_size_kb"
echo 1 >"$trace/tracing_on"
detach "$device"
ploopctl check "$SCRATCH/0.img" >&2
rm "$SCRATCH"/[0-9].img

note 'a base on a disk that does not answer'
below=$(scratch_disk 1)
dmsetup create slow --table "0 $(blockdev --getsz "$below") linear $below 0"
mkfs.ext4 -q -F -E lazy_itable_init=1,nodiscard /dev/mapper/slow
mkdir -p "$TEST_DIR/slow"
mount /dev/mapper/slow "$TEST_DIR/slow"

# give_up REASON: it could not be unmounted while its disk does not answer.
give_up() {
    dmsetup resume slow
    die "$@"
}

images=("$TEST_DIR/slow/base.img" "$SCRATCH/1.img" "$SCRATCH/2.img")
for image in "${images[@]}"; do ploopctl create -s 64M -b 64K "$image" >/dev/null; done
device=$(attach "${images[0]}")
dd if=/dev/urandom of="$device" bs=64k count=4 oflag=direct conv=fsync status=none
detach "$device"
device=$(attach "${images[@]:0:2}")
dd if=/dev/urandom of="$device" bs=64k count=4 seek=8 oflag=direct conv=fsync status=none
udevadm settle -t 10
dmsetup suspend --nolockfs --noflush slow
dd if="$device" of=/dev/null bs=64k count=1 iflag=direct status=none &
stuck=$!
retry 20 in_flight "$device" || give_up 'the read does not begin'
: >"$trace/trace"
echo 1 >"$trace/events/ploop/ploop_hold/enable"
plooptest snapshot --cluster-log 7 "$device" "${images[2]}" &
snapshot=$!
retry 20 grep -q 'ploop_hold: .*: 1$' "$trace/trace" || give_up 'the snapshot does not wait for the read'
for ((i = 0; i < 3; i++)); do
    dd if="$device" of=/dev/null bs=64k count=1 skip=$((8 + i)) iflag=direct status=none &
    waits=$!
    timeout "$(limit 30)" tail --pid "$waits" -f /dev/null || give_up "read $i waits for who waits for others"
done
in_flight "$device" && waits_in_ioctl "$snapshot" || give_up 'the snapshot had nothing to wait for'
dmsetup resume slow
wait "$stuck"
wait "$snapshot"
echo 0 >"$trace/events/ploop/ploop_hold/enable"
expect_same "$(nr_levels "$device")" 3 levels
detach "$device"
for image in "${images[@]}"; do ploopctl check "$image" >&2; done

note 'a write that does not end keeps a freeze waiting, and nobody else'
ploopctl create -s 64M -b 64K "$TEST_DIR/slow/fs.img" >/dev/null
device=$(attach "$TEST_DIR/slow/fs.img")
mkfs.ext4 -q -F "$device"
mkdir "$TEST_DIR/fs"
# What the disk is asked for is what is written here, and nothing of the file system's own.
mount -o noinit_itable "$device" "$TEST_DIR/fs"
head -c 1M /dev/urandom >"$TEST_DIR/fs/file"
exec 3<>"$TEST_DIR/fs/file"
drop_caches
udevadm settle -t 10
dmsetup suspend --nolockfs --noflush slow
# A part of a page, the rest of which is read first.
printf x | dd of="$TEST_DIR/fs/file" bs=1 seek=500000 conv=notrunc status=none &
stuck=$!
retry 20 in_flight "$device" || give_up 'the write does not begin'
(call 5020 >"$TEST_DIR/frozen") &
freezer=$!
retry 20 waits_in_ioctl "$freezer" || give_up 'the freeze does not wait for the write'
(call 5020 >"$TEST_DIR/again") &
other=$!
timeout "$(limit 30)" tail --pid "$other" -f /dev/null || give_up 'another call waits for the freeze'
in_flight "$device" && waits_in_ioctl "$freezer" || give_up 'the freeze had nothing to wait for'
dmsetup resume slow
wait "$stuck" "$freezer"
expect_same "$(<"$TEST_DIR/frozen")" 0 'errno of FREEZE'
expect_same "$(<"$TEST_DIR/again")" 16 'errno of another meanwhile'
expect_same "$(call 5021)" 0 'errno of THAW'
exec 3<&-
umount "$TEST_DIR/fs"
detach "$device"
umount "$TEST_DIR/slow"
dmsetup remove --retry slow
