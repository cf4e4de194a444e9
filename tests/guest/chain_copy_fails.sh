#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A copy from a lower delta that fails, for a bad spot there or for want of space
# in the top, fails its write and nothing else: the disk reads as before there.
# When the reason is gone the write succeeds.
. "$(dirname "$0")/lib.sh"

disk=$(scratch_disk 0)
c=65536 sectors=$((16 << 11))
dmsetup create below --table "0 $sectors linear $disk 0"
head -c 16M /dev/urandom >"$TEST_DIR/model"
dd if="$TEST_DIR/model" of=/dev/mapper/below bs=1M conv=fsync status=none
# The base is the block device, the top has little space.
scratch_fs tmpfs 0 size=8M
ploopctl create -s 16M -b 64K "$SCRATCH/top.img" >/dev/null
device=$(attach -f raw /dev/mapper/below "$SCRATCH/top.img")

# put OFFSET BYTES: to the disk and, if that succeeds, to the model.
put() {
    head -c "$2" /dev/urandom >"$TEST_DIR/part"
    dd if="$TEST_DIR/part" of="$device" bs="$2" seek="$1" oflag=seek_bytes,direct conv=notrunc status=none 2>"$TEST_DIR/why" || return 1
    dd if="$TEST_DIR/part" of="$TEST_DIR/model" bs="$2" seek="$1" oflag=seek_bytes conv=notrunc status=none
}

same() {
    drop_caches
    expect_same_bytes "$device" "$TEST_DIR/model"
}

# In the middle of clusters 16, 20 and 24.
table='' from=0
for bad in $((16 * 128 + 64)) $((20 * 128 + 64)) $((24 * 128 + 64)); do
    table+="$from $((bad - from)) linear $disk $from"$'\n'"$bad 8 error"$'\n'
    from=$((bad + 8))
done
below "$table$from $((sectors - from)) linear $disk $from"
drop_caches
for at in $((16 * c)) $((20 * c + 4096)); do
    ! put "$at" 512 || die "a write succeeded without its copy"
    grep -q 'Input/output error' "$TEST_DIR/why" || die "the write says $(<"$TEST_DIR/why")"
done
put $((17 * c + 512)) 512
# What is not to be copied need not be read.
put $((16 * c)) $c
put $((24 * c + 32768)) 4096
for at in 16 17 18 24; do
    cmp -n $c -i $((at * c)) "$device" "$TEST_DIR/model" >&2 || die "cluster $at is wrong"
done
cmp -n 32768 -i $((20 * c)) "$device" "$TEST_DIR/model" >&2 || die "cluster 20 is wrong"
below "0 $sectors linear $disk 0"
same
put $((20 * c + 4096)) 512
same

note 'no space in the top, and writes shall not wait for it'
echo fail >"/sys/block/${device##*/}/ptune/on_full"
failed=0
for ((at = 24; at < 256; at++)); do put $((at * c + 1024)) 512 || failed=$((failed + 1)); done
grep -q 'No space left' "$TEST_DIR/why" || die "the write says $(<"$TEST_DIR/why")"
((failed > 50 && failed < 200)) || die "$failed writes failed"
same
mount -o remount,size=64M "$SCRATCH"
for ((at = 250; at < 256; at++)); do put $((at * c + 2048)) 512; done
same
detach "$device"
device=$(attach -f raw /dev/mapper/below "$SCRATCH/top.img")
same
detach "$device"
ploopctl check "$SCRATCH/top.img" >&2
dmsetup remove --retry below
