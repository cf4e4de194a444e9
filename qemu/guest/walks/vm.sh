# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# A virtual machine of QEMU whose disk is a ploop device, as a cluster manager uses file-based storage (Ganeti's
# cases), with the commands of docs/hosts.md: created, grown online, trimmed, moved to another node after a
# failure, exported and imported, an existing file adopted. Of qemu/guest/hosts-test.
# The machine runs qemu/guest/walks/vm-init, and is emulated where KVM cannot be had.
# shellcheck disable=SC2034,SC2154 # steps: for it; factor, share, state: of it
steps=(created grown_online trimmed failed_over exported imported adopted)

name=vm1
node1=/srv/node1
node2=/var/lib/node2
device=/dev/disk/by-ploop/$name
run=/run/vm

# boot DEVICE: the machine runs, with its serial line and its monitor in $run.
boot() {
    rm -rf "$run"
    mkdir "$run"
    mkfifo "$run"/{serial,monitor}.{in,out}
    systemd-run --quiet --unit=vm qemu-system-x86_64 -M q35 -accel kvm -accel tcg,tb-size=128 -cpu max -m 128 \
        -nodefaults -no-user-config -no-reboot -display none -kernel "$share/vmlinuz" -initrd "$share/initramfs" \
        -append 'console=ttyS0 quiet panic=-1 mitigations=off nokaslr nowatchdog cryptomgr.notests' \
        -drive "file=$1,format=raw,if=none,id=disk,cache=none,aio=native,discard=unmap" \
        -device virtio-blk-pci,drive=disk -chardev "pipe,id=serial,path=$run/serial" -serial chardev:serial \
        -chardev "pipe,id=monitor,path=$run/monitor" -mon chardev=monitor,mode=readline
    answer
}

# answer: what the machine prints up to "vm: STATUS", which becomes ours.
answer() {
    local line from
    exec {from}<>"$run/serial.out"
    while read -r -t "$((150 * factor))" line <&"$from"; do
        line=${line%$'\r'}
        if [[ $line == 'vm: '* ]]; then
            exec {from}<&-
            return "${line#vm: }"
        fi
        echo "$line"
    done
    die 'the machine does not answer'
}

# in_vm COMMANDS: in the machine.
in_vm() {
    echo "$1" >"$run/serial.in"
    answer
}

off() {
    in_vm 'umount /mnt' || return
    echo 'poweroff -f' >"$run/serial.in"
    retry 60 eval '! systemctl --quiet is-active vm'
}

# data_is_there DIR: what was written when the machine was new, and what it wrote.
data_is_there() {
    same "$(sha256sum <"$1/installed")" "$(cat "$state/installed")" 'what was installed'
    same "$(sha256sum <"$1/written")" "$(cat "$state/written")" 'what the machine wrote'
}

created() {
    mkdir -p "$node1" "$node2"
    ploopctl create -s 128M "$node1/$name.img"
    disk "$name" "$node1/$name.img" noauto
    systemctl start "ploop@$name"
    # The node installs it.
    mkfs.ext4 -q "$device"
    mount "$device" /mnt
    random /mnt/installed 8
    sha256sum </mnt/installed >"$state/installed"
    umount /mnt
    boot "$device" || die 'it does not boot'
    in_vm 'mount /dev/vda /mnt && sha256sum </mnt/installed' >"$state/answer"
    same "$(cat "$state/answer")" "$(cat "$state/installed")" 'what the machine reads'
    in_vm 'head -c 8388608 /dev/urandom >/mnt/written && sync && sha256sum </mnt/written' >"$state/written"
    figure "vm: its image of 128 MiB takes $(mib "$node1/$name.img") MiB with a file system and 16 MiB of data"
}

grown_online() {
    ploopctl resize -s 192M "$device"
    echo 'block_resize disk 192M' >"$run/monitor.in"
    retry 60 eval '[[ $(in_vm "cat /sys/block/vda/size") == 393216 ]]'
    in_vm 'resize2fs /dev/vda 2>&1'
    figure "vm: df in it says $(in_vm "df -m /mnt | awk 'END { print \$2 }'") MiB after growing to 192"
    # More than would have fitted before, at its end.
    in_vm 'head -c 146800640 /dev/zero >/mnt/large && sync && rm /mnt/large && sync'
}

