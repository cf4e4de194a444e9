#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# With compat_proc=1 an open of /proc/vz/ploop_minor reserves a device that has
# no delta, reads show its minor, and the close gives it back, so that two who
# ask at once get different devices; without the parameter there is no /proc/vz,
# which would make systemd take the host for a container.
# module: none
. "$(dirname "$0")/lib.sh"

insmod "$BIN/ploop.ko"
[[ ! -e /proc/vz ]] || die "/proc/vz exists although nobody asked for it"
before=$(systemd-detect-virt --container || true)
rmmod ploop
insmod "$BIN/ploop.ko" compat_proc=1
expect_same "$(stat -c %a /proc/vz/ploop_minor)" 440 mode

scratch_fs ext4
exec 3</proc/vz/ploop_minor 4</proc/vz/ploop_minor
read -r one <&3 || [[ -n $one ]]
read -r two <&4 || [[ -n $two ]]
expect_same "$one" 0 'first minor'
expect_same "$two" 16 'second minor, while the first is reserved'
ploopctl create -s 64M "$SCRATCH/disk.img" >/dev/null
device=$(attach -n 3 "$SCRATCH/disk.img")
expect_same "$(<"/sys/block/${device##*/}/pstate/locked")" 0 'locked of a device nobody reserved'
exec 3<&- 4<&-
exec 3</proc/vz/ploop_minor
read -r one <&3 || [[ -n $one ]]
expect_same "$one" 0 'minor given back and taken again'
exec 3<&-
detach "$device"
rmmod ploop
[[ ! -e /proc/vz ]] || die "/proc/vz outlived the module"
expect_same "$(systemd-detect-virt --container || true)" "$before" 'what systemd takes this host for'
insmod "$BIN/ploop.ko"
