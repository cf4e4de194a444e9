#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Everything at once on four processors: a disk under load is snapshot, merged, grown,
# compacted, tracked and discarded by several who do not know of each other, while other
# disks come and go, and all files and nodes are looked at; then the module comes and goes,
# too. Some of the images are reached past their file system. Who is in somebody's way gets an error; nothing
# hangs, and no byte is lost.
# timeout: 600
# boot: kmemleak=on
# debug: soak
# cpus: 4
. "$(dirname "$0")/lib.sh"

seed=${SEED:-$RANDOM}
seconds=$(share 25 1200)
note "seed $seed, $seconds s on $(nproc) processors"
RANDOM=$seed
scratch_fs ext4
stop=$TEST_DIR/stop
over() { [[ -e $stop ]]; }
hush=$TEST_DIR/hush
# calm: those who attach wait here while somebody wants the module for himself.
calm() { while [[ -e $hush ]] && ! over; do nap; done; }
# Without a process, which would be most of the work.
mkfifo "$TEST_DIR/never"
exec 9<>"$TEST_DIR/never"
# nap: up to 0.3 seconds.
nap() { read -r -t "0.$((RANDOM % 3))$((RANDOM % 9 + 1))" -u 9 || true; }

# What those may be told who come at the wrong time: no such level, not yet, busy, wrong state,
# no space while writes wait, ended early.
excuse='errno (2|11|16|22|28|125)$|os error (2|6|11|16|17|22|28|125)\)'

# attempt NAME CMD...: it succeeds, or has an excuse.
attempt() {
    local name=$1 status=0
    shift
    timeout "$(limit 120)" "$@" >"$TEST_DIR/$name.out" 2>&1 || status=$?
    ((status != 124)) || die "hangs: $*"
    if ((status == 0)); then
        echo "$name" >>"$TEST_DIR/done"
    else
        grep -qE "$excuse" "$TEST_DIR/$name.out" || die "$*: $(<"$TEST_DIR/$name.out")"
    fi
    return "$status"
}

# --- the disk that stays ------------------------------------------------------

# operations NR: changes the deltas of the disk, at random.
operations() {
    local me=op$1 count=0 image size
    RANDOM=$((seed + $1))
    while ! over; do
        case $((RANDOM % 10)) in
            0 | 1 | 2)
                if (($(nr_levels "$device") < 6)); then
                    image=$SCRATCH/$me-$count.img
                    count=$((count + 1))
                    ploopctl create -s "$(($(blockdev --getsize64 "$device") >> 20))M" -b 64K "$image" >/dev/null
                    attempt "$me.snapshot" plooptest snapshot --cluster-log 7 "$device" "$image" || rm "$image"
                fi ;;
            3 | 4) attempt "$me.merge-top" plooptest op "$device" merge top || true ;;
            5 | 6) attempt "$me.merge" plooptest op "$device" merge $((RANDOM % 4 + 1)) || true ;;
            7) attempt "$me.compact" plooptest op "$device" compact || true ;;
            8) size=$(blockdev --getsz "$device")
                ((size >= 160 << 11)) || attempt "$me.grow" plooptest op "$device" grow $((size + (2 << 11))) || true ;;
            9) nap; plooptest op-cancel "$device" 2>/dev/null || true ;;
        esac
        nap
    done
}

