//! What systemd says of the services that this is about: its own two that write to the table, and
//! ours.

use std::time::Instant;

use anyhow::Context;

use super::report::{word, Finding, Harm, Mend};
use super::{fault, table, Wanted};
use crate::binfmt_d;
use crate::host::{
    Host, ABOVE_EARLY, BINFMT_MISC, EARLY, FORMATS, LOCAL_UNITS, SYSTEMD_SOCKETS, VENDOR_UNITS,
};
use crate::systemd::{self, Condition, Unit};

const SYSTEMD_BINFMT: &str = "systemd-binfmt.service";
const BINFMT_SUPPORT: &str = "binfmt-support.service";
const GUARD: &str = "wsl-binfmt-guard.service";
const RESTORE: &str = "wsl-interop-restore.service";
/// The drop-ins of ours, by which those two cannot empty the table.
const DROP_IN: &str = "10-wsl-interop.conf";

/// Asks systemd, and looks at the units.
pub fn check(host: &Host, wanted: &Wanted, deadline: Instant) -> Vec<Finding> {
    let units = match ask(host, deadline) {
        Ok(units) => units,
        Err(error) => return vec![Finding::unknown("systemd", format!("{error:#}"))],
    };
    let [binfmt, support, guard, restore] = &units;
    let mut findings = registrar(host, wanted, "systemd-binfmt", SYSTEMD_BINFMT, binfmt);
    findings.extend(registrar(
        host,
        wanted,
        "binfmt-support",
        BINFMT_SUPPORT,
        support,
    ));
    findings.push(ours(host, wanted.protect, "guard", GUARD, guard));
    let watches = match (wanted.protect, wanted.interop) {
        (Some(protect), Some(interop)) => Some(protect && interop),
        _ => None,
    };
    findings.push(ours(host, watches, "watcher", RESTORE, restore));
    findings
}

/// Asks PID 1 itself, or over the bus where only root may do that.
fn ask(host: &Host, deadline: Instant) -> anyhow::Result<[Unit; 4]> {
    let names = [SYSTEMD_BINFMT, BINFMT_SUPPORT, GUARD, RESTORE];
    let [private, bus] = SYSTEMD_SOCKETS.map(|socket| host.path(socket));
    let ask = |socket, on_a_bus| systemd::units(socket, on_a_bus, &names, deadline);
    let units = ask(&private, false).or_else(|error| {
        if Instant::now() >= deadline {
            return Err(error);
        }
        ask(&bus, true).context("without a bus only root can ask")
    })?;
    units
        .try_into()
        .map_err(|_| anyhow::anyhow!("systemd answered for other units than it was asked for"))
}

/// A service that registers rules which are not ours: how it fares is mostly a note.
fn registrar(
    host: &Host,
    wanted: &Wanted,
    check: &'static str,
    name: &str,
    unit: &Unit,
) -> Vec<Finding> {
    if unit.load_state == "not-found" {
        return vec![Finding::note(check, "not installed")];
    }
    if unit.load_state == "masked" {
        let [_, runtime, _] = LOCAL_UNITS;
        let runtime = host.path(&format!("{runtime}/{name}"));
        let how = match runtime.symlink_metadata().is_ok() {
            true => "unmask --runtime",
            false => "unmask",
        };
        let unmask = format!("systemctl {how} {name} && systemctl start {name}");
        let found = "masked: its rules are not registered";
        return vec![Finding::note(check, found).mended_by(Mend::AsRoot(unmask))];
    }
    let mut findings = vec![state(host, check, name, unit)];
    findings.extend(drop_in(host, wanted, check, name, unit));
    findings
}

/// What a service is to register, and where that stands: a file each entry.
fn rules(host: &Host, name: &str) -> Vec<(String, String)> {
    if name == SYSTEMD_BINFMT {
        let rules = binfmt_d::rules(host).into_iter();
        return rules.map(|rule| (rule.name, rule.path)).collect();
    }
    let names = host.names(FORMATS).into_iter();
    names
        .map(|name| (name.clone(), format!("{FORMATS}/{name}")))
        .collect()
}

/// A file of such rules that only root may read.
fn denied(host: &Host, name: &str) -> Option<String> {
    let mut files = match name {
        SYSTEMD_BINFMT => binfmt_d::files(host),
        _ => Vec::new(),
    };
    files.retain(|path| host.is_denied(path));
    files.pop()
}

