#!/bin/sh
# Usage: cargo-build.sh CARGO PROFILE SOURCE TARGET OUTPUT DEPFILE
# The depfile is cargo's own, since only cargo knows which templates are compiled in.
set -eu
cargo=$1 profile=$2 source=$3 target=$4 output=$5 depfile=$6

# cargo looks for .cargo/config.toml (vendored crates) from the directory that it is called in.
(cd "$source" && "$cargo" build --locked --profile "$profile" --target-dir "$target")

[ "$profile" != dev ] || profile=debug
cp "$target/$profile/wsl-binfmt-generator" "$output"
sed "s|^.*/wsl-binfmt-generator: |$output: |" "$target/$profile/wsl-binfmt-generator.d" >"$depfile"
