#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Bad spots below the images, where an operation reads or writes: data of the source
# or of the destination, an index, a header. It ends with an error, the disk can still
# be read, nothing that was flushed is lost after attaching again, and when the spot
# has healed the operation can be run to its end.
# timeout: 240
. "$(dirname "$0")/lib.sh"

seed=${SEED:-$RANDOM}
note "seed $seed"
modprobe dm-flakey
disk=$(scratch_disk 0)
sectors=$((1 << 21))
c=65536
blkdiscard -f "$disk"
dmsetup create below --table "0 $sectors linear $disk 0"
mkfs.ext4 -q -F -E lazy_itable_init=1,nodiscard /dev/mapper/below
mkdir -p "$SCRATCH"
mount /dev/mapper/below "$SCRATCH"

below() {
    dmsetup suspend --nolockfs below
    dmsetup load below --table "$1"
    dmsetup resume below
}

heal() { below "0 $sectors linear $disk 0"; }

# bad reads|writes FILE BYTE [SECTORS]: I/O of that kind fails there.
bad() {
    local at nr=${4:-8} kind="error"
    sync -f "$SCRATCH"
    at=$(filefrag -e -b512 "$2" | sed -n 's/^ *[0-9]*: *\([0-9]*\)\.\. *\([0-9]*\): *\([0-9]*\)\.\..*/\1 \2 \3/p' |
        awk -v want=$(($3 >> 9)) '$1 <= want && want <= $2 { print $3 + want - $1 }')
    [[ $at =~ ^[0-9]+$ ]] || die "byte $3 of $2 has no place on the disk"
    [[ $1 == reads ]] || kind="flakey $disk $at 0 3600 1 error_writes"
    below "0 $at linear $disk 0
$at $nr $kind
$((at + nr)) $((sectors - at - nr)) linear $disk $((at + nr))"
}

# build LEVELS SIZE(M) [OPTIONS]: a chain with data in each.
build() {
    local i mib=$2 log=${3:-7}
    rm -f "$SCRATCH"/*.img "$TEST_DIR/model"
    images=()
    for ((i = 0; i < $1; i++)); do
        ploopctl create -s "${mib}M" -b $((1 << (log - 1)))K "$SCRATCH/$i.img" >/dev/null
        if ((i == 0)); then
            device=$(attach "$SCRATCH/0.img")
        else
            plooptest snapshot --cluster-log "$log" "$device" "$SCRATCH/$i.img"
        fi
        images+=("$SCRATCH/$i.img")
        load 0.6
    done
    plooptest sync "$device"
}

# load SECONDS
load() {
    local from=()
    [[ ! -e $TEST_DIR/model ]] || from=(--from "$TEST_DIR/model")
    seed=$((seed + 1))
    rm -f "$TEST_DIR/stop"
    plooptest load --seed "$seed" --seconds 20 --stop "$TEST_DIR/stop" "${from[@]}" --save "$TEST_DIR/model" "$device" >&2 &
    sleep "$1"
    touch "$TEST_DIR/stop"
    wait $! || die 'the load found something wrong'
}

same() { plooptest load-verify "$device" "$TEST_DIR/model" || die "$1: the disk is wrong"; }

# fails CMD...: with an error that is told, and in time.
fails() {
    if timeout 60 "$@" >"$TEST_DIR/why" 2>&1; then die "succeeded over a bad spot: $*"; fi
    grep -qE 'errno 5$|os error 5\)' "$TEST_DIR/why" || die "$*: $(<"$TEST_DIR/why")"
    note "$(<"$TEST_DIR/why"), aborted: $(cat "/sys/block/${device##*/}/pstate/aborted")"
}

# The device still reads, also the bad spots if only writes fail.
reads() { timeout 60 plooptest load-verify "$device" "$TEST_DIR/model" || die 'the disk reads wrong after the error'; }

# again IMAGES... -- CMD: after the spot has healed and the device was attached anew.
again() {
    local image
    heal
    same healed
    timeout 60 ploopctl detach "$device" || note "detach says $?"
    [[ ! -b $device ]] || detach "$device"
    device=$(attach "${images[@]}")
    same 'attached again'
    "$@" || die "after it healed: $*"
    same 'done at last'
    load 0.5
    detach "$device"
    for image in $left; do ploopctl check "$SCRATCH/$image" >&2 || die "$image is damaged"; done
    device=$(attach $(for image in $left; do echo "$SCRATCH/$image"; done))
    same 'at the end'
    detach "$device"
}

op() { timeout 60 plooptest op "$device" "$@"; }