# watching: trackers that are killed, checkpoints, SYNC, settings.
watching() {
    local image tracker tracked=0
    RANDOM=$((seed + 10))
    while ! over; do
        image=$(cat "/sys/block/${device##*/}/pdelta/$(($(nr_levels "$device") - 1))/image" 2>/dev/null) || continue
        nap
        rm -f "$SCRATCH/copy"
        plooptest track-copy --quiesce 'sleep 5' "$device" "$image" "$SCRATCH/copy" >/dev/null 2>&1 &
        tracker=$!
        # Killed soon, as nobody else gets anywhere while it tracks; every second time not before it does.
        if ((RANDOM % 2)); then
            while kill -0 "$tracker" 2>/dev/null && [[ ! -s $SCRATCH/copy ]] && ! over; do nap; done
        fi
        nap
        kill -KILL "$tracker" 2>/dev/null || true
        wait "$tracker" 2>/dev/null || true
        # It copies nothing before it tracks. Who can track after another has discarded that one when it was killed.
        if [[ -s $SCRATCH/copy ]]; then
            ((tracked == 0)) || echo watch.track >>"$TEST_DIR/done"
            tracked=1
            # Nobody else can change the chain before it is discarded.
            ((RANDOM % 4 == 0)) || plooptest op-cancel "$device" 2>/dev/null || true
        fi
        attempt watch.checkpoint plooptest checkpoint start "$device" $((RANDOM % 4 + 1)) || true
        attempt watch.read plooptest checkpoint read "$device" $((RANDOM % 4 + 1)) || true
        attempt watch.arm plooptest checkpoint arm "$device" $((RANDOM % 4 + 1)) || true
        attempt watch.drop plooptest checkpoint drop "$device" $((RANDOM % 4 + 1)) || true
        attempt watch.sync plooptest sync "$device" || true
        echo fail >"/sys/block/${device##*/}/ptune/on_full"
        echo wait >"/sys/block/${device##*/}/ptune/on_full"
    done
}

# --- disks that come and go ---------------------------------------------------

