//! Unpacks the archive of an image.
//!
//! bsdtar does, as it takes many formats, attributes and labels. It is told to change its
//! root to where it unpacks, so that no name and no link can lead outside. How much
//! comes out of the archive is counted between two processes: one that takes the compression off,
//! and one that makes the files.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::Context;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;

use super::debian::require;
use super::image::Error;
use super::machine;

/// What is left free on the disk.
const RESERVE: u64 = 1 << 30;
const FILES_RESERVE: u64 = 100_000;

/// Where images are unpacked: nobody but root gets at their files, some of which may be setuid.
fn directory() -> anyhow::Result<PathBuf> {
    let directory = machine::directory()?.join("images");
    fs::create_dir_all(&directory)?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
    Ok(directory)
}

/// The tree of an archive, unpacked for as long as somebody has it.
#[derive(Debug)]
pub struct Unpacked {
    pub tree: PathBuf,
    lock: Flock<File>,
}

impl Drop for Unpacked {
    /// The last one takes it away; who is killed leaves it to whoever unpacks next.
    fn drop(&mut self) {
        if self.lock.relock(FlockArg::LockExclusiveNonblock).is_ok() {
            // There is nobody left to tell.
            let _ = fs::remove_dir_all(&self.tree);
        }
    }
}

/// Unpacks an archive, unless somebody has it unpacked.
pub fn unpacked(archive: &Path, limit: u64) -> Result<Unpacked, Error> {
    let directory = directory()?;
    remove_those_of_the_dead(&directory)?;
    let sum = Command::new("sha256sum")
        .stdin(File::open(archive)?)
        .output()
        .context("running sha256sum")?;
    let sum = String::from_utf8_lossy(&sum.stdout);
    let name = sum.get(..16).context("sha256sum gave no sum")?;
    let tree = directory.join(name);
    let lock = File::create(directory.join(format!("{name}.lock")))?;
    let lock = Flock::lock(lock, FlockArg::LockShared)
        .map_err(|(_, errno)| errno)
        .context("locking the images")?;
    if tree.exists() {
        return Ok(Unpacked { tree, lock });
    }
    // Whoever had it is gone, or was just as quick.
    lock.relock(FlockArg::LockExclusive).context("locking the images")?;
    let shared = |lock: Flock<File>| {
        let relocked = lock.relock(FlockArg::LockShared);
        relocked.context("locking the images")?;
        Ok(Unpacked { tree: tree.clone(), lock })
    };
    if tree.exists() {
        return shared(lock);
    }
    require("bsdtar", "libarchive-tools")?;
    eprintln!("{}: unpacking it ...", archive.display());
    let unfinished = directory.join(format!("{name}.unfinished"));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    fs::create_dir(&unfinished)?;
    let done = unpack(archive, &unfinished, limit)
        .and_then(|()| remove_nodes(&unfinished).map_err(Error::from));
    if let Err(error) = done {
        fs::remove_dir_all(&unfinished)?;
        return Err(error);
    }
    fs::rename(&unfinished, &tree)?;
    shared(lock)
}

/// Takes away what a run that was killed has left.
fn remove_those_of_the_dead(directory: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension() != Some("lock".as_ref()) {
            continue;
        }
        // Whoever has it unpacked, or unpacks it, has the lock.
        if let Ok(_lock) = Flock::lock(File::open(&path)?, FlockArg::LockExclusiveNonblock) {
            for left in ["", "unfinished"].map(|end| path.with_extension(end)) {
                // It is in nobody's way.
                if left.exists() {
                    if let Err(error) = fs::remove_dir_all(&left) {
                        eprintln!("removing {}: {error}", left.display());
                    }
                }
            }
        }
    }
    Ok(())
}

fn unpack(archive: &Path, to: &Path, limit: u64) -> Result<(), Error> {
    let mut plain = quiet("bsdcat")
        .stdin(File::open(archive)?)
        .stdout(Stdio::piped())
        .spawn()
        .context("running bsdcat")?;
    let mut files = quiet("bsdtar")
        .args(["-x", "-p", "--xattrs", "--acls", "--numeric-owner"])
        // What is immutable could not be taken away again.
        .arg("--no-fflags")
        .args(["--chroot", "-f", "-", "-C"])
        .arg(to)
        .stdin(Stdio::piped())
        .spawn()
        .context("running bsdtar")?;
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
    // If the second one has stopped reading, that is the first one's trouble, too.
    if copied? == Copied::All && !statuses[0].success() {
        return Err(Error::Damaged(first_line(&complaints[0])));
    }
    let serious = complaints[1].lines().filter(|line| !is_harmless(line));
    let serious: Vec<_> = serious.collect();
    if statuses[1].success() || serious.is_empty() {
        return Ok(());
    }
    Err(match serious.iter().find(|line| is_damage(line)) {
        Some(line) => Error::Damaged(first_line(line)),
        None if leads_outside(serious[0]) => Error::LeadsOutside(first_line(serious[0])),
        None => Error::DoesNotUnpack(first_line(serious[0])),
    })
}

fn quiet(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C.UTF-8").stderr(Stdio::piped());
    command
}

fn listen(stream: Option<ChildStderr>) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is worth showing.
        let _ = stream.map(|mut stream| stream.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The first thing that bsdtar or bsdcat says, without its name.
fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or("for no reason given");
    let line = line.trim_start_matches("bsdtar: ");
    line.trim_start_matches("bsdcat: <stdin>: ").to_owned()
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

fn leads_outside(line: &str) -> bool {
    let words = ["Path contains '..'", "Cannot extract through symlink"];
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
) -> Result<Copied, Error> {
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
        if total == 0 && !buffer.get(..512).is_some_and(is_tar_header) {
            return Err(Error::NoTar);
        }
        total += filled as u64;
        if total > limit {
            return Err(Error::TooLarge(limit));
        }
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

fn check_room(directory: &Path) -> Result<(), Error> {
    let disk = statvfs(directory).context("asking for the free space")?;
    let room = disk.blocks_available().saturating_mul(disk.fragment_size());
    // Some file systems do not count their files.
    let files = disk.files() == 0 || disk.files_available() > FILES_RESERVE;
    if room > RESERVE && files {
        Ok(())
    } else {
        Err(Error::NoRoom(directory.to_owned()))
    }
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
fn remove_nodes(directory: &Path) -> io::Result<()> {
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
