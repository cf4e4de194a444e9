# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# A guest: boot it, talk to it, end it. Sourced inside the build root, after
# lib.sh. One guest per shell; its files live in the directory given at boot:
#   console.log   the kernel's console    output.log   what its programs print
#   port.in/.out  the control port, one line per message
#   results.raw   a disk on which a failed test leaves its images (a tar)
# With FIRMWARE set, a directory, it starts from firmware with Secure Boot: code.fd, its variables vars.fd, and the
# folder esp/ with shim and GRUB, which get the kernel and its command line.
# With LOSSY set, the path of a socket, scratch disk 0 is the one served there and keeps
# what was flushed, and the others are left as the guest before had them.
# With files in `namespaces` they are others of the root's NVMe disk, which makes zeros by itself. Which of them
# the kernel finds first is chance, mostly the root; else the guest does not come up, and is booted again.
# shellcheck disable=SC2154 # out, cache: lib.sh

. "$top/tests/guest/kernel-log"
machine_pid='' namespaces=()

# kernel and root image and accelerator, once per run.
machine_prepare() {
    kernel=$1
    root_image=$2
    read -ra accel < <("$top/qemu/accel" "$kernel" "$root_image")
}

# machine_options DIR PAYLOAD: fills `options`.
machine_options() {
    local dir=$1 payload=$2 disk file cache_mode nsid=1
    # Only the root is on NVMe: several disks are probed in any order.
    local nvme=(-device "nvme,drive=root,serial=root")
    if ((${#namespaces[@]} > 0)); then
        nvme=(-device "nvme,id=nvme,serial=root" -device "nvme-ns,drive=root,bus=nvme,nsid=1")
    fi
    # shellcheck disable=SC2054 # commas are QEMU's
    options=(
        -M q35 "${accel[@]}" -smp "${SMP:-2}" -m "${MEM:-2048}"
        -nodefaults -no-user-config -no-reboot -display none
        -drive "file=$root_image,format=raw,if=none,id=root,snapshot=on"
        "${nvme[@]}"
        -drive "file=$payload,format=raw,if=none,id=payload,readonly=on"
        -device virtio-blk-pci,drive=payload,serial=payload
    )
    for file in "${namespaces[@]}"; do
        nsid=$((nsid + 1))
        options+=(
            -drive "file=$file,format=raw,if=none,id=namespace$nsid,cache=unsafe,discard=unmap"
            -device "nvme-ns,drive=namespace$nsid,bus=nvme,nsid=$nsid"
        )
    done
    for disk in scratch0 scratch1 scratch2 results; do
        file=$dir/$disk.raw cache_mode=unsafe
        if [[ -n ${LOSSY-} && $disk == scratch0 ]]; then
            file=nbd:unix:$LOSSY cache_mode=writeback
        else
            [[ -n ${LOSSY-} ]] || rm -f "$file"
            truncate -s "${SCRATCH_SIZE:-4G}" "$file"
        fi
        options+=(
            -drive "file=$file,format=raw,if=none,id=$disk,cache=$cache_mode,discard=unmap"
            -device "virtio-blk-pci,drive=$disk,serial=$disk"
        )
    done
}

# machine_kernel WORDS: adds to `options` what boots the kernel, with those words on its command line.
machine_kernel() {
    if [[ -z ${FIRMWARE-} ]]; then
        options+=(-kernel "$kernel/vmlinuz" -append "$1")
        return
    fi
    cp "$kernel/vmlinuz" "$FIRMWARE/esp/vmlinuz"
    printf '%s\n' "linux /vmlinuz $1" boot >"$FIRMWARE/esp/EFI/debian/grub.cfg"
    # shellcheck disable=SC2054 # commas are QEMU's
    options+=(
        -machine smm=on -global driver=cfi.pflash01,property=secure,value=on
        -drive "file=$FIRMWARE/code.fd,format=raw,if=pflash,unit=0,readonly=on"
        -drive "file=$FIRMWARE/vars.fd,format=raw,if=pflash,unit=1"
        -drive "file=fat:$FIRMWARE/esp,format=raw,if=none,id=esp,readonly=on"
        -device virtio-blk-pci,drive=esp,serial=esp,bootindex=0
    )
}

# Of every guest. A hang of a processor is told by RCU.
kernel_words=(
    console=ttyS0 loglevel=5 panic=-1 mitigations=off nokaslr nowatchdog
    cryptomgr.notests log_buf_len=8M kfence.sample_interval=100
    sysctl.kernel.hung_task_timeout_secs=$((90 * ${PLOOP_TIME_FACTOR:-1}))
    sysctl.kernel.hung_task_check_interval_secs=$((10 * ${PLOOP_TIME_FACTOR:-1}))
    root=/dev/nvme0n1 rw
)
kernel_command_line=("${kernel_words[@]}" sysctl.kernel.sysrq=1 init=/usr/sbin/ploop-first)

# machine_boot DIR PAYLOAD: start a guest, with the words of BOOT for its kernel, and
# wait for its "ready". Sets
# machine_pid and the descriptors machine_to, machine_from. An emulated kernel
# on a busy machine may hang while it measures its clocks, so it gets three
# tries. Status 1: it does not come up.
machine_boot() {
    local try
    for try in 1 2 3; do
        if machine_try "$@"; then return 0; fi
        say vm "the guest did not come up (try $try)"
        machine_stop now
    done
    return 1
}

machine_try() {
    local dir=$1 payload=$2 options=() line
    mkdir -p "$dir"
    machine_options "$dir" "$payload"
    machine_kernel "${kernel_command_line[*]} ${BOOT-}"
    rm -f "$dir/port.in" "$dir/port.out"
    mkfifo "$dir/port.in" "$dir/port.out"
    exec {machine_to}<>"$dir/port.in" {machine_from}<>"$dir/port.out"
    : >"$dir/console.log"
    : >"$dir/output.log"
    qemu-system-x86_64 "${options[@]}" \
        -serial "file:$dir/console.log" -serial "file:$dir/output.log" \
        -device virtio-serial-pci -chardev "pipe,id=port,path=$dir/port" \
        -device virtserialport,chardev=port,name=ploop >"$dir/qemu.log" 2>&1 </dev/null &
    machine_pid=$!
    machine_hear line $((45 * ${PLOOP_TIME_FACTOR:-1})) && [[ $line == ready ]]
}

# console_is_clean DIR: the kernel said nothing there that fails a test, or prints what. Others write to the console, too.
console_is_clean() { ! grep -aE '^\[ *[0-9]+\.[0-9]+\] ' "$1/console.log" | grep -aE -- "$bad_log"; }

machine_runs() { [[ -n $machine_pid ]] && kill -0 "$machine_pid" 2>/dev/null; }

machine_say() { printf '%s\n' "$*" >&"$machine_to"; }

# machine_shell DIR PAYLOAD: a guest with a shell on this terminal; Ctrl-A X ends it.
machine_shell() {
    local dir=$1 payload=$2 options=()
    mkdir -p "$dir"
    machine_options "$dir" "$payload"
    machine_kernel "${kernel_command_line[*]} ploop.shell TERM=${TERM:-linux}"
    qemu-system-x86_64 "${options[@]}" -serial mon:stdio
}

# machine_hear VARIABLE SECONDS: the guest's next line. Status 1: it died;
# status 2: it said nothing in time.
machine_hear() {
    # shellcheck disable=SC2034 # read through the name reference
    local -n heard=$1
    local end=$((SECONDS + $2)) part
    heard=''
    while ((SECONDS < end)); do
        # A line may come in pieces, and the wait may end between them.
        if read -r -t 2 -u "$machine_from" part; then heard+=$part; return 0; fi
        heard+=$part
        machine_runs && continue
        # It is gone; its last words may have come in between.
        read -r -t 0.1 -u "$machine_from" part || return 1
        heard+=$part
        return 0
    done
    return 2
}

# End the guest: politely when it listens, else by its process id.
machine_stop() {
    if machine_runs; then
        [[ ${1-} != now ]] && machine_say stop
        local end=$((SECONDS + 10))
        while [[ ${1-} != now ]] && machine_runs && ((SECONDS < end)); do sleep 0.2; done
        machine_runs && kill -KILL "$machine_pid"
    fi
    [[ -z $machine_pid ]] || wait "$machine_pid" 2>/dev/null || true
    machine_pid=''
    if [[ -n ${machine_to-} ]]; then exec {machine_to}>&- {machine_from}>&-; machine_to=''; fi
}
