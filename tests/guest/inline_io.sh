#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# What is mapped is read and overwritten past the file system, on ext4: by counter nearly all of it.
# Meanwhile nobody else can change where the image's blocks are; what we change ourselves is never
# written to by accident; and who looks at the file afterwards sees what was written.
# timeout: 240
# module: bdev=1
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
# Of whatever device there is.
state() { cat "/sys/block/${device##*/}/$1"; }
inline() { state pstate/inline_bios; }
all() { state pstate/total_bios; }
fill() {
    dd if="$TEST_DIR/data" of="$device" bs=1M oflag=direct conv=fsync status=none
    # Once over what is there now.
    dd if="$device" of=/dev/null bs=1M iflag=direct status=none
}
# expect_inline PERCENT WHAT CMD...: so many of the requests meanwhile, at least.
expect_inline() {
    local percent=$1 what=$2 before_inline before_all fast total
    shift 2
    before_inline=$(inline) before_all=$(all)
    "$@"
    fast=$(($(inline) - before_inline)) total=$(($(all) - before_all))
    note "$what: $fast of $total inline"
    ((total >= 128)) || die "$what: only $total requests"
    ((fast * 100 >= total * percent)) || die "$what: $fast of $total"
}
# not_inline WHAT: with the images of WHAT nothing goes past the file system.
not_inline() {
    ploopctl create -s 64M "$image" >/dev/null
    device=$(attach "$image")
    fill
    expect_same "$(inline) $(state pdelta/0/inline)" '0 0' "inline with $1"
    detach "$device"
}
quick_fio() { fio --name=x --filename="$device" --direct=1 --ioengine=libaio --bs=4k --number_ios=2000 --size=32M "$@" >/dev/null; }

head -c 32M /dev/urandom >"$TEST_DIR/data"
for cluster in 64K 1M; do
    note "ploop1, clusters of $cluster"
    ploopctl create -s 64M -b "$cluster" "$image" >/dev/null
    device=$(attach "$image")
    fill
    expect_same "$(state pdelta/0/inline)" 1 inline
    for depth in 1 32; do
        expect_inline 99 "reads at depth $depth" quick_fio --rw=randread --iodepth=$depth
        expect_inline 99 "overwrites at depth $depth" quick_fio --rw=randwrite --iodepth=$depth
    done
    expect_inline 99 'overwrites, each with a flush' quick_fio --rw=randwrite --iodepth=1 --fsync=1 --number_ios=500
    # A fresh cluster: a flush of the device would not do.
    before=$(inline)
    dd if="$TEST_DIR/data" of="$device" bs=4k count=1 seek=$((48 << 8)) oflag=direct conv=fsync status=none
    expect_same "$(inline)" "$before" 'inline requests, with a flush that needs a commit'
    expect_inline 99 'large reads' dd if="$device" of=/dev/null bs=256k count=128 iflag=direct status=none
    detach "$device"
    rm "$image"
done

note 'nobody else changes the file'
ploopctl create -s 64M "$image" >/dev/null
device=$(attach "$image")
fill
# Clean pages that will be old.
cat "$image" >/dev/null
for command in "truncate -s 1M $image" "fallocate -p -o 1M -l 1M $image" "fallocate -c -o 1M -l 1M $image" \
    "dd if=/dev/zero of=$image bs=4k count=1 conv=notrunc status=none"; do
    said=$($command 2>&1) && die "done to an attached image: $command"
    [[ $said == *'busy'* ]] || die "$command: $said"
done
status=0
said=$(ploopctl attach "$image" 2>&1) || status=$?
expect_same "$status" 37 "status of a second attach ($said)"
[[ $said == *"${device##*/}"* ]] || die "the holder is not named: $said"
head -c 32M /dev/urandom >"$TEST_DIR/data2"
# The first time, what the page cache has goes through the file, which drops it.
dd if="$TEST_DIR/data2" of="$device" bs=64k oflag=direct conv=fsync status=none
expect_inline 90 overwrites dd if="$TEST_DIR/data2" of="$device" bs=64k oflag=direct conv=fsync status=none
cmp -n $((32 << 20)) "$device" "$TEST_DIR/data2" || die "the disk does not hold what was written"
# What is durable when it ends does not: the file's sync is a part of it.
dd if="$TEST_DIR/data" of="$device" bs=64k count=16 oflag=direct conv=fsync status=none
before=$(inline)
dd if="$TEST_DIR/data2" of="$device" bs=64k count=16 oflag=direct,dsync status=none
expect_same "$(inline)" "$before" 'inline requests, each durable when it ends'
before=$(stat -c %Y "$image")
detach "$device"
(($(stat -c %Y "$image") >= before)) || die "the file's time went back"
qemu-img convert -f parallels -O raw "$image" "$SCRATCH/raw"
cmp -n $((32 << 20)) "$SCRATCH/raw" "$TEST_DIR/data2" || die "who reads the file sees old data"
truncate -s +0 "$image"
rm "$SCRATCH/raw"

