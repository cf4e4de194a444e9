#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The sysfs files that libploop and people read say what is true.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 64M -b 64K --format-version 1 "$image" >/dev/null
device=$(attach --cookie 'a name' "$image")
dir=/sys/block/${device##*/}

is() { expect_same "$(<"$dir/$1")" "$2" "$1"; }
is pstate/running 1
is pstate/top 0
is pstate/block_size 128
is pstate/fmt_version 1
is pstate/cookie 'a name'
is pdelta/0/level 0
is pdelta/0/image "$image"
is pdelta/0/format ploop1
is pdelta/0/ro 0
is pdelta/0/transparent 0
[[ $(<"$dir/pdelta/0/io") =~ ^(direct|kaio)$ ]] || die "pdelta/0/io is $(<"$dir/pdelta/0/io")"
number=$(stat -c %d "$image")
is pdelta/0/image_info "ino:$(stat -c %i "$image")
sdev:$((number >> 8)):$((number & 255))"
expect_same "$(<"$dir/size")" $((64 << 11)) size
detach "$device"
[[ ! -e $dir ]] || die "$dir outlived the device"
