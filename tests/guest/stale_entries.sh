#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# An image whose table has entries behind the end of its disk, of a disk that was larger
# once. They never come alive: not by growth, not by a merge of a top that was grown, on
# either side; and their slots are used again without harm, also after a crash.
. "$(dirname "$0")/lib.sh"

c=65536
scratch_fs tmpfs
head -c 1M /dev/urandom >"$TEST_DIR/data"

# stale NAME: 16 clusters with data, of which the disk has 8.
stale() {
    rm -f "$SCRATCH/$1"
    ploopctl create -s 1M -b 64K "$SCRATCH/$1" >/dev/null
    device=$(attach "$SCRATCH/$1")
    dd if="$TEST_DIR/data" of="$device" bs=$c oflag=direct conv=notrunc status=none
    detach "$device"
    # 1024 sectors.
    printf '\0\4\0\0\0\0\0\0' | dd of="$SCRATCH/$1" bs=1 seek=36 conv=notrunc status=none
}

# entries NAME: how many of the 16 are not zero.
entries() { od -An -v -tu4 -w4 -j64 -N64 "$SCRATCH/$1" | awk '$1 { n++ } END { print n + 0 }'; }

# right WHAT: the first half is there, behind it is nothing.
right() {
    drop_caches
    cmp -n $((8 * c)) "$device" "$TEST_DIR/data" >&2 || die "$1: the data is wrong"
    cmp -n $((8 * c)) -i $((8 * c)):0 "$device" /dev/zero >&2 || die "$1: what lay behind the end came back"
}

grow() { plooptest op "$device" grow 2048; }

sound() { ploopctl check "$SCRATCH/$1" >&2 || (($? == 41)) || die "$1 is damaged"; }

note 'growth'
stale a
expect_same "$(entries a)" 16 entries
device=$(attach "$SCRATCH/a")
expect_same "$(entries a)" 8 'entries when it is in use'
grow
right grown
detach "$device"
sound a
device=$(attach "$SCRATCH/a")
right 'grown, attached again'
detach "$device"

note 'their slots are used again'
stale a
device=$(attach "$SCRATCH/a")
blkdiscard -o 0 -l $((4 * c)) "$device"
dd if="$TEST_DIR/data" of="$device" bs=$c count=8 oflag=direct conv=notrunc,fsync status=none
grow
right 'written again'
dd if="$TEST_DIR/data" of="$device" bs=$c skip=8 seek=8 count=8 oflag=direct conv=notrunc,fsync status=none
cp "$SCRATCH/a" "$SCRATCH/crashed"
cmp "$device" "$TEST_DIR/data" >&2 || die 'two clusters share a slot'
detach "$device"
sound a
device=$(attach "$SCRATCH/crashed")
cmp "$device" "$TEST_DIR/data" >&2 || die 'wrong after a crash'
detach "$device"

note 'below a top that is grown and merged'
stale a
device=$(attach "$SCRATCH/a")
ploopctl create -s 512K -b 64K "$SCRATCH/b" >/dev/null
plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/b"
grow
right 'a grown top'
plooptest op "$device" merge top
right merged
detach "$device"
sound a

note 'the same, when it was never in use as a top'
stale a
rm -f "$SCRATCH/b"
ploopctl create -s 512K -b 64K "$SCRATCH/b" >/dev/null
device=$(attach "$SCRATCH/a" "$SCRATCH/b")
grow
right 'a grown top'
plooptest op "$device" merge top
right merged
detach "$device"
sound a

note 'in the middle, between others'
ploopctl create -s 1M -b 64K "$SCRATCH/c" >/dev/null
stale a
rm -f "$SCRATCH/b"
ploopctl create -s 512K -b 64K "$SCRATCH/base" >/dev/null
device=$(attach "$SCRATCH/base" "$SCRATCH/a" "$SCRATCH/c")
right 'three levels'
plooptest op "$device" merge 1
right 'two levels'
plooptest op "$device" merge top
right 'one level'
detach "$device"
sound base
