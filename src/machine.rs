//! Facts about the machine, from its files and the environment: read here, judged elsewhere.

use std::fs;
use std::io;

use anyhow::Context;
use camino::Utf8Path;

use crate::host::{
    is_missing, variable, Host, CONTAINER_MARKERS, GUARD_FILE, INIT, INITRD_RELEASE, LOCAL_UNITS,
    MOUNT_INFOS, MOUNT_NAMESPACES, OSRELEASE, PID1_CONTAINER, PID1_ENVIRONMENT, PRIVATE_SOCKET,
    UNIX_SOCKETS, VENDOR_UNITS, WSL_GENERATOR,
};
use crate::mounts;
use crate::plan::OthersFiles;
use crate::wsl::{Environment, Files};

/// What systemd says about the machine in the generator's environment, and where the output goes.
pub fn environment(early: &Utf8Path) -> Environment {
    Environment {
        scope: variable("SYSTEMD_SCOPE"),
        in_initrd: variable("SYSTEMD_IN_INITRD"),
        virtualization: variable("SYSTEMD_VIRTUALIZATION"),
        container: variable("container"),
        below_user_runtime_directory: variable("XDG_RUNTIME_DIR")
            .is_some_and(|d| d.starts_with('/') && early.starts_with(d)),
    }
}

/// What the machine's files say about it.
pub fn files(host: &Host) -> Files {
    Files {
        initrd_release: host.path(INITRD_RELEASE).exists(),
        osrelease: host.text(OSRELEASE).trim().to_owned(),
        pid1_container: pid1_variable(host, "container")
            // Only root can read its environment.
            .unwrap_or_else(|_| Some(host.text(PID1_CONTAINER).trim().to_owned())),
        container_marker: CONTAINER_MARKERS.iter().any(|m| host.path(m).exists()),
        init: has_init(host),
        guarded: host.path(GUARD_FILE).exists(),
    }
}

/// Whether WSL's interop binary is there: an executable file that is a mount, as a container may
/// have a file of its own there. If the mounts cannot be read, any executable file counts.
pub fn has_init(host: &Host) -> bool {
    let [_, own] = MOUNT_INFOS;
    host.is_executable(INIT)
        && fs::read(host.path(own))
            .map_or(true, |mounts| mounts::on(&String::from_utf8_lossy(&mounts), INIT).is_some())
}

/// A variable of PID 1's environment, which WSL sets.
///
/// # Errors
/// The environment cannot be read, which only root can.
pub fn pid1_variable(host: &Host, name: &str) -> io::Result<Option<String>> {
    let environment = host.read(PID1_ENVIRONMENT)?;
    let environment = String::from_utf8_lossy(&environment);
    let value = |variable: &str| variable.strip_prefix(name)?.strip_prefix('=').map(str::to_owned);
    Ok(environment.split('\0').find_map(value))
}

/// The files of WSL, the vendor and the admin that affect what to emit. One that cannot be
/// inspected is reported, and counts as existing, so that nothing of the admin's is masked.
pub fn others_files(host: &Host, mut report: impl FnMut(String)) -> OthersFiles {
    let mut doubt = |path: &str, error: io::Error| {
        // Something other than a regular file is not a failed call.
        let doubtful = error.raw_os_error().is_some() && !is_missing(&error);
        if doubtful {
            report(format!("looking at {}: {error}", host.path(path)));
        }
        doubtful
    };
    let [vendor, ..] = VENDOR_UNITS;
    let condition = "systemd-binfmt.service.d/wsl.conf";
    let theirs = format!("{vendor}/{condition}");
    let vendor_wsl_conf = host.read(&theirs).unwrap_or_else(|error| {
        doubt(&theirs, error);
        Vec::new()
    });
    let mut is_there = |path: &str| match fs::symlink_metadata(host.path(path)) {
        Ok(_) => true,
        Err(error) => doubt(path, error),
    };
    let mut drop_in = |directories: &[&str], name: &str| {
        directories.iter().any(|d| is_there(&format!("{d}/{name}")))
    };
    let all = [LOCAL_UNITS.as_slice(), &VENDOR_UNITS].concat();
    OthersFiles {
        systemd_binfmt_override: drop_in(&all, "systemd-binfmt.service.d/override.conf"),
        binfmt_support_override: drop_in(&all, "binfmt-support.service.d/override.conf"),
        local_wsl_conf: drop_in(&LOCAL_UNITS, condition),
        wsl_generator: is_there(WSL_GENERATOR),
        vendor_wsl_conf: String::from_utf8_lossy(&vendor_wsl_conf).into_owned(),
    }
}

/// Whether no other distro of the VM runs systemd. The list shows the sockets of all distros, which
/// share a network namespace.
///
/// # Errors
/// The sockets cannot be listed.
pub fn is_alone(host: &Host) -> anyhow::Result<bool> {
    let sockets = unix_sockets(host)?;
    let systemds = listening(&sockets).filter(|path| *path == PRIVATE_SOCKET);
    Ok(systemds.count() <= 1)
}

/// The kernel's list of Unix sockets, proc_net(5).
///
/// # Errors
/// /proc is not mounted.
pub fn unix_sockets(host: &Host) -> anyhow::Result<String> {
    let path = host.path(UNIX_SOCKETS);
    let sockets = fs::read(&path).with_context(|| format!("reading {path}"))?;
    Ok(String::from_utf8_lossy(&sockets).into_owned())
}

/// The paths of the listening sockets. The fields are Num, RefCount, Protocol, Flags, Type, St,
/// Inode and Path; a listening socket has the flag `__SO_ACCEPTCON`.
pub fn listening(sockets: &str) -> impl Iterator<Item = &str> {
    sockets.lines().filter_map(|line| {
        let flags = line.split_ascii_whitespace().nth(3)?;
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let path = line.find(" /").and_then(|at| line.get(at + 1..))?;
        (flags & 0x10000 != 0).then_some(path)
    })
}

/// Whether this process is known to have other mounts than the distro.
pub fn is_elsewhere_mounted(host: &Host) -> bool {
    let [distro, own] = MOUNT_NAMESPACES.map(|path| fs::read_link(host.path(path)));
    matches!((distro, own), (Ok(distro), Ok(own)) if distro != own)
}
