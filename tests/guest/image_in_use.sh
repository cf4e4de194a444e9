#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# One writer or many readers: a second attach is refused whoever holds the image,
# we or QEMU, and QEMU is refused while we hold it; messages tell the cases apart. A
# lease, as an NFS server takes one for its clients, is waited for.
# timeout: 150
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 64M "$image" >/dev/null
ln "$image" "$SCRATCH/other-name.img"

device=$(attach "$image")
status=0
said=$(ploopctl attach "$SCRATCH/other-name.img" 2>&1) || status=$?
expect_same "$status" 37 'status of a second attach'
[[ $said == *"$device"* || $said == *"${device##*/}"* ]] || die "the holder is not named: $said"
expect_fail ploopctl attach -r "$image"
expect_fail ploopctl check --repair "$image"
# Past the tool: the module knows by itself.
said=$(plooptest attach-raw "$image" 2>&1) && die "the module attached it twice"
[[ $said == *busy* ]] || die "the module says: $said"
said=$(qemu-io -f parallels -c 'write 0 4k' "$image" 2>&1) && die "QEMU writes to an attached image"
[[ $said == *lock* ]] || die "QEMU says: $said"
detach "$device"

# QEMU holds it.
qemu-io -f parallels -c 'write 0 4k' -c 'sleep 60000' "$image" >/dev/null &
qemu=$!
retry 20 grep -q ":$(stat -c %i "$image") " /proc/locks || die "QEMU took no lock"
status=0
said=$(ploopctl attach "$image" 2>&1) || status=$?
expect_same "$status" 37 'status of attach while QEMU has the image'
[[ $said == *QEMU* || $said == *qemu* ]] || die "the tool says: $said"
said=$(plooptest attach-raw "$image" 2>&1) && die "the module attached an image that QEMU has open"
kill "$qemu"
wait "$qemu" || true
# The mark that QEMU left is repaired.
device=$(attach "$image")
detach "$device"

# lease KIND SECONDS: the image gets a lease, which is given back SECONDS after it was asked for; sets `holder`.
lease() {
    rm -f "$TEST_DIR/held"
    python3 - "$image" "$TEST_DIR/held" "$@" <<'END' &
import fcntl, os, signal, sys, time
path, held, kind, seconds = sys.argv[1:]
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
file = os.open(path, os.O_RDONLY if kind == "F_RDLCK" else os.O_RDWR)
fcntl.fcntl(file, fcntl.F_SETLEASE, getattr(fcntl, kind))
open(held, "w").close()
signal.sigwait({signal.SIGIO})
time.sleep(int(seconds))
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
END
    holder=$!
    retry 20 test -e "$TEST_DIR/held" || die "no lease $1"
}

note 'an image with a lease'
for kind in F_RDLCK F_WRLCK; do
    lease $kind 3
    device=$(attach "$image")
    wait "$holder" || die "the lease $kind was not asked for"
    detach "$device"
done
lease F_WRLCK 3
device=$(attach -r "$image")
wait "$holder" || die 'the lease was not asked for by who only reads'
detach "$device"
# Who does not give it back loses it.
usual=$(</proc/sys/fs/lease-break-time)
echo 5 >/proc/sys/fs/lease-break-time
lease F_WRLCK 600
device=$(attach "$image")
kill -0 "$holder" || die 'the lease was given back'
kill "$holder"
wait "$holder" || true
echo "$usual" >/proc/sys/fs/lease-break-time
detach "$device"
