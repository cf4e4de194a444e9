#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Somebody writes into the images of a disk in use, into headers, indexes, extensions and data, while
# it is read and written and operations run that look at them again. What is read then may be
# anything, but every call ends, the kernel goes on, and a sound disk works next to it.
# timeout: 400
. "$(dirname "$0")/lib.sh"

seed=${SEED:-$RANDOM}
rounds=$(share 12 500)
note "seed $seed, $rounds rounds"
RANDOM=$seed
scratch_fs xfs
size=$((24 << 20)) c=65536

ploopctl create -s 16M -b 64K "$SCRATCH/sound.img" >/dev/null
sound=$(attach "$SCRATCH/sound.img")
head -c 4M /dev/urandom >"$TEST_DIR/data"

# build: a disk of three levels with something in each.
build() {
    local i
    rm -f "$SCRATCH"/[0-9]*.img
    images=() next=0
    for i in 0 1 2; do
        add
        if ((i == 0)); then device=$(attach "${images[0]}"); else plooptest snapshot --cluster-log 7 "$device" "${images[i]}"; fi
        dd if="$TEST_DIR/data" of="$device" bs=64k count=20 seek=$((i * 12)) oflag=direct conv=notrunc,fsync status=none
    done
    plooptest checkpoint start "$device" 3
}

add() {
    images+=("$SCRATCH/$next.img")
    ploopctl create -s "$size" -b 64K "${images[-1]}" >/dev/null
    next=$((next + 1))
}

# mutate: a few bytes of one of the images, wherever they hurt.
mutate() {
    local image at bytes
    image=${images[RANDOM % ${#images[@]}]}
    case $((RANDOM % 4)) in
        0) at=$((RANDOM % 64)) bytes=$((RANDOM % 8 + 1)) ;;
        1) at=$((64 + RANDOM % 400 * 4)) bytes=$((RANDOM % 4 + 1)) ;;
        2) at=$((RANDOM % 16 * 4096)) bytes=4096 ;;
        3) at=$((RANDOM % 40 * c + RANDOM % 64)) bytes=$((RANDOM % 600 + 1)) ;;
    esac
    head -c "$bytes" /dev/urandom | dd of="$image" oflag=seek_bytes seek="$at" conv=notrunc bs=4096 iflag=fullblock status=none
}

# try CMD...: in time, with whatever result.
try() {
    local status=0
    timeout "$(limit 60)" "$@" >"$TEST_DIR/said" 2>&1 || status=$?
    ((status < 124)) || die "status $status of $*: $(tail -n 3 "$TEST_DIR/said")"
    tried=$((tried + 1)) refused=$((refused + (status != 0)))
    return "$status"
}

# operate: something that opens, reads or writes headers and indexes.
operate() {
    case $((RANDOM % 9)) in
        0) if (($(nr_levels "$device") < 5)); then
                add
                try plooptest snapshot --cluster-log 7 "$device" "${images[-1]}" || true
            fi ;;
        1) try plooptest op "$device" merge top || true ;;
        2) try plooptest op "$device" merge $((RANDOM % 3 + 1)) || true ;;
        3) try plooptest op "$device" compact || true ;;
        4) try plooptest op "$device" grow $((size / 512 + RANDOM % 8 * 128)) || true ;;
        5) try plooptest checkpoint start "$device" $((RANDOM % 3 + 1)) || true ;;
        6) try blkdiscard -o $((RANDOM % 300 * c)) -l $((4 * c)) "$device" || true ;;
        7) try ploopctl info "$device" || true ;;
        8) for image in "${images[@]}"; do try ploopctl check "$image" || true; done ;;
    esac
}

tried=0 refused=0 device=''
for ((round = 1; round <= rounds; round++)); do
    [[ -n $device ]] || build
    (for i in 1 2 3 4 5 6; do
        dd if="$device" of=/dev/null bs=64k count=30 skip=$((RANDOM % 300)) iflag=direct status=none
        dd if="$TEST_DIR/data" of="$device" bs=12k count=4 seek=$((RANDOM % 1500)) oflag=direct conv=notrunc,fsync status=none
    done) 2>/dev/null &
    busy=$!
    for i in 1 2 3; do mutate; operate; done
    timeout "$(limit 60)" tail --pid "$busy" -f /dev/null || die 'I/O hangs'
    wait "$busy" || true
    mapfile -t images < <(images_of "$device")
    udevadm settle -t 10 || true
    # It says so if an image could not be closed.
    try ploopctl detach "$device" || true
    [[ ! -b $device ]] || detach "$device"
    device=''
    mutate
    if ((RANDOM % 3)) && try ploopctl attach "${images[@]}"; then
        device=$(grep -oE '/dev/ploop[0-9]+' "$TEST_DIR/said" | head -n 1)
    fi
    next=$((next + 1))
done
[[ -z $device ]] || { try ploopctl detach "$device" || true; [[ ! -b $device ]] || detach "$device"; }
note "$tried calls, $refused failed"
((refused > 0 && refused < tried)) || die 'nothing was refused, or all'
dd if="$TEST_DIR/data" of="$sound" bs=1M oflag=direct conv=notrunc,fsync status=none
cmp -n $((4 << 20)) "$sound" "$TEST_DIR/data" || die 'the sound disk is wrong'
detach "$sound"
ploopctl check "$SCRATCH/sound.img" >&2
