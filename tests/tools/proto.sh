#!/bin/bash
# proto.sh write: compiles runtime/snapshotter/proto/*.proto anew. proto.sh check: fails when what is kept differs from
# that. Needs no protoc.
set -eu
cd "$(dirname "$0")/../.."
kept=runtime/snapshotter/proto/generated
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/proto \
  cargo run --quiet --locked --manifest-path runtime/snapshotter/proto/generate/Cargo.toml -- "$made"
case ${1:-} in
write) cp "$made"/*.rs $kept/ ;;
check) diff -r $kept "$made" && echo "the generated code is that of the protocol" ;;
*) echo "usage: proto.sh write|check" >&2; exit 2 ;;
esac
