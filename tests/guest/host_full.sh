#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The file system below the image is full: writes that need space wait, while reads
# and overwrites go on, and so does a flush of what is there; with space again, after
# a filler was deleted, they end well, and nothing is lost. Who detaches meanwhile
# ends them with an error. Uevents tell when there is little space, none, and enough
# again; who does not wait is told of a failed write.
# allow-log: dev ploop[0-9]+, logical block [0-9]+, lost async page write
# timeout: 150
. "$(dirname "$0")/lib.sh"

scratch_fs tmpfs 0 size=8M
image=$SCRATCH/disk.img
c=65536
FREEZE=0x5020 THAW=0x5021

# direct OFFSET COUNT: clusters of data to the disk; in the background.
direct() {
    timeout "$(limit 60)" dd if="$TEST_DIR/data" of="$device" bs=$c seek="$1" count="$2" \
        oflag=direct conv=notrunc status=none
}

waits() { kill -0 "$1" 2>/dev/null; }

# full: all space is taken by a filler.
full() {
    dd if=/dev/zero of="$SCRATCH/filler" bs=4k status=none 2>/dev/null || true
}

# How often it was said that there is no space, and that there is some again: a second after nobody has to wait
# any more.
no_space='no space for the image' space_again='there is space for the image again'
said() { test_log | grep -cF "$1" || true; }

says_more_than() { (($(said "$2") > $1)); }

