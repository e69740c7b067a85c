#!/bin/sh
# containerd.sh SUITE: prints a directory that holds containerd, its shim, ctr and Docker from a suite of Debian: containerd
# 1.7 from trixie, 2.x from sid.
#
# They are downloaded once, with signatures checked by apt, and unpacked below
# ${LAZYRUN_TEST_CACHE:-/var/cache/lazyrun-tests}; nothing is installed. They want no more of the system than glibc 2.34.
set -eu

suite=${1:?usage: containerd.sh SUITE}
cache=${LAZYRUN_TEST_CACHE:-/var/cache/lazyrun-tests}
home=$cache/containerd-$suite
mirror=${LAZYRUN_DEBIAN_MIRROR:-http://deb.debian.org/debian}

if [ -x "$home/usr/bin/dockerd" ]; then echo "$home/usr/bin"; exit 0; fi

command -v apt-get >/dev/null || { echo "containerd.sh: needs apt-get to download Debian's packages" >&2; exit 1; }
mkdir -p "$cache"
# One downloader at a time; who waited finds the work done.
exec 9>"$cache/containerd-$suite.lock"
flock 9
if [ -x "$home/usr/bin/dockerd" ]; then echo "$home/usr/bin"; exit 0; fi

tmp=$(mktemp -d "$cache/containerd.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
mkdir -p "$tmp/state/lists/partial" "$tmp/cache/archives/partial" "$tmp/root"
: >"$tmp/status"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$tmp/sources.list"
apt() {
    # A mirror of sid that stands still is good enough for a test.
    apt-get -qq -y -o Dir::Etc::sourcelist="$tmp/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferencesparts=/dev/null -o Dir::State="$tmp/state" -o Dir::State::status="$tmp/status" \
        -o Dir::Cache="$tmp/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none \
        -o Acquire::Check-Valid-Until=false "$@" >&2
}
apt update
(cd "$tmp" && apt download containerd docker.io docker-cli)
for package in "$tmp"/*.deb; do dpkg-deb -x "$package" "$tmp/root"; done
mv "$tmp/root/usr/sbin/dockerd" "$tmp/root/usr/bin/"
"$tmp/root/usr/bin/containerd" --version >&2
rm -rf "$home"
mv "$tmp/root" "$home"
echo "$home/usr/bin"
