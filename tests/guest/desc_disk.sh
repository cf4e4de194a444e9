#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A disk with a descriptor from end to end, with a file system on it: attached by
# its directory, snapshots while detached, one mounted for a backup while the disk
# is in use, going back, checking its file system, and images that changed.
# timeout: 240
. "$(dirname "$0")/lib.sh"

need e2fsck debugfs blkid jq chattr

scratch_fs ext4

# says STATUS WORDS ARGUMENTS...: ploopctl ends so, and says so.
says() {
    local want=$1 words=$2 status=0 said
    shift 2
    said=$(ploopctl "$@" 2>&1) || status=$?
    expect_same "$status" "$want" "status of $*: $said"
    [[ $said == *"$words"* ]] || die "$* says '$said'"
}

# on COMMAND...: on the mounted disk.
on() {
    local device
    device=$(attach "$disk")
    mount "$device" "$at"
    "$@"
    umount "$at"
    detach "$disk"
}

put() { head -c "$2" /dev/urandom >"$at/$1"; cp "$at/$1" "$TEST_DIR/$1"; }
same() { local name; for name; do expect_same_bytes "$at/$name" "$TEST_DIR/$name"; done; }
# checked KEY: of each image, as `check` tells it.
checked() { ploopctl check --json "$disk" | jq -c "[.images[]$1]"; }
lacks() { [[ ! -e $at/$1 ]] || die "$1 is there"; }

at=$TEST_DIR/mnt backup=$TEST_DIR/backup
mkdir "$at" "$backup"
for kind in ploop1 raw; do
    note "$kind"
    disk=$SCRATCH/$kind
    ploopctl create --descriptor -f "$kind" -s 64M -b 64K "$disk"
    device=$(attach "$disk/DiskDescriptor.xml")
    mkfs.ext4 -q "$device"
    says 37 'attached already' attach "$disk"
    detach "$disk"
    says 40 'not attached' detach "$disk"
    on put first 3M
    a=$(ploopctl snapshot create "$disk")
    on put second 3M
    b=$(ploopctl snapshot create "$disk")

    device=$(attach "$disk")
    mount "$device" "$at"
    put third 3M
    same first second third
    says 38 'is attached as' snapshot switch --uuid "$a" "$disk"
    note 'a backup of the first snapshot meanwhile'
    ploopctl snapshot mount --uuid "$a" "$disk" "$backup" >/dev/null
    expect_same_bytes "$backup/first" "$TEST_DIR/first"
    [[ ! -e $backup/second ]] || die 'the snapshot has what came later'
    expect_fail touch "$backup/x"
    says 40 'no snapshot is mounted' snapshot umount "$at"
    put fourth 1M
    ploopctl snapshot umount "$backup"
    expect_same "$(ploopctl list | grep -c /dev/)" 1 'devices'
    expect_same "$(checked '.live')" '[true]' 'images that are checked'
    umount "$at"
    detach "$disk"
    ploopctl fscheck "$disk" >/dev/null
    # One that only reads is not judged in place of the disk.
    device=$(attach -r --snapshot "$a" "$disk")
    expect_same "$(checked '.live')" '[false,false,false]' 'images that are checked beside a snapshot'
    detach "$device"

    note 'back to the second'
    ploopctl snapshot switch --uuid "$b" "$disk"
    on same first second
    on lacks third
    on put fifth 1M
    ploopctl snapshot delete --uuid 5fbaabe3-6958-40ff-92a7-860e329aab41 "$disk"
    on same first second
    on lacks fifth
    ploopctl descriptor validate "$disk" >/dev/null
    ploopctl check "$disk" >/dev/null

    note 'merged, larger, shorter'
    b=$(ploopctl snapshot create "$disk")
    ploopctl resize -s 96M "$disk"
    on put sixth 1M
    ploopctl snapshot delete --uuid "$a" "$disk"
    on same first second sixth
    ploopctl compact "$disk"
    on same first second sixth
    ploopctl snapshot create "$disk" >/dev/null
    ploopctl snapshot merge --all "$disk"
    on same first second sixth
    expect_same "$(ploopctl snapshot list --json "$disk" | jq '.size / 1048576')" 96 'MiB'
    ploopctl check "$disk" >/dev/null
    ploopctl snapshot create "$disk" >/dev/null

    note 'a base that is attached alone, by its name'
    options=() raw=()
    [[ $kind != raw ]] || options=(-f raw -b 64K) raw=(--format raw)
    says 38 'not those of its top' attach "${options[@]}" "$disk/root.hds"
    # By a program that does not ask.
    device=/dev/$(plooptest attach-raw "${raw[@]}" --cluster-log 7 "$disk/root.hds" | grep -oE 'ploop[0-9]+')
    says 37 'is not the top' snapshot merge "$disk"
    expect_same "$(find "$disk" -name 'root.hds*' | wc -l)" 2 'images'
    detach "$device"

    note 'a base that somebody else wrote to'
    touch "$disk/root.hds"
    says 39 'was written to' attach "$disk"
    device=$(attach --force "$disk")
    note 'detached though that cannot be written down'
    ploopctl snapshot create "$disk" >/dev/null
    udevadm settle -t 10
    chattr +i "$disk"
    says 0 "$device is detached" detach "$disk"
    chattr -i "$disk"
    device=$(attach "$disk")
    if [[ $kind == raw && $EFFORT != soak ]]; then
        debugfs -w -R 'sif <2> links_count 9' "$device" 2>/dev/null
    else
        # Much of it, which e2fsck is busy with for long.
        dd if=/dev/zero of="$device" bs=4k count=16 seek=100 conv=notrunc,fsync status=none
        dd if=/dev/urandom of="$device" bs=4k count=64 seek=1 conv=notrunc,fsync status=none
    fi
    detach "$disk"
    says 41 'damaged' fscheck "$disk"
done
