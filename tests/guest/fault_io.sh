#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The n-th read, write or flush below the images fails, once, for n from 1 on until the
# operation has no n-th one: attaching, detaching, a copy from below with a flush, reading,
# snapshot, merge of the top. Each succeeds or ends with an error; what was flushed before is
# there, if need be after attaching anew, and the operation can be run to its end.
# timeout: 1200
# boot: kmemleak=on
. "$(dirname "$0")/lib.sh"

seed=${SEED:-$RANDOM}
note "seed $seed"
RANDOM=$seed
# Only the images' data fails, or their file system would be what is tested: it is on a
# device of its own.
modprobe nbd
"$(dirname "$0")/faulty-disk" /dev/nbd0 "$(scratch_disk 1)" "$TEST_DIR" &
retry 120 eval '[[ $(blockdev --getsize64 /dev/nbd0) -gt 0 ]]'
mkdir -p "$SCRATCH"
mkfs.xfs -q -f -K -d rtinherit=1 -r rtdev=/dev/nbd0,extsize=4096 "$(scratch_disk 0)"
mount -t xfs -o rtdev=/dev/nbd0 "$(scratch_disk 0)" "$SCRATCH" || {
    ! test_log | grep 'Not built with CONFIG_XFS_RT' || skip 'xfs of this kernel has no realtime device'
    die 'xfs cannot be mounted with its realtime device'
}

# arm io N
arm() {
    rm -f "$TEST_DIR/failed"
    echo "$2" >"$TEST_DIR/nth.new"
    mv "$TEST_DIR/nth.new" "$TEST_DIR/nth"
}

# disarm io
disarm() {
    local failed=1
    [[ ! -e $TEST_DIR/failed ]] || failed=0
    arm io 0
    return "$failed"
}

# shellcheck disable=SC2034 # for fault-ops
kinds=(io) size=$(($(share 2 8) << 20)) step=1 excuse='errno 5$|os error 5\)|(I/O|Input/output) error' may_poison=1
# Checkpoints are in memory.
# shellcheck disable=SC2034
sure='attach detach cow read snapshot merge_top merge_lower track sync write discard compact grow'
. "$(dirname "$0")/fault-ops"
umount "$SCRATCH"
