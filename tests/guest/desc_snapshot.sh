#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Snapshots of a disk in use: made, mounted and merged away while a file system on
# it is written to, and checked; the tool killed before each of its calls; a disk stacked with
# device mapper. The disk always reads as written, each snapshot as it was.
# allow-log: dev ploop[0-9]+, logical block [0-9]+, lost async page write
# timeout: 600
. "$(dirname "$0")/lib.sh"

need strace dmsetup e2fsck debugfs resize2fs mkfs.xfs xfs_repair blkid jq

scratch_fs ext4
disk=$SCRATCH/disk at=$TEST_DIR/mnt backup=$TEST_DIR/backup
mkdir "$at" "$backup"
ploopctl create --descriptor -s 256M -b 64K "$disk"
device=$(attach "$disk")
mkfs.ext4 -q "$device"
mount "$device" "$at"

make() { ploopctl snapshot create "$disk"; }

nr=0
put() { nr=$((nr + 1)); head -c "$(share 512 2048)K" /dev/urandom >"$TEST_DIR/file$nr"; cp "$TEST_DIR/file$nr" "$at/"; sync -f "$at"; }
same() { local i; for ((i = 1; i <= $2; i++)); do expect_same_bytes "$1/file$i" "$TEST_DIR/file$i"; done; }

put
first=$(make)

(while sleep "$(share 0.3 0.05)"; do dd if=/dev/urandom of="$at/noise" bs=64k count=20 conv=fsync status=none || exit; done) &
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
# A file that was removed while it is open is no damage.
exec 7>"$at/removed"
head -c 1M /dev/urandom >&7
rm "$at/removed"
ploopctl fscheck "$disk" >/dev/null
exec 7>&-
[[ -z $(compgen -G "$disk/fscheck*") ]] || die 'fscheck has left an image'
expect_same "$(ploopctl snapshot list --json "$disk" | jq '.snapshots | length')" 4 'deltas after fscheck'

note 'merged away from the middle, the base, and the top'
ploopctl snapshot delete --uuid "$second" "$disk"
ploopctl snapshot delete --uuid "$first" "$disk"
put
ploopctl snapshot merge "$disk"
expect_same "$(ploopctl snapshot list --json "$disk" | jq '.snapshots | length')" 1 'deltas'
same "$at" "$nr"

note 'a lower image replaced, the disk grown'
uuid=$(make)
put
base=$(ploopctl info --json "$disk" | jq -r '.images[0].image')
cp --sparse=always "$base" "$disk/copy"
ploopctl replace --level 0 "$disk/copy" "$disk"
rm "$base"
ploopctl resize -s 300M "$disk"
expect_same "$(blockdev --getsize64 "$device")" $((300 << 20)) size
resize2fs "$device" 2>/dev/null
put
same "$at" "$nr"
ploopctl snapshot delete --uuid "$uuid" "$disk"
same "$at" "$nr"

