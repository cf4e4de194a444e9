#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Bad spots below the images, where an operation reads or writes: data of the source
# or of the destination, an index, a header. It ends with an error, the disk can still
# be read, nothing that was flushed is lost after attaching again, and when the spot
# has healed the operation can be run to its end. A chain whose merge can neither end nor be
# undone takes no other change, and a FREEZE that fails leaves no file system frozen.
# allow-log: lost (async|sync) page write|JBD2: I/O error|Aborting journal|EXT4-fs error
# timeout: 500
. "$(dirname "$0")/lib.sh"

FREEZE=0x5020 DEL_DELTA=0x40045005 REPLACE_DELTA=0x4018500D MAX_DELTA_SIZE=0x4008501C

seed=${SEED:-$RANDOM}
note "seed $seed"
modprobe dm-delay
disk=$(scratch_disk 0)
sectors=$((1 << 21))
c=65536
blkdiscard -f "$disk"
dmsetup create below --table "0 $sectors linear $disk 0"
dmsetup create bad --table '0 4096 error'
mkfs.ext4 -q -F -E lazy_itable_init=1,nodiscard /dev/mapper/below
mkdir -p "$SCRATCH"
mount /dev/mapper/below "$SCRATCH"

heal() { below "0 $sectors linear $disk 0"; }

# extents FILE: first and last sector of each part of it that holds data, and where it is on the disk below; what was
# only reserved is not read.
extents() {
    sync -f "$SCRATCH"
    filefrag -e -b512 "$1" | grep -v unwritten |
        sed -n 's/^ *[0-9]*: *\([0-9]*\)\.\. *\([0-9]*\): *\([0-9]*\)\.\..*/\1 \2 \3/p'
}

# place FILE BYTE: the first sector of the disk below that holds data of FILE at BYTE or behind that.
place() {
    extents "$1" |
        awk -v want=$(($2 >> 9)) '$2 >= want { print $3 + (want > $1 ? want - $1 : 0); exit }'
}

