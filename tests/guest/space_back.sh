#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Space comes back to the file system below: after files are deleted and trimmed the
# image takes no more than the data, also over a lower delta, where what was
# discarded reads as zeros, now and later. Free slots are used again.
# timeout: 450
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
mkdir "$TEST_DIR/fs"
head -c 24M /dev/urandom >"$TEST_DIR/random"

# blocks FILE...: what they take, in KiB.
blocks() { stat -c %b "$@" | awk '{ sum += $1 } END { print int(sum / 2) }'; }

# used: what the file system on the disk has in use, in KiB.
used() { df --output=used -k "$TEST_DIR/fs" | tail -n 1; }

# in_use: the same, with the metadata that df does not count: journal, groups, inodes.
in_use() {
    dumpe2fs "$device" 2>/dev/null |
        awk '/^Block count:/ { b = $3 } /^Free blocks:/ { f = $3 } /^Block size:/ { s = $3 } END { print int((b - f) * s / 1024) }'
}

# fill N...: 24 MiB for each and small files between them.
fill() {
    local i
    for i in "$@"; do
        cp "$TEST_DIR/random" "$TEST_DIR/fs/big$i"
        mkdir -p "$TEST_DIR/fs/small$i"
        split -b 100k -a 3 -n 30 "$TEST_DIR/random" "$TEST_DIR/fs/small$i/f" 2>/dev/null || true
    done
    sync
}

# try CLUSTER(K) LOWER(yes|no) MOUNT_OPTIONS
try() {
    local c=$1 images=("$SCRATCH/0.img") lower=0 data have peak again sum
    note "clusters of ${c}K, lower delta: $2, $3"
    rm -f "$SCRATCH"/*.img
    ploopctl create -s 256M -b "${c}K" "$SCRATCH/0.img" >/dev/null
    device=$(attach "$SCRATCH/0.img")
    mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$device"
    if [[ $2 == yes ]]; then
        mount "$device" "$TEST_DIR/fs"
        fill 1 2 3
        ploopctl create -s 256M -b "${c}K" "$SCRATCH/1.img" >/dev/null
        plooptest snapshot --freeze --cluster-log $((c == 64 ? 7 : 11)) "$device" "$SCRATCH/1.img"
        umount "$TEST_DIR/fs"
        images+=("$SCRATCH/1.img")
        lower=$(blocks "$SCRATCH/0.img")
    fi
    mount -o "$3" "$device" "$TEST_DIR/fs"
    fill 1 2 3
    peak=$(stat -c %s "${images[-1]}")
    rm -rf "$TEST_DIR"/fs/big[12] "$TEST_DIR"/fs/small[13]
    sync
    if [[ $3 != discard ]]; then fstrim "$TEST_DIR/fs"; fi
    # A journal that still holds deletions discards when it is closed.
    umount "$TEST_DIR/fs"
    detach "$device"
    # At rest: the file of an attached image is grown ahead of what is written, if only to the
    # journal while the file system is looked at.
    have=$(blocks "${images[-1]}")
    sum=$(sha256sum "$SCRATCH/0.img")
    device=$(attach "${images[@]}")
    e2fsck -fn "$device" >&2 || die 'the file system is damaged'
    mount "$device" "$TEST_DIR/fs"
    cmp "$TEST_DIR/fs/big3" "$TEST_DIR/random" || die 'the file left is wrong'
    data=$(used)
    note "$data KiB of data, $have KiB in the top, $lower KiB below, $peak bytes at most"
    data=$(in_use)
    ((have <= data + data / 50 + 6 * c)) || die "$have KiB are used for $data KiB of data"
    # Refilled, the file of a base is not longer than it was: free slots are taken again.
    # Not what is there: it would take other clusters. What small files shared with what was deleted
    # is still there: a part of the 54 MiB needs new slots. Over a lower delta each cluster
    # ever written keeps its slot, which takes no space where nothing is.
    fill 1 2
    if [[ $2 == no ]]; then
        again=$(stat -c %s "${images[-1]}")
        ((again <= peak + 24 * 1048576)) || die "refilled, the image has grown from $peak to $again bytes"
    fi
    umount "$TEST_DIR/fs"
    e2fsck -fn "$device" >&2 || die 'the file system is damaged'
    data=$(in_use)
    detach "$device"
    have=$(blocks "${images[-1]}")
    device=$(attach "${images[@]}")
    ((have <= data + data / 50 + 6 * c)) || die "refilled, $have KiB are used for $data KiB of data"
    note 'all of the disk discarded'
    blkdiscard -f "$device"
    zeros
    detach "$device"
    have=$(blocks "${images[-1]}")
    if [[ $2 == yes ]]; then
        expect_same "$(sha256sum "$SCRATCH/0.img")" "$sum" 'lower image'
    fi
    ((have <= 4 * c + 64)) || die "$have KiB are used for nothing"
    device=$(attach "${images[@]}")
    zeros
    detach "$device"
    for image in "${images[@]}"; do ploopctl check "$image" >&2; done
    cp --sparse=always "${images[-1]}" "$TEST_DIR/copy.hds"
    qemu-img check -f parallels "$TEST_DIR/copy.hds" >&2 || die 'qemu-img: not clean'
    rm "$TEST_DIR/copy.hds"
}

zeros() { dd if="$device" iflag=direct bs=1M status=none | cmp -n $((256 << 20)) - /dev/zero >&2 || die 'the disk does not read as zeros'; }

try 64 yes defaults
try 1024 no discard
if [[ $EFFORT == soak ]]; then
    try 64 no defaults
    try 1024 yes defaults
fi
