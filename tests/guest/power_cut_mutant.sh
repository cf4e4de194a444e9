#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The proof that power_cut.sh would notice: a module that acknowledges a FLUSH
# without doing anything loses acknowledged writes in the same test, and so does
# one that takes FUA for nothing.
# timeout: 240
# module: none
# mutant: skip_flush ignore_fua
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/power-cut-lib"

# loses MUTANT MODE: some cut must.
loses() {
    local mutant=$1 lost=0 cut
    insmod "$BIN/ploop-mutant-$mutant.ko"
    record "$2" 4
    for ((cut = 1; cut <= 4; cut++)); do
        keeps "$cut" || lost=$((lost + 1))
    done
    rmmod ploop
    ((lost > 0)) || die "$mutant: no cut lost anything"
    note "$mutant: $lost of 4 cuts lost acknowledged writes, as they should"
}

loses skip_flush flush
loses ignore_fua fua
