//! What comes from Debian: packages for this machine, and trees, made once with mmdebstrap and
//! kept. Distros boot from overlays on them.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{bail, ensure};

use super::machine::Lack;

/// The tree of a Debian suite with these packages, `directory/suite`, made unless it is there. Some
/// may be of a foreign architecture.
pub fn tree(
    directory: &Path,
    suite: &str,
    packages: &str,
    foreign: Option<&str>,
) -> anyhow::Result<PathBuf> {
    let tree = directory.join(suite);
    if tree_has(directory, suite, packages) {
        return Ok(tree);
    }
    eprintln!("making a Debian tree of {suite}, about half a minute, once ...");
    for old in [&tree, &directory.join(format!("{suite}.unfinished"))] {
        if old.exists() {
            fs::remove_dir_all(old)?;
        }
    }
    fs::create_dir_all(directory)?;
    let native = Command::new("dpkg").arg("--print-architecture").output()?;
    let mut architectures = String::from_utf8(native.stdout)?.trim().to_owned();
    if let Some(foreign) = foreign {
        architectures += &format!(",{foreign}");
    }
    let unfinished = directory.join(format!("{suite}.unfinished"));
    // It mounts /proc, /sys and devices below the tree. If it is killed, they end with this mount
    // namespace: the machine never has them where somebody removes what is unfinished.
    let made = Command::new("unshare")
        .args(["--mount", "mmdebstrap"])
        .arg("--variant=minbase")
        // A suite keeps its last index for good once it is archived, and a mirror may lag.
        .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
        .arg("--dpkgopt=path-exclude=/usr/share/locale/*")
        // What is lost if the machine fails is made again.
        .arg("--dpkgopt=force-unsafe-io")
        .arg(format!("--architectures={architectures}"))
        .arg(format!("--include={packages}"))
        .arg(suite)
        .arg(&unfinished)
        .stdin(Stdio::null())
        .output()?;
    if !made.status.success() {
        let said = String::from_utf8_lossy(&made.stderr);
        ensure!(said.contains("E: Failed to fetch"), "mmdebstrap: {}\n{said}", made.status);
        bail!(Lack::FromDebian(format!(
            "the Debian tree of {suite} could not be made, for which a network is needed: {}",
            first_error(&made.stderr)
        )));
    }
    fs::rename(&unfinished, &tree)?;
    fs::write(recipe(directory, suite), packages)?;
    Ok(tree)
}

/// Whether the tree is there, and was made with just these packages.
pub fn tree_has(directory: &Path, suite: &str, packages: &str) -> bool {
    let made_with = fs::read_to_string(recipe(directory, suite));
    directory.join(suite).exists() && made_with.is_ok_and(|made_with| made_with == packages)
}

fn recipe(directory: &Path, suite: &str) -> PathBuf {
    directory.join(format!("{suite}.packages"))
}

/// Installs a Debian package on this machine, unless its program is there.
///
/// # Errors
/// A [`Lack`] if it cannot be had.
pub fn require(program: &str, package: &str) -> anyhow::Result<()> {
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|directory| directory.join(program).exists());
    if found {
        return Ok(());
    }
    let not_had = |why: &str| Lack::FromDebian(format!("the program {program} is missing: {why}"));
    eprintln!("installing the Debian package {package} ...");
    for arguments in [&["update"][..], &["install", "-y", "--no-install-recommends", package]] {
        let apt = Command::new("apt-get")
            .args(["-q", "-o", "DPkg::Lock::Timeout=300"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .output();
        match apt {
            // Of other sources than that of the package some may be broken.
            Ok(apt) if apt.status.success() || arguments == ["update"] => {}
            Ok(apt) => bail!(not_had(&first_error(&apt.stderr))),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!(not_had("this is not Debian, where apt-get would install it"))
            }
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(Path::new("/usr/bin").join(program).exists(), "{package} installed no {program}");
    Ok(())
}

/// The first line of apt's or mmdebstrap's that is an error.
pub fn first_error(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let error = said.lines().find_map(|line| line.strip_prefix("E: "));
    error.unwrap_or("it says no error").trim().to_owned()
}
