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
    let ours = |line| ours(line, &names, |name| table.inode(name));
    let mut result = Ok(());
    for name in remembered.lines().filter_map(ours) {
        result = result.and(table.unregister(name));
    }
    result.and_then(|()| fs::remove_file(&path).with_context(|| format!("removing {path}")))
}

/// The entry that a line is about, if it still is. What the table does not list, is none: it may be
/// a path that leads out of it.
fn ours<'a>(
    line: &str,
    names: &'a [String],
    inode: impl Fn(&str) -> Option<u64>,
) -> Option<&'a String> {
    let (remembered, name) = line.split_once(' ')?;
    let name = names.iter().find(|listed| *listed == name)?;
    (name != NAME && inode(name) == remembered.parse().ok()).then_some(name)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_entries_that_are_what_they_were_are_ours() {
        let names = ["a", "b c", NAME].map(str::to_owned);
        let inode = |name: &str| Some(name.len() as u64);
        let ours = |line| ours(line, &names, inode);
        assert_eq!(ours("1 a"), Some(&names[0]));
        assert_eq!(ours("3 b c"), Some(&names[1]));
        for line in ["2 a", "10 WSLInterop", "4 ../a", "x a", "x y\0", "a", ""] {
            assert_eq!(ours(line), None, "{line:?}");
        }
    }
}
