//! Repairs the table, so that Windows programs go to /init and own rules are registered: at once by
//! a stand-in that is in nobody's way, then for good by `settle`. No launch fails in between,
//! because there is always one entry or the other.

use std::mem;

use anyhow::{bail, Context, Error};

use crate::binfmt_misc::{Listed, Table};
use crate::host::{Host, INIT, INTEROP};
use crate::interop::{self, LATE, NAME, STAND_IN};
use crate::machine;
use crate::own::Record;

/// Registers the stand-in if Windows programs do not go to /init as they should, and returns what was
/// done. The entry itself is left to `settle`, as others may be about to register that name.
///
/// # Errors
/// The table cannot be read; /init is missing; or the kernel refuses something.
pub fn cover(host: &Host, table: &Table) -> anyhow::Result<Option<String>> {
    if !interop::needs_stand_in(&table.entries()?) {
        return Ok(None);
    }
    let _lock = table.lock();
    let entries = table.entries()?;
    // Another of our processes was quicker.
    if !interop::needs_stand_in(&entries) {
        return Ok(None);
    }
    stand_in(host, table, &entries)?;
    let who = match interop::first(&entries) {
        None => "nobody".to_owned(),
        Some(first) if first.entry.interpreter == INIT => format!("{} without P", first.name),
        Some(first) => first.name.clone(),
    };
    Ok(Some(format!(
        "Windows programs went to {who}; {STAND_IN} takes them until the table is quiet"
    )))
}

/// Puts the stand-in first, unless it already is.
fn stand_in(host: &Host, table: &Table, entries: &[Listed]) -> anyhow::Result<()> {
    require_init(host)?;
    let first = interop::first(entries);
    if first.is_some_and(|first| first.name == STAND_IN && first.entry == interop::wanted()) {
        return Ok(());
    }
    table.unregister(STAND_IN)?;
    table.register(&interop::wanted().rule(STAND_IN))
}

fn require_init(host: &Host) -> anyhow::Result<()> {
    if !machine::has_init(host) {
        let init = host.path(INIT);
        bail!("{init}: not an executable file that WSL has mounted, so this is not a WSL2 distro");
    }
    Ok(())
}

/// The result of `settle`.
#[derive(Default)]
pub struct Settled {
    /// What was done, in words; usually nothing.
    pub deeds: Vec<String>,
    /// What failed, and why.
    pub problems: Vec<Error>,
    /// Whether the records of own rules could not be read, so that nothing was done about these.
    pub unread: bool,
}

/// What takes more than one look at the table to judge.
#[derive(Default)]
pub struct Pending {
    /// Whether there will be another look, which a single `restore` does not wait for.
    pub again: bool,
    /// Misplaced rules of others, whose owner may be about to put them ahead.
    pub foreign: Vec<String>,
    /// Missing own rules: removed on purpose, or just being registered again by somebody.
    pub missing: Vec<String>,
}

impl Pending {
    /// Whether another look is needed.
    pub fn is_any(&self) -> bool {
        !self.foreign.is_empty() || !self.missing.is_empty()
    }
}

/// Puts the table in order. Own rules are registered, see `Record::heal`. If the table is `quiet`,
/// WSLInterop is registered as WSL has it, ahead of all entries that take ordinary Windows programs,
/// and the stand-in is removed; otherwise who writes may be about to register that name, and the
/// stand-in has to do. Entries with a longer magic are put ahead of either: one with `F` only by
/// its owner, whose file it holds; one without `F` by others too, if it was `pending` before, or if
/// there is no look after this one.
pub fn settle(
    host: &Host,
    table: &Table,
    flush: bool,
    quiet: bool,
    pending: &mut Pending,
) -> Settled {
    let _lock = table.lock();
    let mut settled = Settled::default();
    let mut records = Record::read_all(host).unwrap_or_else(|error| {
        settled.problems.push(error);
        settled.unread = true;
        Vec::new()
    });
    let missing = mem::take(&mut pending.missing);
    for record in &mut records {
        record.take_up_beside(host, table);
        let (deeds, problems) = record.heal(host, table, flush, &missing, &mut pending.missing);
        settled.deeds.extend(deeds);
        settled.problems.extend(problems);
    }
    let result = match quiet {
        true => settle_entry(host, table, &mut settled)
            .and_then(|()| put_ahead(table, &mut records, pending, &mut settled))
            .and_then(|()| drop_stand_in(table, &mut settled)),
        false => put_ahead(table, &mut records, pending, &mut settled)
            .and_then(|()| stand_by(host, table)),
    };
    settled.problems.extend(result.err());
    for record in &records {
        settled.problems.extend(record.write(host).err());
    }
    settled
}

/// Removes the stand-in, if WSLInterop is in place.
fn drop_stand_in(table: &Table, settled: &mut Settled) -> anyhow::Result<()> {
    let mut entries = table.entries()?;
    let stand_in = interop::find(&entries, STAND_IN);
    if stand_in.is_none_or(|entry| entry.interpreter != INIT) {
        return Ok(());
    }
    entries.retain(|listed| listed.name != STAND_IN);
    if interop::needs_stand_in(&entries) {
        bail!(
            "Windows programs would not go to {NAME}, changed again at once, so {STAND_IN} stays"
        );
    }
    table.unregister(STAND_IN)?;
    let deed = format!("removed {STAND_IN}, no longer needed beside {NAME}");
    settled.deeds.push(deed);
    Ok(())
}

