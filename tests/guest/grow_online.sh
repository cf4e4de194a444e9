#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Growth of a disk in use, step by step, over the sizes at which the index needs more
# clusters and those in its way are moved; alone, over a lower delta, raw, and with a
# mounted file system on a partition, which is then made larger. udev is told. What
# cannot be, or could not be attached again, is refused, and nothing is lost.
# timeout: 240
. "$(dirname "$0")/lib.sh"

need perl
seed=${SEED:-$RANDOM}
note "seed $seed"
scratch_fs xfs

sectors() { blockdev --getsz "$device"; }

refused() {
    local want=$1
    shift
    if timeout "$(limit 60)" "$@" >"$TEST_DIR/why" 2>&1; then die "not refused: $*"; fi
    grep -q "os error $want)" "$TEST_DIR/why" || die "$*: $(<"$TEST_DIR/why"), not $want"
}

# load FROM: in the background.
load() { begin_load --seed "$seed" --discard --seconds 120 "$@" --save "$TEST_DIR/model" --written "$device"; }

end_load() {
    touch "$TEST_DIR/stop"
    wait "$load" || die "$1: the load found something wrong"
}

# no_stray_entries IMAGE: all between the last entry and the first cluster is zero, as others take it
# for entries.
no_stray_entries() {
    perl -e 'open(my $f, "<:raw", $ARGV[0]) or die "$!"; read($f, my $head, 64);
        my ($nr, $first) = unpack("x32 V x12 V", $head);
        seek($f, 64 + 4 * $nr, 0); read($f, my $rest, 512 * $first - 64 - 4 * $nr);
        exit($rest =~ /[^\0]/)' "$1" || die "$1: something follows the last entry"
}

