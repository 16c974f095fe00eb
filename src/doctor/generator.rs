//! The generator itself: whether systemd finds and runs it, and whether its output is current.

use camino::Utf8Path;

use super::facts::{Fate, Files};
use super::report::{word, Finding, State};
use crate::host::GENERATORS;
use crate::plan::{Output, Plan};
use crate::units;

const CHECK: &str = "generator";

/// Judges the file that systemd runs, and its output.
pub fn check(files: &Files, plan: &Plan) -> Vec<Finding> {
    let bad = |state, found: String, command: String| {
        Finding::new(CHECK, state, found).by_root(format!("{command}systemctl daemon-reload"))
    };
    let unprotected = |found, command| vec![bad(State::Unprotected, found, command)];
    // systemd skips a file that is not executable, and takes the next one.
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
                // A copy, as a link could point to a place where others may write.
                let ([_, etc, ..], name) = (GENERATORS, env!("CARGO_PKG_NAME"));
                let install = format!("install -D -m 755 {}", word(&files.executable));
                let found = "not installed where systemd looks for generators".to_owned();
                unprotected(found, format!("{install} {etc}/{name} && "))
            }
        };
    };
    if *fate == Fate::Masks {
        return unprotected(
            format!("masked by {path}"),
            format!("rm {} && ", word(path)),
        );
    }
    let mut findings = Vec::new();
    if *fate == Fate::WritableByAll {
        let found = format!("anybody can write to {path}, which systemd runs as root");
        findings.push(bad(
            State::Unprotected,
            found,
            format!("chmod o-w {} && ", word(path)),
        ));
    }
    if let Some((other, ..)) = used.and_then(|used| all.get(used + 1)) {
        let found = format!("{path} is used instead of {other}, so upgrading that has no effect");
        findings.push(bad(
            State::Degraded,
            found,
            format!("rm {} && ", word(path)),
        ));
    } else if let Some(stale) = stale(files, plan, real) {
        let found = format!("the output of {path} is out of date: {stale}");
        findings.extend(unprotected(found, String::new()));
    }
    if findings.is_empty() {
        findings.push(Finding::good(CHECK, path.as_str()));
    }
    findings
}

/// The outputs that are missing or out of date, as the generator has since been installed or
/// upgraded, or wsl.conf changed.
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
