#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Programs that others wrote to break file systems, on ext4 and xfs on the disk, while
# snapshots are made and deleted below them: fsx, which compares all that it reads, the
# file system stressors of stress-ng, which verify what they can, dbench, and fio. None of
# them complains, and the file system's own check finds nothing, also in each snapshot.
# timeout: 900
. "$(dirname "$0")/lib.sh"

need fsx stress-ng dbench fio
seed=${SEED:-$RANDOM}
note "seed $seed"
scratch_fs ext4
at=$TEST_DIR/mnt
mkdir "$at" "$TEST_DIR/judge"
size=600M

# Those that work on files; each disk has every fourth one, in a soak all of them.
stressors=(
    access acl chattr chdir chmod chown copy-file dentry dir dirdeep dirmany fallocate
    fd-race fiemap file-ioctl filename filerace flock fpunch fsize fstat getdent hdd inode-flags
    iomix link lease locka lockf lockofd metamix msync open readahead rename revio seek sendfile
    splice sync-file symlink touch unlink utime xattr
)

# check DEVICE WHAT
check() {
    local command=(e2fsck -fn)
    [[ $fs != xfs ]] || command=(xfs_repair -n)
    "${command[@]}" "$1" >"$TEST_DIR/check" 2>&1 || { cat "$TEST_DIR/check" >&2; die "$2: $fs is damaged"; }
}

# judge UUID WHAT: the snapshot, with a delta of its own so that the journal can be replayed.
judge() {
    local other images
    other=$(attach -r --snapshot "$1" "$disk")
    mapfile -t images < <(images_of "$other")
    detach "$other"
    ploopctl create -s "$size" -b 64K "$SCRATCH/judge.img" >/dev/null
    other=$(attach "${images[@]}" "$SCRATCH/judge.img")
    mount ${nouuid:+-o "$nouuid"} "$other" "$TEST_DIR/judge" || die "$2: $fs cannot be mounted"
    umount "$TEST_DIR/judge"
    check "$other" "$2"
    detach "$other"
    rm "$SCRATCH/judge.img"
}

# snapshots: one after the other until told to stop, the last two are kept.
snapshots() {
    local uuids=() nr=0
    while [[ ! -e $TEST_DIR/stop ]]; do
        uuids+=("$(ploopctl snapshot create "$disk")")
        nr=$((nr + 1))
        sleep 3
        judge "${uuids[-1]}" "snapshot $nr"
        if ((${#uuids[@]} > 2)); then
            ploopctl snapshot delete --uuid "${uuids[0]}" "$disk"
            uuids=("${uuids[@]:1}")
        fi
    done
    note "$fs: $nr snapshots"
}

# run NAME CMD...: in a directory of its own.
run() {
    note "$fs: $1"
    mkdir "$at/$1"
    (cd "$at/$1" && timeout $((limit * 4)) "${@:2}") >"$TEST_DIR/$1.out" 2>&1 || {
        tail -n 30 "$TEST_DIR/$1.out" >&2
        die "$fs: $1 complains"
    }
}

suites() {
    local mine=() i
    for ((i = $1; i < ${#stressors[@]}; i += $(share 4 1))); do mine+=("${stressors[i]}"); done
    run fsx fsx -S "$seed" -N "$(share 1000 30000)" file
    run dbench dbench -t "$(share 5 120)" 4
    run fio fio --name=job --size=8M --numjobs=2 --rw=randrw --bsrange=512-64k --ioengine=libaio --iodepth=8 \
        --fsync=32 --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed="$seed" --minimal
    run stress stress-ng --seed "$seed" --temp-path . --sequential 2 --with "$(IFS=,; echo "${mine[*]}")" \
        --timeout "$(share 1 10)" --verify --hdd-bytes 8M --fallocate-bytes 8M --iomix-bytes 8M
    grep -E 'skipped|passed|failed' "$TEST_DIR/stress.out" | cut -c1-200 >&2
}

limit=$(share 200 4000)
first=0
for fs in ext4 xfs; do
    nouuid=''
    [[ $fs != xfs ]] || nouuid=nouuid
    disk=$SCRATCH/$fs
    ploopctl create --descriptor -s "$size" -b 64K "$disk"
    device=$(attach "$disk")
    "mkfs.$fs" -q "$device"
    mount "$device" "$at"
    rm -f "$TEST_DIR/stop"
    snapshots &
    pid=$!
    suites "$first"
    touch "$TEST_DIR/stop"
    wait "$pid" || die "$fs: the snapshots failed"
    umount "$at"
    check "$device" 'at the end'
    detach "$disk"
    device=$(attach "$disk")
    check "$device" 'attached again'
    detach "$disk"
    for image in "$disk"/root.hds*; do ploopctl check "$image" >&2 || die "$image is damaged"; done
    first=1
done
