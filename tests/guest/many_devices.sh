#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Many clones of one base are attached at once, half of them disks with descriptors.
# Each is written to and reads as written; none sees the others, and the base stays
# as it is. What memory and time a device takes is told. Detached, they leave none.
# timeout: 900
. "$(dirname "$0")/lib.sh"

need jq

nr=$(share 40 500)
scratch_fs ext4
cd "$SCRATCH"
ploopctl create -s 256M -b 64K base.img >/dev/null
device=$(attach base.img)
head -c 2M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=64k oflag=direct conv=fsync status=none
expect_fail ploopctl clone base.img early.img
expect_fail ploopctl clone --descriptor base.img early
[[ ! -e early.img && ! -e early ]] || die 'cloned what is written to'
detach "$device"
before=$(sha256sum <base.img)

# In KiB.
meminfo() { awk -v name="$1:" '$1 == name { print $2 }' /proc/meminfo; }
# taken: memory that nobody can have back, in KiB.
taken() {
    udevadm settle -t 60 || true
    drop_caches
    awk '{ kib[$1] = $2 } END { print kib["MemTotal:"] - kib["MemFree:"] - kib["Buffers:"] - kib["Cached:"] - kib["SReclaimable:"] }' /proc/meminfo
}
millis() { echo $(($(date +%s%N) / 1000000)); }
# each: tells what each device added to a figure of meminfo.
each() { echo "$1 $((($(meminfo "$1") - $2) / nr)) KiB"; }

at=(base.img)
for ((i = 1; i <= nr; i++)); do
    if ((i % 2)); then
        ploopctl clone base.img "$i.img"
        at[i]=$i.img
    else
        ploopctl clone --descriptor base.img "$i"
        at[i]=$i
    fi
done
note "$nr clones take $(du -sk --exclude=base.img . | cut -f1) KiB"

# attach_clone I: attaches it; its device in ${devices[I]}.
attach_clone() {
    if (($1 % 2)); then
        devices[$1]=$(attach base.img "${at[$1]}")
    else
        devices[$1]=$(attach "${at[$1]}")
    fi
}
# The module, its caches and udev's workers are not to be counted.
devices=()
old=()
attach_clone 1
detach "${devices[1]}"
figures=(Slab SUnreclaim KernelStack Percpu)
for name in "${figures[@]}"; do old+=("$(meminfo "$name")"); done
available=$(meminfo MemAvailable)
free=$(taken)
begin=$(millis)
for ((i = 1; i <= nr; i++)); do
    attach_clone "$i"
    ((i % 50 != 0)) || note "$i attached, $((($(millis) - begin) / i)) ms each"
done
note "$nr devices attached in $(($(millis) - begin)) ms"
expect_same "$(ploopctl list | tail -n +2 | wc -l)" "$nr" 'devices listed'
expect_same "$(ploopctl stat --prometheus | grep -c '^ploop_running{.*} 1$')" "$nr" 'devices that run'
now=$(taken)
told="memory: $(((now - free) / nr)) KiB a device"
for i in "${!figures[@]}"; do told+=", $(each "${figures[i]}" "${old[i]}")"; done
note "$told; MemAvailable was $available KiB, is $(meminfo MemAvailable) KiB"
expect_fail ploopctl attach base.img
expect_fail ploopctl attach "${at[2]}"

# mine I: what clone I writes: a cluster.
mine() { head -c 65536 < <(yes "clone $1"); }
write_mine() { mine "$1" | dd of="${devices[$1]}" bs=64k seek=$(($1 % 32)) iflag=fullblock oflag=direct conv=notrunc,fsync status=none; }
reads_right() {
    {
        head -c $(($1 % 32 * 65536)) "$TEST_DIR/data"
        mine "$1"
        tail -c +$((($1 % 32 + 1) * 65536 + 1)) "$TEST_DIR/data"
    } | cmp -n $((2 << 20)) - "${devices[$1]}" >&2
}
begin=$(millis)
for ((i = 1; i <= nr; i += 20)); do
    writers=()
    for ((j = i; j < i + 20 && j <= nr; j++)); do
        write_mine "$j" &
        writers+=($!)
    done
    for j in "${writers[@]}"; do wait "$j" || die 'a write failed'; done
done
note "written in $(($(millis) - begin)) ms"
drop_caches
for ((i = 1; i <= nr; i++)); do reads_right "$i" || die "clone $i reads wrong"; done
note "read in $(($(millis) - begin)) ms"

udevadm settle -t 60 || true
begin=$(millis)
for ((i = 1; i <= nr; i++)); do
    retry 20 ploopctl detach "${devices[i]}" || die "cannot detach ${devices[i]}"
done
note "detached in $(($(millis) - begin)) ms"
is_given_back() { (($(taken) < free + (now - free) / 3)); }
retry 30 is_given_back || die "of $((now - free)) KiB, $(($(taken) - free)) are not given back"
expect_same "$(sha256sum <base.img)" "$before" 'the base'
for i in 1 2 "$nr"; do
    attach_clone "$i"
    reads_right "$i" || die "clone $i reads wrong after it was detached"
    detach "${devices[i]}"
done

note 'of an immutable base there is no other use'
chattr +i base.img
attach_clone 2
expect_fail ploopctl attach base.img
detach "${devices[2]}"
expect_fail ploopctl attach base.img
chattr -i base.img

note 'somebody writes to the base: the disks notice'
device=$(attach base.img 2>"$TEST_DIR/said")
grep -q 'hard links' "$TEST_DIR/said" || die 'nothing was said of the clones'
dd if=/dev/urandom of="$device" bs=64k count=1 oflag=direct conv=notrunc,fsync status=none
detach "$device"
status=0
ploopctl attach "${at[2]}" 2>"$TEST_DIR/said" || status=$?
expect_same "$status" 39 'status of attach on a base that changed'
grep -q 'a lower image changed' "$TEST_DIR/said" || die "$(<"$TEST_DIR/said")"
