//! A Debian tree to measure programs in, beside those that come from Debian itself.

use std::path::Path;

use anyhow::Context;
use nix::sched::{unshare, CloneFlags};

use super::debian::tree;
use super::machine::directory;
use super::mount;

/// Turns this process's root into a tree of that suite with these packages. `lay_out` puts what else
/// is wanted into its `/mnt`, which is thrown away when the process ends, as is `/run`.
///
/// # Errors
/// The tree cannot be made, or this process may not mount.
pub fn enter_tree(
    suite: &str,
    packages: &str,
    lay_out: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let tree = tree(&directory()?.join("bench"), suite, packages, None)?;
    unshare(CloneFlags::CLONE_NEWNS).context("unsharing a mount namespace")?;
    mount("none", "/", "rprivate", "")?;
    let inside = |name: &str| tree.join(name).to_string_lossy().into_owned();
    for directory in ["mnt", "run"] {
        mount("tmpfs", &inside(directory), "tmpfs", "mode=755")?;
    }
    mount("proc", &inside("proc"), "proc", "")?;
    mount("/dev", &inside("dev"), "rbind", "")?;
    lay_out(&tree.join("mnt"))?;
    nix::unistd::chroot(&tree).context("changing the root directory")?;
    Ok(std::env::set_current_dir("/")?)
}
