#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# An image left marked in use by a crash is repaired by attach, which says so;
# --no-repair refuses it with a hint; read-only it works and is not changed.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 64M -b 64K "$image" >/dev/null
device=$(attach "$image")
head -c 3M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=64k conv=fsync status=none
# What a crash would leave: the file as it is now.
cp "$image" "$SCRATCH/crashed.img"
detach "$device"

crashed=$SCRATCH/crashed.img
before=$(sha256sum <"$crashed")
said=$(ploopctl attach --no-repair "$crashed" 2>&1) && die "--no-repair attached a marked image"
[[ $said == *repair* ]] || die "no hint: $said"
expect_same "$(sha256sum <"$crashed")" "$before" 'the image after --no-repair'

device=$(attach -r "$crashed")
cmp -n $((3 << 20)) "$device" "$TEST_DIR/data" || die "read-only reads wrong"
detach "$device"
expect_same "$(sha256sum <"$crashed")" "$before" 'the image after a read-only attach'

said=$(plooptest attach-raw --cluster-log 7 "$crashed" 2>&1) && die "the module attached a marked image"
[[ $said == *busy* ]] || die "the module says: $said"

device=$(attach "$crashed" 2>"$TEST_DIR/said")
grep -qiE 'repair|not closed' "$TEST_DIR/said" || die "the repair was not said: $(<"$TEST_DIR/said")"
cmp -n $((3 << 20)) "$device" "$TEST_DIR/data" || die "reads wrong after the repair"
detach "$device"
ploopctl check "$crashed" >&2
cp "$crashed" "$crashed.copy"
qemu-img check -f parallels "$crashed.copy" >&2
