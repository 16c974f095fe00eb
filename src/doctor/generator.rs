//! The generator itself: whether systemd finds it and runs it, and whether it has.

use camino::Utf8Path;

use super::facts::{Fate, Files};
use super::report::{word, Finding, State};
use crate::host::GENERATORS;
use crate::plan::{Output, Plan};
use crate::units;

const CHECK: &str = "generator";

/// Judges the file that counts, and what it has written.
pub fn check(files: &Files, plan: &Plan) -> Vec<Finding> {
    // systemd passes over what is not executable, and takes the next one.
    let all = &files.generators;
    let used = all
        .iter()
        .position(|(.., fate)| *fate != Fate::NotExecutable);
    let Some((at, (path, real, fate))) = used.and_then(|at| Some((at, all.get(at)?))) else {
        return vec![unused(files)];
    };
    if *fate == Fate::Masks {
        let found = format!("switched off by {path}");
        return vec![bad(State::Unprotected, found, &["rm", path.as_str()])];
    }
    let mut findings = Vec::new();
    if *fate == Fate::WritableByAll {
        let found = format!("everybody can write to {path}, and systemd runs it as root");
        let chmod = ["chmod", "o-w", path.as_str()];
        findings.push(bad(State::Unprotected, found, &chmod));
    }
    if let Some((other, ..)) = all.get(at + 1) {
        let found = format!("{path} is used in place of {other}, which upgrades would renew");
        findings.push(bad(State::Degraded, found, &["rm", path.as_str()]));
    } else if let Some(stale) = stale(files, plan, real) {
        let found = format!("{path} has not written as it would now: {stale}");
        findings.push(bad(State::Unprotected, found, &[]));
    }
    if findings.is_empty() {
        findings.push(Finding::good(CHECK, path.as_str()));
    }
    findings
}

/// Where systemd has none to run.
fn unused(files: &Files) -> Finding {
    if let Some((path, ..)) = files.generators.first() {
        let found = format!("{path} is not executable");
        return bad(State::Unprotected, found, &["chmod", "755", path.as_str()]);
    }
    // A copy, since a link could lead to where somebody else may write.
    let [_, etc, ..] = GENERATORS;
    let to = format!("{etc}/{}", env!("CARGO_PKG_NAME"));
    let install = ["install", "-D", "-m", "755", files.executable.as_str(), &to];
    let found = "not installed where systemd looks for it".to_owned();
    bad(State::Unprotected, found, &install)
}

/// What a command mends, if there is one, and after it a daemon-reload.
fn bad(state: State, found: String, command: &[&str]) -> Finding {
    let mut mend: String = command.iter().map(|text| word(text) + " ").collect();
    if !command.is_empty() {
        mend += "&& ";
    }
    Finding::new(CHECK, state, found).by_root(mend + "systemctl daemon-reload")
}

/// What is not there, or not as it would be written now: by a generator that was installed or
/// upgraded since, or with another wsl.conf.
fn stale(files: &Files, plan: &Plan, exe: &Utf8Path) -> Option<String> {
    let stale = plan.outputs.iter().filter_map(|output| {
        let (path, text) = match output {
            Output::File { path, template } => (path, units::fill(template, exe)),
            Output::Link { path, target, .. } => (path, format!("link to {target}")),
        };
        (files.written.get(*path) != Some(&text)).then_some(*path)
    });
    let stale: Vec<_> = stale.collect();
    (!stale.is_empty()).then(|| stale.join(", "))
}
