#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Merges while the disk is in use: a middle pair, the top, into a raw base. The load
# compares all it reads. One that is cancelled loses nothing and can be run again, at
# once and after attaching anew. Others that would change the device meanwhile are
# refused, and so is a merge of what is not there or what another device holds.
# timeout: 300
. "$(dirname "$0")/lib.sh"

seed=${SEED:-$RANDOM}
note "seed $seed"
scratch_fs ext4

new() { ploopctl create -s 64M -b 64K "${@:2}" "$SCRATCH/$1.img" >/dev/null; }

# load SECONDS: in the background, going on from what the disk holds.
load() {
    local from=()
    [[ ! -e $TEST_DIR/model ]] || from=(--from "$TEST_DIR/model")
    seed=$((seed + 1))
    begin_load --seed "$seed" --discard --seconds "$1" "${from[@]}" --save "$TEST_DIR/model" "$device"
}

end_load() {
    touch "$TEST_DIR/stop"
    wait "$load" || die "$1: the load found something wrong"
}

same() { plooptest load-verify "$device" "$TEST_DIR/model" || die "$1: the disk is wrong"; }

# chain FIRST: images FIRST..3, each with data of its own.
build() {
    local i
    rm -f "$TEST_DIR/model" "$SCRATCH"/*.img
    if [[ $1 == raw ]]; then
        ploopctl create -f raw -s 64M "$SCRATCH/0.img" >/dev/null
        device=$(attach -f raw -b 64K "$SCRATCH/0.img")
    else
        new 0
        device=$(attach "$SCRATCH/0.img")
    fi
    for i in 1 2 3; do
        load 60
        sleep 0.4
        end_load 'before'
        new "$i"
        timeout "$(limit 30)" plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/$i.img"
    done
    load 60
    sleep 0.4
    end_load 'before'
}

# reattach FORMAT IMAGE...
reattach() {
    local options=()
    [[ $1 != raw ]] || options=(-f raw)
    shift
    detach "$device"
    device=$(attach "${options[@]}" "${@/#/$SCRATCH/}")
}

# merge LEVEL: under load, with all there is to it.
merge() {
    local before
    before=$(nr_levels "$device")
    load 90
    sleep 0.2
    timeout "$(limit 90)" plooptest op "$device" merge "$1" || die "merge $1 failed"
    sleep 0.2
    end_load "merge $1"
    expect_same "$(nr_levels "$device")" $((before - 1)) levels
    same "merge $1"
}

# refused ERRNO CMD...: of plooptest, which says how it was refused.
refused() {
    local want=$1
    shift
    if timeout "$(limit 60)" "$@" >"$TEST_DIR/why" 2>&1; then die "not refused: $*"; fi
    grep -q "$want" "$TEST_DIR/why" || die "$*: $(<"$TEST_DIR/why"), not $want"
}

note 'all pairs, ploop1'
build ploop1
merge 2
reattach ploop1 0.img 1.img 3.img
same 'after the middle'
merge top
reattach ploop1 0.img 1.img
same 'after the top'
merge 1
refused 'os error 2)' plooptest op "$device" merge top
refused 'os error 2)' plooptest op "$device" merge 0
refused 'os error 2)' plooptest op "$device" merge 1
refused 'os error 2)' plooptest op "$device" merge 300
same 'after refusals'
reattach ploop1 0.img
same 'after all'
detach "$device"
ploopctl check "$SCRATCH/0.img" >&2

note 'into a raw base, top down'
build raw
merge top
merge top
merge top
reattach raw 0.img
same 'after all'
detach "$device"

note 'the lowest pair first, raw'
build raw
merge 1
merge 1
reattach raw 0.img 3.img
same 'after two'
detach "$device"

note 'cancelled'
build ploop1
for level in top 2 1; do
    plooptest op --start --rate 200000 "$device" merge "$level"
    # Nobody has it open, but it cannot be detached.
    udevadm settle -t 10 || true
    expect_fail timeout "$(limit 30)" ploopctl detach "$device"
    new extra
    refused 'os error 16)' plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/extra.img"
    rm "$SCRATCH/extra.img"
    refused 'os error 16)' plooptest op "$device" compact
    refused 'os error 16)' plooptest op "$device" grow $((66 << 11))
    refused 'os error 16)' plooptest op "$device" merge 1
    # OpenVZ's call merges the top: it joins that merge and no other.
    joined=''
    if [[ $level == top ]]; then
        (call 500C >"$TEST_DIR/joined") &
        joined=$!
        retry 20 waits_in_ioctl "$joined" || die 'MERGE does not wait for the merge'
    else
        expect_same "$(call 500C)" 16 'errno of MERGE while another level is merged'
    fi
    [[ $(plooptest op-status "$device") == running* ]] || die "it does not run: $(plooptest op-status "$device")"
    load 90
    sleep 0.3
    plooptest op-cancel "$device"
    refused 'errno 125' plooptest op-wait "$device"
    if [[ -n $joined ]]; then
        wait "$joined"
        expect_same "$(<"$TEST_DIR/joined")" 125 'errno of MERGE that has joined'
    fi
    sleep 0.3
    end_load "cancelled merge of $level"
    expect_same "$(nr_levels "$device")" 4 levels
    same "cancelled merge of $level"
    reattach ploop1 {0..3}.img
    same "cancelled merge of $level, attached again"
    plooptest op-cancel "$device" 2>/dev/null || true
done
note 'slower than anybody waits for, until it is allowed more'
plooptest op --start --rate 1 "$device" merge top
sleep 1
plooptest op-rate "$device" 0
timeout "$(limit 60)" plooptest op-wait "$device" || die 'the merge goes on at its old rate'
same 'merged after all'
rm "$SCRATCH/3.img"
new 3
timeout "$(limit 30)" plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/3.img"

note 'cancelled as it comes, and again, without attaching anew'
for ((i = 0; i < $(share 2 9); i++)); do
    load 60
    plooptest op --start --rate $((RANDOM * 10 + 100000)) "$device" merge "$((i % 3 + 1))"
    sleep "0.$((RANDOM % 90 + 10))"
    plooptest op-cancel "$device"
    if timeout "$(limit 60)" plooptest op-wait "$device" 2>/dev/null; then
        end_load 'ended'
        note "round $i ended before it was cancelled"
        break
    fi
    end_load "cancelled round $i"
done
same 'cancelled often'
while (($(nr_levels "$device") > 1)); do merge top; done
reattach ploop1 0.img
same 'all merged'
detach "$device"
ploopctl check "$SCRATCH/0.img" >&2

note 'a lower delta that another device holds'
build ploop1
other=$(attach -r "$SCRATCH/0.img" "$SCRATCH/1.img")
refused 'os error 16)\|errno 16' plooptest op "$device" merge 1
refused 'os error 16)\|errno 16' plooptest op "$device" merge 2
same 'refused'
sum=$(sha256sum "$other")
merge top
expect_same "$(sha256sum "$other")" "$sum" 'the other device'
detach "$other"
merge 1
merge top
reattach ploop1 0.img
same 'at the end'
detach "$device"
ploopctl check "$SCRATCH/0.img" >&2
