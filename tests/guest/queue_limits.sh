#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The queue tells the truth: a write cache with FUA, I/O in clusters, and the
# logical block size that the image file allows.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
ploopctl create -s 64M -b 256K "$SCRATCH/disk.img" >/dev/null
device=$(attach "$SCRATCH/disk.img")
queue=/sys/block/${device##*/}/queue
expect_same "$(<"$queue/write_cache")" 'write back' write_cache
expect_same "$(<"$queue/fua")" 1 fua
# What blk-mq sets by itself must outlive our limits.
expect_same "$(<"$queue/iostats")" 1 iostats
# Without NOWAIT io_uring passes each request to a thread. Where one would wait, EAGAIN is right.
python3 - "$device" <<'END' || die 'the disk does not take I/O that must not wait'
import errno, mmap, os, sys
buffer = mmap.mmap(-1, 4096)
try:
    os.preadv(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), [buffer], 0, os.RWF_NOWAIT)
except OSError as e:
    sys.exit(0 if e.errno == errno.EAGAIN else e)
END
expect_same "$(<"$queue/optimal_io_size")" $((256 << 10)) optimal_io_size
expect_same "$(<"$queue/chunk_sectors")" 512 chunk_sectors
size=$(<"$queue/logical_block_size")
[[ $size == 512 || $size == 4096 ]] || die "logical_block_size is $size"
# A request of that size works, directly.
head -c "$size" /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs="$size" seek=3 oflag=direct status=none
dd if="$device" of="$TEST_DIR/back" bs="$size" skip=3 count=1 iflag=direct status=none
expect_same_bytes "$TEST_DIR/data" "$TEST_DIR/back"
# One hardware queue a CPU.
expect_same "$(find "/sys/block/${device##*/}/mq" -mindepth 1 -maxdepth 1 | wc -l)" "$(nproc)" queues
detach "$device"

# On a disk with sectors of 4 KiB the image file cannot do less.
modules=/lib/modules/$(uname -r)/modules.dep
[[ -s $modules ]] || die 'no list of the modules of this kernel'
if ! grep -q '/scsi_debug\.ko' "$modules"; then
    note 'left out: this kernel has no scsi_debug'
else
    modprobe scsi_debug dev_size_mb=64 sector_size=4096 ndelay=0
    udevadm settle -t 10
    disk=$(grep -lx 'scsi_debug *' /sys/block/sd*/device/model | head -n 1)
    disk=/dev/$(cut -d/ -f4 <<<"$disk")
    mkfs.ext4 -q "$disk"
    mkdir -p "$TEST_DIR/mnt"
    mount "$disk" "$TEST_DIR/mnt"
    ploopctl create -s 16M -b 64K "$TEST_DIR/mnt/disk.img" >/dev/null
    device=$(attach "$TEST_DIR/mnt/disk.img")
    expect_same "$(<"/sys/block/${device##*/}/queue/logical_block_size")" 4096 'logical block size on 4 KiB sectors'
    head -c 1M /dev/urandom >"$TEST_DIR/data"
    dd if="$TEST_DIR/data" of="$device" bs=4k oflag=direct conv=fsync status=none
    cmp -n 1048576 "$device" "$TEST_DIR/data" || die "reads wrong on 4 KiB sectors"
    detach "$device"
    umount "$TEST_DIR/mnt"
fi
