# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# A container of systemd-nspawn whose root is on a ploop disk, with the commands of docs/hosts.md: made, run,
# snapshot, rolled back, moved, made smaller and larger, while it runs wherever that can be.
# The other host is another directory. Of qemu/guest/hosts-test.
# shellcheck disable=SC2034,SC2154 # steps: for it; share, state: of it
steps=(is_made runs snapshot_while_it_runs rolled_back moved_while_it_runs compacted grown ended)

name=ct101
home=/srv/vz/$name
there=/srv/host2/vz/$name
device=/dev/disk/by-ploop/$name
root=/var/lib/machines/$name
unit=systemd-nspawn@$name

inside() { systemd-run --quiet --wait --pipe --machine="$name" /bin/sh -ec "$1"; }

# up: the container has booted.
up() {
    machinectl start "$name"
    retry 120 systemctl --quiet --machine="$name" is-active multi-user.target
}

# all_of DIR: a checksum of all names, owners, modes, times and contents.
all_of() {
    (cd "$1" && find . -printf '%y %m %U %G %T@ %p %l\n' | sort
        find . -type f -print0 | sort -z | xargs -0 sha256sum) | sha256sum | cut -d' ' -f1
}

is_made() {
    mkdir -p /srv/vz /srv/host2/vz "$root" /etc/systemd/nspawn "/etc/systemd/system/$unit.service.d"
    ploopctl create --descriptor -s 256M "$home"
    echo "$device $root ext4 noauto,noatime 0 2" >>/etc/fstab
    disk "$name" "$home" noauto
    printf '[Network]\nPrivate=yes\nVirtualEthernet=no\n' >"/etc/systemd/nspawn/$name.nspawn"
    printf '[Unit]\nRequiresMountsFor=%s\n' "$root" >"/etc/systemd/system/$unit.service.d/disk.conf"
    systemctl daemon-reload
    systemctl start "ploop@$name"
    mkfs.ext4 -q "$device"
    systemctl start "var-lib-machines-$name.mount"
    tar -C "$root" --numeric-owner -xpf "$share/container.tar"
    systemd-machine-id-setup --root="$root"
    sync -f "$root"
    figure "container: its root has $(find "$root" -xdev | wc -l) files, $(df -m --output=used "$root" | tail -n 1 | tr -d ' ') MiB used; the image takes $(mib "$home"/root.hds) MiB"
}

runs() {
    up
    same "$(inside 'cat /proc/1/comm')" systemd 'process 1'
    inside 'echo one >/srv/state; head -c 16M /dev/urandom >/srv/data; sync'
    sha256sum <"$root/srv/data" >"$state/data"
    # It writes all the time from here on.
    systemd-run --quiet --machine="$name" --unit=writer /bin/sh -c \
        'while :; do n=$((n + 1)); echo "$n" >>/srv/written; sync /srv/written; done'
    retry 30 test -s "$root/srv/written"
}

snapshot_while_it_runs() {
    local uuid
    uuid=$(ploopctl snapshot create "$home")
    echo "$uuid" >"$state/uuid"
    inside 'echo two >/srv/state; rm -r /usr/share/perl5 /usr/lib/x86_64-linux-gnu/perl-base; echo new >/srv/new; head -c 16M /dev/urandom >/srv/data; sync'
    same "$(inside 'cat /srv/state')" two 'after the change'
    # The snapshot has the old state meanwhile.
    ploopctl snapshot mount --uuid "$uuid" "$home" /mnt
    same "$(cat /mnt/srv/state)" one 'in the snapshot'
    same "$(sha256sum </mnt/srv/data)" "$(cat "$state/data")" 'data in the snapshot'
    all_of /mnt >"$state/all"
    ploopctl snapshot umount /mnt
    figure "container: the change of 16 MiB took $(mib "$(ploopctl info --json "$home" | jq -r '.images[-1].image')") MiB above the snapshot"
}

