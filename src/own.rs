//! This distro's own rules, from binfmt.d and update-binfmts(8). They are recorded below
//! /run/wsl-binfmt by name and inode, to tell them from what peers register under the same names.
//! They stay registered while the distro runs, and are unregistered when it stops.

use anyhow::{anyhow, Error};

use crate::binfmt_d;
use crate::binfmt_misc::{fits, is_failed_call, is_name, Entry, Table, Time};
use crate::host::{Host, BEFORE, FORMATS, INVOCATIONS, PRIVATE_SOCKET, STATE};
use crate::interop::{is_reserved, stand_in_of};
use crate::machine;

/// A service that registers rules.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unit {
    /// systemd-binfmt.service, from binfmt.d(5).
    SystemdBinfmt,
    /// binfmt-support.service, from the formats of update-binfmts(8).
    BinfmtSupport,
}

impl Unit {
    /// Both.
    pub const ALL: [Unit; 2] = [Unit::SystemdBinfmt, Unit::BinfmtSupport];

    /// The name, without `.service`.
    pub fn name(self) -> &'static str {
        match self {
            Unit::SystemdBinfmt => "systemd-binfmt",
            Unit::BinfmtSupport => "binfmt-support",
        }
    }

    fn record(self) -> String {
        format!("{STATE}/{}.rules", self.name())
    }

    /// When it was started, if it is active, by its RuntimeDirectory=: systemd creates that before
    /// the service's first command, and removes it after the last.
    fn started(self, host: &Host) -> anyhow::Result<Option<Time>> {
        host.modified(&format!("{STATE}/{}", self.name()))
    }

    /// The same, even without the drop-in that creates that directory: while the unit is active,
    /// systemd keeps a link with its invocation for journald. After a failure, as under WSL's lock,
    /// or a stop, there is none. Then the start of systemd is the earliest possible time, which is
    /// good enough if no other distro can have registered anything.
    fn started_at_all(self, host: &Host, alone: bool) -> anyhow::Result<Option<Time>> {
        if let Some(started) = self.started(host)? {
            return Ok(Some(started));
        }
        let link = format!("{INVOCATIONS}{}.service", self.name());
        match host.modified(&link)? {
            None if alone => host.modified(PRIVATE_SOCKET),
            started => Ok(started),
        }
    }

    /// Whether a rule is known to be no longer its own: update-binfmts(8) has removed the rule's
    /// file.
    fn has_forgotten(self, host: &Host, name: &str) -> bool {
        let file = host.path(&format!("{FORMATS}/{name}"));
        self == Unit::BinfmtSupport && file.try_exists().is_ok_and(|there| !there)
    }

    /// The names that it registers, with the rules if these are known; and the errors of what
    /// cannot be read.
    fn registers(self, host: &Host) -> (Vec<(String, Option<String>)>, Vec<Error>) {
        let (mut rules, errors) = match self {
            Unit::SystemdBinfmt => {
                let (rules, errors) = binfmt_d::read(host);
                // With bytes replaced, it would be another rule.
                let whole = |text: String| (!text.contains('\u{fffd}')).then_some(text);
                let rules = rules.into_iter().map(|rule| (rule.name, whole(rule.text)));
                (rules.collect(), errors)
            }
            Unit::BinfmtSupport => match host.list(FORMATS) {
                Ok(names) => (names.into_iter().map(|n| (n, None)).collect(), Vec::new()),
                Err(error) => {
                    let doing = format!("listing {}", host.path(FORMATS));
                    (Vec::new(), vec![Error::from(error).context(doing)])
                }
            },
        };
        rules.retain(|(name, _): &(String, _)| is_name(name) && !is_reserved(name));
        (rules, errors)
    }
}

/// Stands for the inode of an entry that was wiped, or that a peer has replaced. No entry has it.
const GONE: u64 = 0;

/// One rule of this distro's own.
#[derive(Clone, Debug, PartialEq)]
pub struct Own {
    /// The inode of its entry, or `GONE`.
    inode: u64,
    /// Whether a peer had an entry of this name before.
    shared: bool,
    /// The text that registers it.
    rule: String,
}

