//! The doctor: facts are read once (`facts`), judged by functions that touch nothing (a file for
//! each thing that is looked at), and told (`report`).

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
use crate::plan::Plan;
use crate::verbs::generate::{Decision, Reading};
use crate::wsl::Verdict;
use crate::wsl_conf::WslConf;
use facts::{Facts, Place};
use report::{Finding, Report, State};

/// How long all is waited for that does not answer. What is well answers in a few milliseconds, and
/// on a machine with much else to do in some hundred.
const PATIENCE: Duration = Duration::from_secs(2);

/// Examines the machine.
pub fn examine(host: &Host) -> Report {
    let facts = Facts::read(host, Instant::now() + PATIENCE);
    match facts.place.known("platform", "the root file system") {
        Ok(place) => judge(&facts, place),
        Err(unknown) => Report::of(vec![unknown], true),
    }
}

/// All findings, in the order in which what mends them is to be done.
fn judge(facts: &Facts, place: &Place) -> Report {
    match place.verdict {
        Verdict::Wsl2 => {}
        Verdict::NoInit => return Report::of(vec![without_init(place)], true),
        ref elsewhere => return Report::elsewhere(elsewhere),
    }
    let conf = facts.conf.known("wsl.conf", "reading /etc/wsl.conf");
    let decision = conf.as_ref().ok().copied();
    let known = decision.filter(|d| d.noted.is_some() || d.reading != Reading::Denied);
    let wanted = known.map(in_force);
    let mut findings = vec![platform(place)];
    if !place.has_init {
        findings.push(without_init(place));
    }
    findings.extend(told(conf.map(wsl_conf)));
    let files = facts
        .files
        .known("generator", "reading the files of systemd");
    let files = files.map_err(|unknown| findings.push(unknown)).ok();
    if let Some(files) = files.filter(|_| place.has_systemd) {
        let plan = known.map_or_else(Plan::default, |decision| decision.plan.clone());
        findings.extend(generator::check(files, &plan));
    } else if !place.has_systemd {
        let found = "does not run here, so nothing protects Windows programs";
        let mend = "section [boot]: systemd=true; then wsl.exe --shutdown in Windows";
        let finding = Finding::new("systemd", State::Unprotected, found);
        findings.push(finding.edit(format!("{WSL_CONF}, {mend}")));
    }
    let table = facts
        .table
        .known("binfmt_misc", "reading the table of programs");
    findings.extend(told(table.map(|table| table::check(table, place))));
    if let Some(files) = files {
        let protect = wanted.is_some_and(|conf| conf.protect_binfmt);
        findings.extend(services::check(facts, files, protect));
        findings.extend(leftovers::check(files));
    }
    let session = facts.session.known("WSL_INTEROP", "reading /run/WSL");
    findings.extend(told(session.map(|session| vec![session::check(session)])));
    let findings = findings
        .into_iter()
        .map(|finding| as_wanted(finding, wanted));
    Report::of(
        findings.collect(),
        wanted.is_none_or(|conf| conf.interop_enabled),
    )
}

/// What the distro does not want, by its wsl.conf, is no fault.
fn as_wanted(mut finding: Finding, conf: Option<&WslConf>) -> Finding {
    let (protect, interop) = (
        conf.map(|c| c.protect_binfmt),
        conf.map(|c| c.interop_enabled),
    );
    let wanted = match finding.check {
        "entry" | "launch" | "WSL_INTEROP" => interop,
        "generator" | "systemd" | "status-file" | "guard" => protect,
        "watcher" => protect
            .zip(interop)
            .map(|(protect, interop)| protect && interop),
        _ => Some(true),
    };
    if finding.state <= State::Unknown || wanted == Some(true) {
        return finding;
    }
    finding.mend = None;
    (finding.state, finding.found) = match wanted {
        Some(_) => (
            State::Note,
            format!("{}, as wsl.conf has it", finding.found),
        ),
        None => (
            State::Unknown,
            format!("{}; wsl.conf may have it so", finding.found),
        ),
    };
    finding
}

/// What counts of wsl.conf until the distro stops.
fn in_force(decision: &Decision) -> &WslConf {
    decision.noted.as_ref().unwrap_or(&decision.conf)
}

fn told(known: Result<Vec<Finding>, Finding>) -> Vec<Finding> {
    known.unwrap_or_else(|unknown| vec![unknown])
}

/// Also after a soft-reboot, which unmounts it. The entry holds the file, and so works still.
fn without_init(place: &Place) -> Finding {
    let again = "wsl.exe --shutdown in Windows, then start this distro again".to_owned();
    let lost = "/init, which starts Windows programs, is not there";
    let (state, found, mend) = match place.verdict {
        Verdict::NoInit => (
            State::Broken,
            format!("{lost}: this is a distro that has lost it, or a container"),
            format!("if this is a distro, {again}"),
        ),
        _ => (
            State::Unprotected,
            format!("{lost} any more, as after a soft-reboot: nothing can be put back"),
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
        Ok(None) => "PID 1 has not been told",
        Err(ErrorKind::PermissionDenied) => "only root can see it",
        Err(_) => "PID 1 cannot be looked at",
    };
    let found = format!("this is a WSL2 distro; WSL version unknown: {version}");
    Finding::note("platform", found)
}

/// What was read of wsl.conf.
fn wsl_conf(decision: &Decision) -> Vec<Finding> {
    let check = "wsl.conf";
    let conf = &decision.conf;
    if decision.reading == Reading::Denied {
        return vec![Finding::denied(check, WSL_CONF)];
    }
    let edit = |how: &str| format!("{WSL_CONF}, {how}; then start this distro again");
    let mut findings = Vec::new();
    let counts = in_force(decision);
    if counts.text() != conf.text() {
        let found = format!(
            "{WSL_CONF} has changed: protectBinfmt={}, interop enabled={}; that counts from the \
             next start of this distro",
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
    // What cannot be read says nothing; the defaults hold, which the warning tells.
    if findings.is_empty() && decision.reading != Reading::Failed {
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