/// The state of such a service, measured by what it is for.
fn state(host: &Host, check: &'static str, name: &str, unit: &Unit) -> Finding {
    let rules = rules(host, name);
    let run = |how: &str| Mend::AsRoot(format!("systemctl {how} {name}"));
    let state = match unit.active_state.as_str() {
        "failed" => format!("failed ({})", unit.result),
        state => state.to_owned(),
    };
    let mounts = host.mount_info().unwrap_or_default();
    let Some(table) = table::readable(host, &mounts) else {
        return Finding::note(check, format!("{state}; its rules cannot be seen"));
    };
    let mut missing = rules;
    let all = missing.len();
    missing.retain(|(name, _)| matches!(table.inode(name), Ok(None)));
    let names: Vec<_> = missing.iter().map(|(name, _)| name.as_str()).collect();
    let registered = match names.is_empty() {
        true => format!("rules registered: all {all}"),
        false => format!("rules not registered: {}", names.join(", ")),
    };
    if let Some(path) = denied(host, name) {
        return Finding::unknown(check, format!("{state}; {path}: only root can read it"));
    }
    match (
        unit.active_state.as_str(),
        unit.tested && !unit.conditions_held,
    ) {
        ("active", _) if names.is_empty() => Finding::good(check, format!("{state}; {registered}")),
        ("active", _) => {
            Finding::note(check, format!("{state}; {registered}")).mended_by(run("restart"))
        }
        ("failed", _) if names.is_empty() => Finding::note(
            check,
            format!("{state}, but that is harmless; {registered}"),
        )
        .mended_by(run("restart")),
        ("failed", _) => {
            let mut files: Vec<_> = missing.iter().map(|(_, path)| path.as_str()).collect();
            files.dedup();
            let mend = match name {
                SYSTEMD_BINFMT => Mend::Edit(format!("{}; then restart {name}", files.join(", "))),
                _ => run("restart"),
            };
            Finding::bad(
                check,
                Harm::Degraded,
                format!("{state}; {registered}"),
                mend,
            )
        }
        (_, true) => skipped(host, check, name, unit, (all, &registered)),
        (_, false) if names.is_empty() => Finding::good(check, format!("{state}; {registered}")),
        (_, false) => {
            Finding::note(check, format!("{state}; {registered}")).mended_by(run("start"))
        }
    }
}

/// Not started because of a condition: fine if there is nothing to do, else somebody wanted it so.
fn skipped(
    host: &Host,
    check: &'static str,
    name: &str,
    unit: &Unit,
    (all, registered): (usize, &str),
) -> Finding {
    let known = unit.conditions.iter().find(|condition| condition.failed);
    let by = match known {
        Some(condition) => format!("skipped by {}", condition.text),
        None => "skipped by a condition (which, systemd has forgotten at daemon-reload)".to_owned(),
    };
    if all == 0 {
        return Finding::good(check, format!("{by}; there are no rules"));
    }
    let is_suspect = |condition: &&Condition| known.is_none_or(|known| known == *condition);
    let in_drop_in = |path: &String| {
        let text = host.text(path);
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        let mut suspects = unit.conditions.iter().filter(is_suspect);
        let condition = suspects.find(|c| lines.contains(&c.text.as_str()))?;
        Some((path.clone(), condition))
    };
    // Our own is for where there is no table, which would have been seen before.
    let mut others = unit
        .drop_in_paths
        .iter()
        .filter(|path| !is_named_as_ours(path));
    let Some((path, condition)) = others.find_map(in_drop_in) else {
        return Finding::note(check, format!("{by}; {registered}"));
    };
    let place = match known {
        Some(_) => format!("in {path}"),
        None => format!("maybe {} in {path}", condition.text),
    };
    let found = format!("{by}, {place}; {registered}");
    let restart = format!("systemctl daemon-reload && systemctl restart {name}");
    let is_it = |line: &str| line == condition.text;
    Finding::note(check, found).mended_by(without_settings(host, name, &path, is_it, &restart))
}

/// Takes settings out of a drop-in: the whole of it if they are all that it has, of the admin's for
/// good, of a package's, which would come back, by a mask.
fn without_settings(
    host: &Host,
    unit: &str,
    path: &str,
    is_one: impl Fn(&str) -> bool,
    then: &str,
) -> Mend {
    let text = host.text(path);
    let mut settings = text.lines().map(str::trim).filter(|line| {
        let ignored = line.is_empty() || line.starts_with(['#', ';', '[']);
        !ignored
    });
    if !settings.all(is_one) {
        return Mend::Edit(format!("{path}: without that; then {then}"));
    }
    let vendor = VENDOR_UNITS
        .iter()
        .any(|directory| path.starts_with(directory));
    Mend::AsRoot(match vendor {
        false => format!("rm {} && {then}", word(path)),
        true => {
            let [etc, ..] = LOCAL_UNITS;
            let file = path.rsplit('/').next().unwrap_or_default();
            let mask = word(format!("{etc}/{unit}.d/{file}"));
            format!("mkdir -p {etc}/{unit}.d && ln -s /dev/null {mask} && {then}")
        }
    })
}

