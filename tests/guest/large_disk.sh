#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A disk of 8 TiB attaches in a moment, its last cluster works, and so does a
# disk on the disk; the lower one cannot be detached meanwhile.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 8T "$image" >/dev/null
device=$(attach "$image")
head -c 1M /dev/urandom >"$TEST_DIR/data"
last=$(((8 << 20) - 1))
dd if="$TEST_DIR/data" of="$device" bs=1M seek=$last conv=fsync status=none
upper=$(attach -f raw "$device")
expect_same "$(blockdev --getsize64 "$upper")" $((8 << 40)) 'size of the upper disk'
cmp -n 1048576 -i $((last << 20)):0 "$upper" "$TEST_DIR/data" || die "the upper disk reads wrong"
dd if="$TEST_DIR/data" of="$upper" bs=1M seek=$((last - 2)) conv=fsync status=none
expect_fail ploopctl detach "$device"
detach "$upper"
detach "$device"
device=$(attach "$image")
cmp -n 1048576 -i $(((last - 2) << 20)):0 "$device" "$TEST_DIR/data" || die "the data is lost"
detach "$device"
ploopctl check "$image" >&2
