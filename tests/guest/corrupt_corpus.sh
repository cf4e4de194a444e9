#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Hundreds of damaged images, attached past the tool: each is refused with the
# file unchanged, exactly if something is wrong with it, or else it is served;
# nothing is harmed either way.
# timeout: 200
. "$(dirname "$0")/lib.sh"

scratch_fs tmpfs
for version in 1 2; do
    image=$SCRATCH/good$version.img
    ploopctl create -s 8M -b 32K --format-version $version "$image" >/dev/null
    device=$(attach "$image")
    for at in 0 40 41 90 200; do
        head -c 40k /dev/urandom | dd of="$device" bs=32k seek=$at conv=fsync iflag=fullblock status=none
    done
    detach "$device"
    note "version $version"
    plooptest corpus --seed $((version * 1000)) --count 250 "$image" "$SCRATCH/damaged.img" >&2
done
# Each refusal said which field.
expect_log 'm_Sectors|m_FirstBlockOffset|m_Size|m_Type|m_Sig'
expect_log 'BAT\['
