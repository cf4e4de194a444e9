#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# An image grows by what is written: a small write to a fresh cluster writes
# that much and does not pad it with zeros, and yet the rest of it reads as zeros.
# What was preallocated ahead is cut at detach, and the length is a cluster
# multiple.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
# Nothing else writes there.
mount -o remount,noinit_itable "$SCRATCH"
image=$SCRATCH/disk.img
ploopctl create -s 1G "$image" >/dev/null
device=$(attach "$image")
# The first growth, before anything is counted.
head -c 4k /dev/urandom | dd of="$device" bs=4k seek=9 oflag=direct conv=fsync status=none
disk=$(scratch_disk 0)
written() { sync; awk '{ print $7 * 512 }' "/sys/block/${disk##*/}/stat"; }
before=$(written)
for cluster in 3 100 700; do
    head -c 4k /dev/urandom | dd of="$device" bs=4k seek=$((cluster * 256 + 9)) oflag=direct conv=fsync status=none
done
bytes=$(($(written) - before))
# Data and index; some slack for the file system's journal.
((bytes <= 600 << 10)) || die "three writes of 4 KiB wrote $bytes bytes"
cmp -n $((36 << 10)) -i $((100 << 20)):0 "$device" /dev/zero || die "the cluster's begin is not zero"
cmp -n $((900 << 10)) -i $(((100 << 20) + (40 << 10))):0 "$device" /dev/zero || die "its end is not zero"
detach "$device"
# The file system has no more than that either.
used=$(stat -c '%b * %B' "$image")
((used <= (5 << 20) + 65536)) || die "five clusters take $((used)) bytes"
size=$(stat -c %s "$image")
((size % (1 << 20) == 0)) || die "length $size is not a cluster multiple"
expect_same "$size" $((5 << 20)) "length of header and four clusters"

# A clean image may end in clusters that nothing names and that hold old data:
# they must not show through.
head -c 3M /dev/urandom >>"$image"
device=$(attach "$image")
printf x | dd of="$device" bs=1 seek=$((500 << 20)) conv=fsync status=none
cmp -n 1000000 -i $(((500 << 20) + 4096)):0 "$device" /dev/zero || die "old data shows in a fresh cluster"
detach "$device"
