#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# I/O is accounted to the cgroup that submitted it, on the ploop disk and on the
# disk below, and not to whoever carries it out.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
ploopctl create -s 64M "$SCRATCH/disk.img" >/dev/null
device=$(attach "$SCRATCH/disk.img")
group=/sys/fs/cgroup/ploop-io
echo +io >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || skip "no io controller"
mkdir "$group"
trap 'rmdir "$group"' EXIT

# written DISK: bytes that the group wrote to it.
written() {
    local number
    number=$(<"/sys/block/${1##*/}/dev")
    sed -n "s/^$number .*wbytes=\([0-9]*\).*/\1/p" "$group/io.stat"
}

# shellcheck disable=SC2016 # the inner shell's
bash -c 'echo $$ >"$1/cgroup.procs"; exec dd if=/dev/urandom of="$2" bs=1M count=8 oflag=direct status=none' _ "$group" "$device"
cat "$group/io.stat" >&2
ours=$(written "$device")
below=$(written "$(scratch_disk 0)")
((${ours:-0} >= 8 << 20)) || die "the disk counts ${ours:-nothing}"
((${below:-0} >= 8 << 20)) || die "the disk below counts ${below:-nothing}"
detach "$device"
