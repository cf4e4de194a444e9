#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# A bad spot on the disk below the image: reads and writes of that cluster fail
# with EIO, all others go on, and when the spot heals so does the disk. Uevents and
# counters tell of it.
# timeout: 150
# allow-log: lost (async|sync) page write|JBD2: I/O error|Aborting journal|EXT4-fs error
. "$(dirname "$0")/lib.sh"

disk=$(scratch_disk 0)
sectors=$((1 << 20))
dmsetup create below --table "0 $sectors linear $disk 0"
mkfs.ext4 -q -F /dev/mapper/below
mkdir -p "$SCRATCH"
mount /dev/mapper/below "$SCRATCH"
image=$SCRATCH/disk.img
ploopctl create -s 64M "$image" >/dev/null
device=$(attach "$image")
head -c 24M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=1M conv=fsync oflag=direct status=none

# The disk sector of byte 10 MiB of the file, in its extents.
bad=$(filefrag -e -b512 "$image" | sed -n 's/^ *[0-9]*: *\([0-9]*\)\.\. *\([0-9]*\): *\([0-9]*\)\.\..*/\1 \2 \3/p' |
    awk -v want=$((10 << 11)) '$1 <= want && want <= $2 { print $3 + want - $1 }')
[[ $bad =~ ^[0-9]+$ ]] || die "cannot find the cluster on the disk"

below "0 $bad linear $disk 0
$bad 8 error
$((bad + 8)) $((sectors - bad - 8)) linear $disk $((bad + 8))"
listen
failed=0
for ((mib = 0; mib < 24; mib++)); do
    if dd if="$device" of="$TEST_DIR/part" bs=1M skip=$mib count=1 iflag=direct status=none 2>"$TEST_DIR/why"; then
        cmp -n $((1 << 20)) -i 0:$((mib << 20)) "$TEST_DIR/part" "$TEST_DIR/data" || die "MiB $mib is wrong"
    else
        grep -q 'Input/output error' "$TEST_DIR/why" || die "MiB $mib: $(<"$TEST_DIR/why")"
        failed=$((failed + 1)) at=$mib
    fi
done
expect_same "$failed" 1 'number of clusters that cannot be read'
dd if="$TEST_DIR/data" of="$device" bs=1M skip="$at" seek="$at" count=1 oflag=direct conv=notrunc status=none 2>"$TEST_DIR/why" &&
    die "a write to the bad spot succeeded"
grep -q 'Input/output error' "$TEST_DIR/why" || die "the write: $(<"$TEST_DIR/why")"

expect_event "DEVNAME=$device" PLOOP_ERROR=read PLOOP_ERRNO=5
errors=$(<"/sys/block/${device##*/}/pstate/io_errors")
((errors >= 2)) || die "$errors errors were counted"
# As many failed as are counted, but they are told of once in 10 seconds.
told=$(grep -c '^PLOOP_ERROR=' "$TEST_DIR/events")
for ((i = 0; i < 50; i++)); do
    expect_fail dd if="$device" of=/dev/null bs=4k skip=$((at << 8)) count=1 iflag=direct status=none 2>/dev/null
done
(($(<"/sys/block/${device##*/}/pstate/io_errors") >= errors + 50)) || die 'not all errors were counted'
(($(grep -c '^PLOOP_ERROR=' "$TEST_DIR/events") < told + 25)) || die 'each error was told'

below "0 $sectors linear $disk 0"
dd if="$TEST_DIR/data" of="$device" bs=1M skip="$at" seek="$at" count=1 oflag=direct conv=notrunc,fsync status=none
drop_caches
cmp -n $((24 << 20)) "$device" "$TEST_DIR/data" || die "wrong after the spot healed"
detach "$device"
ploopctl check "$image" >&2

note 'a disk that fails as a whole: the delta is poisoned, detach works'
device=$(attach "$image")
below "0 $sectors error"
expect_fail dd if=/dev/urandom of="$device" bs=4k seek=$((40 << 8)) count=64 oflag=direct conv=fsync status=none
expect_event "DEVNAME=$device" PLOOP_POISONED=1
stop_listening
timeout "$(limit 30)" ploopctl detach "$device" || note "detach says $?"
below "0 $sectors linear $disk 0"
[[ ! -b $device ]] || detach "$device"
umount "$SCRATCH"
dmsetup remove --retry below
