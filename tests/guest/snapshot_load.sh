#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Snapshots under load. On the bare disk no write is lost and no lower image changes
# any more. On mounted file systems, of a whole disk and of two partitions, that are
# frozen for the moment, each snapshot is a clean file system, looked at by a second
# device while the first goes on. What is refused leaves all as it was.
# timeout: 400
. "$(dirname "$0")/lib.sh"

seed=${SEED:-$RANDOM}
note "seed $seed"
scratch_fs xfs

# new NAME CREATE_OPTIONS...
new() { ploopctl create "${@:2}" "$SCRATCH/$1.img" >/dev/null; }

sums() { sha256sum "$@" | cut -d' ' -f1; }

# chain N: the images up to level N.
chain() {
    local i
    images=()
    for ((i = 0; i <= $1; i++)); do images+=("$SCRATCH/$i.img"); done
}

note 'the bare disk'
new 0 -s 64M -b 64K
device=$(attach "$SCRATCH/0.img")
begin_load --seed "$seed" --discard --seconds 60 --save "$TEST_DIR/model" "$device"
before=()
for i in 1 2 3 4 5; do
    sleep 0.7
    new "$i" -s 64M -b 64K
    timeout "$(limit 30)" plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/$i.img" || die "snapshot $i failed"
    before+=("$(sums "$SCRATCH/$((i - 1)).img")")
done
expect_same "$(nr_levels "$device")" 6 levels
sleep 0.5
touch "$TEST_DIR/stop"
wait "$load" || die 'the load found something wrong'
for i in 0 1 2 3 4; do
    expect_same "$(sums "$SCRATCH/$i.img")" "${before[i]}" "image $i below"
done
chain 5
detach "$device"
for i in "${images[@]}"; do ploopctl check "$i" >&2 || die "$i is damaged"; done
device=$(attach "${images[@]}")
plooptest load-verify "$device" "$TEST_DIR/model"

note 'refusals'
dd if=/dev/urandom of="$TEST_DIR/data" bs=64k count=1 status=none
busy() {
    new busy -s 64M -b 64K
    other=$(attach "$SCRATCH/busy.img")
}
# refused WHAT IMAGE OPTIONS...
refused() {
    local what=$1 file=$2 was
    shift 2
    was=$(sums "$file")
    expect_fail timeout "$(limit 30)" plooptest snapshot "$@" "$device" "$file"
    expect_same "$(nr_levels "$device")" 6 "$what: levels"
    [[ $what == busy ]] || expect_same "$(sums "$file")" "$was" "$what: the refused image"
    dd if="$TEST_DIR/data" of="$device" bs=64k seek=3 oflag=direct conv=notrunc,fsync status=none ||
        die "$what: no write after it"
}
new x -s 64M -b 64K
refused 'read-only fd' "$SCRATCH/x.img" --cluster-log 7 --read-only
refused 'cluster of the call' "$SCRATCH/x.img" --cluster-log 8
refused raw "$SCRATCH/x.img" --cluster-log 7 --format raw
busy
refused busy "$SCRATCH/busy.img" --cluster-log 7
detach "$other"
new filled -s 64M -b 64K
other=$(attach "$SCRATCH/filled.img")
dd if="$TEST_DIR/data" of="$other" bs=64k oflag=direct conv=notrunc,fsync status=none
detach "$other"
refused 'not empty' "$SCRATCH/filled.img" --cluster-log 7
new small -s 63M -b 64K
refused smaller "$SCRATCH/small.img" --cluster-log 7
new cluster -s 64M -b 128K
refused cluster "$SCRATCH/cluster.img" --cluster-log 8
new version -s 64M -b 64K --format-version 1
refused version "$SCRATCH/version.img" --cluster-log 7
refused top "$SCRATCH/5.img" --cluster-log 7
refused lower "$SCRATCH/2.img" --cluster-log 7
head -c 1M /dev/urandom >"$SCRATCH/junk.img"
refused junk "$SCRATCH/junk.img" --cluster-log 7
# None of them is held, and the good one still is good.
for i in x filled small cluster version busy; do
    other=$(attach "$SCRATCH/$i.img")
    detach "$other"
