//! Files below the root. The paths of all that are opened are here, each relative to `$WSL_BINFMT_ROOT`.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::process;

use anyhow::Context;
use camino::Utf8PathBuf;

/// The interop binary that WSL binds into every distro.
pub const INIT: &str = "/init";
/// Where systemd and WSL mount binfmt_misc.
pub const BINFMT_MISC: &str = "/proc/sys/fs/binfmt_misc";
/// The guard's file. It must not be in a directory that systemd empties: over an unlinked file, the
/// units' BindPaths= would fail.
pub const GUARD_FILE: &str = "/run/wsl-binfmt/status";
/// The file that WSL 2.8.9 and later binds over the table's status file before systemd starts.
pub const WSL_LOCK: &str = "/run/wsl/binfmt-status-lock";
/// Where systemd and its services keep what lasts until the distro stops.
pub const RUN: &str = "/run";
/// The records that are kept while the distro runs.
pub const STATE: &str = "/run/wsl-binfmt";
/// The names of all entries from before this distro registered its own.
pub const BEFORE: &str = "/run/wsl-binfmt/before";
/// The inode of the interop entry after the last repair; 0 if it was left to others.
pub const INTEROP: &str = "/run/wsl-binfmt/interop";
/// The settings of wsl.conf when the distro started.
pub const BOOT_CONF: &str = "/run/wsl-binfmt/wsl.conf";
/// binfmt.d(5), highest priority first. With a merged /usr the last one is the same as /usr/lib.
pub const BINFMT_D: [&str; 5] = [
    "/etc/binfmt.d",
    "/run/binfmt.d",
    "/usr/local/lib/binfmt.d",
    "/usr/lib/binfmt.d",
    "/lib/binfmt.d",
];
/// The formats of update-binfmts(8), one file each.
pub const FORMATS: &str = "/var/lib/binfmts";
/// Where systemd looks for generators (systemd.generator(7)), highest priority first. The last one
/// is for Debian before /usr was merged.
pub const GENERATORS: [&str; 5] = [
    "/run/systemd/system-generators",
    "/etc/systemd/system-generators",
    "/usr/local/lib/systemd/system-generators",
    "/usr/lib/systemd/system-generators",
    "/lib/systemd/system-generators",
];
/// Where our generator writes when systemd runs it.
pub const EARLY: &str = "/run/systemd/generator.early";
/// The directories with a higher priority than that (systemd.unit(5)).
pub const ABOVE_EARLY: [&str; 3] =
    ["/etc/systemd/system.control", "/run/systemd/system.control", "/run/systemd/transient"];
/// Exists while systemd runs (sd_booted(3)).
pub const SYSTEMD: &str = "/run/systemd/system";
/// Where WSL makes the sockets through which Windows programs start.
pub const INTEROP_SOCKETS: &str = "/run/WSL";
/// All Unix sockets, proc_net(5).
pub const UNIX_SOCKETS: &str = "/proc/net/unix";
/// wsl.conf(5) of this distro.
pub const WSL_CONF: &str = "/etc/wsl.conf";
/// The mounts of this process's namespace, proc_pid_mounts(5).
pub const MOUNTS: &str = "/proc/self/mounts";
/// WSL's own generator, a link to /init that it makes before systemd starts.
pub const WSL_GENERATOR: &str = "/run/systemd/system-generators/wsl-generator";
/// Units and drop-ins of the admin.
pub const LOCAL_UNITS: [&str; 3] =
    ["/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system"];
/// Units and drop-ins of the vendor.
pub const VENDOR_UNITS: [&str; 2] = ["/usr/lib/systemd/system", "/lib/systemd/system"];
/// The kernel's log.
pub const KMSG: &str = "/dev/kmsg";

/// The kernel's release, proc_sys_kernel(5).
pub const OSRELEASE: &str = "/proc/sys/kernel/osrelease";
/// The environment that PID 1 was started with, proc_pid_environ(5).
pub const PID1_ENVIRONMENT: &str = "/proc/1/environ";
/// The value of `container=` in it, written by systemd.
pub const PID1_CONTAINER: &str = "/run/systemd/container";
/// The mounts of the distro, readable by root, and of this process, proc_pid_mountinfo(5).
pub const MOUNT_INFOS: [&str; 2] = ["/proc/1/mountinfo", "/proc/self/mountinfo"];
/// The mount namespace of the distro, and of this process, namespaces(7).
pub const MOUNT_NAMESPACES: [&str; 2] = ["/proc/1/ns/mnt", "/proc/self/ns/mnt"];
/// The processes, each a directory by its number, proc(5).
pub const PROCESSES: &str = "/proc";
/// The root directory of this process.
pub const OWN_ROOT: &str = "/proc/self/root";
/// The root directory of the distro.
pub const DISTRO_ROOT: &str = "/proc/1/root";
/// The command that packages install beside the generator.
pub const COMMAND: &str = "/usr/bin/wsl-binfmt";
/// Links that systemd makes while a unit is active; the unit's name follows.
pub const INVOCATIONS: &str = "/run/systemd/units/invocation:";
/// The socket on which every systemd that is PID 1 listens.
pub const PRIVATE_SOCKET: &str = "/run/systemd/private";
/// Exists in an initrd, os-release(5).
pub const INITRD_RELEASE: &str = "/etc/initrd-release";
/// The marks of Docker, Podman and systemd's container interface in a container.
pub const CONTAINER_MARKERS: [&str; 3] =
    ["/.dockerenv", "/run/.containerenv", "/run/host/container-manager"];

