//! What this distro has registered itself, from binfmt.d and by update-binfmts(8): written down
//! below /run/wsl-binfmt by name and inode, so that it can be told from what peers register under
//! the same names. While the distro runs its rules stand; when it stops, they go.

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
    /// binfmt-support.service, what packages have told update-binfmts(8).
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

    /// When it was started, if it is active. Its RuntimeDirectory= tells: systemd makes it before
    /// the service's first command, and removes it after the last.
    fn started(self, host: &Host) -> anyhow::Result<Option<Time>> {
        host.modified(&format!("{STATE}/{}", self.name()))
    }

    /// The same, also without the drop-in that makes that directory: while it is active, systemd has a
    /// link with its invocation for journald. There is none if it has failed, as under WSL's lock, or
    /// has stopped. Then it is when systemd was, at the earliest, which is enough where nobody else may
    /// have registered anything.
    fn started_at_all(self, host: &Host, alone: bool) -> anyhow::Result<Option<Time>> {
        if let Some(started) = self.started(host)? {
            return Ok(Some(started));
        }
        let link = format!("{INVOCATIONS}{}.service", self.name());
        match host.link_made(&link)? {
            None if alone => host.modified(PRIVATE_SOCKET),
            started => Ok(started),
        }
    }

    /// Whether a rule is known to be none of its any more: update-binfmts(8) has removed its file.
    fn has_forgotten(self, host: &Host, name: &str) -> bool {
        let file = host.path(&format!("{FORMATS}/{name}"));
        self == Unit::BinfmtSupport && file.try_exists().is_ok_and(|there| !there)
    }

    /// The names that it registers, with the rules where they are known; and what could not be
    /// read of them.
    fn registers(self, host: &Host) -> (Vec<(String, Option<String>)>, Vec<Error>) {
        let (mut rules, errors) = match self {
            Unit::SystemdBinfmt => {
                let (rules, errors) = binfmt_d::read(host);
                // With part of a byte sequence lost, it is another rule.
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

/// In place of an inode: the entry was wiped, or a peer's has taken its place. No entry has this one.
const GONE: u64 = 0;

/// One rule of this distro's own.
#[derive(Clone, Debug, PartialEq)]
pub struct Own {
    /// Its entry's, or `GONE`.
    inode: u64,
    /// A peer had an entry of this name before.
    shared: bool,
    /// What registers it.
    rule: String,
}

impl Own {
    /// The name of its entry.
    pub fn name(&self) -> &str {
        let between = self.rule.chars().next().unwrap_or(':');
        self.rule.split(between).nth(1).unwrap_or_default()
    }
}

/// Reads a record. A line that nobody here has written says nothing.
fn parse(record: &str) -> Vec<Own> {
    let own = |line: &str| {
        let (inode, rest) = line.split_once(' ')?;
        let (shared, rule) = rest.split_once(' ')?;
        let own = Own {
            inode: inode.parse().ok()?,
            shared: shared == SHARED,
            rule: rule.to_owned(),
        };
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

/// What is written down of a service's rules.
#[derive(Debug)]
pub struct Record {
    unit: Unit,
    rules: Vec<Own>,
    changed: bool,
}

impl Record {
    /// Reads it; there is none before the service has started and after it has stopped.
    ///
    /// # Errors
    /// It is there, and cannot be read.
    pub fn read(host: &Host, unit: Unit) -> anyhow::Result<Record> {
        Ok(Record {
            unit,
            rules: parse(&host.own_text(&unit.record())?),
            changed: false,
        })
    }

    /// Those of all services.
    ///
    /// # Errors
    /// As above.
    pub fn read_all(host: &Host) -> anyhow::Result<Vec<Record>> {
        let all = Unit::ALL.into_iter();
        all.map(|unit| Record::read(host, unit)).collect()
    }

    /// Writes it down, if it has changed.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, host: &Host) -> anyhow::Result<()> {
        match self.changed {
            true => host.write(&self.unit.record(), &format(&self.rules)),
            false => Ok(()),
        }
    }

    /// The names of what is written down.
    pub fn names(&self) -> Vec<String> {
        self.rules.iter().map(|own| own.name().to_owned()).collect()
    }

    /// Whether nothing is written down.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether the entry with this inode is this distro's own.
    pub fn has(&self, inode: u64) -> bool {
        inode != GONE && self.rules.iter().any(|own| own.inode == inode)
    }

    /// An own entry has been registered anew.
    pub fn moved(&mut self, from: u64, to: u64) {
        for own in self.rules.iter_mut().filter(|own| own.inode == from) {
            own.inode = to;
            self.changed = true;
        }
    }

    /// Takes up what the service has registered since it was started, and leaves out what is a
    /// peer's. After a success everything was registered; what is missing was wiped since.
    ///
    /// # Errors
    /// Those of what could not be read; the rest is taken up.
    fn take_up(&mut self, host: &Host, table: &Table, succeeded: bool) -> Vec<Error> {
        let started = match self.unit.started(host) {
            Ok(Some(started)) => started,
            Ok(None) => {
                let directory = host.path(&format!("{STATE}/{}", self.unit.name()));
                return vec![anyhow!(
                    "{directory}: missing, as if the unit were not running"
                )];
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
        // What is not known to be gone, or is not, is still this distro's.
        let removed = match succeeded && errors.is_empty() {
            true => unregister(table, &stale).map_err(|error| errors.push(error)),
            false => Err(()),
        };
        if removed.is_err() {
            self.rules.extend(stale);
        }
        errors
    }

    /// Takes up what update-binfmts(8) has registered beside the running service, as it does when
    /// a package is installed: right after it has written its own file of that name. What was left to
    /// others since is not that.
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
        let own = Own {
            inode,
            shared,
            rule,
        };
        self.rules.retain(|other| other.name() != own.name());
        self.rules.push(own);
        self.changed = true;
    }

    /// Takes up what has been registered under the service's names since it was started, and nobody
    /// has written down: before there was this program, or beside the unit. What was replaced then
    /// cannot be seen any more. Where this distro is not `alone`, another one has it, too, and may have
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
            // Somebody has another rule of that name, or it was left to others.
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

    /// Registers what is missing, but for what was removed on purpose: that vanishes alone, without a
    /// flush, is still missing at the next look, and is forgotten then. `missing` has what was
    /// missing at the last look, and gets what is now; without it nothing is forgotten. Returns what
    /// was done, and what could not be.
    pub fn heal(
        &mut self,
        host: &Host,
        table: &Table,
        flushed: bool,
        missing: &mut Missing,
    ) -> (Vec<String>, Vec<Error>) {
        let (mut deeds, mut errors) = (Vec::new(), Vec::new());
        for own in std::mem::take(&mut self.rules) {
            let name = own.name().to_owned();
            // Somebody of ours was killed while moving it.
            let stand_in = stand_in_of(&name);
            let unfinished = is_name(&stand_in) && !matches!(table.inode(&stand_in), Ok(None));
            let vanished = own.inode != GONE && !flushed && !unfinished;
            let healed = match table.inode(&name) {
                Ok(None)
                    if self.unit.has_forgotten(host, &name)
                        || (vanished && missing.before.contains(&name)) =>
                {
                    self.changed = true;
                    continue;
                }
                Ok(None) if vanished => {
                    missing.now.push(name);
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

/// Whether an entry runs what this rule of binfmt.d has it run, and in the same way.
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

/// In nanoseconds: by less than this the kernel's clock for files may lag behind.
const LAG: i128 = 20_000_000;
/// And longer than this no start of a service takes that registers rules.
const START: i128 = 1_000_000_000;

fn nanoseconds((seconds, nanoseconds): Time) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
}

/// Own rules that are missing, by name.
#[derive(Default)]
pub struct Missing {
    /// At the last look.
    pub before: Vec<String>,
    /// At this one.
    pub now: Vec<String>,
}

/// What becomes of an own rule in whose place there is another entry.
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
    // It is this distro's turn again when that is gone.
    Ok((GONE, ""))
}

/// What a distro leaves to others of a rule with `F`: without it, and with another path to the
/// same file, by which it is told from a rule that somebody has without `F`.
fn hand_back(entry: &mut Entry) {
    entry.flags.retain(|flag| flag != 'F');
    if !entry.interpreter.starts_with("//") {
        entry.interpreter.insert(0, '/');
    }
}

/// The interpreter of such an entry.
fn handed_back(entry: &Entry) -> Option<String> {
    let interpreter = entry.interpreter.strip_prefix('/')?;
    (!entry.holds_its_file() && interpreter.starts_with('/')).then(|| interpreter.to_owned())
}

fn register(table: &Table, own: &Own) -> anyhow::Result<u64> {
    table.register(&own.rule)?;
    Ok(table.inode(own.name())?.unwrap_or_default())
}

/// Writes down what a service has just registered, and unregisters what it no longer does.
///
/// # Errors
/// It cannot be written down; or not all of it can be read, and the rest is written down.
pub fn record(host: &Host, table: &Table, unit: Unit, succeeded: bool) -> anyhow::Result<()> {
    let mut record = Record::read(host, unit)?;
    let mut errors = record.take_up(host, table, succeeded);
    errors.extend(record.write(host).err());
    first(errors)
}

/// The first error is the one to report.
fn first(errors: Vec<Error>) -> anyhow::Result<()> {
    errors.into_iter().next().map_or(Ok(()), Err)
}

/// Unregisters what a service has registered, as far as it still is what was written down.
///
/// # Errors
/// An entry cannot be removed; the others are, and it stays written down.
pub fn release(host: &Host, table: &Table, unit: Unit) -> anyhow::Result<()> {
    let mut record = Record::read(host, unit)?;
    record.take_up_beside(host, table);
    // What was registered beside the unit looks as if it were another distro's.
    let late = match machine::is_alone(host) {
        Ok(true) => record.take_up_late(host, table, true),
        other => other.map(drop),
    };
    unregister(table, &record.rules)?;
    host.remove(&unit.record())?;
    late
}

/// An entry with `F` holds a file of this distro, and goes. One without is the same whoever
/// registered it: where a peer had it before, it stays for the peer. So does one with `F`, but
/// without its `F`: that holds no file, and the peer's own is run.
fn unregister(table: &Table, rules: &[Own]) -> anyhow::Result<()> {
    let unregister = |own: &Own| -> anyhow::Result<()> {
        let name = own.name();
        // What stands in for it, if somebody was killed while moving it.
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
    first(
        rules
            .iter()
            .filter_map(|own| unregister(own).err())
            .collect(),
    )
}

/// Where this distro's services were started before it had this program, as when that is installed
/// while the distro runs, writes down what they have registered. At boot they have not been started.
///
/// # Errors
/// Something cannot be read, or not be written down.
pub fn take_over(host: &Host, table: &Table) -> anyhow::Result<()> {
    for unit in Unit::ALL {
        let mut record = Record::read(host, unit)?;
        record.take_up_late(host, table, machine::is_alone(host)?)?;
        record.write(host)?;
    }
    Ok(())
}

/// Writes down which names others have before a service registers its own.
///
/// # Errors
/// The table cannot be listed, or a record not be read, or the file not be written.
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
        Own {
            inode,
            shared,
            rule: rule.to_owned(),
        }
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