note 'zeros, discards and what is written around them'
device=$(attach "$image")
fill
# Each job verifies what it wrote; blocks change between written and not, and back.
fio --name=trims --filename="$device" --direct=1 --ioengine=libaio --iodepth=8 --rw=randwrite --bs=4k-64k --bsrange=4k-64k \
    --size=16M --verify=crc32c --verify_backlog=64 --do_verify=1 --number_ios="$(share 300 20000)" >"$TEST_DIR/fio.log" 2>&1 &
load=$!
for ((round = 0; round < $(share 30 1000); round++)); do
    at=$(((RANDOM % 224) * 65536 + (16 << 20)))
    head -c 64k /dev/urandom >"$TEST_DIR/block"
    dd if="$TEST_DIR/block" of="$device" bs=64k seek=$at oflag=direct,seek_bytes status=none
    case $((round % 3)) in
        0) blkdiscard -z -o $((at + 4096)) -l 8192 "$device" ;;
        1) fallocate -z -o $((at + 4096)) -l 8192 "$device" ;;
        2) fallocate -p -o $((at + 4096)) -l 8192 "$device" ;;
    esac
    dd if=/dev/zero of="$TEST_DIR/block" bs=4096 seek=1 count=2 conv=notrunc status=none
    dd if="$device" of="$TEST_DIR/read" bs=64k skip=$at count=1 iflag=direct,skip_bytes status=none
    cmp "$TEST_DIR/block" "$TEST_DIR/read" || die "round $round: after zeros"
    # And over the zeros again.
    dd if="$TEST_DIR/block" of="$device" bs=4096 seek=$((at / 4096 + 1)) count=1 oflag=direct status=none
    dd if="$device" of="$TEST_DIR/read" bs=4096 skip=$((at / 4096 + 1)) count=1 iflag=direct status=none
    cmp -n 4096 "$TEST_DIR/block" "$TEST_DIR/read" || die "round $round: over zeros"
done
wait "$load" || die "what fio wrote is not there: $(tail -3 "$TEST_DIR/fio.log")"
blkdiscard "$device"
fill
cmp -n $((32 << 20)) "$device" "$TEST_DIR/data" || die "the disk does not hold what was written"

note 'a frozen host file system is not written'
expect_inline 99 'reads before' quick_fio --rw=randread
fsfreeze -f "$SCRATCH"
dd if="$TEST_DIR/data2" of="$device" bs=4k count=1 oflag=direct status=none &
writer=$!
sleep 2
[[ -d /proc/$writer ]] || die "written to a frozen file system"
expect_inline 99 'reads of a frozen one' quick_fio --rw=randread
fsfreeze -u "$SCRATCH"
wait "$writer"
cmp -n 4096 "$device" "$TEST_DIR/data2" || die "the write is not there"

note 'a device below that has few tags: who must not wait does not get an error'
tags=/sys/block/$(basename "$(scratch_disk)")/queue/nr_requests
before=$(<"$tags")
echo 4 >"$tags"
for engine in io_uring libaio; do
    fio --name=few --filename="$device" --direct=1 --ioengine=$engine --iodepth=64 --rw=randrw --bs=4k --size=16M --number_ios=1500 \
        --verify=crc32c --verify_backlog=128 >"$TEST_DIR/fio.log" 2>&1 || die "$engine: $(tail -3 "$TEST_DIR/fio.log")"
done
note 'requests of that device, with all its tags, wait in the same plug'
now=$(inline)
timeout -s KILL "$(limit 100)" fio --name=both --filename="$device:$(scratch_disk)" --file_service_type=roundrobin:1 --direct=1 --ioengine=libaio \
    --iodepth=8 --iodepth_batch_submit=8 --iodepth_batch_complete_min=8 --rw=randread --bs=4k --size=32M --number_ios=800 \
    >"$TEST_DIR/fio.log" 2>&1 || die "both at once: $(tail -3 "$TEST_DIR/fio.log")"
# Half of the requests are of the other disk. What the plug keeps from going out at once goes out from a worker.
now=$(($(inline) - now))
note "$now inline"
((now >= 390)) || die "of 400 only $now inline"
echo "$before" >"$tags"

