#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Random ioctls with random arguments: any answer will do, harm will not. The
# seed is printed; PLOOP_SEED repeats one.
. "$(dirname "$0")/lib.sh"

scratch_fs tmpfs
ploopctl create -s 64M "$SCRATCH/disk.img" >/dev/null
seed=${PLOOP_SEED:-$(date +%s)}
note "seed $seed"
for ((i = 0; i < 3; i++)); do
    plooptest ioctl-fuzz --seed $((seed + i)) --count 30000 "$SCRATCH/disk.img" >&2
done
