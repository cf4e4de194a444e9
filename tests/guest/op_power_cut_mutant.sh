#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The proof that op_power_cut.sh and op_power_cut_steps.sh would notice: with a module that takes
# clusters out of the source of a merge before the destination's index has them, a cut in the merge
# loses what was acknowledged.
# timeout: 600
# module: none
# mutant: drop_before_index
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/power-cut-lib"
. "$(dirname "$0")/op-power-cut-lib"

above() {
    snapshot 1
    # Something in many clusters.
    sleep 1
}

a_merge() { plooptest op "$device" merge top; }

insmod "$BIN/ploop-mutant-drop_before_index.ko"
# The kind whose base has next to nothing: only new places can be lost.
begin_step grow above a_merge
# Few of them first, each time from the beginning.
for stride in 8 4 2 1; do
    blkdiscard -f "$replay_disk"
    rm -f "$TEST_DIR/replay"
    for ((entry = first; entry <= end; entry += stride)); do
        if ! keeps_ops 1 "$entry"; then
            note "the cut after $((entry - first)) entries lost something, as it should"
            rmmod ploop
            pass
        fi
    done
done
die 'no cut lost anything'
