//! The generator itself: whether systemd finds and runs it, and whether its output is current.

use camino::Utf8Path;

use super::facts::{Fate, Files};
use super::report::{word, Finding, State};
use crate::host::GENERATORS;
use crate::plan::Output;
use crate::units;

const CHECK: &str = "generator";

/// Judges the file that systemd runs, and its output.
pub fn check(files: &Files, plan: &[Output]) -> Vec<Finding> {
    // systemd skips a file that is not executable, and takes the next one.
    let all = &files.generators;
    let used = all.iter().position(|(.., fate)| *fate != Fate::NotExecutable);
    let Some((at, (path, real, fate))) = used.and_then(|at| Some((at, all.get(at)?))) else {
        return vec![unused(files)];
    };
    if *fate == Fate::Masks {
        let found = format!("masked by {path}");
        return vec![bad(State::Unprotected, found, &["rm", path.as_str()])];
    }
    let mut findings = Vec::new();
    if *fate == Fate::WritableByAll {
        let found = format!("anybody can write to {path}, which systemd runs as root");
        let chmod = ["chmod", "o-w", path.as_str()];
        findings.push(bad(State::Unprotected, found, &chmod));
    }
    if let Some((other, ..)) = all.get(at + 1) {
        let found = format!("{path} is used instead of {other}, so upgrading that has no effect");
        findings.push(bad(State::Degraded, found, &["rm", path.as_str()]));
    } else if let Some(stale) = stale(files, plan, real) {
        let found = format!("the output of {path} is out of date: {stale}");
        findings.push(bad(State::Unprotected, found, &[]));
    }
    if findings.is_empty() {
        findings.push(Finding::good(CHECK, path.as_str()));
    }
    findings
}

/// Judges generators none of which systemd runs.
fn unused(files: &Files) -> Finding {
    if let Some((path, ..)) = files.generators.first() {
        let found = format!("{path} is not executable");
        return bad(State::Unprotected, found, &["chmod", "755", path.as_str()]);
    }
    // A copy, as a link could point to a place where others may write.
    let [_, etc, ..] = GENERATORS;
    let to = format!("{etc}/{}", env!("CARGO_PKG_NAME"));
    let install = ["install", "-D", "-m", "755", files.executable.as_str(), &to];
    let found = "not installed where systemd looks for generators".to_owned();
    bad(State::Unprotected, found, &install)
}

/// A finding that a command, if there is one, fixes together with a daemon-reload.
fn bad(state: State, found: String, command: &[&str]) -> Finding {
    let mut mend: String = command.iter().map(|text| word(text) + " ").collect();
    if !command.is_empty() {
        mend += "&& ";
    }
    Finding::new(CHECK, state, found).by_root(mend + "systemctl daemon-reload")
}

/// The outputs that are missing or out of date, as the generator has since been installed or
/// upgraded, or wsl.conf changed.
fn stale(files: &Files, plan: &[Output], exe: &Utf8Path) -> Option<String> {
    let stale = plan.iter().filter_map(|output| {
        let (path, text) = match output {
            Output::File { path, template } => (path, units::fill(template, exe)),
            Output::Link { path, target, .. } => (path, format!("link to {target}")),
        };
        (files.written.get(*path) != Some(&text)).then_some(*path)
    });
    let stale: Vec<_> = stale.collect();
    (!stale.is_empty()).then(|| stale.join(", "))
}
