#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The tracepoints of the slow path say what happened: a slot for a first write, a
# copy for a write over a lower delta, a slot lost to a discard, commits and growth;
# nothing for an overwrite; and when the queue is held.
. "$(dirname "$0")/lib.sh"

trace_fs
[[ -d $trace/events/ploop ]] || die "no events/ploop in tracefs"
scratch_fs ext4
ploopctl create -s 64M "$SCRATCH/0.img" >/dev/null
device=$(attach "$SCRATCH/0.img")
echo 1 >"$trace/events/ploop/enable"

# traced COMMAND...: what was traced meanwhile.
traced() {
    : >"$trace/trace"
    "$@" >&2
    grep -o 'ploop_[a-z]*: .*' "$trace/trace" || true
}

put() { dd if=/dev/urandom of="$device" bs="$1" count=1 seek="$2" oflag=direct conv=notrunc status=none; }

seen=$(traced put 4k 0)
grep -q 'ploop_map: ploop0 cluster 0 slot 1$' <<<"$seen" || die "first write: $seen"
seen=$(traced put 4k 0)
grep -qE 'ploop_(map|copy|unmap)' <<<"$seen" && die "overwrite: $seen"
seen=$(traced sync "$device")
grep -q 'ploop_commit: ploop0: 0$' <<<"$seen" || die "flush: $seen"
seen=$(traced blkdiscard -l 1M "$device")
grep -q 'ploop_unmap: ploop0 cluster 0 slot 1$' <<<"$seen" || die "discard: $seen"
put 4k 256
ploopctl create -s 64M "$SCRATCH/1.img" >/dev/null
seen=$(traced plooptest snapshot "$device" "$SCRATCH/1.img")
grep -A1 "ploop_hold: ploop0: 1$" <<<"$seen" | grep -q "ploop_hold: ploop0: 0$" || die "snapshot: $seen"
seen=$(traced put 4k 257)
grep -qE 'ploop_copy: ploop0 level 0 slot [12] to slot 1: 0$' <<<"$seen" || die "copy: $seen"
echo 0 >"$trace/events/ploop/enable"
detach "$device"
