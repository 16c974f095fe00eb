//! The kernel's table: whether it is there, what it does with a Windows program, and who may empty
//! it.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::Write;

use nix::errno::Errno;
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::unistd::fexecve;

use super::report::{word, Finding, Harm, Mend};
use super::Wanted;
use crate::host::{Host, BINFMT_MISC, GUARD_FILE, INIT};
use crate::interop::{self, LATE, NAME, STAND_IN};
use crate::mounts;
use crate::registry::{Claim, Entry, Listed, Pattern, Table};

/// The type of the file system.
const KIND: &str = "binfmt_misc";
/// What WSL 2.8.9 and later bind over the status file before systemd starts.
const WSL_LOCK: &str = "/run/wsl/binfmt-status-lock";
/// Looks at all of it.
pub fn check(host: &Host, wanted: &Wanted) -> Vec<Finding> {
    let Ok(mounts) = host.mount_info() else {
        let unreadable = "the list of mounts cannot be read";
        return vec![Finding::unknown("binfmt_misc", unreadable)];
    };
    let probe = probe();
    let seen = match readable(host, &mounts).map(|table| Seen::of(host, &table, &mounts)) {
        Some(Ok(seen)) => Some(seen),
        Some(Err(error)) => return vec![Finding::unknown("binfmt_misc", format!("{error:#}"))],
        None => None,
    };
    let mut findings = match &seen {
        None => vec![not_mounted(host, &mounts)],
        Some(seen) => {
            let mut findings = vec![enabled(host, wanted, seen, &probe)];
            findings.extend(entry(host, wanted, seen));
            findings
        }
    };
    // What mends that no Windows program starts, if it has been found.
    let cause = findings.iter().find_map(|finding| finding.mend.clone());
    findings.push(launch(host, wanted, seen.as_ref(), &probe, cause));
    if let Some(seen) = &seen {
        findings.extend(claims(host, seen));
        findings.push(status_file(host, wanted, seen));
    }
    findings
}

/// The table, if it is mounted. What else there may be on its path is not touched.
pub fn readable(host: &Host, mounts: &str) -> Option<Table> {
    match mounted(host, mounts) {
        Some(KIND) => Table::open(host).ok(),
        _ => None,
    }
}

/// The type of what is mounted on the table's path.
fn mounted<'a>(host: &Host, mounts: &'a str) -> Option<&'a str> {
    mounts::on(mounts, host.path(BINFMT_MISC).as_str()).map(|mount| mount.kind)
}

/// A command that changes mounts, where the distro has its own: not all shells are there.
fn among_mounts(host: &Host, command: String) -> Mend {
    Mend::AsRoot(match host.is_elsewhere_mounted() {
        true => format!("nsenter -t 1 -m -r sh -c {}", word(command)),
        false => command,
    })
}

fn guard(host: &Host) -> String {
    format!("{} guard", host.command())
}

fn restore(host: &Host) -> Mend {
    Mend::AsRoot(format!("{} restore", host.command()))
}

/// What the kernel does with a file that begins with `MZ`.
#[derive(Debug, PartialEq)]
enum Probe {
    /// Some interpreter takes it.
    Taken,
    /// None does: "Exec format error".
    Refused,
    /// This kernel cannot be asked.
    Unknown,
}

/// Asks the kernel, without anything being started: an interpreter could not open a file that is
/// closed on exec, so the kernel has found one when it says ENOENT, execveat(2). For four bytes
/// that can be printed it does not go looking for a module.
fn probe() -> Probe {
    let ask = || -> std::io::Result<Infallible> {
        let program = memfd_create(c"wsl-binfmt-probe", MFdFlags::MFD_CLOEXEC)?;
        let mut program = File::from(program);
        program.write_all(b"MZ  ")?;
        let nothing: [CString; 0] = [];
        Ok(fexecve(program, &[c"wsl-binfmt-probe"], &nothing)?)
    };
    let errno = match ask() {
        Ok(never) => match never {},
        Err(error) => error.raw_os_error().map(Errno::from_raw),
    };
    match errno {
        Some(Errno::ENOENT) => Probe::Taken,
        Some(Errno::ENOEXEC) => Probe::Refused,
        _ => Probe::Unknown,
    }
}

fn not_mounted(host: &Host, mounts: &str) -> Finding {
    let directory = host.path(BINFMT_MISC);
    let mount = format!("mount -t {KIND} {KIND} {directory}");
    let guard = guard(host);
    let (found, mend) = match mounted(host, mounts) {
        None => (
            format!("not mounted on {directory}"),
            format!("{mount} && {guard}"),
        ),
        Some(KIND) => (
            format!("mounted on {directory}, but not to be seen by this shell"),
            guard,
        ),
        Some(kind) => (
            format!("{directory} has something else on it, a file system of type {kind}"),
            // Below it there may be a table already.
            format!(
                "umount -l {directory} && {{ test -e {directory}/register || {mount}; }} && {guard}"
            ),
        ),
    };
    let mend = among_mounts(host, mend);
    Finding::bad("binfmt_misc", Harm::Unprotected, found, mend)
}

