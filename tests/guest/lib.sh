# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# What guest tests share. A test is a bash script tests/guest/NAME.sh:
#
#   #!/usr/bin/env bash
#   # SPDX-License-Identifier: GPL-2.0
#   # One or more lines: the story, what must hold and why.
#   # timeout: SECONDS            (default 120; sized for an emulated machine)
#   # allow-log: REGEX            (kernel lines this test is known to cause)
#   # module: ARGUMENTS           (parameters for insmod; `none`: the test loads it)
#   # mutant: NAME                (needs ploop-mutant-NAME.ko, in $BIN)
#   # cpus: N                     (processors of the guest; default 2)
#   # memory: MIB                 (of the guest, where the usual is 2048)
#   # boot: WORDS                 (on its kernel's command line; an unknown one does no harm)
#   # debug: soak                 (on the debug kernel it does all, as in `make soak`)
#   # kills: QUICK SOAK           (so often the guest is killed after this printed "kill: now")
#   . "$(dirname "$0")/lib.sh"
#
# It runs alone on a freshly loaded module, in the empty directory $TEST_DIR, and
# passes only if it exits 0, the kernel log stays clean, nothing is left attached
# and the module unloads. On failure $TEST_DIR and $SCRATCH are kept, so images
# belong there. tests/guest/run is the other half.

# -E: the trap below holds in functions too.
set -Eeuo pipefail

# shellcheck disable=SC2034 # for the tests
BIN=/payload/bin                # ploopctl and plooptest are also in PATH
SCRATCH=/mnt/scratch            # where scratch_fs mounts
: "${TEST_DIR:=/tmp}" "${TEST_REASON:=/dev/null}" "${EFFORT:=quick}" "${TIME_FACTOR:=1}"

trap 'status=$?; [[ $BASHPID != "$$" ]] || echo "${BASH_SOURCE[0]##*/}:$LINENO: status $status from: $BASH_COMMAND" | tee "$TEST_REASON" >&2' ERR

# share QUICK SOAK: how much of it `make test` does, and `make soak`.
share() { if [[ $EFFORT == soak ]]; then echo "$2"; else echo "$1"; fi; }

# limit SECONDS: so many, on a machine as slow as was said.
limit() { echo $(($1 * TIME_FACTOR)); }

# --- ending -------------------------------------------------------------------

# die REASON: this test failed.
die() {
    echo "$*" >"$TEST_REASON"
    echo "FAILED: $* (line ${BASH_LINENO[0]})" >&2
    # Also from within $(...): end the script, not the subshell alone.
    [[ $BASHPID == "$$" ]] || kill -TERM "$$"
    exit 1
}

# skip REASON: this test cannot be run here.
skip() {
    echo "$*" >"$TEST_REASON"
    echo "SKIPPED: $*" >&2
    exit 77
}

# pass: done; optional, reaching the end is enough.
pass() { exit 0; }

# note TEXT: a line in the test's output, with the time.
note() { printf '%8.2f  %s\n' "$(cut -d' ' -f1 /proc/uptime)" "$*" >&2; }

# need COMMAND...: what qemu/rootfs has for this test.
need() {
    local command
    for command in "$@"; do
        command -v "$command" >/dev/null || die "no $command in the guest: qemu/rootfs says what it has"
    done
}

# --- expecting ----------------------------------------------------------------

# expect_fail CMD...: CMD must fail with a status of its own (not a signal, nor the end of its time).
expect_fail() {
    local status=0
    "$@" || status=$?
    ((status != 0)) || die "succeeded, but must not: $*"
    ((status != 124)) || die "no end in time: $*"
    ((status < 128)) || die "ended by signal $((status - 128)): $*"
}

# expect_same A B [WHAT]: two strings are equal.
expect_same() {
    [[ $1 == "$2" ]] || die "${3:-values} differ: '$1' and '$2'"
}

# expect_same_bytes A B: two files, devices or whatever cmp reads.
expect_same_bytes() {
    cmp -- "$1" "$2" >&2 || die "$1 and $2 differ"
}

