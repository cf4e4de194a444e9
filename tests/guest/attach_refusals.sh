#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# What is not a sound image is refused by the tool with a message that names the
# field, and by the module with a line in the kernel log; the file is unchanged.
# What is torn or marked without loss is repaired, said, and can be refused.
# timeout: 180
. "$(dirname "$0")/lib.sh"

scratch_fs tmpfs
good=$SCRATCH/good.img
image=$SCRATCH/bad.img
ploopctl create -s 16M -b 64K "$good" >/dev/null
device=$(attach "$good")
head -c 1M /dev/urandom | dd of="$device" bs=64k conv=fsync iflag=fullblock status=none
detach "$device"

# put OFFSET HEX: bytes into the bad image.
put() { xxd -r -p <<<"$2" | dd of="$image" bs=1 seek="$1" conv=notrunc status=none; }

# refused WHAT MESSAGE: by tool and by module, for the reason MESSAGE.
refused() {
    local sum said status=0
    sum=$(sha256sum <"$image")
    said=$(ploopctl attach "$image" 2>&1) || status=$?
    ((status != 0 && status < 100)) || die "$1: attach ended with $status ($said)"
    [[ $said =~ $2 ]] || die "$1: the tool says '$said'"
    status=0
    said=$(plooptest attach-raw --cluster-log 7 "$image" 2>&1) || status=$?
    ((status == 1)) && [[ $said == *refused* ]] || die "$1: the module says '$said'"
    [[ $said == *"Invalid argument"* ]] || die "$1: not EINVAL: $said"
    expect_log "ploop.*($2)"
    expect_same "$(sha256sum <"$image")" "$sum" "the file ($1)"
}

fresh() { cp "$good" "$image"; }

fresh; put 0 00; refused 'wrong magic' 'magic'
fresh; put 16 03; refused 'wrong type' 'm_Type'
fresh; put 28 7f; refused 'wrong cluster size' 'm_Sectors'
fresh; put 36 0000000000000000; refused 'size 0' 'm_SizeInSectors'
fresh; put 36 ffffffffffffff7f; refused 'size over the limit' 'm_SizeInSectors'
fresh; put 36 0090000000000000; refused 'size over the BAT' 'm_SizeInSectors'
fresh; put 48 00; refused 'first block inside the BAT' 'm_FirstBlockOffset'
fresh; put 48 81; refused 'first block misaligned' 'm_FirstBlockOffset'
fresh; put 44 07000000; refused 'unknown mark' 'm_DiskInUse'
fresh; put 68 00ffff00; refused 'entry past the end' 'BAT\[1\]'
fresh; truncate -s 100 "$image"; refused 'cut inside the header' 'header and BAT need'
fresh; put 72 "$(xxd -s 64 -l 4 -p "$image")"; refused 'duplicate entry' 'BAT\[2\]'
expect_fail ploopctl check "$image"
ploopctl check --repair "$image" >&2
ploopctl check "$image" >&2

note 'version 1 entries'
rm -f "$good"
ploopctl create -s 16M -b 64K --format-version 1 "$good" >/dev/null
device=$(attach "$good")
head -c 1M /dev/urandom | dd of="$device" bs=64k conv=fsync iflag=fullblock status=none
detach "$device"
fresh; put 64 01010000; refused 'misaligned entry' 'BAT\[0\]'

note 'a torn tail that no entry names'
fresh; printf torn >>"$image"
# Named or not, the module alone refuses, the tool repairs.
expect_fail ploopctl attach --no-repair "$image"
device=$(attach "$image" 2>"$TEST_DIR/said")
grep -qiE 'repair|cut|tail' "$TEST_DIR/said" || die "a repair was not said: $(<"$TEST_DIR/said")"
detach "$device"

note 'not a file'
mkdir "$SCRATCH/dir"
mkfifo "$SCRATCH/fifo"
expect_fail ploopctl attach "$SCRATCH/dir"
expect_fail timeout "$(limit 20)" ploopctl attach "$SCRATCH/fifo"
expect_fail ploopctl attach -f raw "$SCRATCH/dir"
expect_fail ploopctl attach -f raw /dev/null
expect_fail ploopctl attach "$SCRATCH/none"
