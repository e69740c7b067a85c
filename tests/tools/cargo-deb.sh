#!/bin/bash
# cargo-deb.sh ARGS: runs cargo-deb, from the path or from target/tools, where it is built (minutes) when there is none.
set -eu
cd "$(dirname "$0")/../.."
if ! command -v cargo-deb >/dev/null; then
  tools=$PWD/target/tools
  PATH=$tools/bin:$PATH
  if [ ! -x "$tools/bin/cargo-deb" ]; then
    echo "building cargo-deb, which takes minutes" >&2
    CARGO_TARGET_DIR=$tools/build cargo install --quiet --locked --root "$tools" cargo-deb@3.8.0 </dev/null
  fi
fi
exec cargo deb "$@"
