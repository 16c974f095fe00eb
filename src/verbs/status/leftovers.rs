//! What advice from the time before this project has left behind.

use crate::binfmt_d;
use crate::host::{Host, BINFMT_D, INIT, LOCAL_UNITS};
use crate::verbs::restore::{LATE, NAME};

use super::report::{Finding, Harm, Mend};

/// Looks for rules in binfmt.d, units, and links.
pub fn check(host: &Host) -> Vec<Finding> {
    let mut findings = rules(host);
    for directory in LOCAL_UNITS {
        findings.extend(units(host, directory));
        findings.extend(links(host, directory));
    }
    if findings.is_empty() {
        findings.push(Finding::good("leftovers", "none of old workarounds"));
    }
    findings
}

/// Rules that make systemd-binfmt replace the entry, with an instant in which there is none.
fn rules(host: &Host) -> Vec<Finding> {
    let ours = |rule: &binfmt_d::Rule| {
        [NAME, LATE].contains(&rule.name.as_str()) || rule.interpreter == INIT
    };
    let finding = |rule: binfmt_d::Rule| {
        let flags = match rule.flags.contains('F') {
            true => "",
            false => " without the flag F",
        };
        let found = format!("{} registers {}{flags}", rule.path, rule.name);
        let [etc, run, local, ..] = BINFMT_D;
        let (directory, name) = rule.path.rsplit_once('/').unwrap_or_default();
        let mend = match [etc, run, local].contains(&directory) {
            true => format!("rm {}", host.path(&rule.path)),
            // It may be a package's, and come back.
            false => {
                let etc = host.path(etc);
                format!("mkdir -p {etc} && ln -s /dev/null {etc}/{name}")
            }
        };
        Finding::bad("leftovers", Harm::Degraded, found, Mend::AsRoot(mend))
    };
    binfmt_d::rules(host)
        .into_iter()
        .filter(ours)
        .map(finding)
        .collect()
}

/// Units and drop-ins that register the entry.
fn units(host: &Host, directory: &str) -> Vec<Finding> {
    let names = host.names(directory);
    let registers = |path: &str| {
        let text = host.text(path).replace("\\\n", " ");
        let mut settings = text.lines();
        settings.any(|line| {
            let ours = line.contains(NAME) || line.contains(":MZ:");
            line.starts_with("Exec") && line.contains("register") && ours
        })
    };
    let mut findings = Vec::new();
    let mut add = |path: &str, mend: String| {
        let found = format!("{path} registers the entry by itself");
        let mend = Mend::AsRoot(mend);
        findings.push(Finding::bad("leftovers", Harm::Degraded, found, mend));
    };
    for name in &names {
        let path = format!("{directory}/{name}");
        if name.ends_with(".d") {
            for drop_in in host.names(&path) {
                let path = format!("{path}/{drop_in}");
                if drop_in.ends_with(".conf") && registers(&path) {
                    let file = host.path(&path);
                    add(&path, format!("rm {file} && systemctl daemon-reload"));
                }
            }
        } else if let Some(stem) = name.strip_suffix(".service") {
            let starts = [
                format!("{stem}.timer"),
                format!("{stem}.path"),
                name.clone(),
            ];
            let mut starts = starts
                .iter()
                .filter(|unit| is_wanted(host, directory, &names, unit));
            if let Some(unit) = starts.next().filter(|_| registers(&path)) {
                add(&path, format!("systemctl disable --now {unit}"));
            }
        }
    }
    findings
}

/// Whether something wants the unit, so that it is started without being asked for.
fn is_wanted(host: &Host, directory: &str, names: &[String], unit: &str) -> bool {
    names.iter().filter(|name| wants(name)).any(|name| {
        host.path(&format!("{directory}/{name}/{unit}"))
            .symlink_metadata()
            .is_ok()
    })
}

/// Links to the unit that WSL 2.0 to 2.5.6 made at boot, and that was gone after a daemon-reload.
fn links(host: &Host, directory: &str) -> Vec<Finding> {
    let names = host.names(directory);
    let link = |name: &String| {
        let path = host.path(&format!("{directory}/{name}/wsl-binfmt.service"));
        let dangling = path.symlink_metadata().is_ok() && !path.exists();
        dangling.then(|| {
            let found = format!("{path} is a link to a unit of older WSL, which is gone");
            let mend = Mend::AsRoot(format!("rm {path}"));
            Finding::note("leftovers", found).mended_by(mend)
        })
    };
    names
        .iter()
        .filter(|name| wants(name))
        .filter_map(link)
        .collect()
}

fn wants(directory: &str) -> bool {
    directory.ends_with(".wants") || directory.ends_with(".requires")
}
