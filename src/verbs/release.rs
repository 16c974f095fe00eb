//! `release`: unregister what this distro has registered from binfmt.d, so that it does not stay
//! in the table of the VM, and with `F` pin the distro's file system there, when it stops. Only
//! that: a peer may since have registered the same names, which shows in their inodes.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;

use anyhow::Context;

use crate::host::{Host, BINFMT_D, REGISTERED};
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
    let remembered: String = rule_names(host)
        .iter()
        .filter(|name| *name != NAME)
        .filter_map(|name| Some(format!("{} {name}\n", table.inode(name)?)))
        .collect();
    host.write(REGISTERED, &remembered)
}

/// The names of all rules in binfmt.d(5). Of files with one name that in the first directory
/// counts; what cannot be read, systemd-binfmt could not read either.
fn rule_names(host: &Host) -> Vec<String> {
    let mut files = BTreeMap::new();
    for directory in BINFMT_D {
        let listed = host.path(directory).read_dir_utf8();
        for entry in listed.into_iter().flatten().flatten() {
            let name = entry.file_name().to_owned();
            if name.ends_with(".conf") {
                files
                    .entry(name)
                    .or_insert_with_key(|name| format!("{directory}/{name}"));
            }
        }
    }
    files
        .values()
        .filter_map(|path| host.read(path).ok())
        .flat_map(|bytes| rules(&String::from_utf8_lossy(&bytes)))
        .collect()
}

/// The names of the rules in one file.
fn rules(text: &str) -> Vec<String> {
    let name = |line: &str| {
        let mut rule = line.trim().chars();
        let between = rule.next().filter(|c| !"#;".contains(*c))?;
        let name = rule.as_str().split(between).next()?;
        // The kernel takes no other names, and a path must not lead out of the table.
        let valid = !["", ".", "..", "register", "status"].contains(&name) && !name.contains('/');
        valid.then(|| name.to_owned())
    };
    text.lines().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_named_in_their_first_field() {
        let text = "# :no:M::x::/x:\n; :no:M::x::/x:\n\n:a:M::x::/x:\n  |b:c|M||x||/x|\n:d\n";
        assert_eq!(rules(text), ["a", "b:c", "d"]);
        assert!(rules("::M::x::/x:\n:../x:M::x::/x:\n:status:M::x::/x:\n:").is_empty());
    }
}
