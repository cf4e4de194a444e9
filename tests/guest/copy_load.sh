#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A disk is copied while it is written to: on the bare disk by a load that checks what it
# reads, on a file system by fio. Whenever the copy ends, attached it is byte for byte what the
# disk was when it stood still. The load goes on, and nothing of it is lost.
# timeout: 900
. "$(dirname "$0")/lib.sh"

need fio

seed=${SEED:-$RANDOM}
runs=${RUNS:-$(share 2 50)} fs_runs=${RUNS:-$(share 1 25)}
note "seed $seed, $runs runs, $fs_runs on a file system"
RANDOM=$seed
scratch_fs xfs
scratch_fs ext4 1
copies=$SCRATCH-1

content() { dd if="$1" bs=1M iflag=direct status=none || die "$1 cannot be read"; }

# same_content A B: two disks.
same_content() { cmp <(content "$1") <(content "$2") >&2 || die "$1 and $2 differ"; }

# nap: 0 to 1.5 seconds.
nap() { sleep "$((RANDOM % 2)).$((RANDOM % 5))"; }

# same DEVICE COPY...: the frozen device and the copy, attached, have the same bytes.
same() {
    local device=$1 other
    shift
    for i in "$@"; do
        [[ -d $i ]] || ploopctl check "$i" >&2 || die "$i is damaged"
    done
    other=$(attach -r "$@")
    same_content "$other" "$device"
    detach "$other"
}

note 'the bare disk'
for ((run = 1; run <= runs; run++)); do
    ploopctl create -s "$(share 12 48)M" -b 64K "$SCRATCH/disk.img"
    device=$(attach "$SCRATCH/disk.img")
    begin_load --seed $((seed + run)) --discard --seconds 60 --save "$TEST_DIR/model" "$device"
    nap
    # The load is ended by the stop command, as a freeze does not hold who writes to the disk itself.
    end="touch '$TEST_DIR/stop'; while kill -0 $load 2>/dev/null && [ \"\$(cut -d' ' -f3 /proc/$load/stat)\" != Z ]; do sleep 0.1; done"
    how=()
    case $((run % 4)) in
        0) how=(--to "$copies/copy.img") ;;
        1) how=(--through "ploopctl copy receive '$copies/copy.img'") ;;
        2) how=(--compress zstd --through "ploopctl copy receive '$copies/copy.img'") ;;
        3) ;;
    esac
    options=(--keep-frozen --stop-command "$end")
    if ((run % 4 == 3)); then
        timeout "$(limit 120)" ploopctl copy send --v1 "${options[@]}" "$device" |
            timeout "$(limit 120)" ploopctl copy receive "$copies/copy.img" || die "run $run: the copy failed"
    else
        timeout "$(limit 120)" ploopctl copy send "${how[@]}" "${options[@]}" "$device" || die "run $run: the copy failed"
    fi
    wait "$load" || die "run $run: the load found something wrong"
    same "$device" "$copies/copy.img"
    other=$(attach "$copies/copy.img")
    plooptest load-verify "$other" "$TEST_DIR/model"
    detach "$other"
    ploopctl copy thaw "$device"
    detach "$device"
    rm -f "$SCRATCH/disk.img" "$copies/copy.img"
done

note 'a file system, with a snapshot, under fio'
ploopctl create --descriptor -s 128M -b 64K "$SCRATCH/disk"
device=$(attach "$SCRATCH/disk")
mkfs.ext4 -q -F "$device"
mkdir "$TEST_DIR/fs"
mount "$device" "$TEST_DIR/fs"
cp -a /bin/bash "$TEST_DIR/fs/before"
uuid=$(ploopctl snapshot create "$SCRATCH/disk")
fio --name=load --directory="$TEST_DIR/fs" --size=24M --rw=randwrite --bsrange=4k-64k --numjobs=2 \
    --time_based --runtime="$(limit "$(share 400 9000)")" --fsync=50 --verify=crc32c --do_verify=0 --randseed="$seed" \
    --output="$TEST_DIR/fio" &
fio=$!
for ((run = 1; run <= fs_runs; run++)); do
    nap
    timeout "$(limit 120)" ploopctl copy send --json --keep-frozen --to "$copies/copy" "$device" 2>"$TEST_DIR/events" ||
        die "run $run: $(tail -n 3 "$TEST_DIR/events")"
    grep -q '"event":"frozen"' "$TEST_DIR/events" || die 'no event of the freeze'
    same "$device" "$copies/copy"
    ploopctl copy thaw "$device"
    ploopctl descriptor validate "$copies/copy" >/dev/null || die "run $run: the descriptor is not valid"
    other=$(attach -r "$copies/copy")
    timeout "$(limit 60)" e2fsck -fn "$other" >"$TEST_DIR/fsck" 2>&1 || die "run $run: $(tail -n 5 "$TEST_DIR/fsck")"
    detach "$other"
    rm -rf "$copies/copy"
    # Tracking is over: the disk can be changed again. All of the chain is sent, so it is kept short.
    new=$(ploopctl snapshot create "$SCRATCH/disk")
    ploopctl snapshot delete --uuid "$uuid" "$SCRATCH/disk"
    uuid=$new
done
kill "$fio"
wait "$fio" || true
umount "$TEST_DIR/fs"

note 'at rest'
detach "$device"
for how in disk top; do
    option=()
    [[ $how == disk ]] || option=(--top-only)
    ploopctl copy send "${option[@]}" "$SCRATCH/disk" | ploopctl copy receive "$copies/$how"
done
expect_same_bytes "$copies/disk/DiskDescriptor.xml" "$SCRATCH/disk/DiskDescriptor.xml"
for i in "$SCRATCH"/disk/root.hds*; do expect_same_bytes "$i" "$copies/disk/${i##*/}"; done
device=$(attach "$SCRATCH/disk")
other=$(attach "$copies/disk")
same_content "$other" "$device"
detach "$device" "$other"

note 'a raw disk on a block device'
dmsetup create node --table "0 32768 linear $(scratch_disk 2) 0"
device=$(attach -f raw /dev/mapper/node)
dd if=/dev/urandom of="$device" bs=1M count=16 oflag=direct conv=notrunc status=none
timeout "$(limit 120)" ploopctl copy send --to "$copies/node" "$device"
expect_same_bytes "$copies/node" "$device"
detach "$device"
dmsetup remove --retry node
