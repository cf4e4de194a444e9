#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Power cuts during snapshots, merges, merges that are cancelled, growth and
# compaction, under a load that makes every write durable: the images that there were
# at that moment, attached (which repairs them), hold every acknowledged write, and
# around the writes what was there before. Under an ext4 with fio and trims, too, which
# is sound then.
# timeout: 600
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/power-cut-lib"
. "$(dirname "$0")/op-power-cut-lib"

for kind in chain middle cancel grow compact fs; do try "$kind" "$(share 2 60)"; done