# expect_log REGEX: the kernel said so since the test began.
expect_log() {
    test_log | grep -E -- "$1" >/dev/null || die "the kernel log lacks '$1'"
}

# The kernel log since the test began.
test_log() { dmesg | awk -v mark="ploop-test: begin $TEST_NAME" 'index($0, mark) { text = ""; next } { text = text $0 "\n" } END { printf "%s", text }'; }

# retry SECONDS CMD...: until it succeeds, for longer on a slow machine; status 1 when it never does.
retry() {
    local end=$((SECONDS + $1 * TIME_FACTOR))
    shift
    until "$@"; do
        ((SECONDS < end)) || { echo "still failing: $*" >&2; return 1; }
        sleep 0.2
    done
}

# listen: writes the uevents of block devices to $TEST_DIR/events, from now on.
listen() {
    udevadm monitor --kernel --subsystem-match=block --property >"$TEST_DIR/events" &
    listener=$!
    sleep 1
}

# expect_event VARIABLE...: one was sent with all of them since `listen`.
expect_event() {
    retry 10 awk -v want="$*" 'BEGIN { RS = ""; n = split(want, words, " ") }
        { has = 0; for (i = 1; i <= n; i++) has += index("\n" $0 "\n", "\n" words[i] "\n") > 0 }
        has == n { found = 1 } END { exit !found }' "$TEST_DIR/events" ||
        die "no event with $*: $(<"$TEST_DIR/events")"
}

# stop_listening: ends what `listen` began.
stop_listening() {
    kill "$listener"
    wait "$listener" || true
}

# --- disks and file systems ---------------------------------------------------

# scratch_disk [N]: the path of scratch disk N (0, 1 or 2), 4 GiB, contents
# unknown.
scratch_disk() {
    local dir
    for dir in /sys/block/vd*; do
        if [[ $(<"$dir/serial") == "scratch${1:-0}" ]]; then
            echo "/dev/${dir##*/}"
            return
        fi
    done
    die "no scratch disk ${1:-0}"
}

# scratch_fs ext4|xfs|btrfs|tmpfs [N] [MOUNT_OPTIONS]: an empty file system of
# that kind on scratch disk N, mounted at $SCRATCH (N > 0: at $SCRATCH-N).
scratch_fs() {
    local kind=$1 nr=${2:-0} options=${3:-} disk where=$SCRATCH
    ((nr == 0)) || where=$SCRATCH-$nr
    mkdir -p "$where"
    if [[ $kind == tmpfs ]]; then
        mount -t tmpfs -o "size=1G${options:+,$options}" tmpfs "$where"
        return
    fi
    disk=$(scratch_disk "$nr")
    blkdiscard -f "$disk" 2>/dev/null
    case $kind in
        ext4) mkfs.ext4 -q -F -E lazy_itable_init=1,nodiscard "$disk" ;;
        xfs) mkfs.xfs -q -f -K "$disk" ;;
        btrfs) mkfs.btrfs -q -f -K "$disk" >/dev/null ;;
        *) die "scratch_fs: unknown file system '$kind'" ;;
    esac
    mount -t "$kind" ${options:+-o "$options"} "$disk" "$where"
}

# ram_disk MIB: a new RAM disk; prints its path. The runner removes it.
ram_disk() {
    modprobe brd rd_nr=1 rd_size=$(($1 * 1024))
    echo /dev/ram0
}

# below TABLE: what the dm device `below`, under a file system, is made of from here on.
below() {
    dmsetup suspend --nolockfs below
    dmsetup load below --table "$1"
    dmsetup resume below
}

# drop_caches: forget clean pages, so that reads reach the device.
drop_caches() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# left_frozen TARGET DIR: a copy leaves the file system mounted at DIR frozen, until it is thawed.
left_frozen() {
    local copy=$TEST_DIR/left_frozen writer
    ploopctl copy send --keep-frozen --to "$copy" "$1" 2>/dev/null
    touch "$2/frozen" &
    writer=$!
    sleep 1
    kill -0 "$writer" || die "the file system at $2 is not left frozen"
    ploopctl copy thaw "$1"
    timeout "$(limit 20)" tail --pid "$writer" -f /dev/null || die "the file system at $2 is not thawed"
    wait "$writer"
    rm -rf "$copy"
}