note 'one request of those that may wait and those that must not, which the device below would have to split'
most=${tags%/*}/max_sectors_kb
before=$(<"$most")
echo 16 >"$most"
now=$(all)
said=$(timeout -s KILL "$(limit 60)" plooptest read-at-once "$device" $((1 << 20)) 8 32n 8 | paste -sd ' ') || die "it does not end"
echo "$before" >"$most"
expect_same "$said" '8192 32768 8192' 'bytes read'
expect_same "$(($(all) - now))" 1 requests

note 'a snapshot, a merge'
dd if="$TEST_DIR/data" of="$device" bs=1M oflag=direct conv=fsync status=none
ploopctl create -s 64M "$SCRATCH/1.img" >/dev/null
plooptest snapshot --cluster-log 11 "$device" "$SCRATCH/1.img"
dd if="$device" of=/dev/null bs=1M iflag=direct status=none
expect_inline 99 'reads of the lower delta' quick_fio --rw=randread
dd if="$TEST_DIR/data2" of="$device" bs=1M oflag=direct conv=fsync count=16 status=none
dd if="$device" of=/dev/null bs=1M iflag=direct status=none
expect_inline 99 'reads of both' quick_fio --rw=randread
ploopctl merge "$device" >/dev/null 2>&1
cmp -n $((16 << 20)) "$device" "$TEST_DIR/data2" || die "upper half after the merge"
cmp -i $((16 << 20)) -n $((16 << 20)) "$device" "$TEST_DIR/data" || die "lower half after the merge"
dd if="$device" of=/dev/null bs=1M iflag=direct status=none
expect_inline 99 'reads after the merge' quick_fio --rw=randread
expect_inline 99 'overwrites after the merge' quick_fio --rw=randwrite
detach "$device"
ploopctl check "$image" >&2
rm "$image"

note 'data that begins to be journalled, and stops'
umount "$SCRATCH"
# Else the flag is there and says nothing.
scratch_fs ext4 0 nodelalloc
ploopctl create -s 64M "$image" >/dev/null
device=$(attach "$image")
fill
expect_inline 99 'reads before' quick_fio --rw=randread
dd if="$TEST_DIR/data" of="$device" bs=1M oflag=direct conv=fsync status=none
chattr +j "$image"
now=$(inline)
dd if="$TEST_DIR/data2" of="$device" bs=64k count=16 oflag=direct conv=fsync status=none
quick_fio --rw=randread
expect_same "$(inline)" "$now" 'inline requests while data is journalled'
cmp -n $((1 << 20)) "$device" "$TEST_DIR/data2" || die "written while data was journalled"
chattr -j "$image"
dd if="$device" of=/dev/null bs=1M iflag=direct status=none
expect_inline 99 'reads after that' quick_fio --rw=randread
cmp -n $((1 << 20)) "$device" "$TEST_DIR/data2" || die "written while data was journalled, read after that"
detach "$device"
rm "$image"

if [[ $EFFORT == soak ]]; then
    note 'a file so large that not all of its blocks can be known'
    nr=17000
    truncate -s "$((nr * 102))M" "$SCRATCH/large"
    device=$(attach -f raw "$SCRATCH/large")
    # Each is in another page of what is known; the second time over what is written.
    blocks() {
        fio --name=large --filename="$device" --direct=1 --ioengine=libaio --iodepth=32 --bs=4k --zonemode=strided \
            --zonesize=4k --zonerange=102M --number_ios=$nr --size="$((nr * 102))M" "$@" >/dev/null
    }
    blocks --rw=write
    blocks --rw=read
    free=$(awk '/^MemAvailable/ { print $2 }' /proc/meminfo)
    now=$(inline)
    blocks --rw=read
    now=$(($(inline) - now))
    note "$now of $nr inline"
    ((now > 15000 && now <= 16500)) || die "$now of $nr reads inline"
    detach "$device"
    free=$(($(awk '/^MemAvailable/ { print $2 }' /proc/meminfo) - free))
    note "$free KiB came back"
    ((free < 80 << 10)) || die "$free KiB were taken"
    rm "$SCRATCH/large"
fi

note 'not on xfs, nor if it is not wanted'
umount "$SCRATCH"
scratch_fs xfs
not_inline xfs
umount "$SCRATCH"
note 'nor in other blocks than of 4 KiB'
mkfs.ext4 -q -F -b 1024 -E lazy_itable_init=1,nodiscard "$(scratch_disk)" 1G
mount "$(scratch_disk)" "$SCRATCH"
not_inline 'blocks of 1 KiB'
umount "$SCRATCH"
scratch_fs ext4
echo 0 >/sys/module/ploop/parameters/bdev
not_inline 'a host that does not want it'