# slot FILE N: byte offset of the Nth cluster in use (any will do).
note 'merge of the top: its data cannot be read'
build 2 24
bad reads "$SCRATCH/1.img" $((20 * c + 8192))
fails plooptest op "$device" merge top
left=0.img again op merge top

note 'merge of the top: the destination takes no data'
build 2 24
bad writes "$SCRATCH/0.img" $((20 * c + 8192))
fails plooptest op "$device" merge top
reads
left=0.img again op merge top

note 'merge of the top: nor an index'
build 2 24
bad writes "$SCRATCH/0.img" 0
fails plooptest op "$device" merge top
reads
left=0.img again op merge top

note 'merge of the top: no entry of the source can be dropped'
build 2 24
bad writes "$SCRATCH/1.img" 0
fails plooptest op "$device" merge top
reads
left=0.img again op merge top

note 'merge in the middle: the source cannot be read'
build 3 24
bad reads "$SCRATCH/1.img" $((20 * c + 8192))
fails plooptest op "$device" merge 1
left='0.img 2.img' again op merge 1

note 'merge in the middle: the destination takes no data, then no index'
build 3 24
bad writes "$SCRATCH/0.img" $((20 * c + 8192))
fails plooptest op "$device" merge 1
reads
bad writes "$SCRATCH/0.img" 0
fails plooptest op "$device" merge 1
reads
heal
load 0.4
left='0.img 2.img' again op merge 1

note 'snapshot: the mark of the new top'
build 1 24
ploopctl create -s 24M -b 64K "$SCRATCH/new.img" >/dev/null
bad writes "$SCRATCH/new.img" 0
fails plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/new.img"
reads
expect_same "$(cat "/sys/block/${device##*/}/pstate/aborted")" 0 aborted
load 0.4
heal
# As good as new.
left='0.img new.img' again plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/new.img"

note 'snapshot: the index of the old top'
build 1 24
ploopctl create -s 24M -b 64K "$SCRATCH/new.img" >/dev/null
bad writes "$SCRATCH/0.img" 0
fails plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/new.img"
reads
if [[ $(find "/sys/block/${device##*/}/pdelta" -mindepth 1 -maxdepth 1 | wc -l) == 2 ]]; then
    images+=("$SCRATCH/new.img") left='0.img new.img' again true
else
    left='0.img new.img' again plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/new.img"
fi

# compactable: half of the clusters free.
compactable() {
    local i
    build 1 24
    for ((i = 0; i < 24; i++)); do
        blkdiscard -z -o $((i * 16 * c)) -l $((8 * c)) "$device"
    done 2>/dev/null
    blkdiscard -z -o 0 -l $((8 << 20)) "$device"
    blkdiscard -o 0 -l $((8 << 20)) "$device"
    rm "$TEST_DIR/model"
    blkdiscard -o 0 -l $((24 << 20)) "$device"
    load 1
    blkdiscard -o 0 -l $((8 << 20)) "$device"
    cp "$device" "$TEST_DIR/disk"
    plooptest sync "$device"
}

note 'compaction: data at the end cannot be read, then the index not be written'
compactable
reads() { timeout 60 cmp "$device" "$TEST_DIR/disk" >&2 || die 'the disk reads wrong after the error'; }
same() { cmp "$device" "$TEST_DIR/disk" >&2 || die "$1: the disk is wrong"; }
last=$(($(stat -c %s "$SCRATCH/0.img") / c - 1))
for ((at = last; at > 4; at--)); do
    if bad reads "$SCRATCH/0.img" $((at * c)) 2>/dev/null; then break; fi
done
fails plooptest op "$device" compact
heal
same 'compaction over a bad spot'
bad writes "$SCRATCH/0.img" 0
fails plooptest op "$device" compact
reads
load() { :; }
left=0.img again op compact

note 'growth: what is to be moved cannot be read, then the header not be written'
build 1 200 6
unset -f load
dd if=/dev/urandom of="$device" bs=1M count=8 oflag=direct conv=notrunc,fsync status=none
cp --sparse=always "$device" "$TEST_DIR/disk"
bad reads "$SCRATCH/0.img" $((32768 + 4096))
fails plooptest op "$device" grow $((300 << 11))
heal
same 'growth over a bad spot'
expect_same "$(blockdev --getsz "$device")" $((200 << 11)) size
bad writes "$SCRATCH/0.img" 0
fails plooptest op "$device" grow $((300 << 11))
reads
expect_same "$(blockdev --getsz "$device")" $((200 << 11)) size
same() { cmp -n $((200 << 20)) "$device" "$TEST_DIR/disk" >&2 || die "$1: the disk is wrong"; }
load() { :; }
left=0.img again op grow $((300 << 11))

umount "$SCRATCH"
dmsetup remove --retry below
