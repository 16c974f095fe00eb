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
    let ours = |line: &&str| {
        let (inode, name) = line.split_once(' ')?;
        (table.inode(name) == inode.parse().ok() && name != NAME).then_some(name.to_owned())
    };
    let mut result = Ok(());
    for name in remembered.lines().filter_map(|line| ours(&line)) {
        result = result.and(table.unregister(&name));
    }
    result.and_then(|()| fs::remove_file(&path).with_context(|| format!("removing {path}")))
}

/// Remembers what systemd-binfmt has just registered, for `release`. After a stop, which is told
/// by the service's result, there is nothing to remember: what then has those names is a peer's.
///
/// # Errors
/// binfmt_misc is not mounted, or it cannot be written down.
pub fn remember(host: &Host, service_result: Option<&str>) -> anyhow::Result<()> {
    if service_result == Some("success") {
        return Ok(());
    }
    let table = Table::open(host)?;
    let remembered: String = binfmt_d::rules(host)
        .iter()
        .filter(|rule| rule.name != NAME)
        .filter_map(|rule| Some(format!("{} {}\n", table.inode(&rule.name)?, rule.name)))
        .collect();
    host.write(REGISTERED, &remembered)
}