# What is left beside the images and the descriptor after a replacement is nobody's.
tidy() {
    local file
    for file in "$disk"/*; do
        case $file in *.xml) continue ;; esac
        ploopctl info --json "$disk" | jq -r '.images[].image' | grep -qxF "$file" || rm "$file"
    done
}

# prepare COMMAND: makes what it needs, and its arguments in `arguments`.
prepare() {
    copies=$((copies + 1))
    case $1 in
        create) arguments=(snapshot create) ;;
        delete)
            uuid=$(make)
            arguments=(snapshot delete --uuid "$uuid")
            ;;
        replace)
            uuid=$(make)
            base=$(ploopctl info --json "$disk" | jq -r '.images[0].image')
            cp --sparse=always "$base" "$disk/copy$copies"
            arguments=(replace --level 0 "$disk/copy$copies")
            ;;
        resize) arguments=(resize -s "$((300 + copies))M") ;;
    esac
}

note 'killed before each call'
copies=0
for command in create delete replace resize; do
    total=0
    # A short run takes two of them.
    others=(rename unlink fsync)
    for call in ioctl $(share "${others[RANDOM % 3]}" "${others[*]}"); do
        for ((i = 1; ; i += $(share "$i" 1))); do
            prepare "$command"
            status=0
            strace -f -o /dev/null -e "trace=$call" -e "inject=$call:signal=KILL:when=$i" \
                ploopctl "${arguments[@]}" "$disk" >/dev/null 2>&1 || status=$?
            put
            ploopctl recover "$disk" 2>"$TEST_DIR/said" || die "after a kill at $call $i of $command: $(<"$TEST_DIR/said")"
            same "$at" "$nr"
            ploopctl descriptor validate "$disk" >/dev/null
            ploopctl snapshot merge --all "$disk" 2>/dev/null
            [[ $command != replace ]] || tidy
            same "$at" "$nr"
            rm -f "$at"/file* "$TEST_DIR"/file*
            nr=0
            ((status == 137)) || break
            total=$((total + 1))
        done
        ((status == 0)) || die "$command ended with $status"
    done
    note "$command: killed $total times"
    ((total > $(share 1 5))) || die "only $total times: is this the way to kill it?"
done
put
kill "$noise"
wait "$noise" || true
# What it started may take a moment.
retry 30 umount "$at"
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
timeout "$(limit 20)" touch "$at/after"
second=$(attach -r --snapshot "$uuid" "$disk")
e2fsck -f -n "$second" >"$TEST_DIR/fsck" || die "a snapshot of a stacked file system is not clean: $(<"$TEST_DIR/fsck")"
detach "$second"
# Another file system is not frozen in its place.
mount -t tmpfs tmpfs "$at"
expect_fail ploopctl snapshot create "$disk" 2>"$TEST_DIR/said"
grep -q 'mounted over' "$TEST_DIR/said" || die "it says $(<"$TEST_DIR/said")"
umount "$at"
# With what is stacked on it.
left_frozen "$disk" "$at"
umount "$at"
dmsetup remove stacked
ploopctl snapshot delete --uuid "$uuid" "$disk"
detach "$disk"

note 'fscheck of XFS, whose log is never empty while it is mounted'
ploopctl create --descriptor -s 320M -b 64K "$SCRATCH/xfs"
device=$(attach "$SCRATCH/xfs")
mkfs.xfs -q "$device"
mount "$device" "$at"
cp /bin/bash "$at"
exec 7>"$at/removed"
rm "$at/removed"
ploopctl fscheck "$SCRATCH/xfs" >/dev/null
exec 7>&-
umount "$at"
# The root of its free space, which is not needed to mount it.
dd if=/dev/urandom of="$device" bs=4k count=1 seek=4 oflag=direct conv=notrunc status=none
status=0
ploopctl fscheck "$SCRATCH/xfs" >/dev/null 2>&1 || status=$?
expect_same "$status" 41 'the status of fscheck of what is damaged'

note 'fscheck of ext4: what is more than a mount would set right stays damage'
# damaged MKFS-OPTION COMMAND...: a link that nothing holds, and what lets e2fsck -p mend it.
damaged() {
    local command
    mkfs.ext4 -q -F -O "$1" "$device"
    for command in 'sif <2> links_count 9' "${@:2}"; do debugfs -w -R "$command" "$device" 2>>"$TEST_DIR/said"; done
    status=0
    ploopctl fscheck "$SCRATCH/xfs" >"$TEST_DIR/said" 2>&1 || status=$?
    expect_same "$status" 41 "the status of fscheck, which says $(<"$TEST_DIR/said")"
}
damaged has_journal 'ssv last_orphan 5000'
damaged ^has_journal 'ssv state 0'

note 'fscheck and a mount that are ended early, and a device that somebody has open'
disk=$SCRATCH/xfs
mkfs.ext4 -q -F "$device"
uuid=$(make)
# The next one.
spare=/sys/block/ploop1
expect_same "$device" /dev/ploop0 'the device'
is_there() { [[ $(cat "$spare/size" 2>/dev/null) -gt 0 ]]; }
# slowly ARGUMENTS...: ploopctl in the background, whose programs are slow to begin, until it has a device of its own.
slowly() {
    strace -f -o /dev/null -e trace=execve -e inject=execve:delay_enter=2000000 \
        ploopctl "$@" >"$TEST_DIR/said" 2>&1 &
    tracer=$!
    retry 30 is_there
}
# ended ARGUMENTS...: it is ended by a signal then.
ended() {
    local status=0
    slowly "$@"
    pkill -TERM -P "$tracer" -x ploopctl
    wait "$tracer" || status=$?
    expect_same "$status" 29 "the status of $1, which says $(<"$TEST_DIR/said")"
    [[ ! -e $spare/pdelta/0 ]] || die "$1 has left a device"
    expect_same "$(ploopctl snapshot list --json "$disk" | jq '.snapshots | length')" 2 "deltas after $1"
}
ended fscheck "$disk"
ended snapshot mount --uuid "$uuid" "$disk" "$backup"
slowly fscheck "$disk"
exec 8<"/dev/${spare##*/}"
retry 60 grep -q ': sound' "$TEST_DIR/said"
# Longer than any detach is patient.
sleep 4
exec 8<&-
wait "$tracer" || die "fscheck says $(<"$TEST_DIR/said")"
[[ ! -e $spare/pdelta/0 ]] || die 'fscheck has left a device'
detach "$disk"

note 'fscheck without space for what the mount would write'
ploopctl create --descriptor -s 320M -b 1M "$SCRATCH/tight"
replayed() {
    ploopctl fscheck "$SCRATCH/tight" >"$TEST_DIR/said" 2>&1 || die "it says $(<"$TEST_DIR/said")"
    grep -q 'Clearing orphaned inode' "$TEST_DIR/said" || die 'nothing was done as by a mount'
}
device=$(attach "$SCRATCH/tight")
# Its inode is number 12 then.
mkfs.ext4 -q -O ^orphan_file "$device"
head -c 1M /dev/urandom >"$TEST_DIR/removed"
for command in "write $TEST_DIR/removed removed" 'unlink removed' 'sif <12> links_count 0' 'ssv last_orphan 12' \
    'feature +needs_recovery'; do
    debugfs -w -R "$command" "$device" >/dev/null 2>&1
done
# A check that is due is no damage; the journal that tune2fs replays is there again.
tune2fs -C 50 -c 20 "$device" >/dev/null
debugfs -w -R 'feature +needs_recovery' "$device" >/dev/null 2>&1
replayed
detach "$SCRATCH/tight"
# Room for less than the image and two clusters.
fallocate -l 1536K "$SCRATCH/room"
for size in 64M 1M 64K; do
    i=0
    while fallocate -l "$size" "$SCRATCH/fill-$size-$((i += 1))" 2>/dev/null; do :; done
done
rm "$SCRATCH/room"
# What is freed can be had only after a commit.
sync -f "$SCRATCH"
status=0
ploopctl fscheck "$SCRATCH/tight" >"$TEST_DIR/said" 2>&1 || status=$?
expect_same "$status" 20 "the status of fscheck, which says $(<"$TEST_DIR/said")"
expect_same "$(find "$SCRATCH/tight" -name 'fscheck*' | wc -l)" 0 'images left'
rm "$SCRATCH"/fill-*
sync -f "$SCRATCH"
replayed