# trace_fs: sets `trace`, where the kernel's tracepoints are.
trace_fs() {
    trace=/sys/kernel/tracing
    mountpoint -q "$trace" || mount -t tracefs tracefs "$trace"
}

# --- ploop --------------------------------------------------------------------

# attach ARGUMENTS...: ploopctl attach; prints the device's path.
attach() {
    local device
    device=$(ploopctl attach "$@") || die "ploopctl attach $* failed"
    device=$(grep -oE '/dev/ploop[0-9]+' <<<"$device" | head -n 1)
    [[ -b $device ]] || die "ploopctl attach $* named no block device"
    echo "$device"
}

# call NUMBER [TEMPLATE VALUE...]: an ioctl of $device, whose argument perl packs so; a value @FILE is
# the descriptor of that file, open for writing too. Prints the errno, 0 for none.
call() {
    perl -e 'my ($dev, $nr, $template, @values) = @ARGV;
        my @files;
        for (@values) { if (s/^@//) { open(my $file, "+<", $_) or die "$_: $!"; push @files, $file; $_ = fileno $file } }
        open(my $f, "<", $dev) or die "$dev: $!";
        print ioctl($f, hex $nr, defined $template ? pack($template, @values) : 0) ? 0 : $! + 0' "$device" "$@"
}

# in_flight DEVICE: whether a request to it is on its way.
in_flight() {
    local reads writes
    read -r reads writes <"/sys/block/${1##*/}/inflight"
    ((reads + writes > 0))
}

# waits_in_ioctl PID: it does, or the program that it runs.
waits_in_ioctl() {
    local program
    grep -qs '^16 ' "/proc/$1/syscall" || { program=$(pgrep -P "$1") && grep -qs '^16 ' "/proc/$program/syscall"; }
}

load_has_begun() { [[ -e $TEST_DIR/begun ]] || ! kill -0 "$load" 2>/dev/null; }

# begin_load OPTIONS... DEVICE: `plooptest load` in the background, which is process $load, until $TEST_DIR/stop
# is there. When this returns some of it is done, so what follows is done under load.
begin_load() {
    rm -f "$TEST_DIR/stop" "$TEST_DIR/begun"
    plooptest load --stop "$TEST_DIR/stop" --begun "$TEST_DIR/begun" "$@" >&2 &
    # shellcheck disable=SC2034 # for the tests
    load=$!
    retry 30 load_has_begun || die 'the load does not begin'
    [[ -e $TEST_DIR/begun ]] || die 'the load has ended at once'
}

# points: how many checkpoints $device has.
points() { plooptest checkpoint list "$device" | wc -l; }

# copy_extents FROM TO: of what `plooptest checkpoint read` prints, which is read here.
copy_extents() {
    local start len
    while read -r start len; do
        dd if="$1" of="$2" bs=64k iflag=skip_bytes,count_bytes oflag=seek_bytes skip="$start" seek="$start" count="$len" conv=notrunc status=none
    done
}

# space_is ok|low|full: how it is about space for the image of $device.
space_is() { [[ $(<"/sys/block/${device##*/}/pstate/space") == "$1" ]]; }

# nr_levels DEVICE: how many images it consists of; 0 if it is gone.
nr_levels() {
    local all=("/sys/block/${1##*/}/pdelta/"[0-9]*)
    if [[ -e ${all[0]} ]]; then echo "${#all[@]}"; else echo 0; fi
}

# images_of DEVICE: their paths, the base first.
images_of() {
    local i
    for ((i = 0; ; i++)); do cat "/sys/block/${1##*/}/pdelta/$i/image" 2>/dev/null || break; done
}

# detach DEVICE...: udev may have it open for a moment, so be patient.
detach() {
    local device
    udevadm settle -t 10 || true
    for device in "$@"; do
        retry 20 ploopctl detach "$device" || die "cannot detach $device"
    done
}
