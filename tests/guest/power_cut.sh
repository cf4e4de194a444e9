#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Twelve power cuts (soak: 250) under a load that makes every write durable, on a disk that
# drops what was not flushed: the image is repaired without loss by attach, and
# every write that was acknowledged is there; also where writes and flushes go past the file
# system that holds the image.
# timeout: 300
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/power-cut-lib"

# try MODE CUTS
try() {
    local cut
    record "$1" "$2"
    for ((cut = 1; cut <= $2; cut++)); do
        keeps "$cut" || die "$1: cut $cut lost acknowledged writes"
    done
}

try flush "$(share 4 100)"
try fua "$(share 4 75)"
echo 1 >/sys/module/ploop/parameters/bdev
# judge_load DEVICE
judge_load() {
    local fast
    fast=$(<"/sys/block/${1##*/}/pstate/inline_bios")
    ((fast > 100)) || die "only $fast requests went past the file system"
}
# Few places: each goes through the file system until it is known where it is.
# shellcheck disable=SC2034 # for power-cut-lib
blocks=30 prefill=(--prefill)
try flush "$(share 4 75)"
