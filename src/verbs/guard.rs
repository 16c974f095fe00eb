//! `guard`: keep the status file of binfmt_misc from being written, in this distro's own mount
//! namespace. Whatever here empties the table does it by writing `-1` there, and systemd-shutdown
//! does it last of all, when no unit is left to mend it. The mount needs no undoing: it ends with
//! the distro.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::Context;
use camino::Utf8Path;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::statvfs::{statvfs, FsFlags};

use crate::host::{Host, BINFMT_MISC, GUARD_FILE};
use crate::registry::Table;

/// Binds a read-only file over the status file, unless something already is.
///
/// # Errors
/// binfmt_misc is not mounted, or a mount fails; then the status file is as it was.
pub fn guard(host: &Host) -> anyhow::Result<()> {
    // Two at once would mount twice.
    let _lock = Table::open(host)?.lock();
    let table = host.path(BINFMT_MISC);
    let status = table.join("status");
    let file = host.path(GUARD_FILE);
    if is_bound_over(&status, &table)? {
        return match is_half_done(&status, &file) {
            true => make_read_only(&status),
            false => Ok(()),
        };
    }
    let state = fs::read_to_string(&status).with_context(|| format!("reading {status}"))?;
    host.write(GUARD_FILE, &state)?;

    bind(&file, &status).with_context(|| format!("binding {file} over {status}"))?;
    make_read_only(&status).inspect_err(|_| {
        // Nothing more can be done than to try; the first error is the one to report.
        let _ = umount2(status.as_str(), MntFlags::MNT_DETACH);
    })
}

/// A file that is bound over another one lies on a file system of its own. Asking the files and
/// not the table of mounts is right, too, where one mount hides another.
fn is_bound_over(status: &Utf8Path, table: &Utf8Path) -> anyhow::Result<bool> {
    let device = |path: &Utf8Path| {
        fs::metadata(path)
            .map(|m| m.dev())
            .with_context(|| format!("looking at {path}"))
    };
    Ok(device(status)? != device(table)?)
}

/// Whether an earlier run was killed between its two steps.
fn is_half_done(status: &Utf8Path, file: &Utf8Path) -> bool {
    let identity = |path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let read_only = statvfs(status.as_str()).map(|s| s.flags().contains(FsFlags::ST_RDONLY));
    read_only == Ok(false) && identity(status) == identity(file)
}

fn bind(file: &Utf8Path, over: &Utf8Path) -> nix::Result<()> {
    let none: Option<&str> = None;
    mount(
        Some(file.as_str()),
        over.as_str(),
        none,
        MsFlags::MS_BIND,
        none,
    )
}

fn make_read_only(mounted: &Utf8Path) -> anyhow::Result<()> {
    let none: Option<&str> = None;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, mounted.as_str(), none, flags, none)
        .with_context(|| format!("making {mounted} read-only"))
}