impl Own {
    /// The name of its entry.
    pub fn name(&self) -> &str {
        let between = self.rule.chars().next().unwrap_or(':');
        self.rule.split(between).nth(1).unwrap_or_default()
    }
}

/// Parses a record, ignoring lines that this program does not write.
fn parse(record: &str) -> Vec<Own> {
    let own = |line: &str| {
        let (inode, rest) = line.split_once(' ')?;
        let (shared, rule) = rest.split_once(' ')?;
        let own =
            Own { inode: inode.parse().ok()?, shared: shared == SHARED, rule: rule.to_owned() };
        (is_name(own.name()) && !is_reserved(own.name())).then_some(own)
    };
    record.lines().filter_map(own).collect()
}

const SHARED: &str = "shared";

fn format(rules: &[Own]) -> String {
    let line = |own: &Own| {
        let shared = if own.shared { SHARED } else { "-" };
        format!("{} {shared} {}\n", own.inode, own.rule)
    };
    rules.iter().map(line).collect()
}

/// The record of a service's rules.
#[derive(Debug)]
pub struct Record {
    unit: Unit,
    rules: Vec<Own>,
    changed: bool,
}

impl Record {
    /// Reads the record. Before the service starts and after it stops there is none.
    ///
    /// # Errors
    /// It exists, but cannot be read.
    pub fn read(host: &Host, unit: Unit) -> anyhow::Result<Record> {
        Ok(Record { unit, rules: parse(&host.own_text(&unit.record())?), changed: false })
    }

    /// Reads the records of all services.
    ///
    /// # Errors
    /// As above.
    pub fn read_all(host: &Host) -> anyhow::Result<Vec<Record>> {
        let all = Unit::ALL.into_iter();
        all.map(|unit| Record::read(host, unit)).collect()
    }

