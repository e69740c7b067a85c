#!/bin/bash
# deb.sh [PACKAGE]: tries a Debian package (by default the newest in target/debian): what is in it, whether systemd takes
# its units, and that it can be installed, used, upgraded, removed and purged in a fresh Debian. Root, the network once
# (debootstrap; kept in target/debian-root.tar), minutes the first time.
set -euo pipefail
cd "$(dirname "$0")/../.."
fail() { echo "deb.sh: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "root is needed for a chroot"
package=${1:-$(ls -t target/debian/lazyrun_*.deb 2>/dev/null | head -1)}
[ -f "$package" ] || fail "there is no package; run make deb"
work=$(mktemp -d)
chroot=$work/debian
trap 'umount -q "$chroot/proc" 2>/dev/null || true; rm -rf "$work"' EXIT

echo "== what is in $package"
dpkg-deb -c "$package" >"$work/list"
for path in usr/bin/lazyrun usr/sbin/mount.fuse.lazyrun usr/lib/systemd/system/lazyrun-snapshotter.service \
  usr/lib/systemd/system/lazyrun-snapshotter.socket etc/default/lazyrun usr/share/man/man1/lazyrun.1.gz \
  usr/share/man/man1/lazyrun-snapshotter.1.gz usr/share/man/man1/lazyrun-config-check.1.gz \
  usr/share/bash-completion/completions/lazyrun usr/share/zsh/vendor-completions/_lazyrun \
  usr/share/fish/vendor_completions.d/lazyrun.fish usr/share/doc/lazyrun/copyright; do
  grep -Eq " \./$path( |$)" "$work/list" || fail "$path is not in it"
done
grep -q 'usr/sbin/mount.fuse.lazyrun -> ../bin/lazyrun' "$work/list" || fail "mount.fuse.lazyrun is no link"
awk '$2 != "root/root" && $2 != "0/0" { print; bad = 1 } END { exit bad }' "$work/list" || fail "not all of it is root's"
dpkg-deb -f "$package" | grep -q '^Depends:.*libc6' || fail "it does not depend on the C library"
dpkg-deb -f "$package" | grep -q '^Recommends:.*nftables' || fail "it does not recommend nftables"
dpkg-deb -I "$package" conffiles | grep -qx /etc/default/lazyrun || fail "/etc/default/lazyrun is no conffile"

echo "== units"
dpkg-deb -x "$package" "$work/files"
# systemd looks whether the program of the unit is there.
if command -v systemd-analyze >/dev/null; then
  units=$work/files/usr/lib/systemd/system
  for name in service socket; do
    # The program and the page are where the package would put them.
    sed "s,/usr/bin/lazyrun,$work/files&,; s,man:[^ ]* *,," "$units/lazyrun-snapshotter.$name" >"$work/lazyrun-snapshotter.$name"
  done
  said=$(systemd-analyze verify "$work"/lazyrun-snapshotter.{service,socket} 2>&1 | grep lazyrun || true)
  [ -z "$said" ] || fail "systemd does not like the units: $said"
fi

echo "== a fresh Debian"
if [ ! -f target/debian-root.tar ]; then
  debootstrap --variant=minbase --include=man-db,bash-completion,mount bookworm "$chroot" >"$work/debootstrap.log" ||
    { tail "$work/debootstrap.log" >&2; fail "debootstrap failed"; }
  tar -C "$chroot" -cf target/debian-root.tar.part . && mv target/debian-root.tar.part target/debian-root.tar
else
  mkdir "$chroot" && tar -C "$chroot" -xf target/debian-root.tar
fi
mount -t proc proc "$chroot/proc"
cp "$package" "$chroot/tmp/lazyrun.deb"
in_it() { chroot "$chroot" "$@"; }
in_it dpkg -i /tmp/lazyrun.deb >"$work/dpkg.log" 2>&1 || { cat "$work/dpkg.log" >&2; fail "it can't be installed"; }
in_it lazyrun version
in_it man -w lazyrun lazyrun-config-check >/dev/null || fail "there are no manual pages"
in_it lazyrun completion bash | cmp - "$chroot/usr/share/bash-completion/completions/lazyrun" ||
  fail "the completions are not those of the program"
in_it bash -c 'source /usr/share/bash-completion/bash_completion && _completion_loader lazyrun; complete -p lazyrun' >/dev/null ||
  fail "bash completes nothing"
in_it mount.fuse.lazyrun --help | grep -q lowerdir || fail "mount.fuse.lazyrun is no helper of mount"
# Nobody has configured containerd there: the check says so and exits with 1.
code=0
in_it lazyrun config check --format json >"$work/check" || code=$?
[ $code = 1 ] && grep -q '/etc/containerd/config.toml does not exist' "$work/check" || fail "config check: $(cat "$work/check")"
# An upgrade keeps what the administrator has written.
echo 'LAZYRUN_OPTIONS="--cache-limit 80%"' >"$chroot/etc/default/lazyrun"
in_it dpkg -i /tmp/lazyrun.deb >"$work/dpkg.log" 2>&1 || { cat "$work/dpkg.log" >&2; fail "it can't be upgraded"; }
grep -q 80% "$chroot/etc/default/lazyrun" || fail "an upgrade overwrites /etc/default/lazyrun"
in_it dpkg -r lazyrun >/dev/null 2>&1 || fail "it can't be removed"
[ -e "$chroot/etc/default/lazyrun" ] && [ ! -e "$chroot/usr/bin/lazyrun" ] || fail "it is not removed as packages are"
in_it dpkg -P lazyrun >/dev/null 2>&1 || fail "it can't be purged"
left=$(find "$chroot" -xdev -name '*lazyrun*' -not -path '*/tmp/*' -not -path '*/proc/*' -not -path '*/var/log/*')
[ -z "$left" ] || fail "left behind: $left"
echo "the package is good"