/// What there is to be seen of the table.
struct Seen {
    /// The entries that have to do with Windows programs, newest first as the kernel tries them.
    claiming: Vec<Listed>,
    /// The first of them that takes a Windows program, if the table is used at all.
    first: Option<Listed>,
    /// Those that are to come before WSL's and do not.
    misplaced: Vec<String>,
    /// What the status file says, of the table or of what covers it.
    state: String,
    /// What is mounted on the status file.
    cover: Option<String>,
}

impl Seen {
    fn of(host: &Host, table: &Table, mounts: &str) -> anyhow::Result<Seen> {
        let mut claiming = table.entries()?;
        let takes = |listed: &&Listed| listed.entry.takes_windows_programs();
        let first = claiming.iter().find(takes).cloned();
        let misplaced = interop::misplaced(&claiming).into_iter();
        let misplaced = misplaced.map(|listed| listed.name.clone()).collect();
        claiming.retain(|listed| listed.entry.claim() != Claim::None || listed.name == NAME);
        let directory = host.path(BINFMT_MISC);
        let status = directory.join("status");
        let cover = mounts::on(mounts, directory.as_str())
            .and_then(|table| mounts::within(mounts, status.as_str(), &table))
            // The file itself covers nothing.
            .filter(|mount| mount.kind != KIND);
        Ok(Seen {
            claiming,
            first,
            misplaced,
            state: host.text(&format!("{BINFMT_MISC}/status")),
            cover: cover.map(|mount| mount.root.to_owned()),
        })
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        interop::find(&self.claiming, name)
    }
}

/// The table as a whole. Where its status file is covered the kernel is asked, and answers whenever
/// there is an entry to be used.
fn enabled(host: &Host, wanted: &Wanted, seen: &Seen, probe: &Probe) -> Finding {
    let covered = seen.cover.is_some();
    // What the kernel is asked with has no more of a program than its first two bytes.
    let takes_any =
        |listed: &Listed| listed.entry.enabled && listed.entry.pattern == interop::wanted().pattern;
    let contradicted = *probe == Probe::Refused && seen.claiming.iter().any(takes_any);
    let disabled = contradicted || (!covered && seen.state.trim() == "disabled");
    if !disabled {
        let unseen = "mounted; whether it is enabled as a whole cannot be seen";
        return match (covered, probe) {
            (false, _) if seen.state.trim() != "enabled" => Finding::unknown("binfmt_misc", unseen),
            (true, Probe::Refused) => {
                Finding::note("binfmt_misc", format!("{unseen} without an entry"))
            }
            (true, Probe::Unknown) => Finding::unknown("binfmt_misc", unseen),
            _ => Finding::good("binfmt_misc", "mounted and enabled"),
        };
    }
    let status = host.path(BINFMT_MISC).join("status");
    let enable = format!("echo 1 >{status}");
    let mend = match covered {
        true => format!("umount {status} && {enable} && {}", guard(host)),
        false => enable,
    };
    let found = "mounted, but disabled as a whole, for all distros".to_owned();
    let mend = among_mounts(host, mend);
    match wanted.interop {
        Some(false) => wanted.protection("binfmt_misc", Harm::Unprotected, found, mend),
        _ => wanted.interop("binfmt_misc", Harm::Broken, found, mend),
    }
}

/// WSL's own entry.
fn entry(host: &Host, wanted: &Wanted, seen: &Seen) -> Vec<Finding> {
    let path = host.path(BINFMT_MISC).join(NAME);
    let again = |value: &str| {
        let command = host.command();
        Mend::AsRoot(format!("echo {value} >{path} && {command} restore"))
    };
    let fault = |harm, found, mend| wanted.interop("entry", harm, found, mend);
    let stands_in = |name: &str| seen.entry(name).filter(|entry| entry.interpreter == INIT);
    let other = [LATE, STAND_IN]
        .into_iter()
        .find_map(|name| Some((name, stands_in(name)?)));
    let first = match seen.entry(NAME) {
        None => {
            // WSL before 2.6.2 has only the other one, and that will do, mostly.
            let harm = match other.is_some_and(|(_, other)| other.enabled) {
                true => Harm::Degraded,
                false => Harm::Broken,
            };
            fault(harm, format!("{NAME} is missing"), restore(host))
        }
        Some(entry) => match interop::fault(entry) {
            Some(found) => {
                let enabled = Entry {
                    enabled: true,
                    ..entry.clone()
                };
                let mend = match interop::fault(&enabled) {
                    None => again("1"),
                    Some(_) => again("-1"),
                };
                fault(Harm::Broken, format!("{NAME} {found}"), mend)
            }
            None => flags(host, wanted, entry),
        },
    };
    let mut findings = vec![first];
    if let Some((name, other)) = other {
        let place = match seen.entry(NAME) {
            Some(_) => "doubles it",
            None => "stands in for it",
        };
        let found = format!("{name} {place}: {INIT}, flags {}", other.flags);
        findings.push(fault(Harm::Degraded, found, restore(host)));
    }
    findings
}