# try one|chain: fills the file system, and leaves writes that wait, ${writers[@]}.
try() {
    local i at before
    note "$*"
    rm -f "$SCRATCH"/*
    writers=()
    if [[ $1 == chain ]]; then
        ploopctl create -s 32M -b 64K "$TEST_DIR/base.img" >/dev/null
        device=$(attach "$TEST_DIR/base.img")
        dd if=/dev/urandom of="$device" bs=1M count=32 oflag=direct conv=notrunc,fsync status=none
        detach "$device"
        images=("$TEST_DIR/base.img" "$image")
    else
        images=("$image")
    fi
    ploopctl create -s 32M -b 64K "$image" >/dev/null
    device=$(attach "${images[@]}")
    head -c 1M /dev/urandom >"$TEST_DIR/data"
    direct 0 16
    before=$(said "$no_space")
    full
    # More than the file was grown ahead.
    for ((i = 0; i < 6; i++)); do
        (for ((at = 16 + i * 60; at < 16 + i * 60 + 48; at += 16)); do direct $at 16 || exit 1; done) &
        writers+=($!)
    done
    retry 20 says_more_than "$before" "$no_space" || die 'nothing says that there is no space'
    sleep 1
    for i in "${writers[@]}"; do waits "$i" || die 'a write did not wait'; done
    timeout "$(limit 10)" cmp -n 1048576 "$device" "$TEST_DIR/data" || die 'reads are wrong while the host is full'
    timeout "$(limit 10)" dd if="$TEST_DIR/data" of="$device" bs=$c count=8 \
        oflag=direct conv=notrunc,fsync status=none ||
        die 'an overwrite or a flush failed while the host is full'
    timeout "$(limit 10)" blkdiscard -o 0 -l $((4 * c)) "$device" || die 'a discard failed while the host is full'
    timeout "$(limit 10)" cmp -n $((4 * c)) "$device" /dev/zero || die 'what was discarded is not zero'
}

mkdir -p /run/udev/rules.d
rules=/run/udev/rules.d/99-test.rules
echo "ACTION==\"change\", KERNEL==\"ploop*\", ENV{PLOOP_SPACE}==\"full\", RUN+=\"/usr/bin/touch $TEST_DIR/full-%k\"" >"$rules"
udevadm control --reload
for kind in one chain; do
    listen
    try "$kind"
    # Less than the mark was left from the first growth on.
    expect_event "DEVNAME=$device" PLOOP_SPACE=low
    expect_event "DEVNAME=$device" PLOOP_SPACE=full
    retry 20 test -e "$TEST_DIR/full-${device##*/}" || die 'the rule for udev was not followed'
    rm "$TEST_DIR/full-${device##*/}"
    stop_listening
    # An event tells how it is when it is sent: with less than the mark left, there may be little again by then.
    echo 0 >"/sys/block/${device##*/}/ptune/low_water"
    listen
    before=$(said "$space_again")
    retry 10 space_is full || die 'pstate/space is not full'
    rm "$SCRATCH/filler"
    mount -o remount,size=64M "$SCRATCH"
    for i in "${writers[@]}"; do wait "$i" || die 'a write that waited for space failed'; done
    retry 10 says_more_than "$before" "$space_again" || die 'nothing says that there is space again'
    expect_event "DEVNAME=$device" PLOOP_SPACE=ok
    stop_listening
    space_is ok || die "pstate/space is not ok"
    direct 0 16
    direct 400 16
    detach "$device"
    ploopctl check "$image" >&2
    device=$(attach "${images[@]}")
    for at in 0 16 32 48 76 316 332 400; do
        cmp -n 1048576 -i $((at * c)):0 "$device" "$TEST_DIR/data" || die "the data at cluster $at is lost"
    done
    detach "$device"
    rm "$SCRATCH"/*
    mount -o remount,size=8M "$SCRATCH"
done
rm "$rules"
udevadm control --reload

note 'discarded clusters are space'
try one
timeout "$(limit 20)" blkdiscard -o 0 -l $((16 * c)) "$device"
sleep 3
waits "${writers[0]}" || note 'some were let through'
rm "$SCRATCH/filler"
mount -o remount,size=64M "$SCRATCH"
for i in "${writers[@]}"; do wait "$i" || die 'a write that waited for space failed'; done
detach "$device"
rm "$SCRATCH"/*
mount -o remount,size=8M "$SCRATCH"

note 'written through the page cache, and detached without space'
rm -f "$SCRATCH"/*
ploopctl create -s 32M -b 64K "$image" >/dev/null
device=$(attach "$image")
direct 0 16
before=$(said "$no_space")
# It ends when its pages are written.
dd if=/dev/urandom of="$device" bs=1M seek=2 count=28 conv=notrunc status=none &
writer=$!
retry 30 says_more_than "$before" "$no_space" || die 'nothing says that there is no space'
expect_fail timeout "$(limit 20)" ploopctl detach "$device"
[[ -b $device ]] || die 'detached while it is written'
waits "$writer" || die 'the writer did not wait'
# What cannot be written fails, then nobody has it open.
timeout "$(limit 60)" ploopctl detach --force --wait 30 "$device" || note "detach says $?"
wait "$writer" || note "the writer says $?"
[[ ! -b $device ]] || detach "$device"
rm -f "$SCRATCH/filler"
mount -o remount,size=64M "$SCRATCH"
device=$(attach "$image")
cmp -n 1048576 "$device" "$TEST_DIR/data" || die 'the first data is lost'
detach "$device"
ploopctl check "$image" >&2

note 'a file system on the disk that is thawed without space'
rm "$SCRATCH"/*
mount -o remount,size=8M "$SCRATCH"
rm -f "$TEST_DIR/base.img"
ploopctl create -s 32M -b 64K "$TEST_DIR/base.img" >/dev/null
device=$(attach "$TEST_DIR/base.img")
mkfs.ext4 -q -F "$device"
mkdir "$TEST_DIR/fs"
mount "$device" "$TEST_DIR/fs"
cp "$TEST_DIR/data" "$TEST_DIR/fs/a"
expect_same "$(call $FREEZE)" 0 'errno of FREEZE'
ploopctl create -s 32M -b 64K "$image" >/dev/null
plooptest snapshot --cluster-log 7 "$device" "$image"
before=$(said "$no_space")
full
# Free blocks of the file system: what the image has grown ahead is used up.
(for at in 264 280 296 312 328 344; do direct $at 16 || exit 1; done) &
writer=$!
retry 20 says_more_than "$before" "$no_space" || die 'nothing says that there is no space'
# It writes the superblock, which needs a cluster.
call $THAW >"$TEST_DIR/thawed" &
thawer=$!
sleep 2
timeout "$(limit 10)" plooptest sync "$device" || die 'calls do not go on'
timeout "$(limit 10)" plooptest checkpoint start "$device" 5 || die 'a checkpoint does not go on'
waits "$thawer" || die 'thawing did not wait'
for call in $FREEZE $THAW; do expect_same "$(call $call)" 16 "errno of $call"; done
ploopctl create -s 32M -b 64K "$TEST_DIR/2.img" >/dev/null
expect_fail timeout "$(limit 20)" plooptest snapshot --freeze --cluster-log 7 "$device" "$TEST_DIR/2.img"
expect_same "$(nr_levels "$device")" 2 levels
rm "$SCRATCH/filler"
wait "$writer" || die 'the write that waited for space failed'
wait "$thawer"
expect_same "$(<"$TEST_DIR/thawed")" 0 'errno of THAW'
cp "$TEST_DIR/data" "$TEST_DIR/fs/b"
plooptest snapshot --freeze --cluster-log 7 "$device" "$TEST_DIR/2.img"
expect_same "$(nr_levels "$device")" 3 levels
cp "$TEST_DIR/data" "$TEST_DIR/fs/c"
umount "$TEST_DIR/fs"
e2fsck -fn "$device" >&2 || die 'the file system is damaged'
detach "$device"

note 'a write that failed is not told to who writes to the next image'
rm -f "$SCRATCH"/*
ploopctl create -s 32M -b 64K "$image" >/dev/null
device=$(attach "$image")
name=${device##*/}
echo fail >"/sys/block/$name/ptune/on_full"
full
# Through the page cache, and nobody waits for it.
dd if=/dev/urandom of="$device" bs=1M count=12 status=none || true
medium=$(<"/sys/block/$name/diskseq")
udevadm settle -t 10 || true
expect_same "$(call 5002)" 0 'errno of STOP'
rm "$SCRATCH/filler"
expect_same "$(call 5003)" 0 'errno of START'
(($(<"/sys/block/$name/diskseq") > medium)) || die 'the next medium has the number of the one before'
dd if="$TEST_DIR/data" of="$device" bs=64k count=1 conv=notrunc,fsync status=none || die 'the error of a write to the medium before'
detach "$device"
