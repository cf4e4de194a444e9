#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# What ploopctl does to images that are attached and have no descriptor: growing,
# compacting and merging them by the kernel, steering that, trimming, looking at one that grows, and
# detaching a device that is held up. The disk always reads as written.
# timeout: 240
. "$(dirname "$0")/lib.sh"

need jq e2fsck strace

scratch_fs ext4
cd "$SCRATCH"
at=$TEST_DIR/mnt
mkdir "$at"

is_running() { [[ $(operation "$1" .running) == true ]]; }
is_full() { [[ $(ploopctl info --json "$1" | jq -r .device.space) == full ]]; }
operation() { ploopctl op status --json "$1" | jq -r "$2"; }

note 'an image is grown, trimmed and compacted while a file system on it is in use'
ploopctl create -s 128M -b 64K image
device=$(attach image)
mkfs.ext4 -q -b 4096 "$device"
mount "$device" "$at"
head -c 8M /dev/urandom >"$TEST_DIR/kept"
head -c 48M /dev/urandom >"$at/gone"
cp "$TEST_DIR/kept" "$at/kept"
sync -f "$at"
ploopctl resize -s 256M image
expect_same "$(blockdev --getsize64 "$device")" $((256 << 20)) size
ploopctl resize -s 256M "$device"
expect_fail ploopctl resize -s 128M "$device"
rm "$at/gone"
sync -f "$at"
ploopctl trim image | tee "$TEST_DIR/said"
grep -q "^$at: .* trimmed" "$TEST_DIR/said" || die 'nothing was trimmed'
before=$(stat -c %s image)
listen
ploopctl compact "$device"
after=$(stat -c %s image)
((after + (30 << 20) < before)) || die "compacted from $before to $after"
expect_event "DEVNAME=$device" PLOOP_OP=compact PLOOP_ERRNO=0
expect_same_bytes "$at/kept" "$TEST_DIR/kept"
# A detach that cannot be lets nothing fail.
expect_fail ploopctl detach --force "$device" 2>"$TEST_DIR/said"
grep -q "in use: mounted at $at" "$TEST_DIR/said" || die "detach said $(<"$TEST_DIR/said")"
# Nor where it is mounted for others only.
unshare --mount sh -c "touch '$TEST_DIR/apart'; exec sleep 3600" &
apart=$!
retry 20 test -e "$TEST_DIR/apart" || die 'no mount namespace'
umount "$at"
expect_fail ploopctl detach --force "$device" 2>"$TEST_DIR/said"
grep -q "mounted at $at in the mount namespace of process $apart" "$TEST_DIR/said" || die "detach said $(<"$TEST_DIR/said")"
kill "$apart"
wait "$apart" || true
retry 20 test ! -e "/sys/fs/ext4/${device##*/}" || die 'it stays mounted'
ploopctl trim "$device" 2>"$TEST_DIR/said"
grep -q 'nothing is trimmed' "$TEST_DIR/said" || die 'trimmed what is not mounted'
e2fsck -f -n "$device" >/dev/null || die 'the file system is damaged'
detach "$device"
qemu-img check -q -f parallels image || die 'the image is damaged'

note 'a detach by force that is ended leaves writes as they were'
device=$(attach image)
exec 8<"$device"
fails_when_full() { [[ $(<"/sys/block/${device##*/}/ptune/on_full") == fail ]]; }
ploopctl detach --force "$device" 2>"$TEST_DIR/said" &
detach=$!
retry 20 fails_when_full
kill -TERM "$detach"
wait "$detach" || true
! fails_when_full || die 'writes that find no space fail from now on'
exec 8<&-

note 'what comes while info looks is no damage'
# Stopped when it knows the length of the file, but no entries.
strace -o "$TEST_DIR/calls" -e trace=pread64 -e inject=pread64:signal=STOP:when=2 \
    ploopctl info --json "$device" >"$TEST_DIR/said" &
tracer=$!
retry 20 grep -qs 'stopped by SIGSTOP' "$TEST_DIR/calls"
dd if=/dev/urandom of="$device" bs=1M seek=128 count=32 conv=fsync status=none
pkill -CONT -P "$tracer" -x ploopctl
wait "$tracer"
expect_same "$(jq .damaged "$TEST_DIR/said")" false damaged

