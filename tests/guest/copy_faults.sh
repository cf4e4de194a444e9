#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Copies that fail: the receiver or the sender is killed at any moment, the target is full, exists,
# or speaks nonsense, the stop command fails, the disk does not get quiet. Each time there is an
# error on both sides, nothing has the final name, and the disk goes on, neither frozen nor tracked.
# timeout: 900
. "$(dirname "$0")/lib.sh"

seed=${SEED:-$RANDOM}
note "seed $seed"
RANDOM=$seed
scratch_fs xfs
mkdir -p "$TEST_DIR/small" "$TEST_DIR/fs"
mount -t tmpfs -o size=8M tmpfs "$TEST_DIR/small"

ploopctl create --descriptor -s 128M -b 64K "$SCRATCH/disk"
device=$(attach "$SCRATCH/disk")
mkfs.ext4 -q -F "$device"
mount "$device" "$TEST_DIR/fs"
head -c "$(share 16 48)M" /dev/urandom >"$TEST_DIR/fs/data"
sync
# Something to send in each round.
(n=0; while [[ ! -e $TEST_DIR/stop ]]; do
    n=$((n + 1))
    dd if=/dev/urandom of="$TEST_DIR/fs/churn$((n % 5))" bs=64k count=4 conv=fsync status=none
done) &
churn=$!

state() { cat "/sys/block/${device##*/}/pstate/$1"; }

# sound WHAT: the disk goes on after a copy that failed, and there is no copy.
sound() {
    expect_same "$(state freeze_state)" 0 "$1: frozen"
    timeout "$(limit 20)" dd if=/dev/urandom of="$TEST_DIR/fs/after" bs=64k count=1 conv=fsync status=none || die "$1: no write after it"
    [[ ! -e $SCRATCH/copy ]] || die "$1: there is a copy"
    # Not tracked: a snapshot is possible, and is merged away again.
    local uuid
    uuid=$(timeout "$(limit 60)" ploopctl snapshot create "$SCRATCH/disk") || die "$1: no snapshot after it"
    timeout "$(limit 120)" ploopctl snapshot delete --uuid "$uuid" "$SCRATCH/disk" || die "$1: the snapshot stays"
}

# fails WHAT STATUS WORDS ARGUMENTS...: a copy that must fail so.
fails() {
    local what=$1 status=$2 words=$3 got=0
    shift 3
    timeout "$(limit 120)" ploopctl copy send "$@" "$device" >/dev/null 2>"$TEST_DIR/said" || got=$?
    expect_same "$got" "$status" "$what: $(tail -n 3 "$TEST_DIR/said")"
    grep -qE -- "$words" "$TEST_DIR/said" || die "$what says: $(<"$TEST_DIR/said")"
    sound "$what"
}

note 'targets'
fails full 7 'no space|No space' --to "$TEST_DIR/small/copy"
expect_same "$(find "$TEST_DIR/small" -mindepth 1)" '' 'what is left'
mkdir "$SCRATCH/there"
fails exists 1 'exists already' --to "$SCRATCH/there"
fails 'no directory' 1 'does not exist' --to "$SCRATCH/none/copy"
fails nonsense 13 'no answer|went away' --through 'head -c 64 /dev/zero; cat >/dev/null'
fails 'ends at once' 13 'went away' --through true
fails silent 13 silent --timeout 2 --through 'sleep 30'
fails 'stop command' 12 'stop command' --stop-command false --to "$SCRATCH/copy"
fails 'a command that fails in the end' 12 'the command failed' --keep-frozen \
    --through "ploopctl copy receive '$SCRATCH/copy' && rm -r '$SCRATCH/copy' && exit 3"
fails 'a signal while it is frozen' 138 '' --keep-frozen \
    --through "ploopctl copy receive '$SCRATCH/copy' && rm -r '$SCRATCH/copy' && kill -USR1 \$PPID && exit 3"

