#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Somebody cuts the image file while it is attached: requests to what is gone
# fail and do not make the file longer again, which would hide that data is gone;
# what is still there is read; detach says that the image is not clean, and the
# next attach refuses it until somebody has decided to do without. So it is when the
# top is merged at that moment. With the blocks pinned nobody can: see inline_io.
# module: bdev=0
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 64M "$image" >/dev/null
device=$(attach "$image")
head -c 16M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=1M conv=fsync oflag=direct status=none
truncate -s 9M "$image"
drop_caches
cmp -n $((7 << 20)) "$device" "$TEST_DIR/data" || die "good clusters cannot be read"
expect_fail dd if="$device" of=/dev/null bs=1M skip=12 count=1 iflag=direct status=none
for cluster in 14 40; do
    expect_fail timeout "$(limit 20)" dd if="$TEST_DIR/data" of="$device" bs=4k seek=$((cluster << 8)) count=1 \
        oflag=direct status=none
done
expect_same "$(stat -c %s "$image")" $((9 << 20)) 'length after writes behind the end'
cmp -n $((7 << 20)) "$device" "$TEST_DIR/data" || die "good clusters cannot be read any more"

udevadm settle -t 10 || true
expect_fail ploopctl detach "$device"
[[ ! -e /sys/block/${device##*/} ]] || die "the device is still there"
expect_same "$(stat -c %s "$image")" $((9 << 20)) 'length after detach'
expect_fail ploopctl attach "$image"
ploopctl check --repair "$image" >&2
device=$(attach "$image")
cmp -n $((7 << 20)) "$device" "$TEST_DIR/data" || die "good clusters were lost by the repair"
detach "$device"

note 'the source of the merge of the top, which is undone'
for i in 0 1; do ploopctl create -s 64M "$SCRATCH/$i.img" >/dev/null; done
device=$(attach "$SCRATCH"/[01].img)
dd if="$TEST_DIR/data" of="$device" bs=1M conv=fsync oflag=direct status=none
plooptest op --rate $((1 << 20)) --start "$device" merge top
sleep 1
truncate -s 9M "$SCRATCH/1.img"
plooptest op-rate "$device" 0
expect_fail timeout "$(limit 60)" plooptest op-wait "$device"
expect_same "$(nr_levels "$device")" 2 levels
# Which of its slots are free is not known any more: a new cluster would get one that is in use.
expect_same "$(<"/sys/block/${device##*/}/pstate/aborted")" 1 aborted
expect_fail timeout "$(limit 20)" dd if="$TEST_DIR/data" of="$device" bs=1M seek=40 count=1 oflag=direct status=none
expect_same "$(stat -c %s "$SCRATCH/1.img")" $((9 << 20)) 'length after the merge'
udevadm settle -t 10 || true
expect_fail ploopctl detach "$device"
