#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Backups of a disk in use: a full one and 4 (soak: 20) rounds of random writes, discards and
# snapshots, each with an incremental backup while the disk is written to. Every point is
# restored as the disk was at its snapshot. A backup that is ended leaves nothing; after a
# clean detach the chain goes on, after a crash the next one has to be full and says so.
# timeout: 900
. "$(dirname "$0")/lib.sh"

need jq

scratch_fs ext4
cd "$SCRATCH"
mkdir points backups
disk=$SCRATCH/disk
rounds=$(share 4 20)
# What the rounds write at random, and then a part that is written while a backup is made.
quiet=$(($(share 4 32) << 20)) busy=$(($(share 4 8) << 20))

checkpoints() { ploopctl checkpoint list --json "$1" | jq '.checkpoints | length'; }
deltas() { ploopctl snapshot list --json "$disk" | jq '.snapshots | length'; }
images() { ploopctl list --json | jq '[.devices[].deltas[]] | length'; }

# status N CMD...: CMD ends with status N; what it said is in $TEST_DIR/said.
status() {
    local want=$1 have=0
    shift
    "$@" >"$TEST_DIR/said" 2>&1 || have=$?
    ((have == want)) || die "status $have, not $want, of $*: $(<"$TEST_DIR/said")"
}

# change DEVICE: writes and discards at random.
change() {
    local i at
    for ((i = 0; i < 6; i++)); do
        at=$((RANDOM * 4096 % (quiet - (1 << 20))))
        head -c $((512 * (1 + RANDOM % 600))) /dev/urandom |
            dd of="$1" oflag=seek_bytes seek="$at" conv=notrunc bs=64k iflag=fullblock status=none
    done
    if (($(<"/sys/block/${1#/dev/}/queue/discard_max_bytes") > 0)); then
        blkdiscard -o $((RANDOM % (quiet >> 16) << 16)) -l 65536 "$1"
    fi
    blkdiscard -z -o $((RANDOM * 4096 % quiet)) -l 4096 "$1"
    blockdev --flushbufs "$1"
}

# pattern N: byte N, as much as the busy part.
pattern() { head -c "$busy" /dev/zero | tr '\0' "\\$(printf %03o "$1")"; }

# noise DEVICE N: byte N over the busy part, one block after the other.
noise() { pattern "$2" | dd of="$1" oflag=direct,seek_bytes seek="$quiet" conv=notrunc bs=64k iflag=fullblock status=none; }

# judge FILE N: a restored disk is as it was in round N.
judge() {
    local seen
    cmp -n "$quiet" "$1" "points/$2" >&2 || die "point $2 differs from the disk of then"
    # Blocks of the round before an end, those of the one before behind it.
    seen=$(tail -c "$busy" "$1" | tr -s '\0-\377' | od -An -v -tu1 | xargs)
    case $seen in
        "$2" | "$2 $(($2 - 1))" | "$(($2 - 1))") ;;
        *) die "point $2 has writes out of order: $seen" ;;
    esac
}

# backup N COMMAND...: one while the disk is written to.
backup() {
    local nr=$1 writer
    shift
    head -c "$quiet" "$device" >"points/$nr"
    noise "$device" "$nr" &
    writer=$!
    "$@" "backups/$nr" >"$TEST_DIR/said" || die "no backup $nr"
    wait "$writer" || die 'a write failed'
}

note 'a full backup, and incremental ones'
ploopctl create --descriptor -s $((quiet + busy)) -b 64K "$disk"
device=$(attach "$disk")
noise "$device" 0
change "$device"
backup 1 ploopctl backup full "$disk"
expect_same "$(checkpoints "$device")" 1 checkpoints
expect_same "$(deltas)" 1 deltas
for ((nr = 2; nr <= rounds + 1; nr++)); do
    change "$device"
    if ((nr % 3 == 0)); then
        detach "$device"
        device=$(attach "$disk")
        change "$device"
    fi
    ((nr % 5)) || uuid=$(ploopctl snapshot create "$disk")
    options=()
    ((nr % 3)) || options=(-z)
    # Named by the disk, the device and the image in turn.
    case $((nr % 3)) in
        0) target=$disk ;;
        1) target=$device ;;
        *) target=$(ploopctl info --json "$disk" | jq -r '.images[-1].image') ;;
    esac
    backup "$nr" ploopctl backup incremental "${options[@]}" --parent "backups/$((nr - 1))" "$target"
    expect_same "$(checkpoints "$device")" 1 checkpoints
    ((nr % 5)) || ploopctl snapshot delete --uuid "$uuid" "$disk"
    expect_same "$(deltas)" 1 deltas
