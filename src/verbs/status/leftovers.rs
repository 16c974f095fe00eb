//! What advice from the time before this project has left behind.

use std::collections::BTreeSet;

use super::report::{word, Finding, Harm, Mend};
use crate::binfmt_d::{self, Rule};
use crate::host::{Host, BINFMT_D, INIT, LOCAL_UNITS, VENDOR_UNITS, WSL_CONF};
use crate::interop::{LATE, NAME};

const CHECK: &str = "leftovers";

/// Looks for rules in binfmt.d, units, links, and WSL's own command.
pub fn check(host: &Host, boot_command: &str) -> Vec<Finding> {
    let mut findings = rules(host);
    findings.extend(units(host));
    findings.extend(links(host));
    if registers(boot_command) {
        let found = format!("{WSL_CONF} registers the entry by itself");
        let mend = Mend::Edit(format!(
            "{}, section [boot]: without command=",
            host.path(WSL_CONF)
        ));
        findings.push(Finding::bad(CHECK, Harm::Degraded, found, mend));
    }
    if findings.is_empty() {
        findings.push(Finding::good(CHECK, "none of old workarounds"));
    }
    findings
}

/// Rules that make systemd-binfmt replace the entry, with an instant in which there is none.
fn rules(host: &Host) -> Vec<Finding> {
    let found = binfmt_d::rules(host);
    let ours =
        |rule: &&Rule| [NAME, LATE].contains(&rule.name.as_str()) || rule.interpreter == INIT;
    let mut findings = Vec::new();
    // Those of one file follow each other.
    let mut paths: Vec<_> = found.iter().filter(ours).map(|rule| &rule.path).collect();
    paths.dedup();
    for path in paths {
        let in_file = || found.iter().filter(|rule| rule.path == *path);
        let what: Vec<_> = in_file().filter(ours).map(name_and_flags).collect();
        let mend = match in_file().all(|rule| ours(&rule)) {
            true => without_rules(host, path),
            false => Mend::Edit(format!("{}: without these rules", host.path(path))),
        };
        let found = format!("{path} registers {}", what.join(", "));
        findings.push(Finding::bad(CHECK, Harm::Degraded, found, mend));
    }
    let denied = binfmt_d::files(host)
        .into_iter()
        .filter(|path| host.is_denied(path));
    findings.extend(denied.map(|path| unreadable(&path)));
    findings
}

fn name_and_flags(rule: &Rule) -> String {
    match rule.flags.contains('F') {
        true => rule.name.clone(),
        false => format!("{} without the flag F", rule.name),
    }
}

fn unreadable(path: &str) -> Finding {
    Finding::unknown(CHECK, format!("{path}: only root can read it"))
}

/// Takes a file of rules away: the admin's for good; a package's would come back.
fn without_rules(host: &Host, path: &str) -> Mend {
    let [etc, run, local, ..] = BINFMT_D;
    let (directory, name) = path.rsplit_once('/').unwrap_or_default();
    Mend::AsRoot(match [etc, run, local].contains(&directory) {
        true => format!("rm {}", word(host.path(path))),
        false => {
            let mask = word(host.path(etc).join(name));
            format!("mkdir -p {} && ln -s /dev/null {mask}", host.path(etc))
        }
    })
}

/// Units that something starts and drop-ins that register the entry.
fn units(host: &Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |path: String, mend| {
        let found = format!("{path} registers the entry by itself");
        findings.push(Finding::bad(CHECK, Harm::Degraded, found, mend));
    };
    let all = || LOCAL_UNITS.iter().chain(&VENDOR_UNITS);
    for unit in wanted_units(host) {
        // What a timer or a path starts is called as it is.
        let stem = unit
            .rsplit_once('.')
            .map_or(unit.as_str(), |(stem, _)| stem);
        let template = stem.split_once('@').map(|(name, _)| format!("{name}@"));
        let file = format!("{}.service", template.as_deref().unwrap_or(stem));
        let mut paths = all().map(|directory| format!("{directory}/{file}"));
        let path = paths.find(|path| host.path(path).exists());
        if let Some(path) = path.filter(|path| registering(&host.text(path)).any()) {
            add(
                path,
                Mend::AsRoot(format!("systemctl disable --now {}", word(unit))),
            );
        }
    }
    for directory in LOCAL_UNITS {
        for (path, text) in drop_ins(host, directory) {
            let registering = registering(&text);
            if registering.any() {
                let file = host.path(&path);
                let mend = match registering.others {
                    0 => Mend::AsRoot(format!("rm {} && systemctl daemon-reload", word(file))),
                    _ => Mend::Edit(format!(
                        "{file}: without what registers it; then systemctl daemon-reload"
                    )),
                };
                add(path, mend);
            }
        }
    }
    findings
}

