#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The whole machine is killed while it writes to a disk durably, makes snapshots of it and
# merges them. The disk below loses what was not flushed, but for a part, picked at random sector
# by sector. Booted again, the host's file system and the disk come up unattended, and what was
# acknowledged is there.
# timeout: 200
# kills: 3 60
. "$(dirname "$0")/lib.sh"

# The number of the round and of the last acknowledged write, on a disk that loses nothing.
told=$(scratch_disk 1)
disk=$SCRATCH/disk blocks=200
tell() { printf '%-511s\n' "$1" | dd of="$told" bs=512 oflag=direct status=none; }
read -r round acked < <(dd if="$told" bs=512 count=1 iflag=direct status=none | tr -d '\0') || true
last=$(share 3 60)

mkdir -p "$SCRATCH"
below=$(scratch_disk 0)
if [[ -z $round ]]; then
    round=0
    mkfs.ext4 -q -F -E lazy_itable_init=1,nodiscard "$below"
    mount "$below" "$SCRATCH"
    ploopctl create --descriptor -s 96M -b 64K "$disk"
    sync -f "$SCRATCH"
else
    mount "$below" "$SCRATCH"
fi
device=$(attach "$disk")
if ((round > 0)); then
    note "round $round: $acked writes were acknowledged; $(ploopctl snapshot list --json "$disk" | grep -c '"uuid"') snapshots"
    ((acked > 0)) || die 'nothing was written'
    plooptest seqverify "$device" --acked "$acked" --blocks "$blocks" >&2 || die 'what was acknowledged is lost'
    # The numbers begin again.
    blkdiscard -z "$device"
    plooptest sync "$device"
fi

if ((round < last)); then
    tell "$((round + 1)) 0"
    plooptest seqwrite "$device" --ack "$TEST_DIR/ack" --blocks "$blocks" --seconds 1000 >/dev/null &
    (while sleep 0.05; do tell "$((round + 1)) $(plooptest acked "$TEST_DIR/ack")"; done) &
    # Something is always on its way.
    (while :; do dd if=/dev/urandom of="$SCRATCH/noise" bs=64k count=64 oflag=direct conv=notrunc status=none; done) &
    uuids=()
    for ((i = 0; ; i++)); do
        if ((i == 1)); then
            retry 60 eval '(($(plooptest acked "$TEST_DIR/ack") > 3))' || die 'nothing is written'
            echo 'kill: now'
        fi
        uuids+=("$(timeout "$(limit 100)" ploopctl snapshot create "$disk")") || die 'no snapshot'
        ((${#uuids[@]} < 3)) || {
            timeout "$(limit 100)" ploopctl snapshot delete --uuid "${uuids[0]}" "$disk" >/dev/null || die 'no merge'
            uuids=("${uuids[@]:1}")
        }
    done
fi
mapfile -t images < <(images_of "$device")
detach "$disk"
for image in "${images[@]}"; do ploopctl check "$image" >&2 || die "$image is damaged"; done
