#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Growth against writes that are on their way, on a slow disk: one that took a slot
# where the larger index is to be, before it was published; and those that are the first
# in their part of the map while the new map is made. All must be found again.
# timeout: 200
. "$(dirname "$0")/lib.sh"

seed=${SEED:-$RANDOM}
note "seed $seed"
modprobe dm-delay
disk=$(scratch_disk 0)
sectors=$((2 << 21))
blkdiscard -f "$disk"
dmsetup create below --table "0 $sectors delay $disk 0 0 $disk 0 0"
mkfs.ext4 -q -F -E lazy_itable_init=1,nodiscard /dev/mapper/below
mkdir -p "$SCRATCH"
mount /dev/mapper/below "$SCRATCH"

# slow MS: what a write to the disk below takes.
slow() {
    dmsetup suspend --nolockfs below
    dmsetup load below --table "0 $sectors delay $disk 0 0 $disk 0 $1"
    dmsetup resume below
}

end() {
    detach "$device"
    ploopctl check "$image" >&2
    device=$(attach "$image")
    "$@"
    detach "$device"
    rm -f "$image"
}

first_write() {
    local writer
    image=$SCRATCH/first.img
    ploopctl create -s 200M -b 32K "$image" >/dev/null
    device=$(attach "$image")
    head -c 32k /dev/urandom >"$TEST_DIR/data"
    slow 600
    dd if="$TEST_DIR/data" of="$device" bs=32k seek="$1" oflag=direct conv=notrunc status=none &
    writer=$!
    sleep 0.3
    timeout 60 plooptest op "$device" grow $((300 << 11))
    wait "$writer" || die "the write failed"
    slow 0
    same() { cmp -n 32768 -i $((at * 32768)):0 "$device" "$TEST_DIR/data" >&2 || die "the write that took the first slot is lost"; }
    at=$1
    same
    end same
}

note 'new parts of the map while it is made larger'
image=$SCRATCH/map.img
# A part of the map is 512 clusters, so 16 MiB.
ploopctl create -s 24G -b 32K "$image" >/dev/null
device=$(attach "$image")
slow 60
plooptest load --seed "$seed" --jobs 8 --apart $((16 << 20)) --seconds 60 --stop "$TEST_DIR/stop" --save "$TEST_DIR/model" --written "$device" &
load=$!
# Who holds the device's control lock makes the moment between map and switch long.
sync_all_the_time() {
    while [[ ! -e $TEST_DIR/stop ]]; do plooptest sync "$device"; done
}
sync_all_the_time &
syncers=($!)
sync_all_the_time &
syncers+=($!)
step=0
while ((step < 20)) && kill -0 "$load" 2>/dev/null; do
    step=$((step + 1))
    timeout 60 plooptest op "$device" grow $(((24 << 21) + 64 * step)) || die "growth $step failed"
done
touch "$TEST_DIR/stop"
slow 0
note "$step steps"
wait "${syncers[@]}"
wait "$load" || die "a write is lost"
same() { plooptest load-verify --written "$device" "$TEST_DIR/model" || die "a write is lost after attaching again"; }
end same

note 'a write that has a slot of the new index'
first_write 0
first_write 77
umount "$SCRATCH"
dmsetup remove --retry below
