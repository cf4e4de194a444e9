#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Compaction while the disk is in use: after much of a full disk was discarded, in
# random places, the file shrinks to little more than the data. The load compares all
# it reads meanwhile. Cancelled, it loses nothing; without room to gain it does nothing.
# timeout: 400
. "$(dirname "$0")/lib.sh"

seed=${SEED:-$RANDOM}
note "seed $seed"
RANDOM=$seed
scratch_fs ext4

# clusters IMAGE: those in use, and those of the file.
used() { ploopctl check "$1" | grep -oE '[0-9]+ of [0-9]+ used' | cut -d' ' -f1; }

# load: in the background, going on from what the disk holds.
load() {
    local from=()
    [[ ! -e $TEST_DIR/model ]] || from=(--from "$TEST_DIR/model")
    seed=$((seed + 1))
    begin_load --seed "$seed" --discard --seconds 120 "${from[@]}" --save "$TEST_DIR/model" "$device"
}

end_load() {
    touch "$TEST_DIR/stop"
    wait "$load" || die "$1: the load found something wrong"
}

# try KIB LOG LOWER
try() {
    local c=$(($1 * 1024)) log=$2 i images=("$SCRATCH/0.img") nr at before after status
    note "clusters of $1K, lower delta: $3"
    rm -f "$SCRATCH"/*.img "$TEST_DIR/model"
    ploopctl create -s 96M -b "$1K" "$SCRATCH/0.img" >/dev/null
    device=$(attach "$SCRATCH/0.img")
    if [[ $3 == yes ]]; then
        load
        sleep 1
        end_load before
        ploopctl create -s 96M -b "$1K" "$SCRATCH/1.img" >/dev/null
        plooptest snapshot --cluster-log "$log" "$device" "$SCRATCH/1.img"
        images+=("$SCRATCH/1.img")
    fi
    nr=$(((96 << 20) / c))
    # 64 MiB of other data, in random places, most of which go again.
    truncate -s 64M "$TEST_DIR/zero"
    dd if=/dev/urandom of="$device" bs=1M count=64 oflag=direct conv=notrunc status=none
    for ((i = 0; i < nr / 3; i++)); do
        at=$((RANDOM % (nr * 2 / 3)))
        blkdiscard -o $((at * c)) -l "$c" "$device"
    done
    # The load knows only of zeros there, and what the first one wrote is gone.
    blkdiscard -f -z -o 0 -l $((20 << 20)) "$device"
    cp "$device" "$TEST_DIR/disk"
    before=$(stat -c %s "${images[-1]}")
    timeout "$(limit 100)" plooptest op "$device" compact || die 'compaction failed'
    after=$(stat -c %s "${images[-1]}")
    note "$before to $after bytes: $(plooptest op-status "$device")"
    ((after < before)) || die "the file did not shrink"
    status=$(plooptest op-status "$device")
    expect_same "${status##* }" $((before - after)) 'bytes said to be freed'
    expect_same_bytes "$device" "$TEST_DIR/disk"
    timeout "$(limit 100)" plooptest op "$device" compact || die 'compaction again failed'
    detach "$device"
    for i in "${images[@]}"; do ploopctl check "$i" >&2; done
    at=$(used "${images[-1]}")
    ((after <= (at + at / 50 + 3) * c)) || die "the file has $after bytes for $at clusters"
    device=$(attach "${images[@]}")
    expect_same_bytes "$device" "$TEST_DIR/disk"
    note 'under load'
    blkdiscard -f -z "$device"
    rm -f "$TEST_DIR/model"
    load
    for ((i = 0; i < 6; i++)); do
        sleep 0.7
        if ((i == 2)); then
            plooptest op --start --rate 300000 "$device" compact
            sleep 0.3
            plooptest op-cancel "$device"
            timeout "$(limit 60)" plooptest op-wait "$device" || true
        fi
        timeout "$(limit 100)" plooptest op "$device" compact || die "compaction $i failed"
    done
    end_load compaction
    timeout "$(limit 100)" plooptest op "$device" compact || die 'the last compaction failed'
    after=$(stat -c %s "${images[-1]}")
    plooptest load-verify "$device" "$TEST_DIR/model" || die 'the disk is wrong'
    detach "$device"
    for i in "${images[@]}"; do ploopctl check "$i" >&2; done
    at=$(used "${images[-1]}")
    ((after <= (at + at / 50 + 3) * c)) || die "the file has $after bytes for $at clusters"
    device=$(attach "${images[@]}")
    plooptest load-verify "$device" "$TEST_DIR/model" || die 'the disk is wrong after attaching again'
    detach "$device"
    cp --sparse=always "${images[-1]}" "$TEST_DIR/copy.hds"
    qemu-img check -f parallels "$TEST_DIR/copy.hds" >&2 || die 'qemu-img: not clean'
    rm "$TEST_DIR/copy.hds"
}

try 64 7 yes
[[ $EFFORT == quick ]] || try 64 7 no
try 1024 11 no