done
timeout "$(limit 30)" plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/x.img"
cmp -n 65536 -i $((3 * 65536)):0 "$device" "$TEST_DIR/data" || die 'the last write is lost'
detach "$device"
rm -f "$SCRATCH"/*.img "$TEST_DIR/stop"

# churn DIR: names and data, all the time.
churn() {
    local n=0
    while [[ ! -e $TEST_DIR/stop ]]; do
        n=$((n + 1))
        mkdir -p "$1/$((n % 7))"
        cp "$TEST_DIR/data" "$1/$((n % 7))/$n" && mv "$1/$((n % 7))/$n" "$1/f$((n % 13))"
        ((n % 5 > 0)) || rm -rf "${1:?}/$((n % 7))"
    done
}

# mounted NR: snapshots of the file systems mounted at $TEST_DIR/fs1 ..., which
# are partitions if there are several.
mounted() {
    local nr=$1 loads=() i part before read fs nr_snapshots
    nr_snapshots=$(share 2 9)
    for ((fs = 1; fs <= nr; fs++)); do
        truncate -s 8M "$TEST_DIR/fs$fs/load"
        begin_load --seed $((seed + fs)) --jobs 2 --seconds 90 "$TEST_DIR/fs$fs/load"
        loads+=("$load")
        churn "$TEST_DIR/fs$fs" &
        loads+=($!)
    done
    for ((i = 1; i <= nr_snapshots; i++)); do
        sleep 0.3
        new "$i" -s 96M -b 64K
        timeout "$(limit 60)" plooptest snapshot --freeze --cluster-log 7 "$device" "$SCRATCH/$i.img" ||
            die "snapshot $i failed"
        chain $((i - 1))
        before=$(sums "${images[@]}")
        read=$(attach -r "${images[@]}")
        udevadm settle -t 10 || true
        for ((fs = 1; fs <= nr; fs++)); do
            part=$read
            ((nr == 1)) || part=${read}p$fs
            retry 10 test -b "$part" || die "no $part"
            timeout "$(limit 60)" e2fsck -fn "$part" >"$TEST_DIR/fsck" 2>&1 ||
                die "snapshot $i: $part: $(tail -n 5 "$TEST_DIR/fsck")"
        done
        detach "$read"
        expect_same "$(sums "${images[@]}")" "$before" 'lower images'
    done
    touch "$TEST_DIR/stop"
    for i in "${loads[@]}"; do wait "$i" || die 'a load failed'; done
    for ((fs = 1; fs <= nr; fs++)); do umount "$TEST_DIR/fs$fs"; done
    chain "$nr_snapshots"
    detach "$device"
    device=$(attach "${images[@]}")
    udevadm settle -t 10 || true
    for ((fs = 1; fs <= nr; fs++)); do
        part=$device
        ((nr == 1)) || part=${device}p$fs
        retry 10 test -b "$part" || die "no $part"
        e2fsck -fn "$part" >&2 || die 'the file system is damaged'
    done
    detach "$device"
    rm -f "$SCRATCH"/*.img "$TEST_DIR/stop"
}

mkdir "$TEST_DIR/fs1" "$TEST_DIR/fs2"
note 'a file system on the whole disk'
new 0 -s 96M -b 64K
device=$(attach "$SCRATCH/0.img")
mkfs.ext4 -q -F "$device"
mount "$device" "$TEST_DIR/fs1"
mounted 1

note 'two partitions'
new 0 -s 96M -b 64K
device=$(attach "$SCRATCH/0.img")
printf ',48M\n,\n' | sfdisk -q "$device"
udevadm settle -t 10 || true
for fs in 1 2; do
    retry 10 test -b "${device}p$fs"
    mkfs.ext4 -q -F "${device}p$fs"
    mount "${device}p$fs" "$TEST_DIR/fs$fs"
done
mounted 2
