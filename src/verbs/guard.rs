//! `guard`: keep the status file of binfmt_misc from being written to, in all mount namespaces of
//! this distro. The table is emptied by writing `-1` there, and systemd-shutdown does it last of
//! all, when no unit is left to repair it. The mount is not undone: it ends with the distro. The
//! guard also records what has to be known later about the distro's start.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use anyhow::Context;
use camino::Utf8Path;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sched::{setns, unshare, CloneFlags};
use nix::unistd::{chroot, fchdir};

use crate::binfmt_misc::{is_failed_call, Table};
use crate::host::{
    Host, BEFORE, BINFMT_MISC, BOOT_CONF, DISTRO_ROOT, EARLY, GUARD_FILE, INTEROP, LOCAL_UNITS,
    MOUNT_NAMESPACES, OWN_ROOT, RUN,
};
use crate::log::Log;
use crate::machine;
use crate::own::{self, Unit};
use crate::repair;
use crate::verbs::generate::in_force;

/// Binds a read-only file over the status file, unless something is already bound there, and
/// records the state in which the distro starts. A missing table is a warning, not an error.
///
/// # Errors
/// A mount fails, which leaves the status file unchanged; or something cannot be recorded.
pub fn guard(host: &Host, log: &Log) -> anyhow::Result<()> {
    join_distro(host)?;
    let mut result = note_settings(host).and(keep_drop_ins(host));
    let table = match Table::open(host) {
        Ok(table) => table,
        Err(error) if is_failed_call(&error) => return Err(error),
        Err(error) => {
            log.warning(&format!("{error:#}; will guard it when this distro stops"));
            return result;
        }
    };
    if let Ok(false) = is_there(host, BEFORE) {
        result = own::take_over(host, &table)
            .context("recording what this distro has registered so far")
            .and(result);
    }
    type Note = fn(&Host, &Table) -> anyhow::Result<()>;
    let notes: [(&str, Note); 2] = [(BEFORE, own::note_before), (INTEROP, repair::note_interop)];
    for (path, note) in notes {
        result = result.and(match is_there(host, path) {
            Ok(true) => Ok(()),
            Ok(false) => note(host, &table),
            Err(error) => Err(error),
        });
    }
    result = bind_over_status(host).and(result);
    if in_force(host).interop_enabled {
        result = result.and(repair::cover(host, &table).map(drop));
    }
    result
}

fn is_there(host: &Host, absolute: &str) -> anyhow::Result<bool> {
    let path = host.path(absolute);
    path.try_exists().with_context(|| format!("looking at {path}"))
}

/// Records wsl.conf as it is when the distro starts, for later runs of the generator.
fn note_settings(host: &Host) -> anyhow::Result<()> {
    if is_there(host, BOOT_CONF)? {
        return Ok(());
    }
    host.write(BOOT_CONF, &in_force(host).text())
}

/// Keeps copies of the drop-ins: the guard's mount stays if the generator is removed or masked
/// while the distro runs, and would make systemd-binfmt and binfmt-support fail without them.
fn keep_drop_ins(host: &Host) -> anyhow::Result<()> {
    let [_, runtime, _] = LOCAL_UNITS;
    for unit in Unit::ALL {
        let path = format!("{}.service.d/10-wsl-interop.conf", unit.name());
        let text = host.own_text(&format!("{EARLY}/{path}"))?;
        if !text.is_empty() {
            host.write(&format!("{runtime}/{path}"), &text)?;
        }
    }
    Ok(())
}

