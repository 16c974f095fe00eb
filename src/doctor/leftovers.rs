//! Workarounds from before this project, as far as they can be recognized.

use super::facts::Files;
use super::report::{word, Finding, State};
use crate::binfmt_d::Rule;
use crate::host::{BINFMT_D, INIT, VENDOR_UNITS};
use crate::interop::{LATE, NAME};

const CHECK: &str = "leftovers";

/// Judges rules in binfmt.d, units and drop-ins that write to the table, and links.
pub fn check(files: &Files) -> Vec<Finding> {
    let mut findings = rules(files);
    let writes = |path: &str| {
        let found = format!("{path} looks like an old workaround: it writes to the table");
        Finding::new(CHECK, State::Degraded, found)
    };
    for [unit, path, text] in &files.enabled {
        if registers(text) {
            let disable = format!("systemctl disable --now {}", word(unit));
            findings.push(writes(path).by_root(disable));
        }
    }
    for (path, text) in &files.drop_ins {
        let of_vendor = VENDOR_UNITS.iter().any(|vendor| path.starts_with(vendor));
        if registers(text) && !of_vendor {
            let how = "delete the line with \"register\"; then systemctl daemon-reload";
            findings.push(writes(path).edit(format!("{path}: {how}")));
        }
    }
    for path in &files.dangling {
        let found = format!("{path} links to a unit of older WSL that no longer exists");
        findings.push(Finding::note(CHECK, found).by_root(format!("rm {}", word(path))));
    }
    if findings.is_empty() {
        findings.push(Finding::good(CHECK, "no old workarounds found"));
    }
    findings
}

/// Judges rules that make systemd-binfmt replace the entry, with a gap in between.
fn rules(files: &Files) -> Vec<Finding> {
    let is_wsls = |rule: &&Rule| [NAME, LATE].contains(&&*rule.name) || rule.interpreter == INIT;
    let mut findings = Vec::new();
    // The rules of a file are next to each other.
    for rules in files.rules.chunk_by(|a, b| a.path == b.path) {
        let path = rules.first().map_or("", |rule| &rule.path);
        let (directory, name) = path.rsplit_once('/').unwrap_or_default();
        let names = rules.iter().filter(is_wsls).map(|rule| &*rule.name);
        let names: Vec<_> = names.collect();
        let found = format!("{path} looks like an old workaround: it replaces {NAME}");
        let finding = Finding::new(CHECK, State::Degraded, found);
        let [etc, run, local, ..] = BINFMT_D;
        // The admin's file can be deleted; a package's would come back, so it is masked.
        findings.extend(match names.len() {
            0 => None,
            some if some < rules.len() => {
                Some(finding.edit(format!("{path}: delete the rules for {}", names.join(", "))))
            }
            _ if [etc, run, local].contains(&directory) => {
                Some(finding.by_root(format!("rm {}", word(path))))
            }
            _ => {
                let mask = word(format!("{etc}/{name}"));
                Some(finding.by_root(format!("mkdir -p {etc} && ln -s /dev/null {mask}")))
            }
        });
    }
    findings.extend(files.denied.iter().map(|path| Finding::denied(CHECK, path)));
    findings
}

/// Whether a unit has a command that registers the entry, or another one for `MZ`.
pub fn registers(unit: &str) -> bool {
    let unit = unit.replace("\\\n", " ");
    let mut settings = unit.lines().filter_map(|line| line.trim().split_once('='));
    settings.any(|(key, command)| {
        let names_it = command.contains(NAME) || command.contains(":MZ:");
        key.starts_with("Exec") && command.contains("register") && names_it
    })
}