/// Whether the service is kept from emptying the table. What counts is what systemd made of all
/// drop-ins.
fn drop_in(
    host: &Host,
    wanted: &Wanted,
    check: &'static str,
    name: &str,
    unit: &Unit,
) -> Option<Finding> {
    let status = format!("{BINFMT_MISC}/status");
    if wanted.protect == Some(false) || unit.binds_over.contains(&status) {
        return None;
    }
    let reload = "systemctl daemon-reload";
    let early = host.path(EARLY);
    let others = || {
        let ours = |path: &&String| path.starts_with(early.as_str());
        unit.drop_in_paths.iter().filter(move |path| !ours(path))
    };
    // An empty assignment takes back all that came before it.
    let takes_back = |line: &str| {
        let (key, value) = line.split_once('=').unwrap_or_default();
        key.trim() == "BindPaths" && value.trim().is_empty()
    };
    let resets = |path: &&String| {
        let text = host.text(path);
        let mut lines = text.lines();
        lines.any(takes_back)
    };
    let (found, mend) = if let Some(path) = others().find(|path| is_named_as_ours(path)) {
        (
            format!("our drop-in {DROP_IN} is overridden by {path}"),
            Mend::AsRoot(format!("{} && {reload}", put_aside(host, path))),
        )
    } else if let Some(path) = others().rfind(resets) {
        (
            format!("our drop-in {DROP_IN} is overridden by {path}"),
            without_settings(host, name, path, |line| takes_back(line), reload),
        )
    } else {
        (
            format!("our drop-in {DROP_IN} is not loaded"),
            Mend::AsRoot(reload.to_owned()),
        )
    };
    Some(wanted.protection(check, Harm::Degraded, found, mend))
}

fn is_named_as_ours(path: &str) -> bool {
    path.ends_with(&format!("/{DROP_IN}"))
}

/// Takes away what is in the place of ours: a link for good, a file so that it can be looked at.
fn put_aside(host: &Host, path: &str) -> String {
    let is_link = host.path(path).read_link_utf8().is_ok();
    match is_link {
        true => format!("rm {}", word(path)),
        false => format!("mv {} {}", word(path), word(format!("{path}.saved"))),
    }
}

/// A service that the generator emits.
fn ours(
    host: &Host,
    wanted: Option<bool>,
    check: &'static str,
    name: &str,
    unit: &Unit,
) -> Finding {
    let start = format!("systemctl start {name}");
    let reload = "systemctl daemon-reload";
    let fault = |found: String, command: String| {
        let mend = Mend::AsRoot(command);
        fault(wanted, check, Harm::Unprotected, found, mend)
    };
    let state = unit.active_state.as_str();
    if unit.load_state == "not-found" {
        if wanted == Some(false) {
            return Finding::good(check, format!("no {name}, as wsl.conf has it"));
        }
        let found = format!("{name} is not loaded");
        return fault(found, format!("{reload} && {start}"));
    }
    // What lies above ours. systemd before 250 shows a mask as /dev/null.
    let above = ABOVE_EARLY.map(|directory| host.path(directory).join(name));
    let above = above.iter().find(|path| path.symlink_metadata().is_ok());
    if let Some(path) = above {
        let found = format!("{name} is overridden by {path}, {state}");
        let aside = put_aside(host, path.as_str());
        return fault(found, format!("{aside} && {reload} && {start}"));
    }
    let changed = match unit.drop_in_paths.is_empty() {
        true => String::new(),
        false => format!(", changed by {}", unit.drop_in_paths.join(", ")),
    };
    match state {
        "active" if unit.need_daemon_reload => {
            let found = format!("{name} is active{changed}, but its files have changed since");
            Finding::note(check, found).mended_by(Mend::AsRoot(reload.to_owned()))
        }
        "active" if !unit.status_text.is_empty() => {
            let found = format!("{name} is active{changed}, but says: {}", unit.status_text);
            Finding::note(check, found)
        }
        "active" if changed.is_empty() => Finding::good(check, format!("{name} is active")),
        "active" => Finding::note(check, format!("{name} is active{changed}")),
        "activating" => Finding::note(check, format!("{name} is being started{changed}")),
        "failed" => fault(
            format!("{name} has failed ({}){changed}", unit.result),
            format!("systemctl reset-failed {name} && {start}"),
        ),
        _ => fault(format!("{name} is {state}{changed}"), start),
    }
}
