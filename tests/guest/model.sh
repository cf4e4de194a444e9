#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Random operations, more than a thousand (soak: thousands) - writes, discards, zeroes, snapshots, merges of any
# pair, growth, compaction, rollback, detach and attach - agree with a model in
# memory; so do the images, as our own check and qemu-img see them.
# timeout: 400
. "$(dirname "$0")/lib.sh"

# run FS SEED ARGUMENTS...: that seed, or all three.
run() {
    local kind=$1 seed image seeds
    seeds=${SEEDS:-$(share "$2" '1 2 3')}
    shift 2
    scratch_fs "$kind"
    for seed in $seeds; do
        rm -rf "$SCRATCH/m"
        mkdir "$SCRATCH/m"
        note "$kind seed $seed $*"
        plooptest model --seed "$seed" "$@" "$SCRATCH/m" || die "seed $seed of $kind $* fails"
        for image in "$SCRATCH"/m/*.img; do
            if ! ploopctl check "$image" >&2; then
                [[ $* == *--raw* && $image == */0.img ]] || die "$image is damaged"
            fi
        done
    done
    umount "$SCRATCH"
}

run ext4 1 --ops "${OPS:-500}"
run xfs 2 --ops "${OPS:-500}" --version 1 --cluster-log 6
run ext4 3 --ops "${OPS:-300}" --raw