/// All that is enabled: what stands in the directories of links that systemd follows.
fn wanted_units(host: &Host) -> BTreeSet<String> {
    let links = |directory: &str| -> Vec<String> {
        let names = host.names(directory).into_iter();
        names
            .filter(|name| wants(name))
            .flat_map(|name| host.names(&format!("{directory}/{name}")))
            .collect()
    };
    LOCAL_UNITS.into_iter().flat_map(links).collect()
}

fn drop_ins(host: &Host, directory: &str) -> Vec<(String, String)> {
    let names = host.names(directory).into_iter();
    let directories = names.filter(|name| name.ends_with(".d"));
    let files = directories.flat_map(|name| {
        let directory = format!("{directory}/{name}");
        let names = host.names(&directory).into_iter();
        names.map(move |name| format!("{directory}/{name}"))
    });
    files
        .filter(|path| path.ends_with(".conf"))
        .map(|path| (path.clone(), host.text(&path)))
        .collect()
}

/// How many settings of a unit register the entry, and how many do something else.
struct Registering {
    settings: usize,
    others: usize,
}

impl Registering {
    fn any(&self) -> bool {
        self.settings > 0
    }
}

fn registering(unit: &str) -> Registering {
    let mut counted = Registering {
        settings: 0,
        others: 0,
    };
    for line in unit.replace("\\\n", " ").lines() {
        let line = line.trim();
        let (key, value) = line.split_once('=').unwrap_or_default();
        if line.starts_with(['#', ';']) || key.is_empty() {
            continue;
        }
        match key.starts_with("Exec") && registers(value) {
            true => counted.settings += 1,
            // A reset of the same goes with it.
            false => counted.others += usize::from(!value.trim().is_empty()),
        }
    }
    counted
}

/// Whether a command registers the entry.
fn registers(command: &str) -> bool {
    command.contains("register") && (command.contains(NAME) || command.contains(":MZ:"))
}

/// Links to the unit that WSL 2.0 to 2.5.6 made at boot, and that was gone after a daemon-reload.
fn links(host: &Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    for directory in LOCAL_UNITS {
        for name in host.names(directory).into_iter().filter(|name| wants(name)) {
            let path = host.path(&format!("{directory}/{name}/wsl-binfmt.service"));
            if path.symlink_metadata().is_ok() && !path.exists() {
                let found = format!("{path} is a link to a unit of older WSL, which is gone");
                let mend = Mend::AsRoot(format!("rm {}", word(path)));
                findings.push(Finding::note(CHECK, found).mended_by(mend));
            }
        }
    }
    findings
}

fn wants(directory: &str) -> bool {
    directory.ends_with(".wants") || directory.ends_with(".requires")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_registers_the_entry_is_told_from_what_only_looks_at_it() {
        let counted = |unit: &str| {
            let counted = registering(unit);
            (counted.settings, counted.others)
        };
        let register = "/bin/sh -c 'echo :WSLInterop:M::MZ::/init:PF >/x/register'";
        assert_eq!(
            counted(&format!("[Service]\nExecStart=\nExecStart={register}\n")),
            (1, 0)
        );
        assert_eq!(counted(&format!("ExecStart={register}\nNice=1\n")), (1, 1));
        assert_eq!(
            counted("ExecStart=sh -c 'echo :x:M::MZ::/init: \\\n>/x/register'"),
            (1, 0)
        );
        assert_eq!(counted(&format!("# ExecStart={register}\n")), (0, 0));
        assert_eq!(
            counted("ConditionPathExists=/proc/sys/fs/binfmt_misc/WSLInterop"),
            (0, 1)
        );
        assert_eq!(
            counted("ExecStart=cat /proc/sys/fs/binfmt_misc/WSLInterop"),
            (0, 1)
        );
        assert_eq!(
            counted("ExecStart=sh -c 'echo :q:M::ELF::/q: >/x/register'"),
            (0, 1)
        );
    }
}
