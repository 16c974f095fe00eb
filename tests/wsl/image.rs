//! An image of a distro that somebody made, as WSL would install it: an archive or a directory.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::Context;

use super::generation::setting;
use super::unpack::{unpacked, Unpacked};

/// More than this no image is taken to have.
pub const LIMIT: u64 = 16 << 30;

/// Why an image cannot be tried.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// There is none.
    Missing,
    /// It is neither a file nor a directory.
    NeitherFileNorDirectory,
    /// It is a directory that the VM does not see, as it has a `/run` of its own.
    InRun,
    /// It is a file that is no tar archive.
    NoTar,
    /// The archive is damaged: what bsdtar says.
    Damaged(String),
    /// Something in the archive leads outside of where it is unpacked: what bsdtar says.
    LeadsOutside(String),
    /// The archive does not unpack for another reason: what bsdtar says.
    DoesNotUnpack(String),
    /// More than so many bytes come out of the archive.
    TooLarge(u64),
    /// There is no room to unpack it below this directory.
    NoRoom(PathBuf),
    /// A link at this path of it leads to itself.
    Loop(PathBuf),
    /// It has no `/sbin/init`.
    NoInit,
    /// It has no systemd, and this is its `/sbin/init`.
    NoSystemd(PathBuf),
    /// Its systemd, at this path, is no program.
    NoProgram(PathBuf, io::Error),
    /// Its systemd is not for this machine.
    OtherArchitecture {
        /// What it is for.
        image: String,
        /// What this machine is.
        machine: String,
    },
    /// Something failed for which the image may not be to blame.
    Other(anyhow::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Missing => write!(f, "there is no such file"),
            Error::NeitherFileNorDirectory => write!(f, "it is neither a file nor a directory"),
            Error::InRun => {
                write!(f, "the VM does not see the machine's /run, where this directory is")
            }
            Error::NoTar => {
                write!(f, "it is neither a directory nor a tar archive, plain or compressed")
            }
            Error::Damaged(said) => write!(f, "the archive is damaged: {said}"),
            Error::LeadsOutside(said) | Error::DoesNotUnpack(said) => {
                write!(f, "it does not unpack: {said}")
            }
            Error::TooLarge(limit) => write!(
                f,
                "unpacked it has more than {}, which no image of a distro has",
                size(*limit)
            ),
            Error::NoRoom(directory) => {
                write!(f, "there is no room to unpack it below {}", directory.display())
            }
            Error::Loop(path) => write!(f, "{} leads to itself", path.display()),
            Error::NoInit => write!(f, "there is no /sbin/init in it, by which WSL starts systemd"),
            Error::NoSystemd(init) => {
                write!(f, "there is no systemd in it; its /sbin/init is {}", init.display())
            }
            Error::NoProgram(path, error) => {
                write!(f, "{} is no program: {error}", path.display())
            }
            Error::OtherArchitecture { image, machine } => {
                write!(f, "it is for {image}, and this machine is {machine}")
            }
            Error::Other(error) => write!(f, "{error:#}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Error {
        Error::Other(error)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        Error::Other(error.into())
    }
}

fn size(bytes: u64) -> String {
    match bytes >> 30 {
        0 => format!("{} MiB", bytes >> 20),
        gib => format!("{gib} GiB"),
    }
}

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
    /// The unpacked archive, taken away with this.
    _unpacked: Option<Unpacked>,
}

impl Image {
    /// Unpacks the image, unless it is a directory, and looks whether WSL could start systemd in it.
    /// What was unpacked goes with the value.
    ///
    /// # Errors
    /// It cannot be tried.
    pub fn open(path: &Path, limit: u64) -> Result<Image, Error> {
        let metadata = fs::metadata(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::Missing,
            _ => error.into(),
        })?;
        if metadata.is_dir() {
            let tree = fs::canonicalize(path)?;
            if tree.starts_with("/run") {
                return Err(Error::InRun);
            }
            Image::of_tree(tree, None)
        } else if metadata.is_file() {
            let unpacked = unpacked(path, limit)?;
            Image::of_tree(unpacked.tree.clone(), Some(unpacked))
        } else {
            Err(Error::NeitherFileNorDirectory)
        }
    }

    fn of_tree(tree: PathBuf, unpacked: Option<Unpacked>) -> Result<Image, Error> {
        let systemd = find_systemd(&tree)?;
        let machine = Program::read(Path::new("/proc/self/exe"))?;
        let program = Program::read(&outside(&tree, &systemd))
            .map_err(|error| Error::NoProgram(systemd.clone(), error))?;
        if program != machine {
            return Err(Error::OtherArchitecture {
                image: program.to_string(),
                machine: machine.to_string(),
            });
        }
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
            _unpacked: unpacked,
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
fn find_systemd(tree: &Path) -> Result<PathBuf, Error> {
    let is_file = |path: &Path| outside(tree, path).is_file();
    let init = resolve(tree, Path::new("/sbin/init"))?;
    if !is_file(&init) {
        return Err(Error::NoInit);
    }
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
    Err(Error::NoSystemd(init))
}

/// Where a path leads in a tree when all links are followed as they would be with the tree as the
/// root directory. What is not there leads to itself.
///
/// # Errors
/// A link leads to itself.
pub(super) fn resolve(tree: &Path, path: &Path) -> Result<PathBuf, Error> {
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
        if links == 40 {
            return Err(Error::Loop(path.to_owned()));
        }
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
pub(super) fn outside(tree: &Path, path: &Path) -> PathBuf {
    tree.join(path.strip_prefix("/").unwrap_or(path))
}

/// What a program runs on.
#[derive(PartialEq)]
struct Program {
    bits: u8,
    machine: u16,
}

impl Program {
    fn read(path: &Path) -> io::Result<Program> {
        let mut start = [0; 20];
        File::open(path)?.read_exact(&mut start)?;
        let [0x7f, b'E', b'L', b'F', bits, order, .., low, high] = start else {
            return Err(io::Error::other("it is not ELF"));
        };
        let machine = match order {
            2 => u16::from_be_bytes([low, high]),
            _ => u16::from_le_bytes([low, high]),
        };
        Ok(Program { bits, machine })
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
