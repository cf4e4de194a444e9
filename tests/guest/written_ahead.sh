#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Where the disk below makes zeros by itself, the space that an image grows by ahead is written,
# not only allocated: to the file system a first write to a cluster is an overwrite, with nothing to
# convert; a part at a time, so that other I/O does not wait for long. Where it does not, the space is
# allocated as ever. Either way fresh clusters read as zeros.
# timeout: 250
. "$(dirname "$0")/lib.sh"

modules=/lib/modules/$(uname -r)/modules.dep
[[ -s $modules ]] || die 'no list of the modules of this kernel'
grep -q '/scsi_debug\.ko' "$modules" || skip 'this kernel has no scsi_debug'
modprobe sd_mod

# debug_disk WORDS...: sets `disk`, one in memory that can do what they say.
debug_disk() {
    modprobe scsi_debug dev_size_mb=256 delay=0 "$@"
    udevadm settle -t 10
    disk=$(grep -lx 'scsi_debug *' /sys/block/sd*/device/model | head -n 1)
    disk=${disk#/sys/block/}
    disk=/dev/${disk%%/*}
    mkfs.ext4 -q -F -b 4096 "$disk"
    mount "$disk" "$SCRATCH"
}

# unwritten: blocks behind the image's index that are allocated, but not written.
unwritten() { filefrag -v -b4096 "$image" | awk '/unwritten/ && $2 + 0 >= 256 { gsub(":", "", $6); sum += $6 } END { print sum + 0 }'; }

# largest_zeroing: bytes that the disk was asked to make zero at once, at most, as it grows and grows.
largest_zeroing() {
    trace_fs
    image=$SCRATCH/disk.img
    ploopctl create -s 1G "$image" >/dev/null
    device=$(attach "$image")
    : >"$trace/trace"
    echo 1 >"$trace/events/ext4/ext4_zero_range/enable"
    # It grows by an eighth of its length.
    tr '\0' x </dev/zero | dd of="$device" bs=1M count=150 iflag=fullblock oflag=direct status=none
    detach "$device"
    echo 0 >"$trace/events/ext4/ext4_zero_range/enable"
    rm "$image"
    grep -oP 'ext4_zero_range: .* len \K[0-9]+' "$trace/trace" | sort -n | tail -n 1
}

# first_writes: into old data, which must not show through.
first_writes() {
    local i
    image=$SCRATCH/disk.img
    head -c 96M /dev/urandom >"$SCRATCH/old"
    sync
    rm "$SCRATCH/old"
    ploopctl create -s 1G "$image" >/dev/null
    device=$(attach "$image")
    for i in 5 6 300; do
        head -c 4k /dev/urandom >"$TEST_DIR/$i"
        dd if="$TEST_DIR/$i" of="$device" bs=4k seek=$((i * 256 + 9)) oflag=direct conv=fsync status=none
    done
    length=$(stat -c %s "$image")
    ((length > 4 << 20)) || die "the file has not grown ahead: $length bytes"
    ahead=$(unwritten)
    for i in 5 6 300; do
        cmp -n 4096 -i $((i << 20 | 36864)):0 "$device" "$TEST_DIR/$i" || die 'what was written is not there'
        cmp -n 36864 -i $((i << 20)):0 "$device" /dev/zero || die 'the begin of a fresh cluster is not zero'
        cmp -n $((1048576 - 40960)) -i $((i << 20 | 40960)):0 "$device" /dev/zero || die 'the end of a fresh cluster is not zero'
    done
    detach "$device"
    expect_same "$(stat -c %s "$image")" $((4 << 20)) 'length of header and three clusters'
    ploopctl check "$image" >&2
    umount "$SCRATCH"
    modprobe -r scsi_debug
}

mkdir -p "$SCRATCH"
debug_disk lbpws=1 lbprz=1
[[ $(<"/sys/block/${disk##*/}/queue/write_zeroes_unmap_max_hw_bytes") != 0 ]] || die 'the disk does not make zeros'
# Whoever does I/O to the image waits for that.
expect_same "$(largest_zeroing)" $((8 << 20)) 'bytes made zero at once'
first_writes
expect_same "$ahead" 0 'blocks that are not written'
debug_disk
first_writes
((ahead > 0)) || die 'all was written where that takes long'
