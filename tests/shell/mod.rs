//! Shell scripts in tests, and the programs that they need.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{bail, ensure, Context};

pub const SOURCE: &str = env!("CARGO_MANIFEST_DIR");

/// Both outputs of a script that runs in a directory of that name, and must succeed. The cargo that
/// it finds is the one that runs this test.
pub fn sh(name: &str, script: &str) -> anyhow::Result<String> {
    let cargo = Path::new(env!("CARGO"));
    let mut path = cargo.parent().context("no directory")?.as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut command = Command::new("sh");
    command.args(["-euc", &format!("exec 2>&1; {script}")]);
    command.envs([("SOURCE", SOURCE), ("CARGO", env!("CARGO"))]);
    command.env("PATH", path).env("LC_ALL", "C.UTF-8");
    let command = command.current_dir(scratch(name)?).stdin(Stdio::null());
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{script}\nfailed:\n{text}");
    Ok(text)
}

/// A directory that is kept for the next run.
pub fn scratch(name: &str) -> anyhow::Result<PathBuf> {
    let directory =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(env!("CARGO_CRATE_NAME")).join(name);
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// Whether these are there, each `PROGRAM:PACKAGE`, or `NAME.pc:PACKAGE` for pkg-config. Missing ones are
/// installed from Debian. Where that is not possible, it is a failure in CI, and elsewhere a reason to skip
/// the test.
pub fn have_programs(needed: &str) -> anyhow::Result<bool> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _lock = ONE_AT_A_TIME.lock();
    let missing = format!(
        "for i in {needed}; do
            case $i in
                *.pc:*) pkg-config --exists ${{i%.pc:*}} 2>/dev/null ;;
                *) command -v ${{i%:*}} >/dev/null ;;
            esac || echo ${{i#*:}}
        done"
    );
    let missing = || sh("programs", &missing);
    let packages = missing()?.replace('\n', " ");
    if packages.is_empty() {
        return Ok(true);
    }
    // An update that somebody else has under way is as good as our own.
    let install = format!(
        "export DEBIAN_FRONTEND=noninteractive
        apt-get -q -o DPkg::Lock::Timeout=300 update || true
        apt-get -q -o DPkg::Lock::Timeout=300 install -y --no-install-recommends {packages}"
    );
    let installed = sh("programs", &install);
    let left = missing()?;
    if !left.is_empty() {
        let left = left.trim_end().replace('\n', " ");
        if std::env::var_os("CI").is_some() {
            bail!("packages are missing: {left}: {installed:?}");
        }
        // Not eprintln, which the harness swallows when a test passes; and in one piece, as it prints
        // at the same time.
        let line = format!("\nSKIPPED: packages are missing: {left}\n\n");
        std::io::stderr().write_all(line.as_bytes())?;
        return Ok(false);
    }
    Ok(true)
}
