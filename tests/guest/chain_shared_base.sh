#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Two devices on one base at once, each with a top of its own: neither sees what
# the other writes, and nobody may write the base meanwhile.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
ploopctl create -s 16M -b 64K "$SCRATCH/base.img" >/dev/null
device=$(attach "$SCRATCH/base.img")
head -c 4M /dev/urandom | dd of="$device" bs=64k iflag=fullblock conv=fsync status=none
dd if="$device" of="$TEST_DIR/one" bs=1M status=none
cp "$TEST_DIR/one" "$TEST_DIR/two"
detach "$device"
before=$(sha256sum <"$SCRATCH/base.img")
changed=$(stat -c '%y %z %s' "$SCRATCH/base.img")

for name in one two; do ploopctl create -s 16M -b 64K "$SCRATCH/$name.img" >/dev/null; done
one=$(attach "$SCRATCH/base.img" "$SCRATCH/one.img")
two=$(attach "$SCRATCH/base.img" "$SCRATCH/two.img")
put() { head -c 5000 /dev/urandom | tee >(dd of="$2" bs=1 seek="$3" conv=notrunc status=none) | dd of="$1" oflag=seek_bytes iflag=fullblock bs=5000 seek="$3" conv=notrunc,fsync status=none; sleep 0.1; }
for at in 100 65000 1000000 3999000 9000000; do
    put "$one" "$TEST_DIR/one" $at
    put "$two" "$TEST_DIR/two" $((at + 3000))
done
both() {
    drop_caches
    expect_same_bytes "$one" "$TEST_DIR/one"
    expect_same_bytes "$two" "$TEST_DIR/two"
}
both

# refused STATUS WORDS ARGUMENTS...
refused() {
    local want=$1 words=$2 status=0 said
    shift 2
    said=$(ploopctl "$@" 2>&1) || status=$?
    expect_same "$status" "$want" "status of $*"
    [[ $said == *"$words"* ]] || die "$* says '$said'"
}
refused 37 'attached already' attach "$SCRATCH/base.img"
refused 37 'attached already' attach "$SCRATCH/base.img" "$SCRATCH/one.img"
refused 37 'attached already' attach -r "$SCRATCH/base.img" "$SCRATCH/one.img"
refused 38 'more than once' detach "$SCRATCH/base.img"
expect_fail plooptest attach-raw --cluster-log 7 "$SCRATCH/base.img"
expect_fail qemu-io -f parallels -c 'write 0 4k' "$SCRATCH/base.img"
third=$(attach -r "$SCRATCH/base.img")
both
detach "$third" "$one"
# By the image below, now that it is in one device.
expect_same_bytes "$two" "$TEST_DIR/two"
refused 37 'attached already' attach "$SCRATCH/base.img"
udevadm settle -t 10
retry 20 ploopctl detach "$SCRATCH/base.img"
expect_same "$(sha256sum <"$SCRATCH/base.img")" "$before" 'the base'
expect_same "$(stat -c '%y %z %s' "$SCRATCH/base.img")" "$changed" "the base's times and length"
one=$(attach "$SCRATCH/base.img" "$SCRATCH/one.img")
two=$(attach "$SCRATCH/base.img" "$SCRATCH/two.img")
both
detach "$one" "$two"
detach "$(attach "$SCRATCH/base.img")"