/// The most that is read of a file, in bytes. Nobody writes one this long, and a huge file must not
/// delay the boot.
const READ_LIMIT: u64 = 1 << 20;

/// The root directory that every path is relative to.
#[derive(Clone)]
pub struct Host {
    root: Utf8PathBuf,
}

impl Host {
    /// The running machine, or the directory that `$WSL_BINFMT_ROOT` names.
    pub fn from_environment() -> Host {
        Host { root: variable("WSL_BINFMT_ROOT").unwrap_or_default().into() }
    }

    /// `absolute`, below the root.
    pub fn path(&self, absolute: &str) -> Utf8PathBuf {
        if self.root.as_str().is_empty() {
            return absolute.into();
        }
        self.root.join(absolute.trim_start_matches('/'))
    }

    /// Reads a regular file of up to a MiB. Does not block on a FIFO or a device.
    ///
    /// # Errors
    /// It cannot be read, is no regular file, or is longer.
    pub fn read(&self, absolute: &str) -> io::Result<Vec<u8>> {
        let mut options = OpenOptions::new();
        let options = options.read(true).custom_flags(nix::libc::O_NONBLOCK);
        let file = options.open(self.path(absolute))?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let mut bytes = Vec::new();
        match file.take(READ_LIMIT + 1).read_to_end(&mut bytes)? as u64 {
            0..=READ_LIMIT => Ok(bytes),
            _ => Err(io::Error::from_raw_os_error(nix::libc::EFBIG)),
        }
    }

    /// Writes a file atomically, creating its directory. A file that already has this text is not
    /// replaced, as it may be bound over another one. Whatever the umask, both are readable by all
    /// and writable by their owner only.
    ///
    /// # Errors
    /// The file or the directory cannot be written.
    pub fn write(&self, absolute: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path(absolute);
        if let Some(directory) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(directory)
                .and_then(|()| fs::set_permissions(directory, Permissions::from_mode(0o755)))
                .with_context(|| format!("creating {directory}"))?;
        }
        let modes = Permissions::from_mode(0o644);
        if self.read(absolute).is_ok_and(|there| there == text.as_bytes()) {
            return fs::set_permissions(&path, modes)
                .with_context(|| format!("making {path} readable"));
        }
        // Another of our processes may be writing the same file.
        let unfinished = format!("{path}.{}.unfinished", process::id());
        fs::write(&unfinished, text)
            .and_then(|()| fs::set_permissions(&unfinished, modes))
            .and_then(|()| fs::rename(&unfinished, &path))
            .inspect_err(|_| drop(fs::remove_file(&unfinished)))
            .with_context(|| format!("writing {path}"))
    }

    /// Removes a file, if there is one.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, absolute: &str) -> anyhow::Result<()> {
        let path = self.path(absolute);
        match fs::remove_file(&path) {
            Err(error) if is_missing(&error) => Ok(()),
            removed => removed.with_context(|| format!("removing {path}")),
        }
    }

    /// When a file or directory was last modified, or a link was made; none if it does not exist.
    ///
    /// # Errors
    /// It cannot be inspected.
    pub fn modified(&self, absolute: &str) -> anyhow::Result<Option<(i64, i64)>> {
        let path = self.path(absolute);
        match fs::symlink_metadata(&path) {
            Err(error) if is_missing(&error) => Ok(None),
            metadata => metadata
                .map(|m| Some((m.mtime(), m.mtime_nsec())))
                .with_context(|| format!("looking at {path}")),
        }
    }

    /// The text of one of our own files; empty if it does not exist.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn own_text(&self, absolute: &str) -> anyhow::Result<String> {
        match self.read(absolute) {
            Err(error) if is_missing(&error) => Ok(String::new()),
            read => read
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .with_context(|| format!("reading {}", self.path(absolute))),
        }
    }

    /// Whether `absolute` is a regular file with an execute bit. True if it cannot be inspected:
    /// running it will tell.
    pub fn is_executable(&self, absolute: &str) -> bool {
        match fs::metadata(self.path(absolute)) {
            Ok(metadata) => metadata.is_file() && metadata.permissions().mode() & 0o111 != 0,
            Err(error) => !is_missing(&error),
        }
    }

    /// The names in a directory, sorted; none if it cannot be read.
    pub fn names(&self, absolute: &str) -> Vec<String> {
        self.list(absolute).unwrap_or_default()
    }

    /// The names in a directory, sorted; none if it does not exist. Names that are not UTF-8 are
    /// skipped.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn list(&self, absolute: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        match fs::read_dir(self.path(absolute)) {
            Err(error) if is_missing(&error) => {}
            entries => {
                for entry in entries? {
                    names.extend(entry?.file_name().into_string());
                }
            }
        }
        names.sort();
        Ok(names)
    }

    /// The text of a file; empty if it cannot be read.
    pub fn text(&self, absolute: &str) -> String {
        self.read(absolute)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }
}

/// This program's own path, links resolved.
///
/// # Errors
/// /proc is not mounted, or the path is not UTF-8.
pub fn executable() -> anyhow::Result<Utf8PathBuf> {
    let path = std::env::current_exe().context("finding the path of this program")?;
    let path = Utf8PathBuf::try_from(path).context("using the path of this program")?;
    // The kernel adds this after a package upgrade has replaced the file.
    let path = path.as_str().trim_end_matches(" (deleted)");
    Ok(path.into())
}

/// Whether an error means that the file does not exist.
pub fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// An environment variable. Bytes that are not UTF-8 are replaced: no known value has any.
pub fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|v| v.to_string_lossy().into_owned())
}