# bad reads|writes FILE BYTE [SECTORS]: I/O of that kind fails there.
bad() {
    local at kind="error" nr=${4:-8}
    at=$(place "$2" "$3")
    [[ $at =~ ^[0-9]+$ ]] || die "byte $3 of $2 has no place on the disk"
    # Reads and flushes go to the disk, writes to a device where all fail.
    [[ $1 == reads ]] || kind="delay $disk $at 0 /dev/mapper/bad 0 0 $disk $at 0"
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

# What the disk is compared with: the model of the load, or a copy of so many bytes.
judge=model copied=0

# load SECONDS
load() {
    local from=()
    [[ $judge == model ]] || return 0
    [[ ! -e $TEST_DIR/model ]] || from=(--from "$TEST_DIR/model")
    seed=$((seed + 1))
    rm -f "$TEST_DIR/stop"
    # Enough for something to be everywhere.
    plooptest load --seed "$seed" --seconds "$(limit 20)" --at-least 100 --stop "$TEST_DIR/stop" "${from[@]}" --save "$TEST_DIR/model" "$device" >&2 &
    sleep "$1"
    touch "$TEST_DIR/stop"
    wait $! || die 'the load found something wrong'
}

# copy BYTES: the disk as it is now is what it must be.
copy() {
    judge=copy copied=$1
    cp --sparse=always "$device" "$TEST_DIR/disk"
    plooptest sync "$device"
}

# same WHAT: also the bad spots are read, if only writes fail.
same() {
    if [[ $judge == model ]]; then
        timeout "$(limit 60)" plooptest load-verify "$device" "$TEST_DIR/model" || die "$1: the disk is wrong"
    else
        drop_caches
        timeout "$(limit 60)" cmp -n "$copied" "$device" "$TEST_DIR/disk" >&2 || die "$1: the disk is wrong"
    fi
}

# fails CMD...: with an error that is told, and in time.
fails() {
    if timeout "$(limit 60)" "$@" >"$TEST_DIR/why" 2>&1; then die "succeeded over a bad spot: $*"; fi
    grep -qE 'errno 5$|os error 5\)' "$TEST_DIR/why" || die "$*: $(<"$TEST_DIR/why")"
    note "$(<"$TEST_DIR/why"), aborted: $(cat "/sys/block/${device##*/}/pstate/aborted")"
}

# again "LEFT..." CMD: after the spot has healed and the device was attached anew CMD
# succeeds and leaves these images.
again() {
    local image left=()
    for image in $1; do left+=("$SCRATCH/$image"); done
    shift
    heal
    same healed
    timeout "$(limit 60)" ploopctl detach "$device" || note "detach says $?"
    [[ ! -b $device ]] || detach "$device"
    device=$(attach "${images[@]}")
    same 'attached again'
    "$@" || die "after it healed: $*"
    same 'done at last'
    load 0.5
    detach "$device"
    for image in "${left[@]}"; do ploopctl check "$image" >&2 || die "$image is damaged"; done
    device=$(attach "${left[@]}")
    same 'at the end'
    detach "$device"
}

op() { timeout "$(limit 60)" plooptest op "$device" "$@"; }

note 'merge of the top: its data cannot be read'
build 2 24
bad reads "$SCRATCH/1.img" $((20 * c)) 4096
fails plooptest op "$device" merge top
again 0.img op merge top

note 'merge of the top: the destination takes no data'
build 2 24
bad writes "$SCRATCH/0.img" $((20 * c)) 4096
fails plooptest op "$device" merge top
same 'with the bad spot'
again 0.img op merge top

note 'merge of the top: nor its mark'
build 2 24
bad writes "$SCRATCH/0.img" 0
fails plooptest op "$device" merge top
same 'with the bad spot'
again 0.img op merge top

note 'merge of the top: nor a part of the index behind that'
build 2 64 6
bad writes "$SCRATCH/0.img" 4096
fails plooptest op "$device" merge top
same 'with the bad spot'
again 0.img op merge top

note 'merge of the top: no entry of the source can be dropped, and what is in which image is not known'
build 4 24
bad writes "$SCRATCH/3.img" 0
fails plooptest op "$device" merge top
same 'with the bad spot'
# The merge is not over: a chain without it would look the slots of one image up in another.
expect_same "$(call $DEL_DELTA L 1)" 16 'errno of DEL_DELTA'
ploopctl create -s 24M -b 64K "$SCRATCH/new.img" >/dev/null
errno=$(call $REPLACE_DELTA L4SCCLlLLLQQ 2 0 7 0 1 2 0 0 "@$SCRATCH/new.img" 0 0 0 0 0)
expect_same "$errno" 16 'errno of REPLACE_DELTA'
expect_same "$(call $MAX_DELTA_SIZE Q $((64 << 11)))" 16 'errno of MAX_DELTA_SIZE'
fails plooptest op "$device" grow $((32 << 11))
fails plooptest op "$device" merge 1
expect_same "$(nr_levels "$device")" 4 levels
same 'after the refusals'
again '0.img 1.img 2.img' op merge top

note 'merge in the middle: the source cannot be read'
build 3 24
bad reads "$SCRATCH/1.img" $((20 * c)) 4096
fails plooptest op "$device" merge 1
again '0.img 2.img' op merge 1

note 'merge in the middle: the destination takes no data, then no mark'
build 3 24
bad writes "$SCRATCH/0.img" $((20 * c)) 4096
fails plooptest op "$device" merge 1
same 'with the bad spot'
bad writes "$SCRATCH/0.img" 0
fails plooptest op "$device" merge 1
same 'with the bad spot'
heal
load 0.4
again '0.img 2.img' op merge 1

note 'snapshot: the mark of the new top'
build 1 24
ploopctl create -s 24M -b 64K "$SCRATCH/new.img" >/dev/null
bad writes "$SCRATCH/new.img" 0
fails plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/new.img"
same 'with the bad spot'
expect_same "$(cat "/sys/block/${device##*/}/pstate/aborted")" 0 aborted
load 0.4
heal
# As good as new.
again '0.img new.img' plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/new.img"

note 'snapshot: the index of the old top'
build 1 24
ploopctl create -s 24M -b 64K "$SCRATCH/new.img" >/dev/null
bad writes "$SCRATCH/0.img" 0
fails plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/new.img"
same 'with the bad spot'
if [[ $(find "/sys/block/${device##*/}/pdelta" -mindepth 1 -maxdepth 1 | wc -l) == 2 ]]; then
    images+=("$SCRATCH/new.img")
    again '0.img new.img' true
else
    again '0.img new.img' plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/new.img"
fi

note 'compaction: data at the end cannot be read, then the index not be written'
build 1 24
dd if=/dev/urandom of="$device" bs=1M count=24 oflag=direct conv=notrunc status=none
# Every other MiB goes; the last slot stays, whichever cluster has it.
for ((mib = 0; mib < 24; mib += 2)); do blkdiscard -o $((mib << 20)) -l $((1 << 20)) "$device"; done
copy $((24 << 20))
# The last slot with data: what was punched, or never used, has none.
at=$(extents "$SCRATCH/0.img" | awk -v slot=$((c >> 9)) '{ last = int($2 / slot) } END { print last }')
bad reads "$SCRATCH/0.img" $((at * c))
fails plooptest op "$device" compact
heal
same 'compaction over a bad spot'
bad writes "$SCRATCH/0.img" 0
fails plooptest op "$device" compact
same 'with the bad spot'
again 0.img op compact

note 'growth: what is to be moved cannot be read, then the header not be written'
build 1 200 6
dd if=/dev/urandom of="$device" bs=1M count=8 oflag=direct conv=notrunc,fsync status=none
copy $((200 << 20))
bad reads "$SCRATCH/0.img" $((32768 + 4096))
fails plooptest op "$device" grow $((300 << 11))
heal
same 'growth over a bad spot'
expect_same "$(blockdev --getsz "$device")" $((200 << 11)) size
bad writes "$SCRATCH/0.img" 0
fails plooptest op "$device" grow $((300 << 11))
same 'with the bad spot'
expect_same "$(blockdev --getsz "$device")" $((200 << 11)) size
again 0.img op grow $((300 << 11))

note 'merge into a smaller image: its index cannot be written as room is made for a larger one'
# Without a load, which would take the first slot.
judge=copy
build 1 200 6
# The larger index takes the first slot, which has a cluster whose entry is not in the page of the mark.
dd if=/dev/urandom of="$device" bs=1M seek=40 count=4 oflag=direct conv=notrunc,fsync status=none
ploopctl create -s 200M -b 32K "$SCRATCH/1.img" >/dev/null
plooptest snapshot --cluster-log 6 "$device" "$SCRATCH/1.img"
images+=("$SCRATCH/1.img")
op grow $((300 << 11))
copy $((64 << 20))
bad writes "$SCRATCH/0.img" 4096
fails plooptest op "$device" merge top
# Nobody knows which entries are on disk: who comes next has to look.
expect_same "$(ploopctl info --json "$SCRATCH/0.img" | jq .in_use)" true 'the mark of the destination'
same 'with the bad spot'
again 0.img op merge top

note 'FREEZE: the file system is frozen when the index cannot be written'
judge=copy
build 1 24
mkfs.ext4 -q -F -E lazy_itable_init=0 "$device"
mkdir "$TEST_DIR/fs"
# Without flushes of its own: what it writes then is overwritten in place, and only our commit fails.
mount -o barrier=0 "$device" "$TEST_DIR/fs"
plooptest sync "$device"
# A new cluster, whose entry FREEZE has to write.
dd if=/dev/urandom of="$TEST_DIR/fs/new" bs=1M count=4 oflag=direct status=none
bad writes "$SCRATCH/0.img" 0
expect_same "$(<"/sys/block/${device##*/}/pstate/aborted")" 0 'aborted before FREEZE'
expect_same "$(call $FREEZE)" 5 'errno of FREEZE'
expect_same "$(<"/sys/block/${device##*/}/pstate/aborted")" 1 'aborted by FREEZE'
heal
# With or without success, as the disk takes no writes now; but nobody waits.
touch "$TEST_DIR/fs/after" &
timeout "$(limit 20)" tail --pid $! -f /dev/null || die 'the file system is left frozen'
wait $! || note 'the file system takes no more writes'
umount "$TEST_DIR/fs" || die 'the file system cannot be unmounted'
timeout "$(limit 60)" ploopctl detach "$device" || note "detach says $?"
[[ ! -b $device ]] || detach "$device"
device=$(attach "$SCRATCH/0.img")
e2fsck -fy "$device" >&2 || (($? < 4)) || die 'the file system cannot be repaired'
detach "$device"

umount "$SCRATCH"
dmsetup remove --retry below
dmsetup remove --retry bad
