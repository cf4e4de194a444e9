#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Ioctls at random, most of them as a tool would make them, on images that are sometimes
# emptied meanwhile, with I/O in between; some with a changed argument, some all random. Any
# answer will do, harm will not. The seed is printed; PLOOP_SEED repeats one.
# timeout: 400
# boot: kmemleak=on
# allow-log: dev ploop[0-9]+, logical block [0-9]+, lost async page write
# debug: soak
. "$(dirname "$0")/lib.sh"

scratch_fs tmpfs
images=()
for i in 0 1 2 3 4 5; do images+=("$SCRATCH/$i.img"); done
seed=${PLOOP_SEED:-$(date +%s)}
for ((i = 0; i < 3; i++)); do
    rm -f "${images[@]}"
    for image in "${images[@]}"; do ploopctl create -s 64M "$image" >/dev/null; done
    note "seed $((seed + i))"
    plooptest ioctl-fuzz --seed $((seed + i)) --seconds "$(share 20 600)" "${images[@]}" | tee "$TEST_DIR/said" >&2
    done=$(sed -n 's/.*calls; \([0-9]*\) of.*/\1/p' "$TEST_DIR/said")
    ((done > 20)) || die "only $done of the known calls ever succeeded"
done