done
ploopctl backup verify backups/* >&2

note 'every point is restored'
for ((nr = 1; nr <= rounds + 1; nr++)); do
    ploopctl backup restore -f raw --point "$nr" --to restored backups/* >/dev/null
    judge restored "$nr"
    rm restored
done
ploopctl backup restore --to restored.img backups/* >/dev/null
ploopctl check restored.img >&2
qemu-img check -q -f parallels restored.img || die 'the restored image is damaged'
other=$(attach -r restored.img)
head -c $((quiet + busy)) "$other" >restored
judge restored $((rounds + 1))
detach "$other"
rm restored restored.img

note 'what is damaged or incomplete is refused'
last=backups/$((rounds + 1))
head -c -1 "$last" >cut-short
status 41 ploopctl backup verify backups/1 cut-short
status 41 ploopctl backup incremental --parent cut-short "$disk" new
rm cut-short
status 38 ploopctl backup restore --to restored backups/1 backups/3
status 1 ploopctl backup incremental --parent "$last" "$disk" backups/1
status 38 ploopctl backup full --temporary "$TEST_DIR" "$disk" new
[[ ! -e restored && ! -e new ]] || die 'something is left'

note 'a backup that is ended leaves nothing; one that is killed, a snapshot to recover from'
change "$device"
for signal in TERM KILL; do
    ploopctl backup incremental --bwlimit 64K --parent "$last" "$disk" new >"$TEST_DIR/said" 2>&1 &
    tool=$!
    retry 30 eval '(($(deltas) == 2))' || die 'no snapshot'
    sleep 2
    kill "-$signal" "$tool"
    ended=0
    wait "$tool" || ended=$?
    ((ended != 0)) || die "$signal did not end it"
    [[ ! -e new ]] || die "half a backup is left after $signal"
    if [[ $signal == KILL ]]; then
        ploopctl recover "$disk" 2>/dev/null
        expect_same "$(checkpoints "$device")" 2 'checkpoints after a kill'
    else
        expect_same "$ended" 29 'the status'
        expect_same "$(checkpoints "$device")" 1 'checkpoints after TERM'
    fi
    expect_same "$(deltas)" 1 "deltas after $signal"
done
old=$(ploopctl backup verify --json "$last" | jq -r '.backups[0].checkpoint')
for uuid in $(ploopctl checkpoint list --json "$disk" | jq -r '.checkpoints[].uuid'); do
    [[ $uuid == "$old" ]] || ploopctl checkpoint drop --uuid "$uuid" "$disk"
done
expect_same "$(checkpoints "$device")" 1 checkpoints
change "$device"
head -c "$quiet" "$device" >points/last
ploopctl backup incremental --keep --parent "$last" "$disk" new >/dev/null
expect_same "$(checkpoints "$device")" 2 'checkpoints with --keep'
ploopctl backup restore -f raw --to restored backups/* new >/dev/null
cmp -n "$quiet" restored points/last || die 'the backup after those that were ended differs'
rm restored new
ploopctl checkpoint drop --all "$disk"
expect_same "$(checkpoints "$device")" 0 checkpoints
status 45 ploopctl backup incremental --parent "$last" "$disk" new
detach "$device"
status 40 ploopctl backup incremental --parent "$last" "$disk" new
ploopctl backup full "$disk" new >/dev/null
ploopctl backup restore -f raw --to restored new >/dev/null
cmp -n "$quiet" restored points/last || die 'the backup of the detached disk differs'
rm -r restored new points/* backups/*

note 'a device without a descriptor; a crash'
rounds=4
ploopctl create -s $((quiet + busy)) -b 64K image
device=$(attach image)
noise "$device" 0
change "$device"
backup 1 ploopctl backup full "$device"
for ((nr = 2; nr <= rounds; nr++)); do
    change "$device"
    backup "$nr" ploopctl backup incremental --parent "backups/$((nr - 1))" image
    expect_same "$(images)" 1 'images of the device'
done
for ((nr = 1; nr <= rounds; nr++)); do
    ploopctl backup restore -f raw --point "$nr" --to restored backups/* >/dev/null
    judge restored "$nr"
    rm restored
done
[[ -z $(compgen -G 'image.backup-*') ]] || die 'an image is left'
# What a crash would leave: the file as it is now.
change "$device"
cp --sparse=always image crashed
detach "$device"
device=$(attach crashed 2>/dev/null)
expect_same "$(checkpoints "$device")" 0 'checkpoints after a crash'
status 45 ploopctl backup incremental --parent "backups/$rounds" "$device" new
grep -q 'backup full' "$TEST_DIR/said" || die "no hint: $(<"$TEST_DIR/said")"
[[ ! -e new ]] || die 'something is left'
status 0 ploopctl backup incremental --full-if-needed --parent "backups/$rounds" "$device" new
ploopctl backup full "$device" other >/dev/null
for file in new other; do
    expect_same "$(ploopctl backup verify --json "$file" | jq -r '.backups[0].kind')" full kind
    ploopctl backup restore -f raw --to restored "$file" >/dev/null
    expect_same_bytes restored "$device"
    rm restored "$file"
done
expect_same "$(checkpoints "$device")" 2 checkpoints
detach "$device"
# After a clean detach it goes on.
device=$(attach image)
status 0 ploopctl backup incremental --parent "backups/$rounds" "$device" new
expect_same "$(ploopctl backup verify --json new | jq -r '.backups[0].kind')" incremental kind
ploopctl backup restore -f raw --to restored backups/* new >/dev/null
expect_same_bytes restored "$device"
rm restored new
detach "$device"
rm points/* backups/*

note 'a device that is detached during its backup, whose number another gets'
device=$(attach image)
ploopctl backup full --bwlimit "$(share 384 256)K" "$device" new >"$TEST_DIR/said" 2>&1 &
tool=$!
retry 30 compgen -G 'image.backup-*' >/dev/null || die 'no snapshot'
retry 30 eval '(($(images) == 2))' || die 'it is not written to'
head -c 1M /dev/urandom >"$TEST_DIR/late"
dd if="$TEST_DIR/late" of="$device" bs=64k oflag=direct conv=notrunc,fsync status=none
detach "$device"
ploopctl create -s 4M -b 64K rival >/dev/null
rival=$(attach -n "${device#/dev/ploop}" rival)
expect_same "$rival" "$device" device
ended=0
wait "$tool" || ended=$?
((ended != 0)) || die 'it says that all is well'
grep -q 'holds what was written since' "$TEST_DIR/said" || die "no hint: $(<"$TEST_DIR/said")"
detach "$rival"
# Alone it is not what the disk is.
status 38 ploopctl attach image
grep -q 'not all of its disk' "$TEST_DIR/said" || die "no reason: $(<"$TEST_DIR/said")"
status 38 ploopctl resize -s 64M image
device=$(attach image image.backup-*)
cmp -n $((1 << 20)) "$device" "$TEST_DIR/late" || die 'what was written meanwhile is lost'
plooptest op "$device" merge top
detach "$device"
# Nothing is left in the other.
device=$(attach image)
cmp -n $((1 << 20)) "$device" "$TEST_DIR/late" || die 'what was merged is lost'
detach "$device"
rm -f image.backup-* rival new

note 'a raw image: until it is detached'
truncate -s $((quiet + busy)) raw
device=$(attach -f raw raw)
noise "$device" 0
change "$device"
backup 1 ploopctl backup full "$device"
change "$device"
backup 2 ploopctl backup incremental --parent backups/1 "$device"
for nr in 1 2; do
    ploopctl backup restore -f raw --point "$nr" --to restored backups/* >/dev/null
    judge restored "$nr"
    rm restored
done
detach "$device"
device=$(attach -f raw raw)
status 45 ploopctl backup incremental --parent backups/2 "$device" new
detach "$device"
