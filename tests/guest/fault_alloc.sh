#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The n-th allocation that the module asks for fails, for n from 1 on until the operation
# has no n-th one, whoever of its threads it is in: attaching, a first write, a copy from
# below, a flush, a snapshot, merges, growth, discard, compaction, checkpoints, tracking,
# detaching. Each succeeds or ends with an error; the disk goes on and holds what it did,
# and the operation can be run again. Needs a kernel with fault injection.
# timeout: 1200
# boot: kmemleak=on
# allow-log: RIP: 0033
. "$(dirname "$0")/lib.sh"

faults=/sys/kernel/debug
[[ -d $faults/failslab && -d $faults/fail_page_alloc ]] || skip 'this kernel cannot let allocations fail; the debug kernel can'
scratch_fs ext4
seed=${SEED:-$RANDOM}
note "seed $seed"
RANDOM=$seed

# --- the fault ----------------------------------------------------------------

# Counted are allocations that have the module's code on the last frames of the stack. What
# the file system below asks for, on behalf of the module, is far from there.
text=$((0x$(awk '$1 == "ploop" { sub(/^0x/, "", $6); print $6 }' /proc/modules)))
size=$(awk '$1 == "ploop" { print $2 }' /proc/modules)
((text > 0 || text < -1)) || die 'where the module is is not told'
for kind in failslab fail_page_alloc; do
    printf '0x%x' "$text" >"$faults/$kind/require-start"
    printf '0x%x' $((text + size)) >"$faults/$kind/require-end"
    echo "${DEPTH:-14}" >"$faults/$kind/stacktrace-depth"
    echo 0 >"$faults/$kind/verbose"
    echo 0 >"$faults/$kind/times"
    echo 0 >"$faults/$kind/space"
    echo 100 >"$faults/$kind/probability"
    echo N >"$faults/$kind/task-filter"
    echo N >"$faults/$kind/ignore-gfp-wait"
done
echo N >"$faults/fail_page_alloc/ignore-gfp-highmem"
echo 0 >"$faults/fail_page_alloc/min-order"

# An attribute counts what it looked at since boot, which nobody can read or reset, and lets
# fail what is a multiple of its interval. Once something failed it does not count any more,
# and then the count is the interval.
declare -A counted=([failslab]=0 [fail_page_alloc]=0)

# arm KIND N: the N-th allocation from here on fails.
arm() {
    echo $((counted[$1] + $2)) >"$faults/$1/interval"
    echo 1 >"$faults/$1/times"
}

# disarm KIND: whether one has failed; if none has, the count is known again afterwards.
disarm() {
    local interval
    interval=$(<"$faults/$1/interval")
    if (($(<"$faults/$1/times") > 0)); then
        retry 100 spend "$1" || die "the fault of $1 is left"
        counted[$1]=$interval
        return 1
    fi
    counted[$1]=$interval
}

# spend KIND: allocations by the module, some hundreds of them, until one fails.
spend() {
    local other
    if other=$(ploopctl attach "$SCRATCH/spend.img" 2>/dev/null); then
        other=$(grep -oE '/dev/ploop[0-9]+' <<<"$other" | head -n 1)
        ploopctl detach "$other" >/dev/null 2>&1 || detach "$other"
    fi
    (($(<"$faults/$1/times") == 0))
}

# A disk that finds no memory for its name has none, which the kernel calls an invalid argument (device_add_disk).
# shellcheck disable=SC2034 # for fault-ops
kinds=(failslab fail_page_alloc) size=$((3 << 20)) step=2 excuse='errno 12$|os error 12\)|Cannot allocate memory|Out of memory|cannot add a device: Invalid argument$' may_poison=0
# shellcheck disable=SC2034
sure='attach snapshot merge_top merge_lower grow'
ploopctl create -s 64M -b 64K "$SCRATCH/spend.img" >/dev/null
. "$(dirname "$0")/fault-ops"
