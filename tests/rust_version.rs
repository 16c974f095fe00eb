//! The `rust-version` of Cargo.toml is the Rust of Debian 13, and there the project builds, from
//! vendored crates and without a network, as distributions build it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{ensure, Context};
use wsl_vm::{project, require, succeed, target_directory, tree, Machine};

#[test]
fn the_oldest_supported_rust_builds_it_from_vendored_crates() -> anyhow::Result<()> {
    if let Some(lack) = Machine::lacks() {
        eprintln!("\nTHE OLDEST SUPPORTED RUST IS NOT TESTED: {lack}\n");
        ensure!(std::env::var_os("CI").is_none(), "{lack}");
        return Ok(());
    }
    require("mmdebstrap", "mmdebstrap")?;
    let trees = target_directory()?.join("wsl-vm/rust");
    let tree = tree(&trees, "trixie", "cargo,rustc")?;

    let inside = tree.join("project");
    if inside.exists() {
        fs::remove_dir_all(&inside)?;
    }
    fs::create_dir_all(inside.join(".cargo"))?;
    for entry in fs::read_dir(project())? {
        let name = entry?.file_name();
        if name != "target" && name != ".git" {
            copy(&project().join(&name), &inside.join(&name))?;
        }
    }
    let vendored = Command::new(env!("CARGO"))
        .args(["vendor", "--locked", "vendor"])
        .current_dir(&inside)
        .output()?;
    ensure!(vendored.status.success(), "{vendored:?}");
    fs::write(inside.join(".cargo/config.toml"), vendored.stdout)?;

    let manifest = fs::read_to_string(project().join("Cargo.toml"))?;
    let claimed = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = "))
        .context("Cargo.toml has no rust-version")?
        .trim_matches('"');
    let version = in_tree(&tree, "rustc --version")?;
    ensure!(
        version.starts_with(&format!("rustc {claimed}.")),
        "{version}"
    );
    let build =
        "cargo build --release --frozen --quiet && target/release/wsl-binfmt-generator --version";
    let version = in_tree(&tree, build)?;
    let expected = concat!("wsl-binfmt-generator ", env!("CARGO_PKG_VERSION"));
    ensure!(version.trim() == expected, "{version}");
    Ok(())
}

/// What a shell command in the tree prints. No network, no home of this machine.
fn in_tree(tree: &Path, command: &str) -> anyhow::Result<String> {
    let output = Command::new("unshare")
        .args(["--net", "chroot"])
        .arg(tree)
        .args(["sh", "-c", &format!("cd /project && {command}")])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .output()?;
    ensure!(output.status.success(), "{command}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    succeed(Command::new("cp").arg("-r").arg(from).arg(to))
}
