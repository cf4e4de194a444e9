#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# One writer or many readers: a second attach is refused whoever holds the image,
# we or QEMU, and QEMU is refused while we hold it; messages tell the cases apart.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 64M "$image" >/dev/null
ln "$image" "$SCRATCH/other-name.img"

device=$(attach "$image")
status=0
said=$(ploopctl attach "$SCRATCH/other-name.img" 2>&1) || status=$?
expect_same "$status" 37 'status of a second attach'
[[ $said == *"$device"* || $said == *"${device##*/}"* ]] || die "the holder is not named: $said"
expect_fail ploopctl attach -r "$image"
expect_fail ploopctl check --repair "$image"
# Past the tool: the module knows by itself.
said=$(plooptest attach-raw "$image" 2>&1) && die "the module attached it twice"
[[ $said == *busy* ]] || die "the module says: $said"
said=$(qemu-io -f parallels -c 'write 0 4k' "$image" 2>&1) && die "QEMU writes to an attached image"
[[ $said == *lock* ]] || die "QEMU says: $said"
detach "$device"

# QEMU holds it.
qemu-io -f parallels -c 'write 0 4k' -c 'sleep 60000' "$image" >/dev/null &
qemu=$!
retry 20 grep -q ":$(stat -c %i "$image") " /proc/locks || die "QEMU took no lock"
status=0
said=$(ploopctl attach "$image" 2>&1) || status=$?
expect_same "$status" 37 'status of attach while QEMU has the image'
[[ $said == *QEMU* || $said == *qemu* ]] || die "the tool says: $said"
said=$(plooptest attach-raw "$image" 2>&1) && die "the module attached an image that QEMU has open"
kill "$qemu"
wait "$qemu" || true
# The mark that QEMU left is repaired.
device=$(attach "$image")
detach "$device"
