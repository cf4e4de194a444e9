#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The power is cut at every write below (in `make test`, at some of them) while a disk with a checkpoint is detached,
# attached, written to and detached again. What the image has of the checkpoint after that tells all that was written
# since it was made; or it has none.
# timeout: 500
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/power-cut-lib"

g=65536 nr_clusters=96

# put CLUSTER: other data at the end of it, durable.
put() { head -c 4096 /dev/urandom | dd of="$device" bs=4096 seek=$(($1 * g / 4096 + 15)) iflag=fullblock conv=notrunc,fsync status=none; }

mark() { dmsetup message logged 0 mark "$1"; }

note 'what is recorded'
begin_log 160
image=$SCRATCH/0.img
ploopctl create -s $((nr_clusters * g)) -b 64K "$image" >/dev/null
device=$(attach "$image")
head -c $((nr_clusters * g)) /dev/urandom >"$TEST_DIR/then"
dd if="$TEST_DIR/then" of="$device" bs=64k conv=fsync status=none
# As fine as they are, its bits are some clusters of the image.
plooptest checkpoint start --granularity 4096 "$device" 1
for at in 3 4 20 95; do put "$at"; done
mark begin
detach "$device"
mark kept
device=$(attach "$image")
expect_same "$(points)" 1 'checkpoints after attaching again'
for at in 0 41 42; do
    put "$at"
    mark "written$at"
done
detach "$device"
mark again
end_log

# look ENTRY SEED: sets `nr_points`.
look() {
    look_at "$1" "$2"
    device=$(attach "$image")
    nr_points=$(points)
    if ((nr_points > 0)); then
        plooptest checkpoint read "$device" 1 >"$TEST_DIR/extents" || die "cut $1: the checkpoint cannot be read"
        cp "$TEST_DIR/then" "$TEST_DIR/now"
        copy_extents "$device" "$TEST_DIR/now" <"$TEST_DIR/extents"
        expect_same_bytes "$TEST_DIR/now" "$device"
    fi
    detach "$device"
    ploopctl check "$image" >&2
    look_away
}

tried=0 with=0
while read -r -u 9 at seed want; do
    look "$at" "$seed"
    [[ -z $want ]] || expect_same "$nr_points" "$want" "checkpoints after a cut at entry $at"
    tried=$((tried + 1)) with=$((with + nr_points))
done 9< <({
    # What there must be at the marks.
    for at in begin:0 kept:1 written0:0 written42:0 again:1; do echo "$(entry_of "${at%:*}") 0 ${at#*:}"; done
    cuts "$(entry_of begin)" "$(entry_of again)" "$(share 7 1000)"
} | sort -s -n -k 1,1)
note "$with of $tried cuts left the checkpoint"
((tried > 16)) || die 'hardly any cut was tried'