    /// Writes the record, if it has changed.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, host: &Host) -> anyhow::Result<()> {
        match self.changed {
            true => host.write(&self.unit.record(), &format(&self.rules)),
            false => Ok(()),
        }
    }

    /// The names of the recorded rules.
    pub fn names(&self) -> Vec<String> {
        self.rules.iter().map(|own| own.name().to_owned()).collect()
    }

    /// Whether no rules are recorded.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether the entry with this inode is this distro's own.
    pub fn has(&self, inode: u64) -> bool {
        inode != GONE && self.rules.iter().any(|own| own.inode == inode)
    }

    /// Notes that an own entry was registered again, with another inode.
    pub fn moved(&mut self, from: u64, to: u64) {
        for own in self.rules.iter_mut().filter(|own| own.inode == from) {
            own.inode = to;
            self.changed = true;
        }
    }

    /// Records what the service has registered since it was started, but not what is a peer's. If
    /// it succeeded, it had registered everything, and a missing entry was wiped since. Returns the
    /// errors of what could not be read; the rest is recorded.
    fn take_up(&mut self, host: &Host, table: &Table, succeeded: bool) -> Vec<Error> {
        let started = match self.unit.started(host) {
            Ok(Some(started)) => started,
            Ok(None) => {
                let directory = host.path(&format!("{STATE}/{}", self.unit.name()));
                return vec![anyhow!("{directory}: missing, as if the unit were not running")];
            }
            Err(error) => return vec![error],
        };
        let (rules, mut errors) = self.unit.registers(host);
        let before = host.own_text(BEFORE).unwrap_or_else(|error| {
            errors.push(error);
            String::new()
        });
        let mut taken: Vec<Own> = Vec::new();
        for (name, text) in rules {
            let inode = match table.identity(&name) {
                Ok(Some((inode, time))) if time >= started || self.has(inode) => inode,
                Ok(None) if succeeded => GONE,
                Ok(_) => continue,
                Err(error) => {
                    errors.push(error);
                    continue;
                }
            };
            let entry = table.read(&name).ok().flatten();
            let rule = entry.map(|entry| entry.rule(&name)).or(text);
            taken.retain(|own| own.name() != name);
            taken.extend(rule.map(|rule| Own {
                inode,
                shared: before.lines().any(|line| line == name),
                rule,
            }));
        }
        let known = |own: &Own| taken.iter().any(|new| new.name() == own.name());
        let stale: Vec<_> = self.rules.drain(..).filter(|own| !known(own)).collect();
        self.rules = taken;
        self.changed = true;
        // Whatever may still be registered is still this distro's.
        let removed = match succeeded && errors.is_empty() {
            true => unregister(table, &stale).map_err(|error| errors.push(error)),
            false => Err(()),
        };
        if removed.is_err() {
            self.rules.extend(stale);
        }
        errors
    }

    /// Records what update-binfmts(8) has registered outside the running service, as it does when a
    /// package is installed: right after writing its own file of that name. An entry that was
    /// handed back to a peer does not count.
    pub fn take_up_beside(&mut self, host: &Host, table: &Table) {
        if self.unit != Unit::BinfmtSupport {
            return;
        }
        for name in host.names(FORMATS) {
            let written = host.modified(&format!("{FORMATS}/{name}")).ok().flatten();
            let registered = table.identity(&name).ok().flatten();
            let (Some(written), Some((inode, time))) = (written, registered) else {
                continue;
            };
            let at_once = time >= written && time.0 - written.0 <= 1;
            if at_once && !self.has(inode) && !is_reserved(&name) {
                let Ok(Some(entry)) = table.read(&name) else {
                    continue;
                };
                if handed_back(&entry).is_none() {
                    self.push(inode, false, entry.rule(&name));
                }
            }
        }
    }

    fn push(&mut self, inode: u64, shared: bool, rule: String) {
        let own = Own { inode, shared, rule };
        self.rules.retain(|other| other.name() != own.name());
        self.rules.push(own);
        self.changed = true;
    }

    /// Records what was registered under the service's names since it was started, but not
    /// recorded: before this program was installed, or outside the unit. What that replaced can no
    /// longer be known. Unless this distro is `alone`, a peer is assumed to share it, and may have
    /// registered its own since.
    fn take_up_late(&mut self, host: &Host, table: &Table, alone: bool) -> anyhow::Result<()> {
        let Some(start) = self.unit.started_at_all(host, alone)? else {
            return Ok(());
        };
        let before = host.own_text(BEFORE)?;
        // Both services may have rules of one name.
        let written = Record::read_all(host)?;
        for (name, text) in self.unit.registers(host).0 {
            let (Ok(Some((inode, time))), Ok(Some(entry))) =
                (table.identity(&name), table.read(&name))
            else {
                continue;
            };
            let rule = entry.rule(&name);
            // Somebody else has another rule of that name.
            let is_other = match (self.rules.iter().find(|own| own.name() == name), &text) {
                (Some(own), _) => own.rule != rule,
                (None, Some(text)) => !is_of(&entry, text),
                (None, None) => false,
            };
            let is_written = written.iter().any(|record| record.has(inode));
            if is_other || is_written || handed_back(&entry).is_some() {
                continue;
            }
            let since = nanoseconds(time) - nanoseconds(start);
            if since >= -LAG && (alone || since <= START) {
                let shared = !alone || before.lines().any(|line| line == name);
                self.push(inode, shared, rule);
            }
        }
        self.take_up_beside(host, table);
        Ok(())
    }

    /// Registers missing rules, except those removed on purpose: these vanish without a flush, are
    /// still missing at the next look, and are then forgotten. `before` has those that were missing at
    /// the last look, and `missing` receives those that are now. Returns what was done, and what
    /// failed.
    pub fn heal(
        &mut self,
        host: &Host,
        table: &Table,
        flushed: bool,
        before: &[String],
        missing: &mut Vec<String>,
    ) -> (Vec<String>, Vec<Error>) {
        let (mut deeds, mut errors) = (Vec::new(), Vec::new());
        for own in std::mem::take(&mut self.rules) {
            let name = own.name().to_owned();
            let stand_in = stand_in_of(&name);
            let unfinished = is_left(table, &stand_in);
            let vanished = own.inode != GONE && !flushed && !unfinished;
            let healed = match table.inode(&name) {
                Ok(None)
                    if self.unit.has_forgotten(host, &name)
                        || (vanished && before.contains(&name)) =>
                {
                    self.changed = true;
                    continue;
                }
                Ok(None) if vanished => {
                    missing.push(name);
                    Ok((own.inode, ""))
                }
                Ok(None) => register(table, &own).map(|inode| (inode, "was missing")),
                Ok(Some(inode)) if inode == own.inode => Ok((inode, "")),
                Ok(Some(inode)) => taken(table, &own, inode, unfinished),
                Err(error) => Err(error),
            };
            if unfinished && healed.as_ref().is_ok_and(|(inode, _)| *inode != GONE) {
                errors.extend(table.unregister(&stand_in).err());
            }
            let inode = match healed {
                Ok((inode, "")) => inode,
                Ok((inode, why)) => {
                    deeds.push(format!("{} {why}, registered it", own.name()));
                    inode
                }
                Err(error) => {
                    errors.push(error.context(format!("registering {} again", own.name())));
                    GONE
                }
            };
            self.changed |= inode != own.inode;
            self.rules.push(Own { inode, ..own });
        }
        (deeds, errors)
    }
}

