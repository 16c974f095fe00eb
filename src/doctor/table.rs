//! The kernel's table: whether it is mounted, what it does with a Windows program, and whether it
//! can be emptied.

use super::facts::{Place, Probe, Table};
use super::report::{word, Finding, Mend, State};
use crate::binfmt_misc::{Claim, Listed};
use crate::host::{BINFMT_MISC, GUARD_FILE, INIT, WSL_LOCK};
use crate::interop::{self, LATE, NAME, STAND_IN};

/// The type of the file system.
pub const KIND: &str = "binfmt_misc";

/// Judges all of it.
pub fn check(table: &Table, place: &Place) -> Vec<Finding> {
    let entries = table.entries.as_deref().unwrap_or_default();
    let seen = Seen { table, place, entries };
    if table.entries.is_none() {
        return vec![seen.not_mounted(), seen.launch(None)];
    }
    let mut findings = [vec![seen.enabled()], seen.entry()].concat();
    // The fix for Windows programs that do not start, if one of these has found the cause.
    let cause = findings.iter().find_map(|finding| finding.mend.clone());
    findings.push(seen.launch(cause));
    findings.extend(seen.claims());
    findings.push(seen.status_file());
    findings
}

/// The table, and the distro that it is seen from.
struct Seen<'a> {
    table: &'a Table,
    place: &'a Place,
    entries: &'a [Listed],
}

