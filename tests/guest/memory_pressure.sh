#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Memory is short, and the only way out is through our disks: a program that dirties more
# memory than there is, swapped to one past the file system of its image, all of whose clusters were
# written before, and a writer in a small memory cgroup through the page cache of a file system on another. Meanwhile snapshots of
# that are made and merged, and it grows. Nothing hangs, and memory and files hold what was put there.
# timeout: 600
# memory: 384
# module: bdev=1
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
ram=$(awk '$1 == "MemTotal:" { print int($2 / 1024) }' /proc/meminfo)
rounds=$(share 1 20)
note "$ram MiB of memory"
new() { ploopctl create -s "$2M" -b 64K "$SCRATCH/$1.img" >/dev/null; }
# Not on the file system of the other: its journal waits for memory.
scratch_fs ext4 1
ploopctl create -s "$((ram * 3 / 2))M" -b 256K "$SCRATCH-1/swap.img" >/dev/null
new files 512
swap=$(attach "$SCRATCH-1/swap.img")
head -c 8M /dev/urandom >"$TEST_DIR/random"
dd if=<(while cat "$TEST_DIR/random"; do :; done 2>/dev/null) of="$swap" bs=1M iflag=fullblock oflag=direct count=$((ram * 3 / 2)) status=none
sync
# From here on its blocks are known, and swapped pages need no memory on their way.
dd if="$swap" of=/dev/null bs=1M iflag=direct status=none
echo 0 >/sys/module/ploop/parameters/bdev
pstat() { cat "/sys/block/${swap##*/}/pstate/$1"; }
total=$(pstat total_bios) past=$(pstat inline_bios)
files=$(attach "$SCRATCH/files.img")
mkswap -q "$swap" || mkswap "$swap" >/dev/null
swapon "$swap"
mkfs.ext4 -q "$files"
mkdir -p "$TEST_DIR/mnt"
mount "$files" "$TEST_DIR/mnt"
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
small=/sys/fs/cgroup/ploop-small
mkdir -p "$small"
echo $((32 << 20)) >"$small/memory.max"

# hog: 1.2 times the memory, each page with its number, written and compared again and again.
cat >"$TEST_DIR/hog" <<'PYTHON'
import os, sys
pages, rounds = int(sys.argv[1]), int(sys.argv[2])
memory = bytearray(pages << 12)
for turn in range(rounds + 1):
    for page in range(pages):
        at = page << 12
        have = int.from_bytes(memory[at:at + 8], "little")
        if have != (turn and page * 1000 + turn):
            sys.exit(f"page {page} holds {have} in round {turn}")
        memory[at:at + 8] = (page * 1000 + turn + 1).to_bytes(8, "little")
    print("round", turn, flush=True)
PYTHON
python3 "$TEST_DIR/hog" $((ram * 307)) "$rounds" >&2 &
hog=$!

writer() {
    echo "$BASHPID" >"$small/cgroup.procs"
    for ((i = 0; i < rounds; i++)); do
        fio --name=writer --directory="$TEST_DIR/mnt" --size=48M --rw=randwrite --bsrange=4k-256k --randseed="$i" \
            --fsync=200 --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal >/dev/null || exit 1
    done
}
writer &
writer=$!

alive() { kill -0 "$1" 2>/dev/null; }

# What changes the disk allocates memory, and none of it may be had from the disk itself.
count=0
while alive "$hog" || alive "$writer"; do
    count=$((count + 1))
    size=$(($(blockdev --getsize64 "$files") >> 20))
    new "$count" "$size"
    timeout "$(limit 300)" plooptest snapshot --cluster-log 7 "$files" "$SCRATCH/$count.img" || die 'a snapshot failed'
    sleep "$(share 4 1)"
    timeout "$(limit 300)" plooptest op "$files" merge top || die 'a merge failed'
    timeout "$(limit 300)" plooptest op "$files" grow $(((size + 8) << 11)) || die 'the disk could not grow'
    timeout "$(limit 300)" plooptest op "$files" compact || die 'the disk could not be compacted'
    rm "$SCRATCH/$count.img"
done
wait "$hog" || die 'memory that was swapped is wrong'
wait "$writer" || die 'a file written under pressure is wrong'
total=$(($(pstat total_bios) - total)) past=$(($(pstat inline_bios) - past))
note "$past of $total requests of the swap disk past the file system"
((past * 10 >= total * 9)) || die 'swapped through the file system'
note "$count rounds of snapshots; $(awk '$1 == "pswpout" { print $2 }' /proc/vmstat) pages swapped out"
(($(awk '$1 == "pswpout" { print $2 }' /proc/vmstat) > ram * 25)) || die 'nothing was swapped'
swapoff "$swap"
umount "$TEST_DIR/mnt"
rmdir "$small"
detach "$swap" "$files"
files=$(attach "$SCRATCH/files.img")
e2fsck -fn "$files" >&2 || die 'the file system is damaged'
detach "$files"
for image in "$SCRATCH/files.img" "$SCRATCH-1/swap.img"; do ploopctl check "$image" >&2 || die "$image is damaged"; done
