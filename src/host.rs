//! The machine as this program sees it: the only place with absolute paths, every one of them
//! below `$WSL_BINFMT_ROOT`. What is read here is handed on as plain values.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use anyhow::Context;
use camino::{Utf8Path, Utf8PathBuf};

use crate::wsl::{Environment, Files};

/// The interop binary that WSL binds into every distro.
pub const INIT: &str = "/init";
/// Where systemd and WSL mount binfmt_misc.
pub const BINFMT_MISC: &str = "/proc/sys/fs/binfmt_misc";
/// The guard's file. It must not be below a directory that systemd empties: once unlinked, it
/// could no longer be bound over in the units' own mount namespaces.
pub const GUARD_FILE: &str = "/run/wsl-binfmt/status";
/// wsl.conf(5) of this distro.
pub const WSL_CONF: &str = "/etc/wsl.conf";
/// The kernel's log.
pub const KMSG: &str = "/dev/kmsg";

const OSRELEASE: &str = "/proc/sys/kernel/osrelease";
const PID1_ENVIRONMENT: &str = "/proc/1/environ";
const INITRD_RELEASE: &str = "/etc/initrd-release";
/// What Docker, Podman and systemd's container interface leave in a container.
const CONTAINER_MARKERS: [&str; 3] = [
    "/.dockerenv",
    "/run/.containerenv",
    "/run/host/container-manager",
];

/// No file that is read here is longer than this, in bytes.
const READ_LIMIT: u64 = 1 << 20;

/// The root directory below which every path lies.
pub struct Host {
    root: Utf8PathBuf,
}

impl Host {
    /// The running machine, or what `$WSL_BINFMT_ROOT` names instead.
    pub fn from_environment() -> Host {
        Host {
            root: variable("WSL_BINFMT_ROOT").unwrap_or_default().into(),
        }
    }

    /// `absolute`, below the root.
    pub fn path(&self, absolute: &str) -> Utf8PathBuf {
        if self.root.as_str().is_empty() {
            return absolute.into();
        }
        self.root.join(absolute.trim_start_matches('/'))
    }

    /// The first MiB of a regular file. Never blocks, whatever is at that path.
    pub fn read(&self, absolute: &str) -> io::Result<Vec<u8>> {
        let file = open_without_blocking(&self.path(absolute))?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(READ_LIMIT).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Whether `absolute` is a regular file with an execute bit.
    pub fn is_executable(&self, absolute: &str) -> bool {
        std::fs::metadata(self.path(absolute))
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    }

    /// What systemd says of the machine in the generator's environment, and where the output goes.
    pub fn environment(&self, early: &Utf8Path) -> Environment {
        Environment {
            scope: variable("SYSTEMD_SCOPE"),
            in_initrd: variable("SYSTEMD_IN_INITRD"),
            virtualization: variable("SYSTEMD_VIRTUALIZATION"),
            container: variable("container"),
            below_user_runtime_directory: variable("XDG_RUNTIME_DIR")
                .is_some_and(|d| d.starts_with('/') && early.starts_with(d)),
        }
    }

    /// What the machine's files say of it.
    pub fn files(&self) -> Files {
        Files {
            initrd_release: self.path(INITRD_RELEASE).exists(),
            osrelease: self.text(OSRELEASE).trim().to_owned(),
            pid1_container: self
                .text(PID1_ENVIRONMENT)
                .split('\0')
                .find_map(|v| v.strip_prefix("container=").map(str::to_owned)),
            container_marker: CONTAINER_MARKERS.iter().any(|m| self.path(m).exists()),
            init_executable: self.is_executable(INIT),
        }
    }

    /// A file's text, empty where it cannot be read: for facts that are then simply unknown.
    fn text(&self, absolute: &str) -> String {
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
    // What the kernel says once a package upgrade has put a new file in its place.
    let path = path.as_str().trim_end_matches(" (deleted)");
    Ok(path.into())
}

/// Opens for reading; a FIFO that nobody writes to does not hold us up.
fn open_without_blocking(path: &Utf8Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
}

/// An environment variable; what is not UTF-8 in it can only be a value that we do not know.
fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|v| v.to_string_lossy().into_owned())
}
