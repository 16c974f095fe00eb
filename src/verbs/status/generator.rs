//! The generator itself: whether systemd finds it and runs it, and whether it has.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use camino::{Utf8Path, Utf8PathBuf};

use super::report::{Finding, Harm, Mend};
use super::Wanted;
use crate::host::{self, Host, EARLY, GENERATORS};
use crate::plan::{Output, Plan};
use crate::units;

const NAME: &str = env!("CARGO_PKG_NAME");

/// Looks for the file that counts, at how it is, and at what it has written.
pub fn check(host: &Host, wanted: &Wanted, plan: &Plan) -> Vec<Finding> {
    let candidates = GENERATORS.map(|directory| host.path(directory).join(NAME));
    let found = candidates
        .iter()
        .find(|path| path.symlink_metadata().is_ok());
    let Some(path) = found else {
        return vec![missing(host, wanted)];
    };
    let run = |change: &str| Mend::AsRoot(format!("{change} {path} && systemctl daemon-reload"));
    let fault =
        |found: String, mend| wanted.protection("generator", Harm::Unprotected, found, mend);
    let metadata = match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => metadata,
        Ok(_) => return vec![fault(format!("masked by {path}"), run("rm"))],
        Err(error) => return vec![fault(format!("{path}: {error}"), run("rm"))],
    };
    let mode = metadata.permissions().mode();
    if mode & 0o111 == 0 {
        return vec![fault(format!("{path} is not executable"), run("chmod 755"))];
    }
    let mut findings = Vec::new();
    if mode & 0o002 != 0 {
        let found = format!("{path} can be written by everybody, and systemd runs it as root");
        let mend = Mend::AsRoot(format!("chmod o-w {path}"));
        findings.push(Finding::bad("generator", Harm::Unprotected, found, mend));
    }
    let stale = stale(host, plan, path);
    if !stale.is_empty() {
        let reload = Mend::AsRoot("systemctl daemon-reload".to_owned());
        let found = format!(
            "{path} has not written as it would now: {}",
            stale.join(", ")
        );
        findings.push(fault(found, reload));
    }
    if findings.is_empty() {
        findings.push(Finding::good("generator", path.as_str()));
    }
    findings
}

fn missing(host: &Host, wanted: &Wanted) -> Finding {
    let directory = host.path(GENERATORS[1]);
    let exe = host::executable().unwrap_or_else(|_| Utf8PathBuf::from(NAME));
    let command = format!(
        "mkdir -p {directory} && ln -s {exe} {directory}/{NAME} && systemctl daemon-reload"
    );
    wanted.protection(
        "generator",
        Harm::Unprotected,
        "not installed where systemd looks for it".to_owned(),
        Mend::AsRoot(command),
    )
}

/// What is not there, or not as it would be written now: by a generator that was installed or
/// upgraded since, or with another wsl.conf.
fn stale(host: &Host, plan: &Plan, generator: &Utf8Path) -> Vec<&'static str> {
    let early = host.path(EARLY);
    let exe = generator
        .canonicalize_utf8()
        .unwrap_or_else(|_| generator.to_owned());
    let differs = |output: &&Output| match output {
        Output::File { path, template } => {
            let text = units::fill(template, &exe, plan.interop);
            host.text(&format!("{EARLY}/{path}")) != text
        }
        Output::Link { path, target } => early
            .join(path)
            .read_link_utf8()
            .map_or(true, |link| link != *target),
    };
    let path = |output: &Output| match output {
        Output::File { path, .. } | Output::Link { path, .. } => *path,
    };
    plan.outputs.iter().filter(differs).map(path).collect()
}
