#!/bin/bash
# deps.sh [run|test|all]: installs what is missing to run lazyrun (run), to test it (test), or to measure it as well
# (all, the default). With apt on Debian and Ubuntu as root; elsewhere it says exactly what to install and fails.
set -eu

set_wanted=${1:-all}
# command:package; a command may also be in a sbin directory that is not on a user's PATH.
run="nft:nftables ip:iproute2 python3:python3 gcc:gcc make:make"
test="$run containerd:containerd ctr:containerd runc:runc docker-registry:docker-registry skopeo:skopeo curl:curl fusermount3:fuse3 go:golang-go"
all="$test debootstrap:debootstrap mkfs.ext4:e2fsprogs losetup:mount fuse-overlayfs:fuse-overlayfs git:git"
case $set_wanted in
run) wanted=$run ;;
test) wanted=$test ;;
all) wanted=$all ;;
*) echo "usage: deps.sh [run|test|all]" >&2; exit 2 ;;
esac

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
missing=
for pair in $wanted; do
  command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
# Two packages own /bin/busybox; only the static one runs inside an otherwise empty image.
if [ "$set_wanted" != run ] && { [ ! -x /bin/busybox ] || ldd /bin/busybox >/dev/null 2>&1; }; then
  missing="$missing busybox-static"
fi
# containerd's own suite of tests for snapshotters, and its client.
if [ "$set_wanted" != run ] && [ ! -d /usr/share/gocode/src/github.com/containerd/containerd ]; then
  missing="$missing golang-github-containerd-containerd-dev"
fi
[ -e /etc/ssl/certs/ca-certificates.crt ] || [ -e /etc/pki/tls/certs/ca-bundle.crt ] || missing="$missing ca-certificates"
if ! command -v cargo >/dev/null && [ ! -x "$HOME/.cargo/bin/cargo" ]; then
  echo "missing: a Rust toolchain (cargo); see https://rustup.rs" >&2
  exit 3
fi
[ -n "$missing" ] || exit 0

if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  export DEBIAN_FRONTEND=noninteractive
  echo "installing:$missing" >&2
  # Services that a package would start are not wanted: the tests start their own.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
    trap 'rm -f $policy' EXIT
  fi
  # shellcheck disable=SC2086
  apt-get install -y -qq --no-install-recommends $missing >/dev/null 2>&1 </dev/null ||
    { apt-get update -qq </dev/null && apt-get install -y -qq --no-install-recommends $missing </dev/null >/dev/null; }
else
  echo "missing, by the names of Debian's packages:$missing" >&2
  echo "install them, as root on Debian or Ubuntu: apt-get install --no-install-recommends$missing" >&2
  exit 3
fi
