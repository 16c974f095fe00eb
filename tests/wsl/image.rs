//! An image of a distro that somebody made, as WSL would install it: an archive or a directory.
//!
//! bsdtar unpacks it, as it takes many formats, attributes and labels. It is told to change its
//! root to where it unpacks, so that no name and no link can lead outside. How much
//! comes out of the archive is counted between two processes: one that takes the compression off,
//! and one that makes the files.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{bail, ensure, Context};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;

use super::debian::require;
use super::generation::setting;
use super::machine;

/// More than this no image is taken to have.
pub const LIMIT: u64 = 16 << 30;
/// What is left free on the disk.
const RESERVE: u64 = 1 << 30;
const FILES_RESERVE: u64 = 100_000;

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

/// Where images are unpacked: nobody but root gets at their files, some of which may be setuid.
fn directory() -> anyhow::Result<PathBuf> {
    let directory = machine::directory()?.join("images");
    fs::create_dir_all(&directory)?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
    Ok(directory)
}

/// The tree of an archive, unpacked once.
fn unpacked(archive: &Path, limit: u64) -> anyhow::Result<PathBuf> {
    let directory = directory()?;
    let sum = Command::new("sha256sum")
        .stdin(File::open(archive)?)
        .output()
        .context("running sha256sum")?;
    let sum = String::from_utf8(sum.stdout)?;
    let name = sum.get(..16).context("sha256sum gave no sum")?;
    let tree = directory.join(name);
    let lock = File::create(directory.join(format!("{name}.lock")))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .context("locking the images")?;
    if tree.exists() {
        return Ok(tree);
    }
    require("bsdtar", "libarchive-tools")?;
    eprintln!("{}: unpacking it, once ...", archive.display());
    let unfinished = directory.join(format!("{name}.unfinished"));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    fs::create_dir(&unfinished)?;
    let done = unpack(archive, &unfinished, limit).and_then(|()| remove_nodes(&unfinished));
    if let Err(error) = done {
        fs::remove_dir_all(&unfinished)?;
        return Err(error);
    }
    fs::rename(&unfinished, &tree)?;
    Ok(tree)
}

fn unpack(archive: &Path, to: &Path, limit: u64) -> anyhow::Result<()> {
    let quiet = |program: &str| {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C.UTF-8").stderr(Stdio::piped());
        command
    };
    let mut plain = quiet("bsdcat")
        .stdin(File::open(archive)?)
        .stdout(Stdio::piped())
        .spawn()
        .context("running bsdcat")?;
    let mut files = quiet("bsdtar")
        .args(["-x", "-p", "--xattrs", "--acls", "--numeric-owner"])
        .args(["--chroot", "-f", "-", "-C"])
        .arg(to)
        .stdin(Stdio::piped())
        .spawn()
        .context("running bsdtar")?;
    let listen = |stream: Option<std::process::ChildStderr>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // What came before an error is worth showing.
            let _ = stream.map(|mut stream| stream.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let complaints = [listen(plain.stderr.take()), listen(files.stderr.take())];
    let from = plain.stdout.take().context("stdout")?;
    let sink = files.stdin.take().context("stdin")?;
    let copied = copy(from, sink, to, limit);
    if copied.is_err() {
        plain.kill()?;
        files.kill()?;
    }
    let statuses = [plain.wait()?, files.wait()?];
    let complaints = complaints.map(|thread| thread.join().expect("reading does not panic"));
    let copied = copied?;
    // If the second one has stopped reading, that is the first one's trouble, too.
    if copied == Copied::All && !statuses[0].success() {
        bail!("the archive is damaged: {}", first_line(&complaints[0]));
    }
    let serious = complaints[1].lines().filter(|line| !is_harmless(line));
    let serious: Vec<_> = serious.collect();
    if !statuses[1].success() && !serious.is_empty() {
        let damaged = serious.iter().find(|line| is_damage(line));
        match damaged {
            Some(line) => bail!("the archive is damaged: {}", first_line(line)),
            None => bail!("it does not unpack: {}", first_line(serious[0])),
        }
    }
    Ok(())
}

/// The first thing that bsdtar or bsdcat says, without its name.
fn first_line(text: &str) -> &str {
    let line = text.lines().next().unwrap_or("for no reason given");
    let line = line.trim_start_matches("bsdtar: ");
    line.trim_start_matches("bsdcat: <stdin>: ")
}

/// What a file lacks then is of no account here, and WSL's own disk might take it.
fn is_harmless(line: &str) -> bool {
    let attributes = ["extended attribute", "ACL", "file flags"];
    attributes.iter().any(|word| line.contains(word)) || line.contains("Error exit delayed")
}

fn is_damage(line: &str) -> bool {
    let words = ["Truncated", "truncated", "Damaged", "damaged", "checksum"];
    words.iter().any(|word| line.contains(word))
}

#[derive(PartialEq)]
enum Copied {
    All,
    /// Until the reader went away.
    Some,
}

/// Passes the archive on, as far as there is room for it.
fn copy(
    mut from: impl Read,
    mut to: impl Write,
    directory: &Path,
    limit: u64,
) -> anyhow::Result<Copied> {
    let mut buffer = vec![0; 1 << 20];
    let (mut total, mut looked) = (0, 0);
    check_room(directory)?;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match from.read(&mut buffer[filled..])? {
                0 => break,
                more => filled += more,
            }
        }
        if filled == 0 {
            return Ok(Copied::All);
        }
        if total == 0 {
            ensure!(
                buffer.get(..512).is_some_and(is_tar_header),
                "it is neither a directory nor a tar archive, plain or compressed"
            );
        }
        total += filled as u64;
        ensure!(
            total <= limit,
            "unpacked it has more than {}, which no image of a distro has",
            size(limit)
        );
        if total - looked >= 64 << 20 {
            check_room(directory)?;
            looked = total;
        }
        if to.write_all(&buffer[..filled]).is_err() {
            return Ok(Copied::Some);
        }
        buffer[..filled].fill(0);
    }
}

fn size(bytes: u64) -> String {
    match bytes >> 30 {
        0 => format!("{} MiB", bytes >> 20),
        gib => format!("{gib} GiB"),
    }
}

fn check_room(directory: &Path) -> anyhow::Result<()> {
    let disk = statvfs(directory).context("asking for the free space")?;
    let room = disk.blocks_available().saturating_mul(disk.fragment_size());
    // Some file systems do not count their files.
    let files = disk.files() == 0 || disk.files_available() > FILES_RESERVE;
    ensure!(
        room > RESERVE && files,
        "there is no room to unpack it below {}",
        directory.display()
    );
    Ok(())
}

/// Whether a block has the checksum of a tar header. Other archives that bsdtar reads are not taken:
/// what comes out of them would not be counted.
fn is_tar_header(block: &[u8]) -> bool {
    let stated = String::from_utf8_lossy(&block[148..156]);
    let stated = stated.trim_matches([' ', '\0']);
    let sum: u32 = block
        .iter()
        .enumerate()
        .map(|(i, byte)| if (148..156).contains(&i) { b' ' } else { *byte })
        .map(u32::from)
        .sum();
    u32::from_str_radix(stated, 8) == Ok(sum)
}

/// WSL's /dev is its own, and there is no other place for device nodes.
fn remove_nodes(directory: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            remove_nodes(&entry.path())?;
        } else if kind.is_block_device() || kind.is_char_device() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