fn flags(host: &Host, wanted: &Wanted, entry: &Entry) -> Finding {
    let flags = &entry.flags;
    let needed = [
        (
            'P',
            "programs without arguments do not start, and others do not learn their name",
        ),
        ('F', "it does not work in containers"),
    ];
    let lost: Vec<_> = needed
        .into_iter()
        .filter(|(flag, _)| !flags.contains(*flag))
        .map(|(flag, harm)| format!("without the flag {flag} {harm}"))
        .collect();
    let harm = match flags.contains('P') {
        true => Harm::Degraded,
        false => Harm::Broken,
    };
    match lost.is_empty() {
        true => Finding::good("entry", format!("{NAME}: {INIT}, flags {flags}")),
        false => {
            let found = format!("{NAME}: {}", lost.join(", "));
            wanted.interop("entry", harm, found, restore(host))
        }
    }
}

/// Who gets an .exe.
fn launch(
    host: &Host,
    wanted: &Wanted,
    seen: Option<&Seen>,
    probe: &Probe,
    cause: Option<Mend>,
) -> Finding {
    let broken = |found: String, mend: Mend| {
        let mend = cause.unwrap_or(mend);
        wanted.interop("launch", Harm::Broken, found, mend)
    };
    match (seen.map(|seen| &seen.first), probe) {
        (_, Probe::Refused) => {
            let found = ".exe files go to nobody: Exec format error".to_owned();
            broken(found, restore(host))
        }
        (None, Probe::Taken) => {
            Finding::unknown("launch", ".exe files go to somebody who cannot be seen")
        }
        (None, Probe::Unknown) => Finding::unknown("launch", "the kernel cannot be asked"),
        (Some(None), _) => broken(".exe files go to nobody".to_owned(), restore(host)),
        (Some(Some(Listed { name, entry, .. })), _) if entry.interpreter == INIT => {
            Finding::good("launch", format!(".exe files go to {name} ({INIT})"))
        }
        (Some(Some(Listed { name, entry, .. })), _) => {
            let found = format!(".exe files go to {name} ({})", entry.interpreter);
            broken(found, restore(host))
        }
    }
}

/// Everyone else who wants Windows programs, or some of them.
fn claims(host: &Host, seen: &Seen) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut ahead = true;
    for Listed { name, entry, .. } in &seen.claiming {
        if name == NAME {
            ahead = false;
        }
        if interop::is_reserved(name) && (name == NAME || entry.interpreter == INIT) {
            continue;
        }
        let what = match &entry.pattern {
            Pattern::Extension(extension) => format!("files called *.{extension}"),
            Pattern::Magic { offset, magic, .. } => {
                let place = match offset {
                    0 => "begin with".to_owned(),
                    offset => format!("have after {offset} bytes"),
                };
                format!("files that {place} {}", magic.escape_ascii())
            }
        };
        let place = match (entry.enabled, ahead) {
            (false, _) => "disabled",
            (true, true) => "tried before WSLInterop",
            (true, false) => "tried after WSLInterop",
        };
        let found = format!("{name} ({}) is for {what}; {place}", entry.interpreter);
        findings.push(match seen.misplaced.contains(name) {
            true => {
                let found = format!("{found}, which takes these, too");
                Finding::bad("claims", Harm::Degraded, found, restore(host))
            }
            false => Finding::note("claims", found),
        });
    }
    findings
}

/// Who may empty the table from here.
fn status_file(host: &Host, wanted: &Wanted, seen: &Seen) -> Finding {
    let status = host.path(BINFMT_MISC).join("status");
    let Some(root) = &seen.cover else {
        let found = "open: whoever empties the table does so for all distros".to_owned();
        let mend = among_mounts(host, guard(host));
        return wanted.protection("status-file", Harm::Unprotected, found, mend);
    };
    // A path on its file system, which /run mostly is.
    let file = root.trim_end_matches("//deleted");
    let is = |path: &&str| [*path, path.trim_start_matches("/run")].contains(&file);
    let known = [GUARD_FILE, WSL_LOCK].into_iter().find(is);
    let found = match known {
        Some(GUARD_FILE) => format!("guarded by us, with {GUARD_FILE}"),
        Some(lock) => format!("guarded by WSL, with {lock}"),
        None => format!("covered with {file}, which is neither ours nor WSL's"),
    };
    if root.ends_with("//deleted") {
        let found = format!("{found}, which was deleted, so that systemd-binfmt cannot start");
        let mend = among_mounts(host, format!("umount {status} && {}", guard(host)));
        return wanted.protection("status-file", Harm::Degraded, found, mend);
    }
    match known {
        // Nothing here writes to it.
        Some(GUARD_FILE) if !["enabled", "disabled"].contains(&seen.state.trim()) => {
            let found = format!(
                "{found}, to which somebody has written {:?}",
                seen.state.trim()
            );
            let mend = among_mounts(host, format!("umount {status} && {}", guard(host)));
            wanted.protection("status-file", Harm::Degraded, found, mend)
        }
        Some(_) => Finding::good("status-file", found),
        None => Finding::note("status-file", found),
    }
}