impl Seen<'_> {
    /// A command that changes mounts, followed by `guard`. A shell with mounts of its own has to
    /// run it in the distro's.
    fn then_guard(&self, command: &str) -> String {
        let command = format!("{command}{} guard", self.place.command);
        match self.place.has_own_mounts {
            true => format!("nsenter -t 1 -m -r sh -c {}", word(command)),
            false => command,
        }
    }

    fn restore(&self) -> String {
        format!("{} restore", self.place.command)
    }

    fn not_mounted(&self) -> Finding {
        let mount = format!("mount -t {KIND} {KIND} {BINFMT_MISC}");
        let (found, mend) = match self.table.mounted.as_deref() {
            None => (format!("the table is not mounted on {BINFMT_MISC}"), format!("{mount} && ")),
            Some(KIND) => ("this shell cannot see the table".to_owned(), "".to_owned()),
            // The table may already be mounted below it.
            Some(kind) => (
                format!("{kind} is mounted over the table"),
                format!(
                    "umount -l {BINFMT_MISC} && {{ test -e {BINFMT_MISC}/register || {mount}; }} \
                     && "
                ),
            ),
        };
        Finding::new(KIND, State::Unprotected, found).by_root(self.then_guard(&mend))
    }

    /// Whether the table as a whole is enabled. If its status file is covered, the kernel's probe
    /// tells, provided there is an entry that could take it.
    fn enabled(&self) -> Finding {
        let (covered, state) = (self.table.cover.is_some(), self.table.state.as_str());
        // The probe has only the first two bytes of a Windows program.
        let all = interop::wanted().pattern;
        let takes_any = |listed: &Listed| listed.entry.enabled && listed.entry.pattern == all;
        let refused = self.table.probe == Probe::Refused;
        let contradicted = refused && self.entries.iter().any(takes_any);
        if !contradicted && (covered || state != "disabled") {
            let unseen = "mounted; cannot tell whether it is enabled";
            return match (covered, self.table.probe) {
                (false, _) if state != "enabled" => Finding::unknown(KIND, unseen),
                (true, Probe::Refused) => Finding::note(KIND, format!("{unseen} without an entry")),
                (true, Probe::Unknown) => Finding::unknown(KIND, unseen),
                _ => Finding::good(KIND, "the table is mounted and enabled"),
            };
        }
        let enable = format!("echo 1 >{BINFMT_MISC}/status && ");
        let mend = match covered {
            true => self.then_guard(&format!("umount {BINFMT_MISC}/status && {enable}")),
            false => self.then_guard(&enable),
        };
        let found = "the whole table is disabled, in all distros";
        Finding::new(KIND, State::Broken, found).by_root(mend)
    }

    /// Judges WSL's own entry.
    fn entry(&self) -> Vec<Finding> {
        let bad = |state, found| Finding::new("entry", state, found).by_root(self.restore());
        let mut of_wsl = self.entries.iter().filter(|listed| listed.entry.interpreter == INIT);
        let other = of_wsl.find(|listed| [LATE, STAND_IN].contains(&&*listed.name));
        let own = interop::find(self.entries, NAME);
        let start = "which starts Windows programs,";
        let mut findings = vec![match own.map(|entry| (entry, interop::fault(entry))) {
            // WSL before 2.6.2 has only the other one, which mostly works.
            None if other.is_some_and(|other| other.entry.enabled) => {
                bad(State::Degraded, format!("{NAME}, {start} is missing"))
            }
            None => bad(State::Broken, format!("{NAME}, {start} is missing")),
            Some((entry, Some(found))) => {
                // Enables the entry if it is only disabled; removes it if it is not WSL's.
                let mut enabled = entry.clone();
                enabled.enabled = true;
                let value = if interop::fault(&enabled).is_none() { 1 } else { -1 };
                let mend = format!("echo {value} >{BINFMT_MISC}/{NAME} && {}", self.restore());
                bad(State::Broken, format!("{NAME}, {start} {found}")).by_root(mend)
            }
            Some((entry, None)) if !interop::starts_programs(entry) => {
                // The stand-in may be ahead.
                let (state, why) = match interop::needs_stand_in(self.entries) {
                    true => (State::Broken, ", so programs without arguments do not start"),
                    false => (State::Degraded, ""),
                };
                bad(state, format!("{NAME} has lost its flag P{why}"))
            }
            Some((entry, None)) if !entry.flags.contains('F') => {
                let why = "its flag F, so it does not work in containers";
                bad(State::Degraded, format!("{NAME} has lost {why}"))
            }
            Some((entry, None)) => {
                Finding::good("entry", format!("{NAME}: {INIT}, flags {}", entry.flags))
            }
        }];
        if let Some(Listed { name, .. }) = other {
            let place = if own.is_some() { "duplicates" } else { "stands in for" };
            findings.push(bad(State::Degraded, format!("{name} {place} {NAME}")));
        }
        findings
    }

    /// Judges which interpreter gets a Windows program.
    fn launch(&self, cause: Option<Mend>) -> Finding {
        let takes = |listed: &&Listed| listed.entry.takes_windows_programs();
        let first = self.entries.iter().find(takes);
        // Of ours without P, the check of the entry tells.
        let is_weak = first
            .is_some_and(|first| first.name != NAME && !interop::starts_programs(&first.entry));
        let first = first.map(|listed| (&listed.name, &*listed.entry.interpreter));
        let found = match (first, self.table.probe) {
            (None, Probe::Taken | Probe::Unknown) if self.table.entries.is_none() => {
                let unseen = "cannot tell whether Windows programs start";
                return Finding::unknown("launch", unseen);
            }
            (_, Probe::Refused) | (None, _) => {
                "Windows programs do not start: \"Exec format error\"".to_owned()
            }
            (Some((name, INIT)), _) if is_weak => format!(
                "Windows programs go to {name}, which has no flag P, so those without arguments do not start"
            ),
            (Some((name, INIT)), _) => {
                let found = format!("Windows programs start through {name} ({INIT})");
                return Finding::good("launch", found);
            }
            (Some((name, other)), _) => {
                format!("Windows programs go to {name} ({other}), not to {INIT}")
            }
        };
        let mend = cause.or_else(|| Some(Mend::AsRoot(self.restore())));
        Finding { mend, ..Finding::new("launch", State::Broken, found) }
    }

    /// Judges the other entries that claim Windows programs, or some of them.
    fn claims(&self) -> Vec<Finding> {
        let misplaced = interop::misplaced(self.entries);
        let mut findings = Vec::new();
        for listed in self.entries {
            let (name, entry) = (&listed.name, &listed.entry);
            let what = match entry.claim() {
                Claim::None => continue,
                _ if interop::is_reserved(name) && (name == NAME || entry.interpreter == INIT) => {
                    continue
                }
                Claim::Ordinary => "also claims Windows programs",
                Claim::Longer => "is for programs that look like Windows programs",
            };
            let found = format!("{name} ({}) {what}", entry.interpreter);
            findings.push(match (misplaced.contains(&listed), entry.enabled) {
                (true, _) => {
                    let found = format!("{found}, but does not get them: {NAME} is tried first");
                    Finding::new("claims", State::Degraded, found).by_root(self.restore())
                }
                (false, true) => Finding::note("claims", found),
                (false, false) => Finding::note("claims", format!("{found}; disabled")),
            });
        }
        findings
    }

    /// Judges whether this distro can empty the table.
    fn status_file(&self) -> Finding {
        let check = "status-file";
        let Some(root) = &self.table.cover else {
            let found = "writable: emptying the table would stop Windows programs in all distros";
            let finding = Finding::new(check, State::Unprotected, found);
            return finding.by_root(self.then_guard(""));
        };
        // A path within its file system, whose root is usually /run.
        let file = root.trim_end_matches("//deleted");
        let is = |path: &str| [path, path.trim_start_matches("/run")].contains(&file);
        let known = [GUARD_FILE, WSL_LOCK].into_iter().find(|path| is(path));
        let found = match known {
            Some(path) => format!("guarded by {path}"),
            None => format!("covered by {file}, which is neither ours nor WSL's"),
        };
        // Nothing of ours writes to it once it is bound.
        let kept = !is(GUARD_FILE) || ["enabled", "disabled"].contains(&&*self.table.state);
        let why = match (root.ends_with("//deleted"), kept) {
            (true, _) => "which was deleted, so systemd-binfmt cannot start",
            (false, false) => "which somebody has modified",
            (false, true) if known.is_some() => return Finding::good(check, found),
            (false, true) => return Finding::note(check, found),
        };
        let mend = self.then_guard(&format!("umount {BINFMT_MISC}/status && "));
        Finding::new(check, State::Degraded, format!("{found}, {why}")).by_root(mend)
    }
}
