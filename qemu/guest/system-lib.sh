# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# What the guest's halves of qemu/test-install and qemu/test-hosts share. Sourced. Says to the host
#   ok NAME | FAIL NAME REASON     of each check
export PATH=/usr/sbin:/usr/bin LC_ALL=C.UTF-8
state=/var/lib/ploop-test
. /payload/kernel-log
mkdir -p "$state"
until [[ -e /dev/virtio-ports/ploop ]]; do sleep 0.2; done

say() { echo "$*" >/dev/virtio-ports/ploop; }

# check NAME CMD...: one result; status 1 when it failed.
check() {
    local name=$1 log=$state/log
    shift
    if "$@" >"$log" 2>&1; then
        say "ok $name"
    else
        say "FAIL $name $(tail -n 3 "$log" | tr '\n' ' ')"
        cat "$log" >&2
        return 1
    fi
}
