#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The proof that power_cut.sh would notice: a module that acknowledges a FLUSH
# without doing anything loses acknowledged writes in the same test.
# timeout: 200
# module: none
# mutant: skip_flush
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/power-cut-lib"

insmod "$BIN/ploop-mutant-skip_flush.ko"
record 5
lost=0
for ((cut = 1; cut <= 5; cut++)); do
    restore "$cut"
    status=0
    device=$(attach "$SCRATCH/disk.img")
    plooptest seqverify "$device" --acked "$(<"$TEST_DIR/acked.$cut")" --blocks "$blocks" >&2 || status=$?
    ((status < 2)) || die "cannot verify cut $cut"
    lost=$((lost + status))
    detach "$device"
    forget
done
((lost > 0)) || die "no cut lost anything although FLUSH does nothing"
note "$lost of 5 cuts lost acknowledged writes, as they should"
