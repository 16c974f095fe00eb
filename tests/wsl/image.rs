//! An image of a distro that somebody made, as WSL would install it: an archive or a directory.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::{bail, ensure, Context};

use super::generation::setting;
use super::unpack::unpacked;

/// More than this no image is taken to have.
pub const LIMIT: u64 = 16 << 30;

/// A distro's files, and what can be said of them.
pub struct Image {
    /// Its root directory.
    pub tree: PathBuf,
    /// What it calls itself.
    pub name: String,
    /// systemd's own directory in it, where it looks for generators, too.
    pub systemd: PathBuf,
    /// What whoever tries it should know.
    pub notes: Vec<String>,
}

impl Image {
    /// Unpacks the image, unless it is a directory or has been before, and looks whether WSL could
    /// start systemd in it.
    ///
    /// # Errors
    /// One that says in a line why it cannot be tried.
    pub fn open(path: &Path, limit: u64) -> anyhow::Result<Image> {
        let metadata = fs::metadata(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => anyhow::anyhow!("there is no such file"),
            _ => error.into(),
        })?;
        let tree = if metadata.is_dir() {
            let tree = fs::canonicalize(path)?;
            // The VM has a /run of its own.
            ensure!(
                !tree.starts_with("/run"),
                "the VM does not see the machine's /run, where this directory is"
            );
            tree
        } else if metadata.is_file() {
            unpacked(path, limit)?
        } else {
            bail!("it is neither a file nor a directory");
        };
        Image::of_tree(tree)
    }

    fn of_tree(tree: PathBuf) -> anyhow::Result<Image> {
        let systemd = find_systemd(&tree)?;
        let machine = Program::read(Path::new("/proc/self/exe"))?;
        let program = Program::read(&outside(&tree, &systemd))
            .with_context(|| format!("{} is no program", systemd.display()))?;
        ensure!(
            program == machine,
            "it is for {program}, and this machine is {machine}"
        );
        let mut notes = Vec::new();
        let conf = read(&tree, "/etc/wsl.conf").unwrap_or_default();
        if !setting(&conf, "boot", "systemd").is_some_and(|v| v.eq_ignore_ascii_case("true")) {
            notes.push(
                "Its /etc/wsl.conf has no [boot] systemd=true, without which WSL may not start \
                 systemd."
                    .to_owned(),
            );
        }
        let release = ["/etc/os-release", "/usr/lib/os-release"];
        let release = release.iter().find_map(|path| read(&tree, path));
        let name = release.as_deref().and_then(pretty_name);
        let directory = systemd.parent().context("systemd has a directory")?;
        Ok(Image {
            name: name.unwrap_or("a distro without a name").to_owned(),
            systemd: directory.to_owned(),
            tree,
            notes,
        })
    }
}

fn pretty_name(release: &str) -> Option<&str> {
    let mut lines = release.lines();
    let name = lines.find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(name.trim_matches(['"', '\'']))
}

/// A small text file of the image.
fn read(tree: &Path, path: &str) -> Option<String> {
    let path = outside(tree, &resolve(tree, Path::new(path)).ok()?);
    let metadata = fs::symlink_metadata(&path).ok()?;
    if !metadata.is_file() || metadata.len() > 1 << 20 {
        return None;
    }
    Some(String::from_utf8_lossy(&fs::read(path).ok()?).into_owned())
}

/// The file of the image's systemd, by its path in the image.
fn find_systemd(tree: &Path) -> anyhow::Result<PathBuf> {
    let is_file = |path: &Path| outside(tree, path).is_file();
    let init = resolve(tree, Path::new("/sbin/init"))?;
    ensure!(
        is_file(&init),
        "there is no /sbin/init in it, by which WSL starts systemd"
    );
    if init.file_name().is_some_and(|name| name == "systemd") {
        return Ok(init);
    }
    // Some distros do something first, as NixOS does.
    let places = [
        "/lib/systemd/systemd",
        "/usr/lib/systemd/systemd",
        "/run/current-system/systemd/lib/systemd/systemd",
        "/nix/var/nix/profiles/system/systemd/lib/systemd/systemd",
    ];
    for place in places {
        let systemd = resolve(tree, Path::new(place))?;
        if is_file(&systemd) {
            return Ok(systemd);
        }
    }
    bail!(
        "there is no systemd in it; its /sbin/init is {}",
        init.display()
    )
}

/// Where a path leads in a tree when all links are followed as they would be with the tree as the
/// root directory. What is not there leads to itself.
///
/// # Errors
/// A link leads to itself.
pub fn resolve(tree: &Path, path: &Path) -> anyhow::Result<PathBuf> {
    let mut left: Vec<PathBuf> = parts(path);
    let mut found = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = left.pop() {
        if part == Path::new("..") {
            found.pop();
            continue;
        }
        let next = found.join(&part);
        let Ok(target) = fs::read_link(outside(tree, &next)) else {
            found = next;
            continue;
        };
        links += 1;
        ensure!(links < 40, "{} leads to itself", path.display());
        if target.is_absolute() {
            found = PathBuf::from("/");
        }
        left.extend(parts(&target));
    }
    Ok(found)
}

/// The names in a path, the last first.
fn parts(path: &Path) -> Vec<PathBuf> {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(PathBuf::from(name)),
        Component::ParentDir => Some(PathBuf::from("..")),
        _ => None,
    });
    let mut parts: Vec<_> = parts.collect();
    parts.reverse();
    parts
}

/// The path on the machine of one in a tree.
pub fn outside(tree: &Path, path: &Path) -> PathBuf {
    tree.join(path.strip_prefix("/").unwrap_or(path))
}

/// What a program runs on.
#[derive(PartialEq)]
struct Program {
    bits: u8,
    machine: u16,
}

impl Program {
    fn read(path: &Path) -> anyhow::Result<Program> {
        let mut start = [0; 20];
        File::open(path)?.read_exact(&mut start)?;
        let [0x7f, b'E', b'L', b'F', bits, order, .., low, high] = start else {
            bail!("it is not ELF");
        };
        let machine = match order {
            2 => u16::from_be_bytes([low, high]),
            _ => u16::from_le_bytes([low, high]),
        };
        Ok(Program { bits, machine })
    }
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bits = if self.bits == 1 { "32" } else { "64" };
        match self.machine {
            3 => write!(f, "i386"),
            40 => write!(f, "32-bit ARM"),
            62 => write!(f, "x86-64"),
            183 => write!(f, "arm64"),
            243 => write!(f, "{bits}-bit RISC-V"),
            other => write!(f, "another processor ({bits} bits, number {other} in ELF)"),
        }
    }
}
