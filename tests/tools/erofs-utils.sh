#!/bin/sh
# Prints a directory that holds fsck.erofs, dump.erofs and mkfs.erofs of erofs-utils >= 1.8.
#
# The system's own are used if they are new enough (those of Debian 12 are not). Otherwise Debian 13's packages are
# downloaded once, with their libraries and signatures checked by apt, and unpacked below
# ${LAZYRUN_TEST_CACHE:-/var/cache/lazyrun-tests}; nothing is installed. Needs apt and a mirror the first time.
set -eu

cache=${LAZYRUN_TEST_CACHE:-/var/cache/lazyrun-tests}
home=$cache/erofs-utils-trixie
mirror=${LAZYRUN_DEBIAN_MIRROR:-http://deb.debian.org/debian}

new_enough() { # DIR
    [ -x "$1/fsck.erofs" ] && [ -x "$1/dump.erofs" ] || return 1
    v=$("$1/fsck.erofs" --version 2>/dev/null | sed -n 's/^fsck.erofs (erofs-utils) v\{0,1\}\([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
    [ -n "$v" ] || return 1
    [ "${v% *}" -gt 1 ] || [ "${v#* }" -ge 8 ]
}

for dir in /usr/bin /usr/local/bin "$home/bin"; do
    if new_enough "$dir"; then echo "$dir"; exit 0; fi
done

command -v apt-get >/dev/null || {
    echo "erofs-utils.sh: needs erofs-utils >= 1.8, or apt-get to download them" >&2; exit 1; }
mkdir -p "$cache"
# One downloader at a time; who waited finds the work done.
exec 9>"$cache/erofs-utils.lock"
flock 9
if new_enough "$home/bin"; then echo "$home/bin"; exit 0; fi

tmp=$(mktemp -d "$cache/erofs-utils.XXXXXX")
trap 'rm -rf "$tmp"' EXIT INT TERM
mkdir -p "$tmp/state/lists/partial" "$tmp/cache/archives/partial" "$tmp/etc" "$tmp/home/bin" "$tmp/home/root"
: >"$tmp/status"
arch=$(dpkg --print-architecture)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$tmp/etc/sources.list"
apt() {
    apt-get -qq -y -o Dir::Etc::sourcelist="$tmp/etc/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferencesparts=/dev/null -o Dir::State="$tmp/state" -o Dir::State::status="$tmp/status" \
        -o Dir::Cache="$tmp/cache" -o APT::Architecture="$arch" -o APT::Architectures="$arch" \
        -o APT::Sandbox::User=root -o APT::Install-Recommends=false -o Debug::NoLocking=true \
        -o Acquire::Languages=none "$@" >&2
}
apt update
apt --download-only install erofs-utils
for deb in "$tmp"/cache/archives/*.deb; do
    # Only what the programs link to: no maintainer script runs, no shell or tool is needed.
    case ${deb##*/} in erofs-utils_*|lib*|zlib1g*) dpkg-deb -x "$deb" "$tmp/home/root" ;; esac
done
root=$home/root
libs=$(cd "$tmp/home/root" && find . -name 'lib*.so*' -printf '%h\n' | sort -u | sed "s|^\.|$root|" | paste -sd:)
loader=$(cd "$tmp/home/root" && find . -name 'ld-linux*.so*' | head -n 1)
for tool in fsck.erofs dump.erofs mkfs.erofs; do
    printf '#!/bin/sh\nexec "%s" --library-path "%s" "%s" "$@"\n' \
        "$root/${loader#./}" "$libs" "$root/usr/bin/$tool" >"$tmp/home/bin/$tool"
    chmod 755 "$tmp/home/bin/$tool"
done
rm -rf "$home"
mv "$tmp/home" "$home"
new_enough "$home/bin" || { echo "erofs-utils.sh: the downloaded programs do not run" >&2; exit 1; }
echo "$home/bin"