note 'a detach that waits does not stop who has got the number by then'
ploopctl create -s 64M -b 64K other
exec 8>/run/ploopctl.lock
flock 8
ploopctl detach "$device" 2>"$TEST_DIR/said" 8>&- &
detach=$!
waits() { readlink "/proc/$detach/fd"/* | grep -qx /run/ploopctl.lock; }
retry 20 waits
# Who comes now has another lock.
rm /run/ploopctl.lock
detach "$device"
expect_same "$(attach other)" "$device" 'the number'
exec 8>&-
status=0
wait "$detach" || status=$?
expect_same "$status" 40 "the status of the detach, which says $(<"$TEST_DIR/said")"
expect_same "$(images_of "$device")" "$SCRATCH/other" 'images'
detach "$device"
rm image other

note 'a merge is watched, slowed down, ended, and done'
ploopctl create -s 128M -b 64K base
ploopctl create -s 128M -b 64K top
device=$(attach base)
head -c 32M /dev/urandom >"$TEST_DIR/below"
dd if="$TEST_DIR/below" of="$device" bs=1M conv=fsync status=none
detach "$device"
device=$(attach base top)
head -c 24M /dev/urandom >"$TEST_DIR/above"
dd if="$TEST_DIR/above" of="$device" bs=1M conv=fsync status=none
cp "$TEST_DIR/below" "$TEST_DIR/want"
dd if="$TEST_DIR/above" of="$TEST_DIR/want" bs=1M conv=notrunc status=none
same() { cmp -n $((32 << 20)) "$device" "$TEST_DIR/want" || die 'the disk changed'; }
expect_same "$(operation "$device" .operation)" null operation
expect_fail ploopctl op rate 1M "$device"
# By another name the base may be a clone's.
ln base other
expect_fail ploopctl merge "$device" 2>"$TEST_DIR/said"
grep -q 'has 2 names' "$TEST_DIR/said" || die "merge said $(<"$TEST_DIR/said")"
rm other
ploopctl merge --rate 1M "$device" &
merge=$!
retry 20 is_running top
expect_same "$(operation "$device" .operation)" merge operation
expect_same "$(operation "$device" .rate)" $((1 << 20)) rate
ploopctl list | grep -q ' merge ' || die 'list does not show it'
ploopctl info "$device" | grep -q '^operation: *merge' || die 'info does not show it'
ploopctl info --json "$device" | jq -e '.operation.running' >/dev/null
expect_fail ploopctl detach "$device" 2>"$TEST_DIR/said"
grep -q 'detach --force' "$TEST_DIR/said" || die "detach said $(<"$TEST_DIR/said")"
ploopctl op rate 512K "$device"
expect_same "$(operation "$device" .rate)" $((512 << 10)) rate
ploopctl op cancel "$device"
status=0
wait "$merge" || status=$?
expect_same "$status" 29 'status of the merge that was ended'
expect_event "DEVNAME=$device" PLOOP_OP=merge PLOOP_ERRNO=125
same
# Its tool killed, the operation goes on: for most of a minute, unless it is allowed more.
ploopctl merge --rate 512K base top &
merge=$!
retry 20 is_running top
kill -KILL "$merge"
wait "$merge" || true
expect_same "$(operation "$device" .running)" true 'running without its tool'
ploopctl op rate 0 base
ploopctl op wait base
expect_same "$(ploopctl info --json "$device" | jq '.device.deltas | length')" 1 deltas
same
expect_fail ploopctl merge "$device"
detach "$device"
qemu-img check -q -f parallels base || die 'the image is damaged'

note 'a device that merges is detached by force'
rm top
ploopctl create -s 128M -b 64K top
device=$(attach base top)
dd if="$TEST_DIR/above" of="$device" bs=1M seek=32 conv=fsync status=none
ploopctl merge --rate 256K "$device" &
merge=$!
retry 20 is_running top
ploopctl detach --force top
status=0
wait "$merge" || status=$?
expect_same "$status" 29 'status of the merge'
device=$(attach base top)
same
cmp "$TEST_DIR/above" <(dd if="$device" bs=1M skip=32 count=24 status=none) || die 'the rest changed'
detach "$device"

note 'a device whose writes wait for space is detached by force'
mkdir "$TEST_DIR/small"
mount -t tmpfs -o size=24M tmpfs "$TEST_DIR/small"
ploopctl create -s 64M -b 64K "$TEST_DIR/small/image"
device=$(attach "$TEST_DIR/small/image")
dd if=/dev/urandom of="$device" bs=1M count=40 oflag=direct status=none 2>"$TEST_DIR/said" &
writer=$!
retry 20 is_full "$device"
ploopctl list | grep -q ' full ' || die 'list does not show it'
ploopctl info "$device" | grep -q '^space: *none left' || die 'info does not show it'
expect_fail ploopctl detach "$device"
ploopctl detach --force "$device"
expect_fail wait "$writer"
grep -q 'No space left' "$TEST_DIR/said" || die "the write said $(<"$TEST_DIR/said")"
ploopctl check "$TEST_DIR/small/image"
umount "$TEST_DIR/small"
