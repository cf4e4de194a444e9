#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Copy on write: over a base with data, two deltas take writes of all sizes at the
# borders of clusters, of whole clusters and of single sectors, alone and at once.
# The disk always reads as a file to which the same was written, and the lower
# images keep every byte.
# timeout: 300
. "$(dirname "$0")/lib.sh"

# xfs, where copies cost nothing.
scratch_fs xfs
head -c 24M /dev/urandom >"$TEST_DIR/random"
skip=0

# put OFFSET BYTES [DD_FLAG]: other random bytes each time, to disk and model.
put() {
    local from=("if=$TEST_DIR/random" bs=512 "skip=$skip" count=$(($2 / 512)) status=none)
    skip=$(((skip + 977) % 4096))
    dd "${from[@]}" seek=$(($1 / 512)) conv=notrunc of="$TEST_DIR/model"
    # One write: dd's block is all of it.
    dd if="$TEST_DIR/model" iflag=skip_bytes,count_bytes,fullblock bs="$2" count="$2" skip="$1" \
        oflag="seek_bytes,direct${3:+,$3}" seek="$1" conv=notrunc of="$device" status=none
}

# same: through the page cache, and past it in pieces that cross clusters.
same() {
    expect_same_bytes "$device" "$TEST_DIR/model"
    dd if="$device" iflag=direct bs=28k status=none | cmp - "$TEST_DIR/model" >&2 || die "direct reads differ"
}

# write_level SHIFT: SHIFT clusters further each time, so that levels overlap.
write_level() {
    local s=$(($1 * c)) i pids=()
    put $((s + c - 512)) 1024
    put $((s + 3 * c)) "$c"
    put $((s + 4 * c + 4096 - 512)) 1024 dsync
    put $((s + 5 * c)) 512
    put $((s + 7 * c - 512)) 512
    put $((s + 8 * c - 8192)) $((c + 16384))
    put $((s + 9 * c + 512)) $((c - 1024)) dsync
    put $((s + 11 * c + 12288)) 4096
    # Many at once, several in each cluster: they wait for each other's copy.
    for ((i = 0; i < 12; i++)); do
        put_later $((s + (12 + i % 6) * c + (i * 5 + 1) * 512)) &
        pids+=($!)
    done
    for i in "${pids[@]}"; do wait "$i" || die "a write failed"; done
}

# put_later OFFSET: one sector; the model is a sparse file that nobody else writes there.
put_later() {
    dd if="$TEST_DIR/random" bs=512 skip=$(($1 / 512 % 4096)) count=1 seek=$(($1 / 512)) oflag=direct conv=notrunc of="$device" status=none
    dd if="$TEST_DIR/random" bs=512 skip=$(($1 / 512 % 4096)) count=1 seek=$(($1 / 512)) conv=notrunc of="$TEST_DIR/model" status=none
}

sums() { sha256sum "$@" | cut -d' ' -f1; }

# try CLUSTER FORMAT: raw, 1 or 2.
try() {
    local size=$((24 * $1 * 1024)) kind=$2 images=("$SCRATCH/0.img") device before level options=() at
    c=$(($1 * 1024))
    note "clusters of $1K, base $kind"
    rm -f "$SCRATCH"/*.img
    rm -f "$TEST_DIR/model"
    truncate -s "$size" "$TEST_DIR/model"
    if [[ $kind == raw ]]; then
        options=(-f raw)
        ploopctl create -f raw -s "$size" "$SCRATCH/0.img" >/dev/null
        device=$(attach -f raw -b "$1K" "$SCRATCH/0.img")
        kind=2
    else
        ploopctl create -s "$size" -b "$1K" --format-version "$kind" "$SCRATCH/0.img" >/dev/null
        device=$(attach "$SCRATCH/0.img")
    fi
    # Whole clusters, parts of some, and holes.
    for at in 0 1 3 4 6 7 8 10 12 13 15 18; do put $((at * c)) "$c"; done
    put $((9 * c + 4096)) 8192
    put $((16 * c + c - 4096)) 4096
    same
    detach "$device"
    for level in 1 2; do
        before=$(sums "${images[@]}")
        # The top one is larger than what is below.
        ploopctl create -s $((size + (level - 1) * 3 * c)) -b "$1K" --format-version "$kind" "$SCRATCH/$level.img" >/dev/null
        truncate -s $((size + (level - 1) * 3 * c)) "$TEST_DIR/model"
        images+=("$SCRATCH/$level.img")
        device=$(attach "${options[@]}" "${images[@]}")
        same
        write_level $((level - 1))
        same
        drop_caches
        same
        if ((level == 2)); then put $((size - c / 2)) $((2 * c)); fi
        detach "$device"
        expect_same "$(sums "${images[@]:0:level}")" "$before" 'lower images'
        device=$(attach "${options[@]}" "${images[@]}")
        same
        detach "$device"
        device=$(attach -r "${options[@]}" "${images[@]}")
        same
        detach "$device"
    done
    for at in "${images[@]:${#options[@]}/2}"; do
        ploopctl check "$at" >&2
        cp --reflink=auto "$at" "$TEST_DIR/copy.hds"
        qemu-img check -f parallels "$TEST_DIR/copy.hds" >&2 || die "qemu-img: $at is not clean"
    done
}

[[ $EFFORT == quick ]] || try 32 2
try 64 1
try 64 raw
try 1024 2
