//! `release`: unregister what this distro has registered from binfmt.d, so that it does not stay
//! in the table of the VM, and with `F` pin the distro's file system there, when it stops. Only
//! that: a peer may since have registered the same names, which shows in their inodes.

use std::fs;
use std::io::ErrorKind;

use anyhow::Context;

use crate::binfmt_d;
use crate::host::{Host, REGISTERED};
use crate::registry::Table;
use crate::verbs::restore::NAME;

/// Unregisters what is remembered, as far as it still is what was remembered. `WSLInterop` is
/// everybody's, and stays.
///
/// # Errors
/// binfmt_misc is not mounted, or an entry cannot be removed; the others are.
pub fn release(host: &Host) -> anyhow::Result<()> {
    let path = host.path(REGISTERED);
    let remembered = match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        text => text.with_context(|| format!("reading {path}"))?,
    };
    let table = Table::open(host)?;
    let names = table.names()?;
    let release = |inode: &str, name| match table.inode(name)? {
        Some(there) if inode.parse() == Ok(there) => table.unregister(name),
        _ => Ok(()),
    };
    let mut result = Ok(());
    for (inode, name) in remembered.lines().filter_map(|line| line.split_once(' ')) {
        // What the table does not list is no entry: it may be a path that leads out of it.
        if name != NAME && names.iter().any(|listed| listed == name) {
            result = result.and(release(inode, name));
        }
    }
    result.and_then(|()| fs::remove_file(&path).with_context(|| format!("removing {path}")))
}

/// Remembers what systemd-binfmt has just registered, for `release`. After a stop, which is told
/// by the service's result, there is nothing to remember: what then has those names is a peer's.
///
/// # Errors
/// binfmt_misc is not mounted, or it cannot be written down; or not all of it can be read, and the
/// rest is written down.
pub fn remember(host: &Host, service_result: Option<&str>) -> anyhow::Result<()> {
    if service_result == Some("success") {
        return Ok(());
    }
    let table = Table::open(host)?;
    let (rules, mut errors) = binfmt_d::read(host);
    let mut remembered = String::new();
    for rule in rules.iter().filter(|rule| rule.name != NAME) {
        match table.inode(&rule.name) {
            Ok(Some(inode)) => remembered.push_str(&format!("{inode} {}\n", rule.name)),
            Ok(None) => {}
            Err(error) => errors.push(error),
        }
    }
    host.write(REGISTERED, &remembered)?;
    errors.into_iter().next().map_or(Ok(()), Err)
}