/// Whether an entry has the interpreter and flags of this rule of binfmt.d.
fn is_of(entry: &Entry, rule: &str) -> bool {
    let in_order = |flags: &str| {
        let mut flags: Vec<char> = flags.chars().collect();
        flags.sort_unstable();
        flags
    };
    binfmt_d::parse(rule, "").iter().any(|rule| {
        rule.interpreter == entry.interpreter && in_order(&rule.flags) == in_order(&entry.flags)
    })
}

/// The most by which the kernel's clock for files may lag behind, in nanoseconds.
const LAG: i128 = 20_000_000;
/// The longest start of a service that registers rules, in nanoseconds.
const START: i128 = 1_000_000_000;

fn nanoseconds((seconds, nanoseconds): Time) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
}

/// Whether this stand-in was left by one of our processes that was killed while moving an entry.
fn is_left(table: &Table, stand_in: &str) -> bool {
    is_name(stand_in) && !matches!(table.inode(stand_in), Ok(None))
}

/// Handles an own rule whose place another entry has taken.
fn taken(
    table: &Table,
    own: &Own,
    inode: u64,
    unfinished: bool,
) -> anyhow::Result<(u64, &'static str)> {
    let Some(mut entry) = table.read(own.name())? else {
        return Ok((own.inode, ""));
    };
    if unfinished && entry.rule(own.name()) == own.rule {
        return Ok((inode, ""));
    }
    if let Some(interpreter) = handed_back(&entry) {
        entry.interpreter = interpreter;
        entry.flags.push('F');
        if entry.rule(own.name()) == own.rule {
            let inode = table.replace(own.name(), inode, &stand_in_of(own.name()), &entry)?;
            return Ok((inode, "had lost its F"));
        }
    }
    // This distro registers its own again once that is gone.
    Ok((GONE, ""))
}

/// Changes a rule with `F` for handing it back to peers: without `F`, and with a different path to
/// the same file, to tell it from a rule that never had `F`.
fn hand_back(entry: &mut Entry) {
    entry.flags.retain(|flag| flag != 'F');
    if !entry.interpreter.starts_with("//") {
        entry.interpreter.insert(0, '/');
    }
}

/// The original interpreter of an entry that was handed back.
fn handed_back(entry: &Entry) -> Option<String> {
    let interpreter = entry.interpreter.strip_prefix('/')?;
    (!entry.holds_its_file() && interpreter.starts_with('/')).then(|| interpreter.to_owned())
}

fn register(table: &Table, own: &Own) -> anyhow::Result<u64> {
    table.register(&own.rule)?;
    Ok(table.inode(own.name())?.unwrap_or_default())
}

/// Records what a service has just registered, and unregisters what it no longer registers.
///
/// # Errors
/// The record cannot be written; or something cannot be read, and the rest is recorded.
pub fn record(host: &Host, table: &Table, unit: Unit, succeeded: bool) -> anyhow::Result<()> {
    let mut record = Record::read(host, unit)?;
    let mut errors = record.take_up(host, table, succeeded);
    errors.extend(record.write(host).err());
    first(errors)
}

