#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Images on NFS, from a server on the same machine: written, synced, a snapshot
# and its merge, all under a load that compares what it reads, while the server is out
# of reach for a while.
# timeout: 300
. "$(dirname "$0")/lib.sh"

need exportfs rpc.nfsd rpc.mountd mount.nfs rpcbind

scratch_fs ext4
export=$SCRATCH/export at=$TEST_DIR/nfs
mkdir "$export" "$at"
ip link set lo up
modprobe nfsd
mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd
mount -t tmpfs tmpfs /var/lib/nfs
mkdir /var/lib/nfs/sm
touch /var/lib/nfs/{etab,rmtab,xtab}

# gone: for some seconds the server is out of reach.
gone() {
    ip link set lo down
    sleep 3
    ip link set lo up
}

rpcbind -w || rpcbind
rpc.mountd -V 3 -N 4 -p 20048 -F &
mountd=$!
exportfs -o rw,sync,no_root_squash,no_subtree_check,fsid=1 "127.0.0.1:$export"
rpc.nfsd -V 3 -N 4 8
retry 30 mount -t nfs -o vers=3,proto=tcp,mountproto=tcp,mountport=20048,port=2049,nolock,hard,timeo=20 \
    "127.0.0.1:$export" "$at"

image=$at/0.img
ploopctl create -s 48M -b 64K "$image" >/dev/null
device=$(attach "$image")
note "io: $(cat "/sys/block/${device##*/}/pdelta/0/io"), discards: $(cat "/sys/block/${device##*/}/pstate/discard_mode")"
head -c 8M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=256K seek=4 oflag=direct conv=fsync status=none
drop_caches
cmp -n $((8 << 20)) -i $((1 << 20)):0 "$device" "$TEST_DIR/data" >&2 || die 'reads back wrong'
detach "$device"
ploopctl check "$image" >&2

note 'who makes it durable is killed while the server is out of reach'
device=$(attach "$image")
dd if="$TEST_DIR/data" of="$device" bs=64K count=4 seek=600 oflag=direct status=none
ip link set lo down
plooptest sync "$device" &
syncer=$!
told=''
retry 20 waits_in_ioctl "$syncer" || told='who makes it durable does not wait for the server'
kill -KILL "$syncer"
sleep 2
waits_in_ioctl "$syncer" || told=${told:-the one that was killed did not wait for the end of it}
ip link set lo up
[[ -z $told ]] || die "$told"
wait "$syncer" || note "the one that was killed: status $?"
expect_same "$(cat "/sys/block/${device##*/}/pstate/aborted")" 0 'writes refused'
dd if="$TEST_DIR/data" of="$device" bs=64K count=4 seek=620 oflag=direct conv=fsync status=none
cmp -n 262144 -i $((600 << 16)):0 "$device" "$TEST_DIR/data" >&2 || die 'what was synced is lost'
detach "$device"
ploopctl check "$image" >&2

note 'under load, and the server out of reach for a while'
device=$(attach "$image")
blkdiscard -f -z "$device"
begin_load --seed "${SEED:-7}" --seconds 200 --save "$TEST_DIR/model" "$device"
sleep 2
gone
ploopctl create -s 48M -b 64K "$at/1.img" >/dev/null
timeout "$(limit 100)" plooptest snapshot --cluster-log 7 "$device" "$at/1.img" || die 'no snapshot'
sleep 2
gone
timeout "$(limit 100)" plooptest op "$device" merge top || die 'no merge'
touch "$TEST_DIR/stop"
wait "$load" || die 'the load found something wrong'
detach "$device"
for image in "$at"/[01].img; do ploopctl check "$image" >&2; done
device=$(attach "$at/0.img")
plooptest load-verify "$device" "$TEST_DIR/model" || die 'the disk is wrong after attaching again'
detach "$device"
cp --sparse=always "$export/0.img" "$TEST_DIR/copy.hds"
qemu-img check -f parallels "$TEST_DIR/copy.hds" >&2 || die 'qemu-img: not clean'

umount "$at"
rpc.nfsd 0
exportfs -ua
kill "$mountd"
wait "$mountd" || true
umount /var/lib/nfs
pkill -x rpcbind || true
umount /proc/fs/nfsd
