#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Opening a node of major 182 makes the device, as libploop expects, with the
# kernel's one warning; GETDEVICE and the calls of libploop work on it, and 15
# minors are left for its partitions.
# allow-log: block device autoloading is deprecated
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
ploopctl create -s 64M "$SCRATCH/disk.img" >/dev/null
mknod "$TEST_DIR/node" b 182 $((40 * 16))
[[ ! -e /sys/block/ploop40 ]] || die "ploop40 is there already"
# The block layer has that function only with the option.
grep -qw blk_request_module /proc/kallsyms || skip 'this kernel has no BLOCK_LEGACY_AUTOLOAD'
blockdev --getsize64 "$TEST_DIR/node" >/dev/null
[[ -e /sys/block/ploop40 ]] || die "opening the node made no device"
expect_same "$(</sys/block/ploop40/dev)" 182:640 'device number'
expect_same "$(</sys/block/ploop40/pstate/running)" 0 running
expect_same "$(</sys/block/ploop40/pstate/top)" 4294967295 'top of an empty device'
# As udev does, which looks at what is new.
exec 8<"$TEST_DIR/node"
sleep 1 <&8 &
exec 8<&-
device=$(attach -n 40 "$SCRATCH/disk.img")
expect_same "$device" /dev/ploop40 device
printf 'label: gpt\n,\n' | sfdisk -q "$device"
retry 10 test -e /sys/class/block/ploop40p1 || die "no partition"
expect_same "$(</sys/class/block/ploop40p1/dev)" 182:641 'number of the partition'
detach "$device"
[[ ! -e /sys/block/ploop40 ]] || ploopctl detach /dev/ploop40