/// Leaves WSLInterop to others for now, and puts the stand-in first, unless the first entry that
/// takes Windows programs is as good. An own rule that was just registered may take them.
fn stand_by(host: &Host, table: &Table) -> anyhow::Result<()> {
    let entries = table.entries()?;
    require_untouched(table, &entries)?;
    let is_as_good =
        |first: &Listed| first.entry.interpreter == INIT && interop::has_flags(&first.entry);
    match interop::first(&entries).is_some_and(is_as_good) {
        true => Ok(()),
        false => stand_in(host, table, &entries),
    }
}

/// Fails, without a stand-in, if somebody has changed the entry.
fn require_untouched(table: &Table, entries: &[Listed]) -> anyhow::Result<()> {
    if let Some(fault) = interop::find(entries, NAME).and_then(interop::fault) {
        table.unregister(STAND_IN)?;
        bail!("{NAME} {fault}: somebody changed it, leaving it alone");
    }
    Ok(())
}

/// Registers the entry, with its flags and ahead of its rivals.
fn settle_entry(host: &Host, table: &Table, settled: &mut Settled) -> anyhow::Result<()> {
    let entries = table.entries()?;
    require_untouched(table, &entries)?;
    match interop::find(&entries, NAME) {
        Some(entry) => {
            let rivals = interop::rivals_ahead(&entries);
            let lost = !interop::has_flags(entry);
            if lost || !rivals.is_empty() {
                stand_in(host, table, &entries)?;
                table.unregister(NAME)?;
                table.register(&interop::wanted().rule(NAME))?;
                settled.deeds.push(match lost {
                    true => format!("{NAME} had flags '{}', registered it again", entry.flags),
                    false => {
                        format!("{} took Windows programs, put {NAME} first", rivals.join(", "))
                    }
                });
            }
        }
        None => {
            require_init(host)?;
            match table.register(&interop::wanted().rule(NAME)) {
                Ok(()) => settled.deeds.push(format!("{NAME} was missing, registered it")),
                // A peer without our lock was quicker: check what is registered now.
                Err(error) if table.read(NAME)?.is_none() => return Err(error),
                Err(_) => {}
            }
        }
    }
    let standing = table.read(NAME)?;
    if !standing.is_some_and(|e| interop::fault(&e).is_none() && interop::has_flags(&e)) {
        bail!("{NAME}: registered, but reads back differently");
    }
    if table.read(LATE)?.is_some_and(|e| e.interpreter == INIT) {
        table.unregister(LATE)?;
        let deed = format!("removed {LATE}, not needed beside {NAME}");
        settled.deeds.push(deed);
    }
    Ok(())
}

/// Finishes the work of a process that was killed while it put an entry ahead.
fn finish(table: &Table, settled: &mut Settled) -> anyhow::Result<()> {
    let entries = table.entries()?;
    for (name, left) in interop::unfinished(&entries) {
        if left.entry.holds_its_file() {
            continue;
        }
        if table.read(name)?.is_none() {
            table.register(&left.entry.rule(name))?;
        }
        table.unregister(&left.name)?;
        let deed = format!("removed {}, no longer needed beside {name}", left.name);
        settled.deeds.push(deed);
    }
    Ok(())
}

/// Puts the entries with a longer magic ahead.
fn put_ahead(
    table: &Table,
    records: &mut [Record],
    pending: &mut Pending,
    settled: &mut Settled,
) -> anyhow::Result<()> {
    finish(table, settled)?;
    let entries = table.entries()?;
    let before = mem::take(&mut pending.foreign);
    for listed in interop::misplaced(&entries) {
        let name = &listed.name;
        let own = records.iter_mut().find(|record| record.has(listed.inode));
        match own {
            None if listed.entry.holds_its_file() => {}
            None if pending.again && !before.contains(name) => pending.foreign.push(name.clone()),
            own => {
                match table.replace(name, listed.inode, &interop::stand_in_of(name), &listed.entry)
                {
                    Ok(inode) => {
                        if let Some(own) = own {
                            own.moved(listed.inode, inode);
                        }
                        let deed = format!("put {name} ahead of {NAME}, which is less specific");
                        settled.deeds.push(deed);
                    }
                    Err(error) => settled.problems.push(error.context(format!(
                        "putting {name} ahead of {NAME}, which is less specific"
                    ))),
                }
            }
        }
    }
    Ok(())
}

/// Records the entry's inode after the table was settled. Another inode later means that the entry
/// was removed in between.
pub fn note_interop(host: &Host, table: &Table) -> anyhow::Result<()> {
    // Other processes of this distro may be doing the same.
    let _lock = table.lock();
    let inode = table.inode(NAME)?.unwrap_or_default().to_string();
    match host.text(INTEROP) == inode {
        true => Ok(()),
        false => host.write(INTEROP, &inode).context("recording the entry's inode"),
    }
}

/// Whether the entry has been removed since its inode was recorded.
pub fn interop_went(host: &Host, table: &Table) -> bool {
    match host.own_text(INTEROP).map(|noted| noted.parse::<u64>()) {
        Ok(Ok(noted)) => table.inode(NAME).ok() != Some(Some(noted)),
        // Not recorded yet.
        Ok(Err(_)) => false,
        // Unknown, so assume it.
        Err(_) => true,
    }
}
