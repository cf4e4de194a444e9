#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A chain of 255 images, each with one cluster: the highest that has a cluster is
# read, writes go on top, attach takes no unreasonable time. One more image is
# refused by the tool and by the module, also by a snapshot.
# timeout: 300
. "$(dirname "$0")/lib.sh"

scratch_fs tmpfs
levels=255 clusters=100 c=32768
ploopctl create -s $((clusters * c)) -b 32K "$SCRATCH/first" >/dev/null
device=$(attach "$SCRATCH/first")
dd if=/dev/urandom of="$device" bs=$c count=1 oflag=direct iflag=fullblock status=none
detach "$device"
slot=$(od -An -tu4 -j64 -N4 "$SCRATCH/first")
((slot > 0))

# The same image for each level, with another cluster and other data.
truncate -s $((clusters * c)) "$SCRATCH/model"
images=()
for ((i = 0; i < levels; i++)); do
    image=$SCRATCH/$i.img
    at=$((i * 37 % clusters))
    cp "$SCRATCH/first" "$image"
    printf '\0\0\0\0' | dd of="$image" bs=4 seek=16 conv=notrunc status=none
    # The entry is below 256.
    printf "\\x$(printf %x $((slot)))" | dd of="$image" bs=1 seek=$((64 + 4 * at)) conv=notrunc status=none
    head -c $c < <(yes "this is level $i") >"$SCRATCH/data"
    dd if="$SCRATCH/data" of="$image" bs=$c seek=$((slot)) conv=notrunc status=none
    dd if="$SCRATCH/data" of="$SCRATCH/model" bs=$c seek=$at conv=notrunc status=none
    images+=("$image")
done
ploopctl check "$image" >&2
before=$(sha256sum "${images[@]:0:levels-1}" | sha256sum)

began=$SECONDS
device=$(attach "${images[@]}")
note "attached $levels levels in $((SECONDS - began)) s"
((SECONDS - began < $(limit 60))) || die "attach took $((SECONDS - began)) s"
expect_same "$(<"/sys/block/${device##*/}/pstate/top")" $((levels - 1)) top
expect_same "$(ploopctl list --json | jq '.devices[0].deltas | length')" $levels 'levels listed'
expect_same "$(ploopctl info "$device" | grep -c '^delta:')" $levels 'levels shown'
expect_same_bytes "$device" "$SCRATCH/model"
for at in 3 777 2000 6000; do
    for file in "$device" "$SCRATCH/model"; do
        dd if="$SCRATCH/data" of="$file" bs=512 seek=$at count=3 conv=notrunc,fsync status=none
    done
done
expect_same_bytes "$device" "$SCRATCH/model"

note 'a second device on all but the top'
cp "$SCRATCH/first" "$SCRATCH/other.img"
began=$SECONDS
other=$(attach "${images[@]:0:levels-1}" "$SCRATCH/other.img")
note "attached in $((SECONDS - began)) s"
detach "$other" "$device"
device=$(attach "${images[@]}")
expect_same_bytes "$device" "$SCRATCH/model"

note 'a snapshot would be one more'
ploopctl create -s $((clusters * c)) -b 32K "$SCRATCH/more.img" >/dev/null
expect_fail timeout "$(limit 30)" plooptest snapshot --cluster-log 6 "$device" "$SCRATCH/more.img"
other=$(attach "$SCRATCH/more.img")
detach "$other"
expect_same_bytes "$device" "$SCRATCH/model"
detach "$device"
ploopctl check "$image" >&2
expect_same "$(sha256sum "${images[@]:0:levels-1}" | sha256sum)" "$before" 'lower images'

note 'one more'
said=$(ploopctl attach "${images[@]}" "$SCRATCH/first" 2>&1) && die "$((levels + 1)) levels are attached"
[[ $said == *"at most $levels images"* ]] || die "the tool says '$said'"
said=$(plooptest attach-raw --cluster-log 6 "${images[@]}" "$SCRATCH/first" 2>&1) && die "the module takes $((levels + 1)) levels"
[[ $said == *"Invalid argument"* ]] || die "the module says '$said'"
expect_log "there are $levels deltas already"
