#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# The sysfs files that libploop and people read say what is true, and so does what
# ploopctl stat makes of them.
. "$(dirname "$0")/lib.sh"

scratch_fs ext4
image=$SCRATCH/disk.img
ploopctl create -s 64M -b 64K --format-version 1 "$image" >/dev/null
device=$(attach --cookie 'a name' "$image")
dir=/sys/block/${device##*/}

is() { expect_same "$(<"$dir/$1")" "$2" "$1"; }
is pstate/running 1
is pstate/top 0
is pstate/block_size 128
is pstate/fmt_version 1
is pstate/cookie 'a name'
is pdelta/0/level 0
is pdelta/0/image "$image"
is pdelta/0/format ploop1
is pdelta/0/ro 0
is pdelta/0/transparent 0
[[ $(<"$dir/pdelta/0/io") =~ ^(direct|kaio)$ ]] || die "pdelta/0/io is $(<"$dir/pdelta/0/io")"
number=$(stat -c %d "$image")
is pdelta/0/image_info "ino:$(stat -c %i "$image")
sdev:$((number >> 8)):$((number & 255))"
expect_same "$(<"$dir/size")" $((64 << 11)) size

note 'who waits for an event keeps no image'
expect_same "$(stat -c %a "$dir/pstate/event")" 400 'mode of event'
cat "$dir/pstate/event" >"$TEST_DIR/event" &
reader=$!
# It has the file open and sleeps.
waits_for_event() { [[ $(readlink "/proc/$reader/fd"/*) == */pstate/event* && $(cut -d' ' -f3 "/proc/$reader/stat") == S ]]; }
retry 10 waits_for_event || die 'nobody waits for an event'
ploopctl create -s 64M -b 64K --format-version 1 "$SCRATCH/other.img" >/dev/null
plooptest snapshot --cluster-log 7 "$device" "$SCRATCH/other.img"
plooptest op "$device" merge top
kill -0 "$reader" || die "it did not wait: $(<"$TEST_DIR/event")"
detach "$(attach "$SCRATCH/other.img")"
kill "$reader"
wait "$reader" || true
rm "$TEST_DIR/event" "$SCRATCH/other.img"

note 'what was done is counted'
before=$(ploopctl stat --json "$device")
dd if=/dev/urandom of="$device" bs=64k count=16 oflag=direct conv=fsync status=none
dd if="$device" of=/dev/null bs=4k count=8 iflag=direct status=none
blkdiscard -o 0 -l 131072 "$device"
after=$(ploopctl stat --json)
more() { jq -n --argjson a "$before" --argjson b "$after" "\$b.devices[0].counters.$1 - \$a.devices[0].counters.$1"; }
for want in write_bytes:1048576 discards:1 discard_bytes:131072 allocated_clusters:16 discarded_clusters:2 io_errors:0; do
    expect_same "$(more "${want%:*}")" "${want#*:}" "${want%:*} more"
done
# udev may have read, too, and a flush counts as a write of nothing.
(($(more reads) >= 8 && $(more writes) >= 16 && $(more read_bytes) >= 32768 && $(more flushes) >= 1 && $(more commits) >= 1)) || die "$after"
jq -e '.devices[0].image_file | .file_size > 0 and .allocated_size > 0 and .host_free > 0' <<<"$after" >/dev/null || die "$after"
ploopctl stat | grep -q "^${device##*/} .* running$" || die 'stat does not show the device'

note 'as metrics, which replace a file at once'
echo old >"$TEST_DIR/ploop.prom"
ploopctl stat --prometheus --output "$TEST_DIR/ploop.prom"
grep -q "^ploop_writes_completed_total{device=\"${device##*/}\"} [1-9]" "$TEST_DIR/ploop.prom" || die "$(<"$TEST_DIR/ploop.prom")"
grep -q "^ploop_device_info{device=\"${device##*/}\",cookie=\"a name\",format=\"ploop1\"" "$TEST_DIR/ploop.prom" || die 'no info'
grep -q old "$TEST_DIR/ploop.prom" && die 'the file was added to'
expect_same "$(ls "$TEST_DIR")" ploop.prom 'what is left'
expect_fail ploopctl stat --prometheus --output "$TEST_DIR/missing/ploop.prom"

note 'watched, until a signal ends it'
ploopctl stat --watch 1 "$device" >"$TEST_DIR/watched" &
watcher=$!
retry 20 grep -q "^${device##*/} " "$TEST_DIR/watched"
kill -INT "$watcher"
wait "$watcher" || die "ended by a signal, stat --watch says $?"
head -n 1 "$TEST_DIR/watched" | grep -q '^DEVICE .*r/s.* STATE$' || die "$(<"$TEST_DIR/watched")"
# All that it watches is gone.
ploopctl stat --watch 1 "$device" >/dev/null 2>&1 &
watcher=$!
sleep 2
detach "$device"
status=0
wait "$watcher" || status=$?
expect_same "$status" 40 'status of stat --watch of no device'
expect_fail ploopctl stat "$device"
ploopctl stat >&2
[[ ! -e $dir ]] || die "$dir outlived the device"
