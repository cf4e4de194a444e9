# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# A Debian with systemd that the packages are tested in: what qemu/test-install and qemu/test-hosts share.
# Sourced inside the build root, after machine.sh. The guest runs /payload/test at each boot
# (qemu/guest/ploop-test.service), which tells us the lines that `stage` knows; qemu/guest/system-lib.sh
# has its half. Its scratch disk is /srv. Nothing is lost by a reset but what the guest had in memory.
# shellcheck disable=SC2034,SC2154 # read by, or of: machine.sh, lib.sh, who sources this

# system_prepare AREA KERNEL ROOT_IMAGE: sets `abi`, `factor` and `dir`, which is gone in the end; its
# folder `payload` becomes the payload disk.
system_prepare() {
    area=$1
    machine_prepare "$2" "$3"
    abi=$(<"$kernel/abi")
    factor=${PLOOP_TIME_FACTOR:-1}
    failed=0
    dir=$(mktemp -d "$out/vm.XXXXXX")
    trap 'machine_stop now; rm -rf "$dir"' EXIT
    trap 'exit 130' INT TERM
    mkdir -p "$dir/payload/debs"
    cp "$top"/{qemu/guest/system-lib.sh,tests/guest/kernel-log} "$dir/payload"
    cp "$top/qemu/guest/$area-test" "$dir/payload/test"
    cp "$out/test-debs"/{ploopctl,"ploop-modules-$abi"}_*.deb "$dir/payload/debs"
}

keep_console() {
    mkdir -p "$out/test-results/$area"
    cp "$dir/console.log" "$out/test-results/$area/"
}

# lost REASON: the guest is no longer to be understood.
lost() {
    keep_console
    tail -n 15 "$dir/console.log" | sed 's/^/    /'
    report FAIL guest "$1; see $out/test-results/$area"
    exit 1
}

# system_start SCRATCH_SIZE: boot it. MEM, with MiB, and SMP are for the machine.
system_start() {
    truncate -s 64M "$dir/payload.img"
    mke2fs -q -F -t ext4 -O ^has_journal -m 0 -d "$dir/payload" "$dir/payload.img"
    truncate -s "$1" "$dir/scratch.img"
    mke2fs -q -F -t ext4 "$dir/scratch.img"
    mkfifo "$dir/port.in" "$dir/port.out" "$dir/monitor.in" "$dir/monitor.out"
    # Nobody reads the monitor's answers; they are few.
    exec {machine_to}<>"$dir/port.in" {machine_from}<>"$dir/port.out" \
        {monitor}<>"$dir/monitor.in" {unread}<>"$dir/monitor.out"
    qemu-system-x86_64 -M q35 "${accel[@]}" -smp "${SMP:-2}" -m "${MEM:-1024}" \
        -nodefaults -no-user-config -display none -kernel "$kernel/vmlinuz" \
        -drive "file=$root_image,format=raw,if=none,id=root,snapshot=on" -device nvme,drive=root,serial=root \
        -drive "file=$dir/payload.img,format=raw,if=none,id=payload,readonly=on" \
        -device virtio-blk-pci,drive=payload,serial=payload \
        -drive "file=$dir/scratch.img,format=raw,if=none,id=scratch,cache=unsafe" \
        -device virtio-blk-pci,drive=scratch,serial=scratch \
        -serial "file:$dir/console.log" -device virtio-serial-pci \
        -chardev "pipe,id=port,path=$dir/port" -device virtserialport,chardev=port,name=ploop \
        -chardev "pipe,id=monitor,path=$dir/monitor" -mon chardev=monitor,mode=readline \
        -append "${kernel_words[*]} systemd.show_status=true systemd.hostname=guest" \
        >"$dir/qemu.log" 2>&1 </dev/null &
    machine_pid=$!
}

reset() { echo system_reset >&"$monitor"; }

# hangs_early NR: whether the kernel of that boot has not come to its first process: see machine_boot.
hangs_early() { (($(grep -ac 'Welcome to' "$dir/console.log") < $1)); }

# stage NR: one boot, until what comes next, which is left in `next`.
stage() {
    local line='' word rest name heard began=$SECONDS limit=$((180 * factor)) resets=0
    while :; do
        heard=0
        machine_hear line "$limit" || heard=$?
        if ((heard == 2 && resets < 2)) && hangs_early "$1"; then
            resets=$((resets + 1))
            say "$area" "boot $1: the kernel hangs as it begins (reset $resets)"
            reset
            continue
        fi
        ((heard == 0)) || lost "boot $1: $([[ $heard == 1 ]] && echo 'QEMU ended' || echo "silent for $limit s")"
        read -r word rest <<<"$line"
        case $word in
            hello)
                [[ $rest == "$1" ]] || lost "boot $1 says it is boot $rest: the one before did not end as it should"
                say "$area" "boot $1: $((SECONDS - began)) s" ;;
            ok) report ok "$rest" ;;
            figure) printf '      %s\n' "$rest" ;;
            FAIL) read -r name rest <<<"$rest"; report FAIL "$name" "$rest" ;;
            reboot|cut|'done') next=$word; return ;;
            *) lost "boot $1 said '$line'" ;;
        esac
    done
}

# system_end: when the guest has said that it ends. Judges the kernel's log also of what came after the guest looked at
# it, as of how it was shut down each time. Status 1 when a check failed.
system_end() {
    local end=$((SECONDS + 120 * factor)) bad
    while machine_runs && ((SECONDS < end)); do sleep 0.2; done
    if machine_runs; then report FAIL power-off 'it does not come to its end'; else report ok power-off; fi
    if bad=$(console_is_clean "$dir"); then
        report ok console
    else
        report FAIL console "$(head -n 1 <<<"$bad" | cut -c1-160)"
    fi
    if ((failed)); then
        keep_console
        say "$area" "the console is in $out/test-results/$area"
    fi
    say "$area" "$SECONDS s"
    return "$failed"
}
