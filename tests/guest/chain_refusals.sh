#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# What does not fit on the delta below is refused, by the tool with a message and
# by the module with a line in the kernel log; no image is changed and no device
# is left.
# timeout: 180
. "$(dirname "$0")/lib.sh"

need jq

scratch_fs tmpfs
cd "$SCRATCH"
make() { ploopctl create "$@" >/dev/null; }
make -s 8M -b 64K base
make -s 8M -b 64K top
make -s 8M -b 32K small_clusters
make -s 8M -b 64K --format-version 1 version_1
make -s 16M -b 64K large
make -s 8001K -b 64K uneven
make -f raw -s 8M raw
make -f raw -s 1000K raw_uneven
make -s 8M -b 64K --preallocate marked
printf '\x59\x6e\x6f\x74' | dd of=marked bs=1 seek=44 conv=notrunc status=none
images=(base top small_clusters version_1 large uneven raw raw_uneven marked)
sum=$(sha256sum "${images[@]}")

# nothing_changed WHAT
nothing_changed() {
    expect_same "$(sha256sum "${images[@]}")" "$sum" "images ($1)"
    [[ -z $(ploopctl list) ]] || die "$1: $(ploopctl list)"
}

# tool MESSAGE ARGUMENTS...
tool() {
    local message=$1 said status=0
    shift
    said=$(ploopctl attach "$@" 2>&1) || status=$?
    ((status == 38 || status == 11 || status == 37)) || die "attach $* ended with $status ($said)"
    [[ $said =~ $message ]] || die "attach $* says '$said'"
    nothing_changed "tool, $*"
}

# module LOG ARGUMENTS...
module() {
    local log=$1 said status=0
    shift
    said=$(plooptest attach-raw "$@" 2>&1) || status=$?
    ((status == 1)) && [[ $said == *refused* ]] || die "attach-raw $* says '$said'"
    [[ -z $log ]] || expect_log "ploop.*$log"
    nothing_changed "module, $*"
}

tool 'small_clusters does not fit on base: cluster size' base small_clusters
tool 'base does not fit on version_1: format version' version_1 base
tool 'base does not fit on large: disk size' large base
tool 'top does not fit on large' base large top
tool 'large does not fit on uneven: .*multiple' uneven large
tool 'raw is not a ploop1 image' base raw
tool 'raw is never guessed|-f raw' raw top
tool 'raw_uneven: .*multiple' -f raw -b 64K raw_uneven top
tool 'cluster size' -f raw -b 1M raw top
tool 'given twice' base base
tool 'given twice' -r base top base

module 'cluster size' --cluster-log 7 base small_clusters
module 'cluster size' --cluster-log 6 base small_clusters
module 'format version' --cluster-log 7 version_1 base
module 'disk size is' --cluster-log 7 large base
module 'raw image can only be the base' --cluster-log 7 --above raw base raw
module 'multiple of the cluster size' --cluster-log 7 --format raw raw_uneven top
module 'cluster size' --cluster-log 11 --format raw raw top
module 'open for writing' --cluster-log 7 --all-rw base top
module '' --cluster-log 7 base top base
module '' --cluster-log 7 marked top

note 'and what fits is taken'
detach "$(attach base top)"
detach "$(attach -f raw raw top)"
detach "$(attach base large)"
# Marked below: as it is, if nothing is to be written, else mended.
device=$(attach -r marked top)
detach "$device"
expect_same "$(sha256sum marked)" "$(grep ' marked$' <<<"$sum")" 'the marked image'
ploopctl attach --json marked top >"$TEST_DIR/said"
detach "$(jq -r .device "$TEST_DIR/said")"
jq -e '.repaired[0] | startswith("marked: ")' "$TEST_DIR/said" >&2 || die "the repair was not told: $(<"$TEST_DIR/said")"
ploopctl check marked >&2
cd /
