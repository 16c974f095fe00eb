//! The fuzz targets in `fuzz/`, guided by coverage: over what they have found before, and for a
//! while longer. `FUZZ_RUNS` is how many executions that is.

#[allow(dead_code)] // Each user needs a part of it.
#[path = "ours/extent.rs"]
mod extent;
mod shell;

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::{ensure, Context};

use shell::{have_programs, scratch, sh};

/// What `cargo fuzz --sanitizer none` sets; it needs no compiler but the stable one. Overflows and
/// failed debug assertions count, too.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
        -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares \
        --cfg fuzzing -Cdebug-assertions -Coverflow-checks";

#[test]
fn wsl_conf() -> anyhow::Result<()> {
    fuzz("wsl_conf", 20_000)
}

#[test]
fn entry() -> anyhow::Result<()> {
    fuzz("entry", 50_000)
}

#[test]
fn binfmt_d() -> anyhow::Result<()> {
    fuzz("binfmt_d", 50_000)
}

#[test]
fn mounts() -> anyhow::Result<()> {
    fuzz("mounts", 20_000)
}

#[test]
fn every_target_is_run_and_has_a_corpus() -> anyhow::Result<()> {
    let targets = r#"cd "$SOURCE/fuzz"; ls fuzz_targets | sed 's/\.rs$//'"#;
    let targets = sh("names", targets)?;
    assert_eq!(targets, sh("names", r#"ls "$SOURCE/fuzz/corpus""#)?);
    for target in targets.lines() {
        let run = format!("fuzz(\"{target}\", ");
        ensure!(include_str!("fuzz.rs").contains(&run), "{target}");
    }
    Ok(())
}

/// Runs a target. What it finds, and what it fails with, stays below the build directory.
fn fuzz(target: &str, runs: u32) -> anyhow::Result<()> {
    let asked = std::env::var("FUZZ_RUNS").ok();
    let is_wanted = asked.is_some() || extent::has(&format!("THE FUZZ TARGET {target} IS"))?;
    if !is_wanted || !have_programs("g++:g++")? {
        return Ok(());
    }
    let program = build()?.join(target);
    let program = program.display();
    let runs = asked.unwrap_or_else(|| runs.to_string());
    // What an earlier run has found would make this one another.
    let script = format!(
        r#"
        rm -rf found failed-*
        mkdir found
        ../build/programs/{target} found "$SOURCE/fuzz/corpus/{target}" -runs={runs} -seed=1 -max_len=512 \
            -timeout=10 -artifact_prefix="$PWD/failed-" >log 2>&1 || echo failed"#
    );
    let failed = !sh(target, &script)?.is_empty();
    let log = fs::read(scratch(target)?.join("log"))?;
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().collect();
    let (_, end) = lines.split_at(lines.len().saturating_sub(60));
    let again = format!("again with the file that is named above: {program} FILE");
    ensure!(!failed, "{}\n{target} failed; {again}", end.join("\n"));
    // Without counters it would try at random.
    let loaded = |line: &str| line.contains("Loaded ") && line.contains("8-bit counters");
    ensure!(lines.iter().any(|line| loaded(line)), "{log}");
    let done = lines.iter().rfind(|line| line.contains("DONE   cov: "));
    println!("{target}: {}", done.context("no coverage")?);
    Ok(())
}

/// The directory of all targets, built once.
fn build() -> anyhow::Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let build = || -> anyhow::Result<PathBuf> {
        // With --target, the flags are not those of build scripts, too. No other flags come in:
        // this variable is the first that cargo looks at.
        let script = format!(
            r#"
            host=$(rustc -vV | sed -n 's/^host: //p')
            CARGO_ENCODED_RUSTFLAGS=$(echo {FLAGS} | tr ' ' '\037')
            export CARGO_ENCODED_RUSTFLAGS
            "$CARGO" build --quiet --locked --release --manifest-path "$SOURCE/fuzz/Cargo.toml" \
                --target "$host" --target-dir . >&2
            ln -sfn "$host/release" programs"#
        );
        sh("build", &script)?;
        Ok(scratch("build")?.join("programs"))
    };
    let built = BUILT.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    built.clone().map_err(anyhow::Error::msg)
}
