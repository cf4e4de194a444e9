#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A FUA write that the disk below refuses poisons the image. Nothing but STOP and a new
# attach makes it writable again: not DEL_DELTA of a lower level, not an operation, not
# that the disk has healed; nor is anything told of it that is not on disk. What was
# flushed before is there, also what was written through commits that ran at that moment.
# timeout: 150
. "$(dirname "$0")/lib.sh"

need perl
modprobe dm-delay
disk=$(scratch_disk 0)
sectors=$((1 << 20))
dmsetup create below --table "0 $sectors linear $disk 0"
dmsetup create bad --table '0 4096 error'
mkfs.ext4 -q -F -E lazy_itable_init=1,nodiscard /dev/mapper/below
mkdir -p "$SCRATCH"
mount /dev/mapper/below "$SCRATCH"

# del_delta LEVEL: prints the errno, 0 for none.
del_delta() { call 0x40045005 L "$1"; }

aborted() { cat "/sys/block/${device##*/}/pstate/aborted"; }

# put MIB FLAG: a MiB of the data to its place.
put() { timeout "$(limit 30)" dd if="$TEST_DIR/data" of="$device" bs=1M skip="$1" seek="$1" count=1 \
    oflag="direct$2" conv=notrunc status=none; }

# same FIRST END: these MiB are what was written.
same() { cmp -i $(($1 << 20)) -n $((($2 - $1) << 20)) "$device" "$TEST_DIR/data" >&2; }

head -c 64M /dev/urandom >"$TEST_DIR/data"
# From MiB 31.5 on the entries are in a second page of the index.
for i in 0 1 2; do ploopctl create -s 64M -b 32K "$SCRATCH/$i.img" >/dev/null; done
device=$(attach "$SCRATCH/0.img")
# Level 1 stays empty: the base has all that it has.
plooptest snapshot --cluster-log 6 "$device" "$SCRATCH/1.img"
plooptest snapshot --cluster-log 6 "$device" "$SCRATCH/2.img"
for ((i = 0; i < 8; i++)); do put $i ''; done
plooptest sync "$device"

sync -f "$SCRATCH"
# The disk's sector of MiB 4 of the image.
at=$(filefrag -e -b512 "$SCRATCH/2.img" | grep -v unwritten |
    sed -n 's/^ *[0-9]*: *\([0-9]*\)\.\. *\([0-9]*\): *\([0-9]*\)\.\..*/\1 \2 \3/p' |
    awk -v want=$((4 << 11)) '$1 <= want && want <= $2 { print $3 + want - $1; exit }')
[[ $at =~ ^[0-9]+$ ]] || die 'cannot find a cluster on the disk'
below "0 $at linear $disk 0
$at 2048 delay $disk $at 0 /dev/mapper/bad 0 0 $disk $at 0
$((at + 2048)) $((sectors - at - 2048)) linear $disk $((at + 2048))"

# Clusters that are new, each flushed, up to the first that fails. Their page is not that of
# the writes with FUA, whose entries stay durable.
(
    for ((i = 32; i < 64; i++)); do
        put $i '' 2>/dev/null && plooptest sync "$device" 2>/dev/null || break
        echo $i >>"$TEST_DIR/flushed"
    done
) &
writer=$!
for ((i = 0; i < 8; i++)); do put $i ,dsync 2>/dev/null || note "MiB $i fails"; done
wait "$writer" || true
expect_same "$(aborted)" 1 aborted
flushed=$(tail -n 1 "$TEST_DIR/flushed" 2>/dev/null || echo 31)
note "flushed up to MiB $flushed"

below "0 $sectors linear $disk 0"
for try in 'a write' del_delta 'a write' op freeze dump; do
    case $try in
        # What is in memory is not on disk, as both promise.
        freeze) expect_same "$(call 0x5020)" 5 'errno of FREEZE' ;;
        dump) expect_same "$(call 0x40105022 L5 2 0 2 0 0)" 5 'errno of DUMP_CACHED_BAT' ;;
        del_delta) expect_same "$(del_delta 1)" 5 'errno of DEL_DELTA' ;;
        op) expect_fail plooptest op "$device" grow $((1 << 18)) ;;
        *) expect_fail put 1 '' 2>"$TEST_DIR/why" ;;
    esac
    expect_same "$(aborted)" 1 "aborted after $try"
done

note 'attached again'
timeout "$(limit 30)" ploopctl detach "$device" || note "detach says $?"
[[ ! -b $device ]] || detach "$device"
device=$(attach "$SCRATCH/0.img" "$SCRATCH/1.img" "$SCRATCH/2.img")
# The one that failed may be old or new, and both are the same.
same 0 8 || die 'what was synced is lost'
same 32 $((flushed + 1)) || die 'what was flushed is lost'
put 9 ,dsync
expect_same "$(del_delta 1)" 0 'errno of DEL_DELTA'
put 10 ,dsync
same 0 8 || die 'wrong without the empty level'
same 32 $((flushed + 1)) || die 'what was flushed is gone'
detach "$device"
ploopctl check "$SCRATCH/2.img" >&2
umount "$SCRATCH"
dmsetup remove --retry below
dmsetup remove --retry bad