note 'the receiver is killed'
for when in $(share '0.1 4.4' '0.1 0.5 1.1 2 3 4.2 4.6') $((RANDOM % 6)).$((RANDOM % 10)); do
    got=0
    timeout "$(limit 120)" ploopctl copy send --bwlimit "$(share 4 12)M" --rounds 50 "$device" 2>"$TEST_DIR/said" \
        --through "timeout -s KILL $when ploopctl copy receive '$SCRATCH/copy'" || got=$?
    if [[ ! -e $SCRATCH/copy ]]; then
        expect_same "$got" 13 "killed after $when s"
        grep -q 'went away' "$TEST_DIR/said" || die "killed after $when s: $(<"$TEST_DIR/said")"
    fi
    rm -rf "$SCRATCH/copy" "$SCRATCH/copy.ploopctl-partial"
    sound "receiver after $when s"
done
# What it left does not hinder the next one.
mkdir "$SCRATCH/copy.ploopctl-partial"
fails 'killed before the freeze' 13 'went away' --rounds 2 --stop-command "kill -KILL \$(cat '$TEST_DIR/pid')" \
    --through "echo \$\$ >'$TEST_DIR/pid'; exec ploopctl copy receive '$SCRATCH/copy'"
rm -rf "$SCRATCH/copy.ploopctl-partial"

note 'the sender is killed'
for signal in INT TERM KILL; do
    for when in $(share '' '0.2 0.7 1.3 2.1') $((RANDOM % 3)).$((RANDOM % 10)); do
        got=0
        timeout -s "$signal" "$when" ploopctl copy send --bwlimit "$(share 8 24)M" --rounds 50 "$device" 2>/dev/null |
            ploopctl copy receive "$SCRATCH/copy" 2>"$TEST_DIR/said" || got=$?
        if [[ -e $SCRATCH/copy ]]; then
            rm -rf "$SCRATCH/copy"
            continue
        fi
        grep -qE 'ends before|gave up' "$TEST_DIR/said" || die "the receiver says: $(<"$TEST_DIR/said")"
        [[ ! -e $SCRATCH/copy.partial ]] || die 'the partial copy is left'
        # Killed, it cannot thaw and goes on being noted.
        [[ $signal != KILL ]] || ploopctl copy thaw "$device"
        sound "sender: $signal after $when s"
    done
done

note 'others meanwhile'
timeout "$(limit 120)" ploopctl copy send --bwlimit "$(share 3 8)M" "$device" 2>/dev/null | ploopctl copy receive "$SCRATCH/copy" &
copy=$!
sleep 1
expect_fail ploopctl snapshot create --wait 1 "$SCRATCH/disk"
expect_fail ploopctl resize --wait 1 -s 256M "$SCRATCH/disk"
expect_fail ploopctl copy send --wait 1 --to "$SCRATCH/second" "$device"
wait "$copy" || die 'the copy failed'
ploopctl descriptor validate "$SCRATCH/copy" >/dev/null
rm -rf "$SCRATCH/copy"

note 'a command that does not end'
got=0
timeout "$(limit 120)" ploopctl copy send --keep-frozen --timeout "$(limit 10)" \
    --through "ploopctl copy receive $SCRATCH/endless; exec sleep 3600" "$device" 2>"$TEST_DIR/said" || got=$?
expect_same "$got" 13 "$(tail -n 3 "$TEST_DIR/said")"
grep -q 'does not end' "$TEST_DIR/said" || die "it says: $(<"$TEST_DIR/said")"
ploopctl descriptor validate "$SCRATCH/endless" >/dev/null
rm -rf "$SCRATCH/endless"
sound 'a command that does not end'

touch "$TEST_DIR/stop"
wait "$churn"
umount "$TEST_DIR/fs"

note 'who writes to the disk itself does not stand still'
# Faster than any copy can be: in large blocks, and nobody reads or sends them.
fio --name=busy --filename="$device" --direct=1 --rw=randwrite --bs=256k --ioengine=libaio --iodepth=16 \
    --numjobs=2 --time_based --runtime=3600 --size="$(share 8 32)M" >/dev/null 2>&1 &
load=$!
requests() { cat "/sys/block/${device##*/}/pstate/total_bios"; }
before=$(requests)
is_busy() { (($(requests) >= before + 512)); }
retry 60 is_busy || die "fio does not write"
fails 'not quiet' 14 'still written to' --rounds 2 --to "$SCRATCH/copy"
kill "$load"
wait "$load" || true
detach "$device"
umount "$TEST_DIR/small"
