#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Twenty power cuts under a load that makes every write durable, on a disk that
# drops what was not flushed: the image is repaired without loss by attach, and
# every write that was acknowledged is there.
# timeout: 300
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/power-cut-lib"

record 16
for ((cut = 1; cut <= 16; cut++)); do
    restore "$cut"
    device=$(attach "$SCRATCH/disk.img")
    plooptest seqverify "$device" --acked "$(<"$TEST_DIR/acked.$cut")" --blocks "$blocks" >&2 ||
        die "cut $cut lost acknowledged writes"
    detach "$device"
    ploopctl check "$SCRATCH/disk.img" >/dev/null || die "cut $cut left a damaged image"
    forget
done

note 'the same with FUA instead of flushes'
record 4 --fua
for ((cut = 1; cut <= 4; cut++)); do
    restore "$cut"
    device=$(attach "$SCRATCH/disk.img")
    plooptest seqverify "$device" --acked "$(<"$TEST_DIR/acked.$cut")" --blocks "$blocks" >&2 ||
        die "cut $cut lost FUA writes"
    detach "$device"
    forget
done
