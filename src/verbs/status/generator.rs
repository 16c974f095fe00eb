//! The generator itself: whether systemd finds it and runs it, and whether it has.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use camino::{Utf8Path, Utf8PathBuf};

use super::report::{word, Finding, Harm, Mend};
use super::Wanted;
use crate::host::{self, Host, EARLY, GENERATORS};
use crate::plan::{Output, Plan};
use crate::units;

const CHECK: &str = "generator";
const NAME: &str = env!("CARGO_PKG_NAME");

/// Looks for the file that counts, at how it is, and at what it has written.
pub fn check(host: &Host, wanted: &Wanted, plan: &Plan) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut unusable = None;
    for directory in GENERATORS {
        let path = host.path(directory).join(NAME);
        match fate(&path) {
            Fate::Absent => {}
            Fate::Masks => {
                let mend = Mend::AsRoot(format!("rm {} && {RELOAD}", word(&path)));
                return vec![fault(wanted, format!("masked by {path}"), mend)];
            }
            // systemd passes over it, and takes the next one.
            Fate::Unusable(found) => {
                unusable.get_or_insert((path, found));
            }
            Fate::Runs { by_everybody } => {
                findings.extend(by_everybody.then(|| writable(&path)));
                findings.extend(stale(host, wanted, plan, &path));
                if findings.is_empty() {
                    findings.push(Finding::good(CHECK, path.as_str()));
                }
                return findings;
            }
        }
    }
    vec![match unusable {
        Some((path, found)) => {
            let mend = Mend::AsRoot(format!("chmod 755 {} && {RELOAD}", word(&path)));
            fault(wanted, format!("{path} {found}"), mend)
        }
        None => missing(host, wanted),
    }]
}

const RELOAD: &str = "systemctl daemon-reload";

fn fault(wanted: &Wanted, found: String, mend: Mend) -> Finding {
    wanted.protection(CHECK, Harm::Unprotected, found, mend)
}

/// What systemd makes of a file where it looks for generators.
enum Fate {
    Absent,
    Masks,
    Unusable(&'static str),
    Runs { by_everybody: bool },
}

fn fate(path: &Utf8Path) -> Fate {
    let is_null = path
        .read_link_utf8()
        .is_ok_and(|target| target == "/dev/null");
    let Ok(metadata) = fs::metadata(path) else {
        return Fate::Absent;
    };
    let mode = metadata.permissions().mode();
    match metadata.is_file() {
        _ if is_null => Fate::Masks,
        true if metadata.len() == 0 => Fate::Masks,
        true if mode & 0o111 == 0 => Fate::Unusable("is not executable"),
        true => Fate::Runs {
            by_everybody: mode & 0o002 != 0,
        },
        false => Fate::Absent,
    }
}

fn writable(path: &Utf8Path) -> Finding {
    let found = format!("{path} can be written by everybody, and systemd runs it as root");
    let mend = Mend::AsRoot(format!("chmod o-w {}", word(path)));
    Finding::bad(CHECK, Harm::Unprotected, found, mend)
}

/// A copy, since a link could lead to where somebody else may write.
fn missing(host: &Host, wanted: &Wanted) -> Finding {
    let [_, etc, ..] = GENERATORS;
    let path = host.path(etc).join(NAME);
    let exe = host::executable().unwrap_or_else(|_| Utf8PathBuf::from(NAME));
    let install = format!("install -D -m 755 {} {}", word(exe), word(path));
    let found = "not installed where systemd looks for it".to_owned();
    fault(
        wanted,
        found,
        Mend::AsRoot(format!("{install} && {RELOAD}")),
    )
}

/// What is not there, or not as it would be written now: by a generator that was installed or
/// upgraded since, or with another wsl.conf.
fn stale(host: &Host, wanted: &Wanted, plan: &Plan, generator: &Utf8Path) -> Option<Finding> {
    let early = host.path(EARLY);
    let exe = generator.canonicalize_utf8();
    let exe = exe.unwrap_or_else(|_| generator.to_owned());
    let differs = |output: &&Output| match output {
        Output::File { path, template } => {
            let text = units::fill(template, &exe);
            host.text(&format!("{EARLY}/{path}")) != text
        }
        Output::Link { path, target, .. } => {
            let link = early.join(path).read_link_utf8();
            link.map_or(true, |link| link != *target)
        }
    };
    let path = |output: &Output| match output {
        Output::File { path, .. } | Output::Link { path, .. } => *path,
    };
    let stale: Vec<_> = plan.outputs.iter().filter(differs).map(path).collect();
    (!stale.is_empty()).then(|| {
        let stale = stale.join(", ");
        let found = format!("{generator} has not written as it would now: {stale}");
        fault(wanted, found, Mend::AsRoot(RELOAD.to_owned()))
    })
}
