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
    let bad = |state, found: String, command: String| {
        Finding::new(CHECK, state, found).by_root(format!("{command}systemctl daemon-reload"))
    };
    let unprotected = |found, command| vec![bad(State::Unprotected, found, command)];
    // systemd passes over what is not executable, and takes the next one.
    let all = &files.generators;
    let used = all
        .iter()
        .position(|(.., fate)| *fate != Fate::NotExecutable);
    let Some((path, real, fate)) = used.and_then(|used| all.get(used)) else {
        return match all.first() {
            Some((path, ..)) => unprotected(
                format!("{path} is not executable"),
                format!("chmod 755 {} && ", word(path)),
            ),
            None => {
                // A copy, since a link could lead to where somebody else may write.
                let ([_, etc, ..], name) = (GENERATORS, env!("CARGO_PKG_NAME"));
                let install = format!("install -D -m 755 {}", word(&files.executable));
                let found = "not installed where systemd looks for it".to_owned();
                unprotected(found, format!("{install} {etc}/{name} && "))
            }
        };
    };
    if *fate == Fate::Masks {
        return unprotected(
            format!("switched off by {path}"),
            format!("rm {} && ", word(path)),
        );
    }
    let mut findings = Vec::new();
    if *fate == Fate::WritableByAll {
        let found = format!("everybody can write to {path}, and systemd runs it as root");
        findings.push(bad(
            State::Unprotected,
            found,
            format!("chmod o-w {} && ", word(path)),
        ));
    }
    if let Some((other, ..)) = used.and_then(|used| all.get(used + 1)) {
        let found = format!("{path} is used in place of {other}, which upgrades would renew");
        findings.push(bad(
            State::Degraded,
            found,
            format!("rm {} && ", word(path)),
        ));
    } else if let Some(stale) = stale(files, plan, real) {
        let found = format!("{path} has not written as it would now: {stale}");
        findings.extend(unprotected(found, String::new()));
    }
    if findings.is_empty() {
        findings.push(Finding::good(CHECK, path.as_str()));
    }
    findings
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
