#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Snapshots of a disk in use: made, mounted and merged away while a file system on
# it is written to; the tool killed before each of its calls; a disk stacked with
# device mapper. The disk always reads as written, each snapshot as it was.
# timeout: 600
. "$(dirname "$0")/lib.sh"

need strace dmsetup e2fsck blkid

scratch_fs ext4
disk=$SCRATCH/disk at=$TEST_DIR/mnt backup=$TEST_DIR/backup
mkdir "$at" "$backup"
ploopctl create --descriptor -s 256M -b 64K "$disk"
device=$(attach "$disk")
mkfs.ext4 -q "$device"
mount "$device" "$at"

make() { ploopctl snapshot create "$disk"; }

nr=0
put() { nr=$((nr + 1)); head -c 2M /dev/urandom >"$TEST_DIR/file$nr"; cp "$TEST_DIR/file$nr" "$at/"; sync -f "$at"; }
same() { local i; for ((i = 1; i <= $2; i++)); do expect_same_bytes "$1/file$i" "$TEST_DIR/file$i"; done; }

put
first=$(make)

(while sleep 0.05; do dd if=/dev/urandom of="$at/noise" bs=64k count=20 conv=fsync status=none || exit; done) &
noise=$!
note 'three snapshots under load, one mounted'
put
second=$(make)
put
third=$(make)
put
for name in "$first:1" "$second:2" "$third:3"; do
    ploopctl snapshot mount --uuid "${name%:*}" "$disk" "$backup" >/dev/null
    same "$backup" "${name#*:}"
    [[ ! -e $backup/file$((${name#*:} + 1)) ]] || die 'a snapshot has what came later'
    expect_fail ploopctl snapshot delete --uuid "${name%:*}" "$disk"
    ploopctl snapshot umount "$backup"
done
ploopctl fscheck "$disk" >/dev/null
expect_same "$(ploopctl snapshot list --json "$disk" | jq '.snapshots | length')" 4 'deltas after fscheck'

note 'merged away from the middle, the base, and the top'
ploopctl snapshot delete --uuid "$second" "$disk"
ploopctl snapshot delete --uuid "$first" "$disk"
put
ploopctl snapshot merge "$disk"
expect_same "$(ploopctl snapshot list --json "$disk" | jq '.snapshots | length')" 1 'deltas'
same "$at" "$nr"

note 'killed before each call'
for command in create delete; do
    for call in ioctl rename unlink fsync; do
        for ((i = 1; ; i++)); do
            [[ $command == create ]] || uuid=$(make)
            status=0
            if [[ $command == create ]]; then arguments=(create); else arguments=(delete --uuid "$uuid"); fi
            strace -f -o /dev/null -e "trace=$call" -e "inject=$call:signal=KILL:when=$i" \
                ploopctl snapshot "${arguments[@]}" "$disk" >/dev/null 2>&1 || status=$?
            put
            ploopctl recover "$disk" 2>"$TEST_DIR/said" || die "after a kill at $call $i of $command: $(<"$TEST_DIR/said")"
            same "$at" "$nr"
            ploopctl descriptor validate "$disk" >/dev/null
            ploopctl snapshot merge --all "$disk"
            rm -f "$at"/file* "$TEST_DIR"/file*
            nr=0
            ((status == 137)) || break
        done
    done
done
put
kill "$noise"
wait "$noise" || true
umount "$at"
detach "$disk"
e2fsck -f -n "$(attach -r "$disk")" >/dev/null || die 'the file system is damaged'
detach "$disk"

note 'a file system on device mapper on the disk'
device=$(attach "$disk")
echo "0 $(blockdev --getsz "$device") linear $device 0" | dmsetup create stacked
mount /dev/mapper/stacked "$at"
put
dd if=/dev/urandom of="$at/dirty" bs=1M count=8 status=none
uuid=$(make)
# Not frozen for good.
timeout 20 touch "$at/after"
second=$(attach -r --snapshot "$uuid" "$disk")
e2fsck -f -n "$second" >"$TEST_DIR/fsck" || die "a snapshot of a stacked file system is not clean: $(<"$TEST_DIR/fsck")"
detach "$second"
umount "$at"
dmsetup remove stacked
ploopctl snapshot delete --uuid "$uuid" "$disk"
detach "$disk"