# let_go DEVICE IMAGE RO NAME: detaches it. The number may be another's as soon as it is gone, so a
# second try looks first.
let_go() {
    local dir=/sys/block/${1##*/} end=$((SECONDS + 120))
    while [[ $(cat "$dir/pdelta/0/image" "$dir/ro" 2>/dev/null | paste -sd ' ') == "$2 $3" ]]; do
        timeout "$(limit 60)" ploopctl detach "$1" 2>"$TEST_DIR/$4.detach" && return
        ((SECONDS < end)) || die "$4: cannot detach: $(<"$TEST_DIR/$4.detach")"
        nap
    done
}

# come NAME ARGUMENTS...: attaches what the arguments say and prints the device, if it can be had now.
come() {
    timeout "$(limit 120)" ploopctl attach "${@:2}" 2>"$TEST_DIR/$1.attach" | grep -oE '/dev/ploop[0-9]+' | head -n 1
}

# comer NAME CLUSTER: an image attached, written, and detached, over and over. Others open
# the disk, attach the image, and unload the module, so that attaching may fail at any time;
# what was acknowledged is there the next time.
comer() {
    local image=$SCRATCH/$1.img at size acked=0 rounds=0
    ploopctl create -s 48M -b "$2" "$image" >/dev/null
    while ! over; do
        calm
        at=$(come "$1" "$image") || { nap; continue; }
        plooptest seqverify "$at" --acked "$acked" --blocks 200 --length $((48 << 20)) >/dev/null || die "$1: round $rounds, what was written is lost"
        # The verifier counts from 1 again: what is there is of an earlier round.
        blkdiscard -z "$at"
        acked=$(plooptest seqwrite "$at" --ack "$TEST_DIR/$1.ack" --blocks 200 --length $((48 << 20)) --count $((RANDOM % 60 + 1)))
        size=$(blockdev --getsz "$at")
        ((RANDOM % 4 != 0 || size >= 96 << 11)) || attempt "$1.grow" plooptest op "$at" grow $((size + 2048)) || true
        let_go "$at" "$image" 0 "$1"
        rounds=$((rounds + 1))
        echo "$1.attach" >>"$TEST_DIR/done"
    done
}

# stacker NAME: as `comer`; a level is made above the image and merged into it, and while that goes on the disk is
# written to, and somebody tries to detach it.
stacker() {
    local images=("$SCRATCH/$1.img") top=$SCRATCH/$1.top.img at acked=0
    ploopctl create -s 48M -b 64K "${images[0]}" >/dev/null
    while ! over; do
        calm
        at=$(come "$1" "${images[@]}") || { nap; continue; }
        plooptest seqverify "$at" --acked "$acked" --blocks 200 --length $((48 << 20)) >/dev/null || die "$1: what was written is lost"
        blkdiscard -z "$at"
        if ((${#images[@]} == 1)); then
            ploopctl create -s 48M -b 64K "$top" >/dev/null
            if attempt "$1.stack" plooptest snapshot --cluster-log 7 "$at" "$top"; then images+=("$top"); else rm "$top"; fi
        fi
        attempt "$1.start" plooptest op --start --rate $((RANDOM * 100 + 500000)) "$at" merge top || true
        acked=$(plooptest seqwrite "$at" --ack "$TEST_DIR/$1.ack" --blocks 200 --length $((48 << 20)) --count $((RANDOM % 60 + 1)))
        while [[ $(plooptest op-status "$at" 2>/dev/null) == running* ]]; do
            # Only a merge that has just ended lets it.
            if timeout "$(limit 60)" ploopctl detach "$at" 2>/dev/null; then at='' && break; fi
            # One that is cancelled would let it, too, with both levels: it is over before the next try.
            if ((RANDOM % 8 == 0)); then
                plooptest op-cancel "$at" 2>/dev/null || true
                timeout "$(limit 60)" plooptest op-wait "$at" 2>/dev/null || (($? != 124)) || die "$1: a cancelled merge goes on"
            fi
            nap
        done
        if [[ -z $at || $(nr_levels "$at") == 1 ]]; then
            ((${#images[@]} == 1)) || echo "$1.unstack" >>"$TEST_DIR/done"
            images=("${images[0]}")
            rm -f "$top"
        fi
        [[ -z $at ]] || let_go "$at" "${images[0]}" 0 "$1"
        echo "$1.attach" >>"$TEST_DIR/done"
    done
}

# rival IMAGE: attaches what others use, for a moment, only to read.
rival() {
    local at
    while ! over; do
        calm
        at=$(come rival -r "$1") || true
        if [[ -n $at ]]; then
            dd if="$at" of=/dev/null bs=64k count=4 iflag=direct status=none 2>/dev/null || true
            let_go "$at" "$1" 1 rival
        fi
        nap
    done
}

# --- those who look on --------------------------------------------------------

# Files and nodes by the shell alone: there are processes enough.
reader() {
    local file
    while ! over; do
        # A read of event waits for one.
        for file in /sys/block/ploop*/p{state,tune,delta}/{[^e]*,*/*} /sys/block/ploop*/{size,stat,inflight,range,queue/*}; do
            # shellcheck disable=SC2188
            read -r _ <"$file"
        done 2>/dev/null || true
        nap
        ((RANDOM % 20 != 0)) || ploopctl list --json >/dev/null 2>&1 || true
        for file in /dev/ploop[0-9]*; do
            ((RANDOM % 20 != 0)) || ploopctl info "$file" >/dev/null 2>&1 || true
        done
    done
}

opener() {
    local node
    while ! over; do
        for node in /dev/ploop[0-9]*; do
            [[ -b $node ]] || continue
            { exec 7<"$node" && nap && exec 7<&-; } 2>/dev/null || true
            ((RANDOM % 10 != 0)) || dd if="$node" of=/dev/null bs=4k count=1 status=none 2>/dev/null || true
            ((RANDOM % 10 != 0)) || blockdev --rereadpt "$node" 2>/dev/null || true
        done
        nap
    done
}

crier() {
    while ! over; do
        # What is attached from here on does I/O the one way or the other.
        echo $((RANDOM % 2)) 2>/dev/null >/sys/module/ploop/parameters/bdev || true
        for at in /sys/block/ploop*/uevent; do echo change >"$at"; done 2>/dev/null || true
        nap
        ((RANDOM % 10 != 0)) || udevadm trigger --subsystem-match=block --sysname-match='ploop*' 2>/dev/null || true
        ((RANDOM % 10 != 0)) || udevadm settle -t 5 || true
        ((RANDOM % 10 != 0)) || timeout 0.2 cat /sys/block/ploop*/pstate/event >/dev/null 2>&1 || true
    done
}

# unloader: with a disk that stays it never succeeds. Without one it may, between two that
# attach; and it does, soon after nobody does any more.
unloader() {
    local tries=0
    while ! over; do
        if rmmod ploop 2>"$TEST_DIR/rmmod"; then
            [[ -z $device ]] || die 'the module was unloaded while a disk was there'
            echo unload >>"$TEST_DIR/done"
            tries=0
            nap
            insmod "$BIN/ploop.ko"
            rm -f "$hush"
        elif [[ -z $device ]]; then
            tries=$((tries + 1))
            ((tries < 40)) || : >"$hush"
            ((tries < 1000)) || die "nobody uses the module, and it does not go: $(<"$TEST_DIR/rmmod")"
        fi
        nap
    done
}

# lacking: what has not been done yet.
lacking() {
    local what
    for what in "${wanted[@]}"; do grep -qE "(^|\.)$what\$" "$TEST_DIR/done" || echo "$what"; done
}

# run SECONDS FUNCTION...: all of them at once, for so long, and until there was enough.
run() {
    local job failed='' end=$((SECONDS + $1)) tell=$((SECONDS + $1))
    local -A pids=()
    shift
    rm -f "$stop" "$hush"
    for job in "$@"; do
        # shellcheck disable=SC2086 # a function and its arguments
        $job &
        pids[$job]=$!
    done
    : >"$TEST_DIR/done"
    while ((SECONDS < end)) || [[ -n $(lacking) ]]; do
        for job in "${!pids[@]}"; do kill -0 "${pids[$job]}" || die "'$job' ended"; done
        if ((SECONDS >= tell)); then
            note "still to be done: $(lacking | paste -sd ' ')"
            tell=$((SECONDS + 30))
        fi
        sleep 0.5
    done
    touch "$stop"
    for job in "${!pids[@]}"; do wait "${pids[$job]}" || failed+=" '$job'"; done
    [[ -z $failed ]] || die "failed:$failed"
    sort "$TEST_DIR/done" | uniq -c >&2
}

note 'with a disk that stays'
ploopctl create -s 96M -b 64K "$SCRATCH/0.img" >/dev/null
device=$(attach "$SCRATCH/0.img")
load() {
    plooptest load --seed "$seed" --discard --jobs 4 --seconds 100000 --stop "$stop" --save "$TEST_DIR/model" "$device" >&2 ||
        die 'the load found something wrong'
}
# In a short run what does not have to wait for its turn for long.
read -ra wanted <<<"$(share 'snapshot grow checkpoint attach stack' 'snapshot merge-top merge compact grow checkpoint track attach stack unstack')"
run "$seconds" load 'operations 1' 'operations 2' watching 'comer one 64K' 'comer two 1M' 'stacker pile' \
    "rival $SCRATCH/one.img" reader opener crier unloader
# Not before the rival has let go.
for image in one two pile; do ploopctl check "$SCRATCH/$image.img" >&2 || die "$image is damaged"; done
plooptest op-cancel "$device" 2>/dev/null || true
plooptest op-wait "$device" 2>/dev/null || true
plooptest load-verify "$device" "$TEST_DIR/model" || die 'the disk is wrong'
mapfile -t images < <(images_of "$device")
detach "$device"
device=$(attach "${images[@]}")
plooptest load-verify "$device" "$TEST_DIR/model" || die 'the disk is wrong when attached again'
detach "$device"
for image in "${images[@]}"; do ploopctl check "$image" >&2 || die "$image is damaged"; done

note 'with a module that goes'
device=
wanted=(unload attach stack unstack)
run $((seconds / 2)) 'comer three 32K' 'stacker heap' "rival $SCRATCH/one.img" reader opener crier unloader
for image in three heap; do ploopctl check "$SCRATCH/$image.img" >&2 || die "$image is damaged"; done
[[ -d /sys/module/ploop ]] || insmod "$BIN/ploop.ko"
