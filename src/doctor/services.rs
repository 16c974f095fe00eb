//! What systemd says about the services that matter here: the two that write to the table, and
//! ours.

use super::facts::{Fact, Facts, Files};
use super::report::{word, Finding, State};
use super::systemctl::Unit;
use crate::binfmt_misc::Listed;
use crate::host::{BINFMT_MISC, EARLY};
use crate::interop::{find, is_reserved};

/// The services, in the order in which they are checked.
pub const UNITS: [&str; 4] = [
    "systemd-binfmt.service",
    "binfmt-support.service",
    "wsl-binfmt-guard.service",
    "wsl-interop-restore.service",
];
/// Our drop-in, which keeps the first two from emptying the table.
const DROP_IN: &str = "10-wsl-interop.conf";
const RELOAD: &str = "systemctl daemon-reload";

/// Judges all of them.
pub fn check(facts: &Facts, files: &Files, protect: bool) -> Vec<Finding> {
    let units = match facts.units.known("systemd", "systemd") {
        Ok(units) => units,
        Err(unknown) => {
            return vec![unknown.by_hand(match facts.units {
                Fact::Silent => "run wsl.exe --shutdown in Windows, then start this distro again",
                _ => "run this again as root, with sudo",
            })]
        }
    };
    let [binfmt, support, guard, restore] = &units[..] else {
        return Vec::new();
    };
    let table = facts.table.known("", "").ok();
    let standing = table.and_then(|table| table.entries.as_deref());
    let rules = files.rules.iter();
    let [by_binfmt, by_support] = &files.recorded;
    let registrars = [
        Registrar {
            check: "systemd-binfmt",
            unit: binfmt,
            rules: rules.map(|rule| (&*rule.name, &*rule.path)).collect(),
            recorded: by_binfmt,
            standing,
            denied: files.denied.first().map(String::as_str),
        },
        Registrar {
            check: "binfmt-support",
            unit: support,
            rules: files.formats.iter().map(|name| (&**name, "")).collect(),
            recorded: by_support,
            standing,
            denied: None,
        },
    ];
    let mut findings = Vec::new();
    for mut registrar in registrars {
        registrar.rules.retain(|(name, _)| !is_reserved(name));
        findings.push(registrar.state());
        findings.extend(registrar.unrecorded());
        findings.extend(registrar.drop_in(files).filter(|_| protect));
    }
    findings.push(ours(files, "guard", guard));
    findings.push(ours(files, "watcher", restore));
    findings
}

/// A service, not ours, that registers rules.
struct Registrar<'a> {
    check: &'static str,
    unit: &'a Unit,
    /// The rules that it should register: names, and the files that they are in.
    rules: Vec<(&'a str, &'a str)>,
    /// The rules that are recorded as registered by it.
    recorded: &'a [String],
    /// The entries of the table, if it can be read.
    standing: Option<&'a [Listed]>,
    /// A file of rules that only root can read.
    denied: Option<&'a str>,
}