rolled_back() {
    systemctl stop "$unit"
    systemctl stop "ploop@$name"
    ploopctl snapshot switch --uuid "$(cat "$state/uuid")" "$home"
    systemctl start "ploop@$name"
    mount -o ro,noload "$device" /mnt
    same "$(all_of /mnt)" "$(cat "$state/all")" 'all files'
    umount /mnt
    up
    same "$(inside 'cat /srv/state')" one 'after going back'
    same "$(sha256sum <"$root/srv/data")" "$(cat "$state/data")" 'data after going back'
    inside 'test ! -e /srv/new; perl -e 1'
}

moved_while_it_runs() {
    local old new
    systemd-run --quiet --machine="$name" --unit=writer /bin/sh -c \
        'n=$(tail -n 1 /srv/written); while :; do n=$((n + 1)); echo "$n" >>/srv/written; sync /srv/written; done'
    ploopctl copy send --json --stop-command "systemctl stop $unit" --keep-frozen \
        --through "ploopctl copy receive $there" "$device" 2>"$state/events"
    figure "container: $(grep '^{' "$state/events" | jq -rs '
        "of \(map(select(.event == "begin"))[0].bytes) bytes in \(map(select(.event == "begin"))[0].files) files " +
        "\(map(select(.event == "end"))[-1].bytes) were sent, again in rounds \(map(select(.event == "round").dirty)); " +
        "the disk stood still for \(map(select(.event == "end"))[-1].downtime_ms) ms"')"
    tail -n 1 "$root/srv/written" >"$state/written"
    old=$(readlink -f "$device")
    new=$(ploopctl attach -r --json "$there" | jq -r .device)
    cmp <(dd if="$old" bs=1M iflag=direct status=none) <(dd if="$new" bs=1M iflag=direct status=none)
    ploopctl detach "$new"
    ploopctl copy thaw "$old"
    systemctl stop "ploop@$name"
    # The other host.
    disk "$name" "$there" noauto
    up
    same "$(inside 'tail -n 1 /srv/written')" "$(cat "$state/written")" 'the last line that was written'
    same "$(inside 'cat /srv/state')" one 'on the other host'
    same "$(ploopctl snapshot list --json "$there" | jq -c '[.snapshots[].uuid]')" \
        "$(ploopctl snapshot list --json "$home" | jq -c '[.snapshots[].uuid]')" snapshots
    rm -r "$home"
}

compacted() {
    local full
    ploopctl snapshot delete --uuid "$(cat "$state/uuid")" "$there"
    inside 'head -c 64M /dev/urandom >/srv/large; sync'
    full=$(mib "$there"/root.hds*)
    inside 'rm /srv/large; sync'
    ploopctl trim "$there"
    ploopctl compact "$there"
    figure "container: the image took $full MiB with 64 MiB of data, $(mib "$there"/root.hds*) MiB when that was deleted, trimmed and compacted; df says $(df -m --output=used "$root" | tail -n 1 | tr -d ' ') MiB"
    (($(mib "$there"/root.hds*) < full - 56)) || die 'it did not get smaller'
    ploopctl fscheck "$there"
    same "$(sha256sum <"$root/srv/data")" "$(cat "$state/data")" 'data after compacting'
}

grown() {
    local before
    before=$(inside 'df -m --output=size / | tail -n 1')
    ploopctl resize -s 512M "$there"
    resize2fs "$device"
    figure "container: df in it says $((before)) MiB before growing, $(($(inside 'df -m --output=size / | tail -n 1'))) MiB after"
    # More than would have fitted before.
    inside 'head -c 160M /dev/urandom | tee /srv/large | sha256sum; sync' >"$state/large"
    drop_caches
    same "$(sha256sum <"$root/srv/large")" "$(cat "$state/large")" 'data behind the old end'
    same "$(sha256sum <"$root/srv/data")" "$(cat "$state/data")" 'data after growing'
}

ended() {
    systemctl stop "$unit"
    systemctl stop "ploop@$name"
    closed "$there"/root.hds*
    [[ ! -e $device ]]
}
