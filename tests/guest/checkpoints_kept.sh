#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Checkpoints outlive a clean detach in the image's dirty bitmaps, where QEMU reads the same, and
# nothing else: not a crash, not somebody else's write, not damage.
# timeout: 300
. "$(dirname "$0")/lib.sh"

need qemu-nbd jq

scratch_fs ext4
g=65536
extents() { plooptest checkpoint read "$device" "$1"; }

# put BYTE BYTES: other data there.
put() { head -c "$2" /dev/urandom | dd of="$device" bs="$2" seek="$1" oflag=seek_bytes,direct iflag=fullblock conv=notrunc status=none; }

# bitmaps IMAGE: their names, in the order of the image.
bitmaps() { ploopctl info --json "$1" | jq -r '.bitmaps[].id'; }

# in_qemu IMAGE NAME: the extents as QEMU has them.
in_qemu() {
    local socket=$TEST_DIR/nbd nbd
    qemu-nbd -r -f parallels -B "$2" -k "$socket" -e 1 "$1" &
    nbd=$!
    retry 30 test -S "$socket"
    qemu-img map --output=json --image-opts \
        "driver=nbd,server.type=unix,server.path=$socket,x-dirty-bitmap=qemu:dirty-bitmap:$2" >"$TEST_DIR/map"
    wait "$nbd" || die 'qemu-nbd failed'
    # What QEMU calls dirty is shown as without data.
    jq -r '.[] | select(.data == false) | "\(.start) \(.length)"' "$TEST_DIR/map"
}

note 'two checkpoints, kept twice'
ploopctl create -s 100M -b 64K "$SCRATCH/0.img" >/dev/null
device=$(attach "$SCRATCH/0.img")
put 0 1048576
plooptest checkpoint start "$device" 1
put $((3 * g)) 4096
put $((17 << 20)) 299008
put $(((100 << 20) - 4096)) 4096
plooptest checkpoint start --granularity 4096 "$device" 2
put $((50 << 20)) 4096
# One that waits for a snapshot has nothing to be kept.
plooptest checkpoint arm "$device" 3
one=$(extents 1) two=$(extents 2)
for round in first second; do
    detach "$device"
    ploopctl check "$SCRATCH/0.img" >&2
    mapfile -t names < <(bitmaps "$SCRATCH/0.img")
    expect_same "${#names[@]}" 2 bitmaps
    # It takes the clusters of a bitmap for leaked, and nothing else.
    status=0
    qemu-img check -q -f parallels "$SCRATCH/0.img" || status=$?
    expect_same "$status" 3 'what QEMU thinks of the image'
    expect_same "$(in_qemu "$SCRATCH/0.img" "${names[0]}")" "$one" 'what QEMU sees of the first'
    expect_same "$(in_qemu "$SCRATCH/0.img" "${names[1]}")" "$two" 'what QEMU sees of the second'
    sum=$(sha256sum <"$SCRATCH/0.img")
    device=$(attach -r "$SCRATCH/0.img")
    detach "$device"
    expect_same "$(sha256sum <"$SCRATCH/0.img")" "$sum" 'the image after it was only read'
    device=$(attach "$SCRATCH/0.img")
    expect_log '2 checkpoints of the image go on'
    expect_same "$(points)" 2 checkpoints
    expect_same "$(extents 1)" "$one" "extents, $round time"
    expect_same "$(extents 2)" "$two" "extents, $round time"
    put $((70 << 20)) 4096
    one=$(extents 1) two=$(extents 2)
done
plooptest op "$device" grow $((130 << 11))
expect_same "$(extents 1)" "$one" 'extents of a larger disk'
put $((120 << 20)) 65536
one=$(extents 1)
detach "$device"
expect_same "$(in_qemu "$SCRATCH/0.img" "${names[0]}")" "$one" 'what QEMU sees of the larger disk'

note 'after a crash, or when somebody else has written, or with damage: none'
device=$(attach "$SCRATCH/0.img")
expect_same "$(extents 1)" "$one" extents
cp --sparse=always "$SCRATCH/0.img" "$SCRATCH/crashed.img"
detach "$device"
cp --sparse=always "$SCRATCH/0.img" "$SCRATCH/good.img"
device=$(attach "$SCRATCH/crashed.img")
expect_same "$(points)" 0 'checkpoints after a crash'
detach "$device"
expect_same "$(bitmaps "$SCRATCH/crashed.img")" '' bitmaps