# What it trims, the host has back before long.
trimmed() {
    local image=$node1/$name.img before
    in_vm "head -c 67108864 /dev/zero | tr '\\0' x >/mnt/large && sync"
    before=$(mib "$image")
    in_vm 'rm /mnt/large && sync && fstrim /mnt && sync'
    retry 60 eval '((before - $(mib "$image") >= 60))'
    figure "vm: with 64 MiB removed and trimmed in it, its image went from $before to $(mib "$image") MiB"
}

failed_over() {
    local moved=$node2/$name.img
    in_vm 'echo kept >/mnt/kept && sync'
    # It writes when it is killed.
    echo 'while :; do echo more >>/mnt/more; sync; done' >"$run/serial.in"
    sleep 2
    systemctl kill --signal=KILL vm
    retry 30 eval '! systemctl --quiet is-active vm'
    systemctl reset-failed vm || true
    systemctl stop "ploop@$name"
    closed "$node1/$name.img"
    mv "$node1/$name.img" "$moved"
    figure "vm: moved to the other node were $(mib "$moved") MiB, of a file of $(($(stat -c %s "$moved") >> 20)) MiB"
    disk "$name" "$moved" noauto
    systemctl start "ploop@$name"
    boot "$device" || die 'it does not boot'
    same "$(in_vm 'mount /dev/vda /mnt && cat /mnt/kept')" kept 'what was synced'
    same "$(in_vm 'sha256sum </mnt/written')" "$(cat "$state/written")" 'what it wrote before'
    same "$(in_vm 'cat /sys/block/vda/size')" 393216 'its size there'
    off
}

exported() {
    local image=$node2/$name.img
    systemctl stop "ploop@$name"
    ploopctl convert -f raw "$image" /srv/export.raw
    qemu-img convert -f parallels -O qcow2 "$image" /srv/export.qcow2
    qemu-img compare -f raw -F qcow2 /srv/export.raw /srv/export.qcow2
    figure "vm: of an image of $(mib "$image") MiB became $(mib /srv/export.raw) MiB raw, $(mib /srv/export.qcow2) MiB qcow2"
}

imported() {
    local image
    ploopctl convert --from raw -f ploop1 /srv/export.raw /srv/from-raw.img
    qemu-img convert -f qcow2 -O parallels /srv/export.qcow2 /srv/from-qcow2.img
    for image in from-raw from-qcow2; do
        disk "$image" "/srv/$image.img" noauto
        systemctl start "ploop@$image"
        cmp "/dev/disk/by-ploop/$image" /srv/export.raw
        e2fsck -fn "/dev/disk/by-ploop/$image"
        mount -o ro,noload "/dev/disk/by-ploop/$image" /mnt
        data_is_there /mnt
        umount /mnt
        systemctl stop "ploop@$image"
        closed "/srv/$image.img"
        figure "vm: imported by $image it takes $(mib "/srv/$image.img") MiB"
    done
}

adopted() {
    local before
    if ploopctl create -s 128M /srv/export.raw; then die 'it was made over a file that exists'; fi
    disk old /srv/export.raw noauto,format=raw
    systemctl start ploop@old
    boot /dev/disk/by-ploop/old || die 'it does not boot'
    same "$(in_vm 'mount /dev/vda /mnt && sha256sum </mnt/written')" "$(cat "$state/written")" 'what it wrote before'
    in_vm 'echo adopted >/mnt/adopted'
    off
    systemctl stop ploop@old
    # It is a raw image as before.
    mount -o loop,ro,noload /srv/export.raw /mnt
    same "$(cat /mnt/adopted)" adopted 'what it wrote to the file'
    data_is_there /mnt
    umount /mnt
    # What is wanted thin becomes so in place.
    before=$(mib /srv/export.raw)
    cp --sparse=always /srv/export.raw /srv/adopted.raw
    ploopctl convert --from raw -f ploop1 --in-place /srv/export.raw
    figure "vm: the adopted raw file took $before MiB, $(mib /srv/export.raw) MiB as a thin image"
    qemu-img compare -f parallels -F raw /srv/export.raw /srv/adopted.raw
}
