#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The power is cut at every write below (in `make test`, at some of them), in one snapshot, one merge of the top, one
# that is cancelled, and one growth that moves a cluster, each under load: what was
# acknowledged before it began is there, and what was interrupted can be done again.
# timeout: 700
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/power-cut-lib"
. "$(dirname "$0")/op-power-cut-lib"

# shellcheck disable=SC2034 # for the libraries
blocks=60 small=6
most=$(share 3 1000)

nothing() { :; }

a_snapshot() { plooptest snapshot --cluster-log "$log" "$device" "$SCRATCH/1.img"; }

# The image is listed and durable before the first cut.
new_image() {
    ploopctl create -s "$size" -b "$cluster" "$SCRATCH/1.img" >/dev/null
    sync -f "$SCRATCH"
    say "$SCRATCH/0.img $SCRATCH/1.img"
}

above() {
    new_image
    a_snapshot
    # Something in most clusters.
    sleep 1
}

a_merge() { plooptest op "$device" merge top; }

merging() {
    above
    plooptest op --start --rate 150000 "$device" merge top
    sleep 0.5
}

a_cancel() {
    plooptest op-cancel "$device"
    plooptest op-wait "$device" || true
    sleep 0.2
}

a_growth() { plooptest op "$device" grow $((300 << 11)); }

try_step chain merging a_cancel "$most"
try_step chain new_image a_snapshot "$most"
try_step chain above a_merge "$most"
try_step grow nothing a_growth "$most"
