# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Common to all host scripts: where things are, how to speak, how to cache.
# Sourced; never run. Owns the variables top, out, cache.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
out=$top/.build
# ~ works without HOME, too.
cache=${PLOOP_CACHE:-${XDG_CACHE_HOME:-~/.cache}/ploop}
# shellcheck disable=SC2034 # for those who source this
logs=$out/logs
# Of the make that called; not meant for the makes we call.
unset MAKEFLAGS MFLAGS MAKELEVEL

# --- speaking ---------------------------------------------------------------

# say AREA TEXT: one line for the person who waits.
say() { printf '[%s] %s\n' "$1" "${*:2}" >&2; }

# die AREA TEXT: the same, and the end.
die() { say "$@"; exit 1; }

# quietly AREA LOG CMD...: run CMD with its output in LOG; on failure show the
# end of the log and its path.
quietly() {
    local area=$1 log=$2 status=0
    shift 2
    mkdir -p "$(dirname "$log")"
    "$@" >"$log" 2>&1 </dev/null || status=$?
    if ((status != 0)); then
        tail -n 25 "$log" | sed 's/^/    /' >&2
        say "$area" "failed (status $status): $1; the whole log is $log"
    fi
    return "$status"
}

# report ok|FAIL NAME [REASON]: one check of $area, for who waits and for the tally; sets `failed`.
report() {
    # shellcheck disable=SC2154 # area: whose checks they are, of who sources this
    printf '%-4s  %s/%s%s\n' "$1" "$area" "$2" "${3:+: $3}"
    printf '%s %s/%s %s\n' "$1" "$area" "$2" "${3-}" >>"${PLOOP_TALLY:-/dev/null}"
    # shellcheck disable=SC2034 # read there
    [[ $1 == ok ]] || failed=1
}

# --- privilege --------------------------------------------------------------

as_root() {
    if (($(id -u) == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die host "needs root for '$1': run as root or install sudo"
    fi
}

# one_at_a_time NAME: wait until no other shell holds NAME in this tree, and hold
# it until this shell ends.
one_at_a_time() {
    mkdir -p "$out"
    local fd
    exec {fd}>"$out/$1.lock"
    flock -n "$fd" || { say "$1" "waiting for another one in this tree"; flock "$fd"; }
}

# --- caching ----------------------------------------------------------------

# key_of FILE|TEXT...: a short name for "made from exactly these".
key_of() {
    local part
    for part in "$@"; do
        if [[ -f $part ]]; then cat -- "$part"; else printf '%s\n' "$part"; fi
    done | sha256sum | cut -c1-12
}

# cached NAME KEY CMD...: the directory $cache/NAME-KEY, made by `CMD... DIR`
# if missing. CMD fills a temporary directory that is renamed when complete, so
# a half-made one is never trusted; a lock keeps two makes apart. Directories of
# the same NAME with another key may be another checkout's: they are removed when
# nobody used them for 14 days. Sets `item`.
cached() {
    local name=$1 key=$2 lock old
    shift 2
    item=$cache/$name-$key
    if [[ -d $item ]]; then
        touch "$item" 2>/dev/null || true
        return 0
    fi
    mkdir -p "$cache"
    exec {lock}>"$cache/$name.lock"
    flock "$lock"
    if [[ ! -d $item ]]; then
        as_root rm -rf "$cache/$name.new"
        mkdir "$cache/$name.new"
        "$@" "$cache/$name.new"
        mv -T "$cache/$name.new" "$item"
        touch "$item"
        for old in "$cache/$name"-????????????; do
            [[ ! -d $old || -n $(find "$old" -maxdepth 0 -mtime -14) ]] || as_root rm -rf "$old"
        done
    fi
    exec {lock}>&-
}

# --- the build root ---------------------------------------------------------

in_root() { "$top/qemu/in-root" "$@"; }

# update_lists: ask the archive what it has, once per shell. Apt does not wait for another of its kind.
update_lists() {
    [[ -z ${updated-} ]] || return 0
    updated=1
    say kernel "asking the archive which kernels it has"
    mkdir -p "$cache"
    quietly kernel "$logs/apt-update.log" flock "$cache/apt.lock" "$top/qemu/in-root" --root apt-get update ||
        die kernel "cannot reach the archive"
}

# left_archive AREA ABI: something of that kernel could not be had. Say so if it cannot be had any more.
left_archive() {
    (update_lists) || return 0
    in_root "$top/qemu/kernel" --is-complete "$2" ||
        say "$1" "the archive no longer holds all of the kernel $2: KERNEL=newest takes a newer one"
}

# enter_root "$0" "$@": run the calling script again inside the build root,
# unless it is there already.
enter_root() {
    [[ -n ${PLOOP_INSIDE-} ]] || exec "$top/qemu/in-root" "$@"
}
