#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# START that cannot mark the image in use fails, and so does the next one, though the disk has
# healed: else the image would be written without a mark, and after a crash nobody would look
# at it. CLEAR and a new attach make it usable.
. "$(dirname "$0")/lib.sh"

need perl filefrag
STOP=0x5002 START=0x5003 CLEAR=0x5001
modprobe dm-delay
disk=$(scratch_disk 0)
sectors=$((1 << 20))
dmsetup create below --table "0 $sectors linear $disk 0"
dmsetup create bad --table '0 4096 error'
mkfs.ext4 -q -F -E lazy_itable_init=1,nodiscard /dev/mapper/below
mkdir -p "$SCRATCH"
mount /dev/mapper/below "$SCRATCH"

image=$SCRATCH/disk.img
head -c 1M /dev/urandom >"$TEST_DIR/data"
ploopctl create -s 64M -b 64K "$image" >/dev/null
device=$(attach "$image")
dd if="$TEST_DIR/data" of="$device" bs=64k oflag=direct conv=fsync status=none
expect_same "$(call $STOP)" 0 'errno of STOP'
sync -f "$SCRATCH"
# Where the header is; it can be read, but not written.
at=$(filefrag -e -b512 "$image" | sed -n 's/^ *0: *0\.\. *[0-9]*: *\([0-9]*\)\.\..*/\1/p')
[[ $at =~ ^[0-9]+$ ]] || die 'cannot find the header on the disk'
below "0 $at linear $disk 0
$at 8 delay $disk $at 0 /dev/mapper/bad 0 0 $disk $at 0
$((at + 8)) $((sectors - at - 8)) linear $disk $((at + 8))"
expect_same "$(call $START)" 5 'errno of START'
below "0 $sectors linear $disk 0"
expect_same "$(call $START)" 5 'errno of the next START'
expect_same "$(call $CLEAR)" 0 'errno of CLEAR'
[[ ! -b $device ]] || retry 10 ploopctl detach "$device" || note 'there is nothing to detach'
ploopctl check "$image" >&2 || die 'the image is damaged'

device=$(attach "$image")
cmp -n 1048576 "$device" "$TEST_DIR/data" >&2 || die 'the data is lost'
dd if="$TEST_DIR/data" of="$device" bs=64k seek=20 oflag=direct conv=fsync status=none
expect_same "$(ploopctl info --json "$image" | jq .in_use)" true 'in use'
detach "$device"
ploopctl check "$image" >&2 || die 'the image is damaged at the end'
umount "$SCRATCH"
dmsetup remove --retry below
dmsetup remove --retry bad
