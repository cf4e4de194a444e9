#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# ploopctl killed before each system call that changes a detached disk or makes a
# change durable: whatever comes next completes or undoes it, says so, and the disk
# reads as one of the two.
# timeout: 600
. "$(dirname "$0")/lib.sh"

need strace

scratch_fs ext4
few=$(share 6 1) many=$(share 60 3)
disk=$SCRATCH/disk

# fill BYTE: all of the disk, as the guest sees it.
fill() {
    local device
    device=$(attach "$disk")
    head -c 2M /dev/zero | tr '\0' "$1" | dd of="$device" bs=64k iflag=fullblock conv=fsync status=none
    detach "$disk"
}

# shows: the byte that fills the disk, or nothing.
shows() {
    local device
    device=$(attach "$disk" 2>"$TEST_DIR/said") || die "$(<"$TEST_DIR/said")"
    tr -s '\0-\377' <"$device"
    detach "$disk" 2>>"$TEST_DIR/said"
}

ploopctl create --descriptor -s 2M -b 32K "$disk"
fill a
a=$(ploopctl snapshot create "$disk")
fill b
cp -a --sparse=always "$disk" "$SCRATCH/before"

# killed_everywhere WANT ARGUMENTS...: WANT is what the disk may show, as a pattern. A short run takes half of the calls.
killed_everywhere() {
    local want=$1 call nr step total=0 status seen
    local halves=('rename unlink linkat' 'fsync pwrite64 openat')
    shift
    for call in $(share "${halves[RANDOM % 2]}" "${halves[*]}"); do
        # Of those that are many, fewer.
        case $call in openat|pwrite64) step=$many ;; *) step=$few ;; esac
        for ((nr = 1 + RANDOM % step; ; nr += step)); do
            rm -rf "$disk"
            cp -a --sparse=always "$SCRATCH/before" "$disk"
            status=0
            strace -f -o /dev/null -e "trace=$call" -e "inject=$call:signal=KILL:when=$nr" \
                ploopctl "$@" >/dev/null 2>&1 || status=$?
            if ((status != 137)); then
                # It makes fewer such calls than where this began: its first one, then.
                ((status == 0 && nr > 1 && nr <= step)) || break
                nr=$((1 - step))
                continue
            fi
            total=$((total + 1))
            seen=$(shows)
            # shellcheck disable=SC2053 # a pattern
            [[ $seen == $want ]] || die "killed at $call $nr of $*: shows '$seen'"
            ploopctl descriptor validate "$disk" >/dev/null || die "killed at $call $nr of $*: not valid"
            expect_same "$(find "$disk" -name 'root.hds*' | wc -l)" "$(grep -c '<File>' "$disk/DiskDescriptor.xml")" "images after $call $nr of $*"
            [[ ! -e $disk/DiskDescriptor.xml.intent ]] || die "killed at $call $nr of $*: still unfinished"
        done
        ((status == 0)) || die "$* ended with $status"
    done
    note "$*: killed $total times"
    ((total > $(share 0 10))) || die "only $total times: is this the way to kill it?"
}

killed_everywhere 'b' snapshot create "$disk"
killed_everywhere '[ab]' snapshot switch --uuid "$a" "$disk"
killed_everywhere '[ab]' snapshot delete --uuid 5fbaabe3-6958-40ff-92a7-860e329aab41 "$disk"
killed_everywhere 'b' snapshot delete --uuid "$a" "$disk"
killed_everywhere 'b*' resize -s 4M "$disk"
