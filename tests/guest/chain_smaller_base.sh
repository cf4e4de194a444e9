#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Behind the end of a smaller base the disk reads as zeros, even if the base's table
# has entries there: they are of a disk that was larger once.
. "$(dirname "$0")/lib.sh"

scratch_fs tmpfs
ploopctl create -s 1M -b 64K "$SCRATCH/base" >/dev/null
device=$(attach "$SCRATCH/base")
head -c 1M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=64k conv=fsync status=none
detach "$device"
# Half the size, 1024 sectors; the table keeps its 16 entries.
printf '\0\4\0\0\0\0\0\0' | dd of="$SCRATCH/base" bs=1 seek=36 conv=notrunc status=none
# It says so, but that is no reason not to attach it.
ploopctl check "$SCRATCH/base" >&2 || (($? == 41))
ploopctl create -s 1M -b 64K "$SCRATCH/top" >/dev/null
device=$(attach "$SCRATCH/base" "$SCRATCH/top")
cmp -n 524288 "$device" "$TEST_DIR/data" >&2 || die 'the base reads wrong'
cmp -n 524288 -i 524288:0 "$device" /dev/zero >&2 || die 'what lies behind the end of the base shows'
# Nor is it copied.
dd if="$TEST_DIR/data" of="$device" bs=512 seek=1500 count=1 oflag=direct conv=notrunc status=none
cmp -n $((1500 * 512 - 524288)) -i 524288:0 "$device" /dev/zero >&2 || die 'what lies behind the end of the base was copied'
# Nor is it in a backup.
ploopctl backup full "$device" "$SCRATCH/backup" >/dev/null
ploopctl backup restore -f raw --to "$SCRATCH/restored" "$SCRATCH/backup" >/dev/null
expect_same_bytes "$SCRATCH/restored" "$device"
detach "$device"
