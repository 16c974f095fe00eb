#!/bin/sh
# Usage: cargo-build.sh CARGO PROFILE SOURCE TARGET OUTPUT DEPFILE
# The depfile is cargo's own, since only cargo knows which templates are compiled in.
set -eu
cargo=$1 profile=$2 source=$3 target=$4 output=$5 depfile=$6

# cargo reads that variable, too, and has a directory for each architecture that it names.
built=$target${CARGO_BUILD_TARGET:+/$CARGO_BUILD_TARGET}
case $profile in dev) built=$built/debug ;; *) built=$built/$profile ;; esac
built=$built/wsl-binfmt-generator
# An old one must not pass for what is built now, should cargo put that elsewhere.
rm -f "$built"

# cargo looks for .cargo/config.toml (vendored crates) from the directory that it is called in.
(cd "$source" && "$cargo" build --locked --profile "$profile" --target-dir "$target")

cp "$built" "$output"
# Through a link in the build directory, as ninja understands no quotes in paths.
ln -sfn "$source" "$output.source"
from=$(printf %s "$source/" | sed 's/ /\\ /g')
to=$output.source/
from=$from to=$to output=$output awk '{
    sub(/^.*\/wsl-binfmt-generator: /, "")
    while (at = index($0, ENVIRON["from"]))
        $0 = substr($0, 1, at - 1) ENVIRON["to"] substr($0, at + length(ENVIRON["from"]))
    print ENVIRON["output"] ": " $0
}' "$built.d" >"$depfile"