/// The result to report: the first error, if any.
fn first(errors: Vec<Error>) -> anyhow::Result<()> {
    errors.into_iter().next().map_or(Ok(()), Err)
}

/// Unregisters the entries of a service that are still as recorded.
///
/// # Errors
/// An entry cannot be removed; the others are, and the record is kept.
pub fn release(host: &Host, table: &Table, unit: Unit) -> anyhow::Result<()> {
    let mut record = Record::read(host, unit)?;
    record.take_up_beside(host, table);
    // What was registered outside the unit looks like another distro's.
    let late = match machine::is_alone(host) {
        Ok(true) => record.take_up_late(host, table, true),
        other => other.map(drop),
    };
    unregister(table, &record.rules)?;
    host.remove(&unit.record())?;
    late
}

/// Unregisters these rules, unless a peer had an entry of the name before. In that case an entry
/// without `F` stays, as it is the same whoever registered it. One with `F` holds a file of this
/// distro, so it is replaced by one without `F`, which holds no file and runs the peer's own.
fn unregister(table: &Table, rules: &[Own]) -> anyhow::Result<()> {
    let unregister = |own: &Own| -> anyhow::Result<()> {
        let name = own.name();
        // Its stand-in, if a process was killed while moving it.
        let stand_in = stand_in_of(name);
        if is_name(&stand_in) {
            table.unregister(&stand_in)?;
        }
        let entry = match table.read(name) {
            Err(error) if is_failed_call(&error) => return Err(error),
            entry => entry.ok().flatten(),
        };
        let Some(mut entry) = entry else {
            return table.unregister_exactly(name, own.inode).map(drop);
        };
        let holds = entry.holds_its_file();
        if own.shared && !holds {
            return Ok(());
        }
        hand_back(&mut entry);
        if own.shared && fits(&stand_in, &entry.rule(&stand_in)) {
            return table.replace(name, own.inode, &stand_in, &entry).map(drop);
        }
        table.unregister_exactly(name, own.inode).map(drop)
    };
    first(rules.iter().filter_map(|own| unregister(own).err()).collect())
}

/// Records what the services have registered if they were started before this program was
/// installed. At boot they have not been started yet.
///
/// # Errors
/// Something cannot be read or recorded.
pub fn take_over(host: &Host, table: &Table) -> anyhow::Result<()> {
    for unit in Unit::ALL {
        let mut record = Record::read(host, unit)?;
        record.take_up_late(host, table, machine::is_alone(host)?)?;
        record.write(host)?;
    }
    Ok(())
}

/// Records the names that others have registered, before a service registers its own.
///
/// # Errors
/// The table cannot be listed, a record cannot be read, or the file cannot be written.
pub fn note_before(host: &Host, table: &Table) -> anyhow::Result<()> {
    let records = Record::read_all(host)?;
    let own = |name: &String| {
        let inode = table.inode(name).ok().flatten();
        let mut own = records.iter().flat_map(|record| &record.rules);
        own.any(|own| !own.shared && Some(own.inode) == inode && own.name() == name)
    };
    let mut names = table.names()?;
    names.retain(|name| !own(name));
    let mut names = names.join("\n");
    names.push('\n');
    host.write(BEFORE, &names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(inode: u64, shared: bool, rule: &str) -> Own {
        Own { inode, shared, rule: rule.to_owned() }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let rules = [
            own(12, false, r":qemu a:M::\x7fELF::/usr/bin/qemu a:F"),
            own(0, true, "|b:c|E||py||/x:y|"),
        ];
        assert_eq!(parse(&format(&rules)), rules);
        assert_eq!(rules[0].name(), "qemu a");
        assert_eq!(rules[1].name(), "b:c");
    }

    #[test]
    fn what_nobody_has_written_so_says_nothing() {
        for record in [
            "",
            "\n",
            "x - :a:M::a::/a:\n",
            "1 -\n",
            "1 - ::M\n",
            "1 - :status:\n",
            "1 - :../x:\n",
            "1 - :a\0b:\n",
            "1 - :WSLInterop:\n",
            "1 - :WSLInterop-next-a:\n",
            "-1 - :a:\n",
        ] {
            assert_eq!(parse(record), [], "{record:?}");
        }
    }
}