impl Registrar<'_> {
    fn is_missing(&self, name: &str) -> bool {
        self.standing.is_some_and(|all| find(all, name).is_none())
    }

    /// Judges whether it does its job. If it does not, that is mostly just a note.
    fn state(&self) -> Finding {
        let (check, name) = (self.check, self.unit.get("Id"));
        match (self.unit.get("LoadState"), self.denied, self.standing) {
            ("not-found", ..) => Finding::note(check, "not installed"),
            ("masked", ..) => {
                let at_runtime = self.unit.get("FragmentPath").starts_with("/run/");
                let option = if at_runtime { " --runtime" } else { "" };
                let start = format!("systemctl unmask{option} {name} && systemctl start {name}");
                Finding::note(check, "masked, so its rules are not registered").by_root(start)
            }
            (_, Some(path), _) => Finding::denied(check, path),
            (_, None, None) => {
                let found = format!("{}; its rules cannot be seen", state(self.unit));
                Finding::note(check, found)
            }
            (_, None, Some(_)) => self.registered(),
        }
    }

    /// Judges whether its rules are in the table.
    fn registered(&self) -> Finding {
        let (check, unit, name) = (self.check, self.unit, self.unit.get("Id"));
        let missing = self.rules.iter().filter(|(name, _)| self.is_missing(name));
        let (missing, mut paths): (Vec<_>, Vec<_>) = missing.copied().unzip();
        let gone = self.recorded.iter().filter(|name| self.is_missing(name));
        let gone: Vec<_> = gone.map(String::as_str).collect();
        let (is, gone, missing) = (state(unit), gone.join(", "), missing.join(", "));
        let all = format!("{is}; its rules are registered");
        let not = format!("{is}; not registered: {missing}");
        let hint = |found: &str, command| Finding::note(check, found).by_root(command);
        let bad = |found| Finding::new(check, State::Degraded, found);
        let restart = format!("systemctl restart {name}");
        let skipped =
            unit.get("ConditionResult") == "no" && unit.get("ConditionTimestampMonotonic") != "0";
        match (unit.get("ActiveState"), missing.is_empty()) {
            ("active", _) if !gone.is_empty() => {
                bad(format!("{is}, but rules of this distro are gone: {gone}")).by_root(restart)
            }
            ("active", false) => hint(&not, restart),
            ("failed", true) => hint(&format!("{all}, so it does no harm"), again(name)),
            // A rule that the kernel refuses has to be edited; for any other cause a restart helps.
            ("failed", false) if check == "systemd-binfmt" && failure(unit).is_none() => {
                paths.dedup();
                let paths = paths.join(", ");
                let how = format!("{paths}: correct or delete {missing}; then {}", again(name));
                bad(not).edit(how)
            }
            ("failed", false) => bad(not).by_root(again(name)),
            (_, true) => Finding::good(check, all),
            // `systemctl show` does not say which condition.
            (_, false) if skipped => {
                let how = format!("\"systemctl status {name}\" names the condition; delete it");
                let found = format!("skipped by a condition; {not}");
                Finding::note(check, found).by_hand(how)
            }
            (_, false) => hint(&not, format!("systemctl start {name}")),
        }
    }

    /// Finds rules that would stay registered when this distro stops.
    fn unrecorded(&self) -> Option<Finding> {
        let names = self.rules.iter().map(|(name, _)| *name);
        let unknown = |name: &&str| {
            !self.is_missing(name) && !self.recorded.iter().any(|recorded| recorded == name)
        };
        let unknown: Vec<_> = names.filter(unknown).collect();
        let runs = self.unit.get("ActiveState") == "active" && self.standing.is_some();
        (runs && !unknown.is_empty()).then(|| {
            let found = format!(
                "not recorded as this distro's, so they may stay after it stops: {}",
                unknown.join(", ")
            );
            let restart = format!("systemctl restart {}", self.unit.get("Id"));
            Finding::note(self.check, found).by_root(restart)
        })
    }

    /// Judges whether the service is kept from emptying the table, by what systemd made of all
    /// drop-ins.
    fn drop_in(&self, files: &Files) -> Option<Finding> {
        let bound = self.unit.binds_over(&format!("{BINFMT_MISC}/status"));
        let unused = ["not-found", "masked"].contains(&self.unit.get("LoadState"));
        if unused || bound {
            return None;
        }
        // An empty assignment cancels all previous ones.
        let empties = |line: &str| {
            let (key, value) = line.split_once('=').unwrap_or_default();
            key.trim() == "BindPaths" && value.trim().is_empty()
        };
        let resets = |path: &&str| {
            let mut read = files.drop_ins.iter().filter(|(other, _)| other == path);
            read.any(|(_, text)| text.lines().any(empties))
        };
        let mut others = self.unit.drop_ins();
        others.retain(|path| !path.starts_with(EARLY));
        let replaced = others.iter().find(|path| path.ends_with(DROP_IN));
        let culprit = others.iter().rfind(|path| resets(path));
        let bad = |found| Finding::new(self.check, State::Degraded, found);
        let takes_back = |path| bad(format!("{path} overrides our drop-in, {DROP_IN}"));
        Some(match (replaced, culprit) {
            (Some(path), _) => takes_back(path).by_root(format!("{} && {RELOAD}", put_aside(path))),
            (None, Some(path)) => {
                takes_back(path).edit(format!("{path}: delete \"BindPaths=\"; then {RELOAD}"))
            }
            (None, None) => {
                bad(format!("systemd has not loaded our drop-in, {DROP_IN}")).by_root(RELOAD)
            }
        })
    }
}

/// A restart that also works when the start limit was hit.
fn again(name: &str) -> String {
    format!("systemctl reset-failed {name} && systemctl restart {name}")
}

fn state(unit: &Unit) -> String {
    match unit.get("ActiveState") {
        "failed" => format!("failed ({})", failure(unit).unwrap_or(unit.get("Result"))),
        state => state.to_owned(),
    }
}

/// Why a unit failed, if its program is not the cause.
fn failure(unit: &Unit) -> Option<&'static str> {
    match (unit.get("Result"), unit.get("ExecMainStatus")) {
        ("start-limit-hit", _) => Some("started too often in a short time"),
        (_, "226") => Some("its sandbox could not be set up: 226/NAMESPACE"),
        (_, "203") => Some("its program could not be run: 203/EXEC"),
        _ => None,
    }
}

fn put_aside(path: &str) -> String {
    format!("mv {} {}", word(path), word(format!("{path}.saved")))
}

/// Judges a service that the generator writes.
fn ours(files: &Files, check: &'static str, unit: &Unit) -> Finding {
    let name = unit.get("Id");
    let start = format!("systemctl start {name}");
    let bad = |found, command| Finding::new(check, State::Unprotected, found).by_root(command);
    if unit.get("LoadState") == "not-found" {
        return bad(format!("{name} is not loaded"), format!("{RELOAD} && {start}"));
    }
    let mut found = format!("{name}: {}", state(unit));
    // systemd before 250 shows only /dev/null for a mask.
    if let Some(path) = files.above.iter().find(|path| path.ends_with(name)) {
        let aside = format!("{} && {RELOAD} && {start}", put_aside(path));
        return bad(format!("{found}, overridden by {path}"), aside);
    }
    let changed = unit.drop_ins();
    if !changed.is_empty() {
        found += &format!(", changed by {}", changed.join(", "));
    }
    let says = unit.get("StatusText");
    match unit.get("ActiveState") {
        "active" if unit.get("NeedDaemonReload") == "yes" => {
            let found = format!("{found}, but its files have changed since it was loaded");
            Finding::note(check, found).by_root(RELOAD)
        }
        "active" if !says.is_empty() => Finding::note(check, format!("{found}, but says: {says}")),
        "active" if changed.is_empty() => Finding::good(check, found),
        "active" | "activating" => Finding::note(check, found),
        "failed" => bad(found, again(name)),
        _ => bad(found, start),
    }
}