judge() {
    local i
    for ((i = 0; i < ${#images[@]}; i++)); do
        [[ $kind != raw || $i -gt 0 ]] || continue
        no_stray_entries "${images[i]}"
        ploopctl check "${images[i]}" >&2 || die "${images[i]} is damaged"
        cp --reflink=auto "${images[i]}" "$TEST_DIR/copy.hds"
        qemu-img check -f parallels "$TEST_DIR/copy.hds" >&2 || die "qemu-img: ${images[i]} is not clean"
        rm "$TEST_DIR/copy.hds"
    done
}

# try KIND CLUSTER LOG MIB STEP...: KIND one, chain or raw; steps in MiB.
try() {
    kind=$1
    local cluster=$2 log=$3 mib=$4 options=() create=(-b "$2") step
    shift 4
    note "$kind, clusters of $cluster, $mib MiB and $*"
    rm -f "$SCRATCH"/*.img "$TEST_DIR/model"
    images=("$SCRATCH/0.img")
    if [[ $kind == raw ]]; then
        options=(-f raw -b "$cluster") create=(-f raw)
    fi
    ploopctl create -s "${mib}M" "${create[@]}" "$SCRATCH/0.img" >/dev/null
    device=$(attach "${options[@]}" "$SCRATCH/0.img")
    if [[ $kind == chain ]]; then
        load
        sleep 1
        end_load before
        ploopctl create -s "${mib}M" -b "$cluster" "$SCRATCH/1.img" >/dev/null
        plooptest snapshot --cluster-log "$log" "$device" "$SCRATCH/1.img"
        images+=("$SCRATCH/1.img")
        load --from "$TEST_DIR/model"
    else
        load
    fi
    for step in "$@"; do
        sleep 0.4
        mib=$((mib + step))
        timeout "$(limit 60)" plooptest op "$device" grow $((mib << 11)) || die "growth to $mib MiB failed"
        expect_same "$(sectors)" $((mib << 11)) size
    done
    refused 22 plooptest op "$device" grow $(((mib << 11) - 2048))
    if [[ $kind != raw ]]; then refused 22 plooptest op "$device" grow $(((mib << 11) + 8)); fi
    timeout "$(limit 60)" plooptest op "$device" grow $((mib << 11)) || die 'growth by nothing failed'
    end_load growth
    # What is new reads as zeros and can be written.
    plooptest load-verify --written "$device" "$TEST_DIR/model"
    load --from "$TEST_DIR/model"
    sleep 1
    end_load 'on the larger disk'
    plooptest load-verify --written "$device" "$TEST_DIR/model" || die 'the disk is wrong'
    detach "$device"
    judge
    [[ $kind != raw ]] || options=(-f raw)
    device=$(attach "${options[@]}" "${images[@]}")
    expect_same "$(sectors)" $((mib << 11)) 'size after attaching again'
    plooptest load-verify "$device" "$TEST_DIR/model" || die 'the disk is wrong after attaching again'
    detach "$device"
}

# The first cluster of 32K has the entries of 255.5 MiB, each more those of 256.
try one 32K 6 200 55 1 1 500
try chain 32K 6 250 3 10 512
[[ $EFFORT == quick ]] || try one 64K 7 1000 24 100
try raw 64K 7 100 1 30 100

note 'the limit of version 1'
images=("$SCRATCH/v1.img")
ploopctl create -s 64M -b 64K --format-version 1 "${images[0]}" >/dev/null
device=$(attach "${images[0]}")
refused 27 plooptest op "$device" grow $((1 << 33))
refused 22 plooptest op "$device" grow 0
dd if=/dev/urandom of="$device" bs=64k count=4 oflag=direct conv=fsync status=none
timeout "$(limit 60)" plooptest op "$device" grow $((65 << 11))
detach "$device"
kind=one
judge
device=$(attach -r "${images[0]}")
refused 30 plooptest op "$device" grow $((66 << 11))
detach "$device"

note 'over a delta that ends inside a cluster'
ploopctl create -s 1000000000 -b 1M "$SCRATCH/odd.img" >/dev/null
ploopctl create -s 1000000000 -b 1M "$SCRATCH/top.img" >/dev/null
device=$(attach "$SCRATCH/odd.img" "$SCRATCH/top.img")
refused 22 plooptest op "$device" grow $((2 << 21))
detach "$device"
device=$(attach "$SCRATCH/odd.img" "$SCRATCH/top.img")
detach "$device"

note 'copied before anything is written'
ploopctl create -s 200M -b 32K "$SCRATCH/empty.img" >/dev/null
device=$(attach "$SCRATCH/empty.img")
timeout "$(limit 60)" plooptest op "$device" grow $((300 << 11))
timeout "$(limit 60)" plooptest track-copy --quiesce true "$device" "$SCRATCH/empty.img" "$SCRATCH/copy.img"
detach "$device"
device=$(attach "$SCRATCH/copy.img")
expect_same "$(sectors)" $((300 << 11)) 'size of the copy'
cmp -n $((300 << 20)) "$device" /dev/zero >&2 || die 'the copy is wrong'
detach "$device"

note 'alone, ending inside a cluster, with something behind the end of the disk'
rm "$SCRATCH/odd.img"
ploopctl create -s 1000000000 -b 1M "$SCRATCH/odd.img" >/dev/null
device=$(attach "$SCRATCH/odd.img")
size=$(blockdev --getsize64 "$device") within=$((1000000000 % 1048576))
head -c "$within" /dev/urandom >"$TEST_DIR/last"
dd if="$TEST_DIR/last" of="$device" bs=1M seek=$((size >> 20)) oflag=direct conv=fsync status=none
detach "$device"
len=$(stat -c %s "$SCRATCH/odd.img")
perl -e 'print "x" x shift' $((1048576 - within)) |
    dd of="$SCRATCH/odd.img" bs=64K seek=$((len - 1048576 + within)) oflag=seek_bytes conv=notrunc status=none
device=$(attach "$SCRATCH/odd.img")
cmp -n "$within" -i $((size - within)):0 "$device" "$TEST_DIR/last" >&2 || die 'the last cluster is not at the end of the file'
timeout "$(limit 60)" plooptest op "$device" grow $((1 << 21))
cmp -n "$within" -i $((size - within)):0 "$device" "$TEST_DIR/last" >&2 || die 'the last bytes are lost'
cmp -n $(((1 << 30) - size)) -i "$size:0" "$device" /dev/zero >&2 || die 'what was behind the end shows'
detach "$device"
ploopctl check "$SCRATCH/odd.img" >&2

note 'an image whose header says that its data is far away'
ploopctl create -s 64M -b 1M "$SCRATCH/far.img" >/dev/null
# m_FirstBlockOffset: 512 GiB.
perl -e 'print pack("V", 1 << 30)' | dd of="$SCRATCH/far.img" bs=1 seek=48 conv=notrunc status=none
truncate -s $((512 << 30)) "$SCRATCH/far.img"
device=$(attach "$SCRATCH/far.img")
timeout "$(limit 60)" plooptest op "$device" grow $((256 << 11))
dd if=/dev/urandom of="$device" bs=1M count=1 seek=200 oflag=direct conv=fsync status=none
(($(stat -c %b "$SCRATCH/far.img") < 200 << 11)) || die "it takes $(stat -c %b "$SCRATCH/far.img") sectors"
detach "$device"
ploopctl check "$SCRATCH/far.img" >&2
rm "$SCRATCH/far.img"

note 'a raw disk whose file somebody has cut: to make it longer would hide that'
truncate -s 64M "$SCRATCH/raw"
device=$(attach -f raw -b 64K "$SCRATCH/raw")
truncate -s 32M "$SCRATCH/raw"
if timeout "$(limit 60)" plooptest op "$device" grow $((128 << 11)) >"$TEST_DIR/why" 2>&1; then die 'it has grown'; fi
grep -qE 'errno 5$|os error 5\)' "$TEST_DIR/why" || die "growth: $(<"$TEST_DIR/why")"
expect_same "$(stat -c %s "$SCRATCH/raw")" $((32 << 20)) 'length of what was cut'
udevadm settle -t 10 || true
expect_fail ploopctl detach "$device"
rm "$SCRATCH/raw"

note 'a file system on a partition'
ploopctl create -s 250M -b 32K "$SCRATCH/fs.img" >/dev/null
device=$(attach "$SCRATCH/fs.img")
printf ',,L\n' | sfdisk -q --label gpt "$device"
udevadm settle -t 10 || true
retry 10 test -b "${device}p1"
mkfs.ext4 -q -F "${device}p1"
mkdir "$TEST_DIR/fs"
mount "${device}p1" "$TEST_DIR/fs"
head -c 20M /dev/urandom >"$TEST_DIR/fs/a"
udevadm monitor --kernel --subsystem-match=block --property >"$TEST_DIR/events" &
monitor=$!
sleep 1
timeout "$(limit 60)" plooptest op "$device" grow $((700 << 11))
retry 10 grep -q 'RESIZE=1' "$TEST_DIR/events" || die "no event of a size that changed: $(<"$TEST_DIR/events")"
kill "$monitor"
sgdisk -e "$device" >&2 || die 'sgdisk -e fails'
# The partition in use grows with the table.
parted -s ---pretend-input-tty "$device" resizepart 1 Yes 100% >&2 || printf ', +\n' | sfdisk -N 1 --no-reread -f "$device" >&2
partx -u "$device" >&2 || true
udevadm settle -t 10 || true
(($(blockdev --getsz "${device}p1") > 600 << 11)) || die "the partition has $(blockdev --getsz "${device}p1") sectors"
resize2fs "${device}p1" >&2
head -c 40M /dev/zero | tr '\0' x >"$TEST_DIR/fs/b"
sync
sums=$(sha256sum "$TEST_DIR"/fs/[ab])
umount "$TEST_DIR/fs"
e2fsck -fn "${device}p1" >&2 || die 'the file system is damaged'
detach "$device"
device=$(attach "$SCRATCH/fs.img")
udevadm settle -t 10 || true
retry 10 test -b "${device}p1"
mount "${device}p1" "$TEST_DIR/fs"
expect_same "$(sha256sum "$TEST_DIR"/fs/[ab])" "$sums" files
umount "$TEST_DIR/fs"
detach "$device"
ploopctl check "$SCRATCH/fs.img" >&2
