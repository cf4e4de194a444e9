#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Growth against writes that are on their way, on a slow disk: one that took a slot
# where the larger index is to be, before it was published; and those that are the first
# in their part of the map while the new map is made. All must be found again.
# timeout: 400
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

nr_slots() { cat "/sys/block/${device##*/}/pstate/allocated_clusters"; }

# has_slot: the write has taken its place in the file.
has_slot() { (($(nr_slots) > 0)); }

# first_write CLUSTER: the first one of an image, and growth that begins while it is on its way.
first_write() {
    local writer ms met=0
    at=$1 image=$SCRATCH/first.img
    same() { cmp -n 32768 -i $((at * 32768)):0 "$device" "$TEST_DIR/data" >&2 || die "the write that took the first slot is lost"; }
    # On a busy machine it may be over before growth begins.
    for ms in 600 2000 6000; do
        ploopctl create -s 200M -b 32K "$image" >/dev/null
        device=$(attach "$image")
        head -c 32k /dev/urandom >"$TEST_DIR/data"
        slow "$ms"
        dd if="$TEST_DIR/data" of="$device" bs=32k seek="$at" oflag=direct conv=notrunc status=none &
        writer=$!
        retry 20 has_slot || die 'the write takes no slot'
        plooptest op --start "$device" grow $((300 << 11))
        ! in_flight "$device" || met=1
        timeout "$(limit 100)" plooptest op-wait "$device" || die 'growth failed'
        wait "$writer" || die "the write failed"
        slow 0
        same
        end same
        ((met == 0)) || return 0
    done
    die 'the write was over before growth began'
}

note 'new parts of the map while it is made larger'
image=$SCRATCH/map.img
# A part of the map is 512 clusters, so 16 MiB.
ploopctl create -s 48G -b 32K "$image" >/dev/null
device=$(attach "$image")
slow 60
begin_load --seed "$seed" --jobs 8 --apart $((16 << 20)) --seconds 60 --save "$TEST_DIR/model" --written "$device"
# Who holds the device's control lock makes the moment between map and switch long.
sync_all_the_time() {
    while [[ ! -e $TEST_DIR/stop ]]; do plooptest sync "$device"; done
}
sync_all_the_time &
syncers=($!)
sync_all_the_time &
syncers+=($!)
step=0 met=0
while ((step < 20)) && kill -0 "$load" 2>/dev/null; do
    step=$((step + 1)) before=$(nr_slots)
    timeout "$(limit 60)" plooptest op "$device" grow $(((48 << 21) + 64 * step)) || die "growth $step failed"
    # Writes went on meanwhile.
    (($(nr_slots) == before)) || met=$((met + 1))
done
touch "$TEST_DIR/stop"
slow 0
note "$step steps, $met of them under load"
((met >= 3)) || die "only $met steps of growth met the load"
wait "${syncers[@]}"
wait "$load" || die "a write is lost"
same() { plooptest load-verify --written "$device" "$TEST_DIR/model" || die "a write is lost after attaching again"; }
end same

note 'a write that has a slot of the new index'
first_write 0
first_write 77
umount "$SCRATCH"
dmsetup remove --retry below
