# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# A volume of podman on a ploop disk, with the commands of docs/hosts.md: written by a container, snapshot
# while that runs, grown, rolled back. Of qemu/guest/hosts-test.
# shellcheck disable=SC2034,SC2154 # steps: for it; share, state: of it
steps=(volume_is_made written_by_a_container snapshot_while_it_runs grown_while_it_runs rolled_back removed)

name=db
home=/srv/volumes/$name
device=/dev/disk/by-ploop/$name

inside() { podman exec "$name" /bin/sh -ec "$1"; }

stop() {
    podman stop --time 1 "$name"
    retry 30 eval "! findmnt --source $(readlink -f "$device")"
}

volume_is_made() {
    mkdir -p "${home%/*}"
    podman import "$share/box.tar" localhost/box
    ploopctl create --descriptor -s 128M "$home"
    disk "$name" "$home"
    systemctl start "ploop@$name"
    mkfs.ext4 -q "$device"
    podman volume create --opt type=ext4 --opt "device=$device" --opt o=noatime "$name"
}

written_by_a_container() {
    # It writes all the time.
    podman run --detach --name "$name" --network none --volume "$name:/data" localhost/box \
        /bin/sh -c 'while :; do n=$((n + 1)); echo "$n" >>/data/log; /bin/busybox sync; /bin/busybox sleep 0.1; done'
    retry 60 inside '[ -s /data/log ]'
    inside 'echo one >/data/state; /bin/busybox head -c 8388608 /dev/urandom >/data/file; /bin/busybox sync'
    inside '/bin/busybox sha256sum </data/file' >"$state/file"
    findmnt --source "$(readlink -f "$device")"
    figure "podman: the image of the volume takes $(mib "$home"/root.hds*) MiB with a file system and 8 MiB of data"
}

snapshot_while_it_runs() {
    ploopctl snapshot create "$home" >"$state/uuid"
    inside 'echo two >/data/state; /bin/busybox head -c 4194304 /dev/urandom >/data/file; /bin/busybox sync'
    same "$(inside '/bin/busybox cat /data/state')" two 'after the change'
    figure "podman: the change of 4 MiB took $(mib "$(ploopctl info --json "$home" | jq -r '.images[-1].image')") MiB above the snapshot"
}

grown_while_it_runs() {
    ploopctl resize -s 192M "$home"
    resize2fs "$device"
    figure "podman: df in the container says $(($(inside "/bin/busybox df -m /data | /bin/busybox awk 'END { print \$2 }'"))) MiB after growing to 192"
    # More than would have fitted before.
    inside '/bin/busybox head -c 125829120 /dev/urandom | /bin/busybox tee /data/large | /bin/busybox sha256sum' >"$state/large"
    drop_caches
    same "$(inside '/bin/busybox sha256sum </data/large')" "$(cat "$state/large")" 'data behind the old end'
}

rolled_back() {
    stop
    systemctl stop "ploop@$name"
    ploopctl snapshot switch --uuid "$(cat "$state/uuid")" "$home"
    systemctl start "ploop@$name"
    podman start "$name"
    same "$(inside '/bin/busybox cat /data/state')" one 'after going back'
    same "$(inside '/bin/busybox sha256sum </data/file')" "$(cat "$state/file")" 'the file after going back'
    inside '[ ! -e /data/large ]'
    # A file system is as large as its disk was then.
    figure "podman: the disk is $(($(blockdev --getsize64 "$device") >> 20)) MiB after going back"
    stop
}

removed() {
    podman rm "$name"
    podman volume rm "$name"
    systemctl stop "ploop@$name"
    closed "$home"/root.hds*
}
