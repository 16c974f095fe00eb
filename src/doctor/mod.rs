//! The doctor: facts are read once (`facts`), judged by functions that do no I/O (a file for each
//! subject), and reported (`report`).

pub mod facts;
mod generator;
pub mod leftovers;
pub mod report;
mod services;
mod session;
mod systemctl;
mod table;
#[cfg(test)]
#[path = "../../tests/doctor/states.rs"]
mod tests;

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use crate::host::{Host, WSL_CONF};
use crate::verbs::generate::Decision;
use crate::wsl::Verdict;
use crate::wsl_conf::WslConf;
use facts::{Facts, Place};
use report::{Finding, Report, State};

/// How long to wait for an answer. A healthy machine answers in a few milliseconds, a busy one in a
/// few hundred.
const PATIENCE: Duration = Duration::from_secs(2);

/// Examines the machine.
pub fn examine(host: &Host) -> Report {
    let facts = Facts::read(host, Instant::now() + PATIENCE);
    match facts.place.known("platform", "the root file system") {
        Ok(place) => judge(&facts, place),
        Err(unknown) => Report::of(vec![unknown], true),
    }
}

/// All findings, in the order in which to apply their fixes.
fn judge(facts: &Facts, place: &Place) -> Report {
    match place.verdict {
        Verdict::Wsl2 => {}
        Verdict::NoInit => return Report::of(vec![without_init(place)], true),
        ref elsewhere => return Report::elsewhere(elsewhere),
    }
    let conf = facts.conf.known("wsl.conf", "reading /etc/wsl.conf");
    let decision = conf.as_ref().ok().copied();
    let known =
        decision.filter(|d| d.noted.is_some() || d.unread != Some(ErrorKind::PermissionDenied));
    let wanted = known.map(in_force);
    let mut findings = vec![platform(place)];
    if !place.has_init {
        findings.push(without_init(place));
    }
    findings.extend(told(conf.map(wsl_conf)));
    let files = facts.files.known("generator", "reading systemd's files");
    let files = files.map_err(|unknown| findings.push(unknown)).ok();
    if let Some(files) = files.filter(|_| place.has_systemd) {
        let plan = known.map(|decision| &*decision.plan);
        findings.extend(generator::check(files, plan.unwrap_or_default()));
    } else if !place.has_systemd {
        let found = "not running, so nothing protects Windows programs";
        let mend = "section [boot]: set systemd=true; then run wsl.exe --shutdown in Windows";
        let finding = Finding::new("systemd", State::Unprotected, found);
        findings.push(finding.edit(format!("{WSL_CONF}, {mend}")));
    }
    let table = facts.table.known("binfmt_misc", "reading the table");
    findings.extend(told(table.map(|table| table::check(table, place))));
    if let Some(files) = files {
        let protect = wanted.is_some_and(|conf| conf.protect_binfmt);
        findings.extend(services::check(facts, files, protect));
        findings.extend(leftovers::check(files));
    }
    let session = facts.session.known("WSL_INTEROP", "reading /run/WSL");
    findings.extend(told(session.map(|session| vec![session::check(session)])));
    let findings = findings.into_iter().map(|finding| as_wanted(finding, wanted));
    Report::of(findings.collect(), wanted.is_none_or(|conf| conf.interop_enabled))
}

/// Turns a fault into a note if the distro's wsl.conf asks for that state.
fn as_wanted(mut finding: Finding, conf: Option<&WslConf>) -> Finding {
    let (protect, interop) = (conf.map(|c| c.protect_binfmt), conf.map(|c| c.interop_enabled));
    let wanted = match finding.check {
        "entry" | "launch" | "WSL_INTEROP" => interop,
        "generator" | "systemd" | "status-file" | "guard" => protect,
        "watcher" => protect.zip(interop).map(|(protect, interop)| protect && interop),
        _ => Some(true),
    };
    if finding.state <= State::Unknown || wanted == Some(true) {
        return finding;
    }
    finding.mend = None;
    (finding.state, finding.found) = match wanted {
        Some(_) => (State::Note, format!("{}; expected with this wsl.conf", finding.found)),
        None => (State::Unknown, format!("{}; wsl.conf may ask for this", finding.found)),
    };
    finding
}

/// The settings in effect until the distro stops.
fn in_force(decision: &Decision) -> &WslConf {
    decision.noted.as_ref().unwrap_or(&decision.conf)
}

fn told(known: Result<Vec<Finding>, Finding>) -> Vec<Finding> {
    known.unwrap_or_else(|unknown| vec![unknown])
}

/// Judges a missing /init. After a soft-reboot, which unmounts it, Windows programs still start:
/// the entry keeps the file open.
fn without_init(place: &Place) -> Finding {
    let again = "run wsl.exe --shutdown in Windows, then start this distro again".to_owned();
    let lost = "/init, which starts Windows programs,";
    let (state, found, mend) = match place.verdict {
        Verdict::NoInit => (
            State::Broken,
            format!("{lost} is missing: this distro has lost it, or this is a container"),
            format!("if this is a distro, {again}"),
        ),
        _ => (
            State::Unprotected,
            format!("{lost} is gone, as after a soft-reboot: nothing can be restored"),
            again,
        ),
    };
    Finding::new("platform", state, found).by_hand(mend)
}

fn platform(place: &Place) -> Finding {
    let version = match &place.version {
        Ok(Some(version)) => {
            let found = format!("this is a WSL2 distro; WSL version {version}");
            return Finding::good("platform", found);
        }
        Ok(None) => "it is not in PID 1's environment",
        Err(ErrorKind::PermissionDenied) => "only root can see it",
        Err(_) => "PID 1's environment cannot be read",
    };
    let found = format!("this is a WSL2 distro; WSL version unknown: {version}");
    Finding::note("platform", found)
}

/// Judges wsl.conf.
fn wsl_conf(decision: &Decision) -> Vec<Finding> {
    let check = "wsl.conf";
    let conf = &decision.conf;
    if decision.unread == Some(ErrorKind::PermissionDenied) {
        return vec![Finding::denied(check, WSL_CONF)];
    }
    let edit = |how: &str| format!("{WSL_CONF}, {how}; then start this distro again");
    let mut findings = Vec::new();
    let counts = in_force(decision);
    if counts.text() != conf.text() {
        let found = format!(
            "{WSL_CONF} has changed: protectBinfmt={}, interop enabled={}; this takes effect at \
             the next start of this distro",
            conf.protect_binfmt, conf.interop_enabled
        );
        findings.push(Finding::note(check, found));
    }
    if !counts.protect_binfmt {
        let found = format!("{WSL_CONF} has protectBinfmt=false, so nothing is protected");
        let mend = edit("section [boot]: delete the line protectBinfmt=false");
        findings.push(Finding::new(check, State::Unprotected, found).edit(mend));
    }
    if !counts.interop_enabled {
        let found = "has enabled=false in [interop], so no Windows programs start here";
        findings.push(Finding::note(check, format!("{WSL_CONF} {found}")));
    }
    // If it cannot be read the defaults apply, which the warning below reports.
    if findings.is_empty() && matches!(decision.unread, None | Some(ErrorKind::NotFound)) {
        findings.push(Finding::good(check, "protection and interop are on"));
    }
    if let Some(warning) = &decision.warning {
        let note = Finding::note(check, warning.as_str());
        findings.push(match conf.refused_line {
            Some(line) => note.edit(edit(&format!("line {line}: correct or delete it"))),
            None => note,
        });
    }
    findings
}
