#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# ploopctl killed at any point of attach or detach, by the clock and before each
# of its ioctls: the next detach or attach copes, nothing stays behind and the
# data is there. Nor does an image stay that could not be made.
# timeout: 240
. "$(dirname "$0")/lib.sh"

need strace

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 64M "$image" >/dev/null
device=$(attach "$image")
head -c 1M /dev/urandom >"$TEST_DIR/data"
dd if="$TEST_DIR/data" of="$device" bs=1M conv=fsync status=none
detach "$device"

# killed MILLISECONDS ARGUMENTS...: ploopctl, killed after that time.
killed() {
    local after=$1 pid
    shift
    ploopctl "$@" >/dev/null 2>&1 &
    pid=$!
    sleep "0.$(printf %03d "$after")"
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

for ((i = 0; i < 12; i++)); do
    killed $((i * 12)) attach "$image"
    if ((i % 2 == 0)); then
        # Whatever is left: detach removes it, or says that there is nothing.
        retry 10 bash -c 'ploopctl detach "$1"; s=$?; ((s == 0 || s == 40))' _ "$image" || die "detach after a killed attach"
    fi
    # The next attach works, or says that the killed one had got through.
    status=0
    device=$(ploopctl attach "$image" 2>"$TEST_DIR/said") || status=$?
    if ((status == 37)); then
        device=$(ploopctl list --json | jq -r '.. | .device? // empty' | head -n 1)
    else
        expect_same "$status" 0 "attach after a killed attach: $(<"$TEST_DIR/said")"
    fi
    udevadm settle -t 10
    killed $((i * 10)) detach "$image"
    status=0
    retry 10 bash -c 'ploopctl detach "$1"; s=$?; ((s == 0 || s == 40))' _ "$image" || die "detach after a killed detach"
done
for left in /sys/block/ploop*; do
    [[ ! -e $left ]] || ploopctl detach "/dev/${left##*/}"
done

# killed_at CALL N ARGUMENTS...: ploopctl, killed as it enters its Nth system call
# CALL, which is after the one before; status 1 if it ends before that.
killed_at() {
    local call=$1 nr=$2 status=0
    shift 2
    strace -f -o /dev/null -e "trace=$call" -e "inject=$call:signal=KILL:when=$nr" \
        ploopctl "$@" >/dev/null 2>&1 || status=$?
    ((status == 0 || status == 137)) || die "ploopctl $* ended with $status, to be killed at $call $nr"
    ((status == 137))
}

# detached: the image is not attached any more, or was not.
detached() {
    local status=0
    udevadm settle -t 10 || true
    ploopctl detach "$image" 2>"$TEST_DIR/said" || status=$?
    ((status == 0 || status == 40))
}

nothing_left() {
    local left
    for left in /sys/block/ploop*; do
        [[ ! -e $left ]] || die "${left##*/} is left after a kill at $1"
    done
}

# copes WHERE: the next attach and detach work.
copes() {
    local status=0
    # Who looks at what is left keeps it from being removed.
    udevadm settle -t 10 || true
    ploopctl attach "$image" >/dev/null 2>"$TEST_DIR/said" || status=$?
    # 37: the killed one had got through.
    ((status == 0 || status == 37)) || die "attach after a kill at $1: $(<"$TEST_DIR/said")"
    retry 10 detached || die "detach after a kill at $1: $(<"$TEST_DIR/said")"
    nothing_left "$1"
}

# killed_everywhere COMMAND: at each ioctl and at the end.
killed_everywhere() {
    local command=$1 nr=0 survived=''
    while [[ -z $survived ]]; do
        nr=$((nr + 1))
        [[ $command != detach ]] || attach "$image" >/dev/null
        udevadm settle -t 10 || true
        killed_at ioctl "$nr" "$command" "$image" || survived=1
        copes "$command, ioctl $nr"
    done
    note "$command: killed at each of $((nr - 1)) ioctls"
    ((nr > 3)) || die "$command makes only $((nr - 1)) ioctls: is this the way to kill it?"
    [[ $command != detach ]] || attach "$image" >/dev/null
    udevadm settle -t 10 || true
    killed_at exit_group 1 "$command" "$image" || die "$command cannot be killed as it ends"
    copes "$command, its end"
}
killed_everywhere attach
killed_everywhere detach

device=$(attach "$image")
cmp -n $((1 << 20)) "$device" "$TEST_DIR/data" || die "the data is gone"
detach "$device"
ploopctl check "$image" >&2

note 'an image whose name cannot be made durable is none'
status=0
strace -f -o /dev/null -e trace=fsync -e inject=fsync:error=EIO:when=2 \
    ploopctl create -s 64M "$SCRATCH/new" 2>"$TEST_DIR/said" || status=$?
expect_same "$status" 16 "the status of create, which says $(<"$TEST_DIR/said")"
[[ ! -e $SCRATCH/new ]] || die 'it is there'
