#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Every ioctl answers bad pointers, bad fields, wrong states, unknown numbers and
# unprivileged callers with the documented error, and leaves the state as it was.
. "$(dirname "$0")/lib.sh"

scratch_fs tmpfs
ploopctl create -s 64M "$SCRATCH/disk.img" >/dev/null
plooptest ioctl-table "$SCRATCH/disk.img" >&2
ploopctl check "$SCRATCH/disk.img" >&2
# The versions of tool and module are those of one build.
mapfile -t version < <(ploopctl --version)
[[ ${version[1]-} == "module ${version[0]#ploopctl } (interface "*')' ]] || die "--version says: ${version[*]}"
