#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# An image file works on ext4, xfs, btrfs and tmpfs, and on a file system
# without direct I/O (ramfs): thin, synced, and the same after attach again. A signal
# to the caller does not count as a failure of the file system.
# timeout: 240
. "$(dirname "$0")/lib.sh"

# Nothing that compression or a search for zeros makes smaller.
head -c 16M /dev/urandom >"$TEST_DIR/data"

use() {
    local kind=$1 image=$SCRATCH/disk.img device
    note "$kind"
    ploopctl create -s 256M -b 64K "$image" >/dev/null
    device=$(attach "$image")
    dd if="$TEST_DIR/data" of="$device" bs=256K seek=100 oflag=direct conv=fsync status=none
    dd if="$TEST_DIR/data" of="$device" bs=4k count=1 seek=40000 conv=fsync status=none
    drop_caches
    cmp <(dd if="$device" bs=256K skip=100 count=64 status=none) "$TEST_DIR/data" ||
        die "$kind: reads back wrong"
    detach "$device"
    (($(stat -c %s "$image") <= 20 << 20)) || die "$kind: the image is not thin"
    ploopctl check "$image" >&2
    device=$(attach "$image")
    cmp <(dd if="$device" bs=256K skip=100 count=64 status=none) "$TEST_DIR/data" ||
        die "$kind: wrong after attach again"
    cmp -n 4096 -i 163840000:0 "$device" "$TEST_DIR/data" || die "$kind: the small write is lost"
    detach "$device"
}

for kind in ext4 xfs btrfs tmpfs; do
    scratch_fs "$kind"
    use "$kind"
    umount "$SCRATCH"
done

note 'who makes it durable is killed, where file I/O of who is killed does not go on'
scratch_fs ext4 0 data=journal
ploopctl create -s 256M -b 64K "$SCRATCH/disk.img" >/dev/null
device=$(attach "$SCRATCH/disk.img")
expect_same "$(<"/sys/block/${device##*/}/pdelta/0/io")" buffered 'kind of I/O'
# It has nothing to wait for if all was made durable meanwhile, as it is every five seconds.
for try in 1 2 3 4 5; do
    dd if="$TEST_DIR/data" of="$device" bs=64K count=4 seek=$((600 + try * 4)) oflag=direct status=none
    fsfreeze -f "$SCRATCH"
    plooptest sync "$device" &
    syncer=$!
    sleep 2
    ! kill -0 "$syncer" || break
    fsfreeze -u "$SCRATCH"
    wait "$syncer"
done
kill -KILL "$syncer"
sleep 1
fsfreeze -u "$SCRATCH"
wait "$syncer" || note "the one that was killed: status $?"
expect_same "$(<"/sys/block/${device##*/}/pstate/aborted")" 0 'writes refused'
dd if="$TEST_DIR/data" of="$device" bs=64K count=4 seek=640 oflag=direct conv=fsync status=none
cmp -n 262144 -i $(((600 + try * 4) << 16)):0 "$device" "$TEST_DIR/data" >&2 || die 'what was synced is lost'
detach "$device"
ploopctl check "$SCRATCH/disk.img" >&2
umount "$SCRATCH"

mkdir -p "$SCRATCH"
mount -t ramfs ramfs "$SCRATCH"
use ramfs
umount "$SCRATCH"