qemu-io -f parallels -c 'write -P 7 1M 64k' "$SCRATCH/0.img" >/dev/null 2>&1
device=$(attach "$SCRATCH/0.img")
expect_same "$(points)" 0 'checkpoints after QEMU has written'
detach "$device"

cp --sparse=always "$SCRATCH/good.img" "$SCRATCH/0.img"
# Where the extension is: sectors, at byte 56.
at=$(($(od -An -tu8 -j 56 -N 8 "$SCRATCH/0.img") * 512))
for byte in 0 9 30 120 60000; do
    cp --sparse=always "$SCRATCH/good.img" "$SCRATCH/0.img"
    printf '\x5a' | dd of="$SCRATCH/0.img" bs=1 seek=$((at + byte)) conv=notrunc status=none
    device=$(attach "$SCRATCH/0.img")
    expect_same "$(points)" 0 "checkpoints with byte $byte damaged"
    detach "$device"
    ploopctl check "$SCRATCH/0.img" >&2
done

note 'dropped; not enough space for them'
cp --sparse=always "$SCRATCH/good.img" "$SCRATCH/0.img"
device=$(attach "$SCRATCH/0.img")
expect_same "$(points)" 2 checkpoints
plooptest checkpoint drop "$device" 1
plooptest checkpoint drop "$device" 2
detach "$device"
expect_same "$(bitmaps "$SCRATCH/0.img")" '' bitmaps
rm "$SCRATCH/crashed.img"
device=$(attach "$SCRATCH/good.img")
head -c $((130 << 20)) "$device" >"$TEST_DIR/content"
dd if=/dev/zero of="$SCRATCH/filler" bs=1M status=none 2>/dev/null || true
dd if=/dev/zero of="$SCRATCH/filler-2" bs=4K status=none 2>/dev/null || true
detach "$device"
rm "$SCRATCH"/filler*
if [[ -n $(bitmaps "$SCRATCH/good.img") ]]; then note 'there was space after all'; else expect_log 'no checkpoints are kept'; fi
ploopctl check "$SCRATCH/good.img" >&2
device=$(attach "$SCRATCH/good.img")
expect_same_bytes "$device" "$TEST_DIR/content"
detach "$device"
rm "$SCRATCH"/*.img

note 'the top of a chain'
ploopctl create -s 64M -b 64K "$SCRATCH/0.img" >/dev/null
ploopctl create -s 64M -b 64K "$SCRATCH/1.img" >/dev/null
device=$(attach "$SCRATCH/0.img" "$SCRATCH/1.img")
plooptest checkpoint start "$device" 1
put $((9 * g)) 4096
one=$(extents 1)
for round in first second; do
    detach "$device"
    device=$(attach "$SCRATCH/0.img" "$SCRATCH/1.img")
    expect_same "$(extents 1)" "$one" "extents, $round time"
done
detach "$device"
# Below another top it is of another disk.
ploopctl create -s 64M -b 64K "$SCRATCH/2.img" >/dev/null
device=$(attach "$SCRATCH/0.img" "$SCRATCH/1.img" "$SCRATCH/2.img")
expect_same "$(points)" 0 'checkpoints below another top'
detach "$device"
rm "$SCRATCH"/*.img

note 'many clusters of bitmap: clear, set and mixed'
ploopctl create -s 5G -b 32K "$SCRATCH/0.img" >/dev/null
device=$(attach "$SCRATCH/0.img")
plooptest checkpoint start --granularity 4096 "$device" 1
blkdiscard -f -z -o $((1 << 30)) -l $((1 << 30)) "$device"
put $((3 << 30)) 4096
put $(((4 << 30) - 4096)) 4096
put $(((5 << 30) - 4096)) 4096
one=$(extents 1)
detach "$device"
expect_same "$(in_qemu "$SCRATCH/0.img" "$(bitmaps "$SCRATCH/0.img")")" "$one" 'what QEMU sees'
device=$(attach "$SCRATCH/0.img")
expect_same "$(extents 1)" "$one" extents
detach "$device"
ploopctl check "$SCRATCH/0.img" >&2