/// Makes the mount.
///
/// # Errors
/// binfmt_misc is not mounted, or a mount fails, which leaves the status file unchanged.
pub fn bind_over_status(host: &Host) -> anyhow::Result<()> {
    // Without the lock, two processes at once would mount twice.
    let _lock = Table::open(host)?.lock();
    let table = host.path(BINFMT_MISC);
    let status = table.join("status");
    let file = host.path(GUARD_FILE);
    // A killed run may have left this mount.
    while umount2(file.as_str(), MntFlags::MNT_DETACH).is_ok() {}
    if is_bound_over(&status, &table)? {
        return Ok(());
    }
    let state = fs::read_to_string(&status).with_context(|| format!("reading {status}"))?;
    host.write(GUARD_FILE, &state)?;
    bind_from_aside(host, &file, &status)?;
    if is_bound_over(&status, &table)? {
        return Ok(());
    }

    // A distro may have a second mount namespace. A new mount propagates there; a later change of
    // its flags does not. So the file has to be read-only before it is bound over the status file.
    bind(&file, &file)?;
    let bound = make_read_only(&file).and_then(|()| bind(&file, &status));
    // The mount over the status file does not need this one.
    let unbound = umount2(file.as_str(), MntFlags::MNT_DETACH);
    bound.and(unbound.with_context(|| format!("unmounting {file}")))
}

/// Makes the mount in another mount namespace, from where only the last step propagates to the
/// distro: one change instead of four. After five changes in a second, systemd mounts nothing for
/// the rest of it, and a boot took 0.8 seconds longer. Where the table's mount does not propagate,
/// nothing happens.
///
/// # Errors
/// There is no way back.
fn bind_from_aside(host: &Host, file: &Utf8Path, status: &Utf8Path) -> anyhow::Result<()> {
    let [_, own] = MOUNT_NAMESPACES;
    let [namespace, root] = [own, OWN_ROOT].map(|path| File::open(host.path(path)));
    let (Ok(namespace), Ok(root)) = (namespace, root) else {
        return Ok(());
    };
    if unshare(CloneFlags::CLONE_NEWNS).is_err() {
        return Ok(());
    }
    let none: Option<&str> = None;
    let run = host.path(RUN);
    // If a step fails, there is still the other way.
    let _ = mount(none, run.as_str(), none, MsFlags::MS_PRIVATE, none)
        .map_err(anyhow::Error::from)
        .and_then(|()| bind(file, file))
        .and_then(|()| make_read_only(file))
        .and_then(|()| bind(file, status));
    enter(namespace, root).context("returning to the distro's mount namespace")
}

/// Joins the distro's mount namespace. A drop-in for all services may have given the unit one of
/// its own, where a mount would guard nothing.
///
/// # Errors
/// The kernel does not allow it.
pub fn join_distro(host: &Host) -> anyhow::Result<()> {
    if !machine::is_elsewhere_mounted(host) {
        return Ok(());
    }
    let [distro, _] = MOUNT_NAMESPACES;
    let [mounts, root] = [distro, DISTRO_ROOT].map(|path| host.path(path));
    let open = |path| File::open(path).with_context(|| format!("opening {path}"));
    enter(open(&mounts)?, open(&root)?)
        .with_context(|| format!("joining the mount namespace {mounts}"))
}

fn enter(namespace: File, root: File) -> nix::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNS).and_then(|()| fchdir(root)).and_then(|()| chroot("."))
}

/// Whether a file of another file system is bound over the status file. Unlike the list of mounts,
/// this is right even if one mount hides another.
fn is_bound_over(status: &Utf8Path, table: &Utf8Path) -> anyhow::Result<bool> {
    let device = |path: &Utf8Path| {
        fs::metadata(path).map(|m| m.dev()).with_context(|| format!("looking at {path}"))
    };
    Ok(device(status)? != device(table)?)
}

fn bind(file: &Utf8Path, over: &Utf8Path) -> anyhow::Result<()> {
    let none: Option<&str> = None;
    mount(Some(file.as_str()), over.as_str(), none, MsFlags::MS_BIND, none)
        .with_context(|| format!("binding {file} over {over}"))
}

fn make_read_only(mounted: &Utf8Path) -> anyhow::Result<()> {
    let none: Option<&str> = None;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, mounted.as_str(), none, flags, none)
        .with_context(|| format!("making {mounted} read-only"))
}
