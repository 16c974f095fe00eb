//! The kernel's table: whether it is there, what it does with a Windows program, and who may empty
//! it.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::Write;

use nix::errno::Errno;
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::unistd::fexecve;

use super::report::{Finding, Harm, Mend};
use super::Wanted;
use crate::host::{Host, BINFMT_MISC, GUARD_FILE, INIT};
use crate::mounts;
use crate::registry::{Claim, Entry, Pattern, Table};
use crate::verbs::restore::{self, Others, LATE, NAME};

const BINFMT_MISC_TYPE: &str = "binfmt_misc";
/// What WSL 2.8.9 and later bind over the status file before systemd starts.
const WSL_LOCK: &str = "/run/wsl/binfmt-status-lock";

/// Looks at all of it.
pub fn check(host: &Host, wanted: &Wanted) -> Vec<Finding> {
    let probe = probe();
    let Some(cover) = cover(host) else {
        let unreadable = "the list of mounts cannot be read";
        return vec![Finding::unknown("binfmt_misc", unreadable)];
    };
    let mut findings = Vec::new();
    let Some(table) = readable(host) else {
        findings.push(not_mounted(host));
        let cause = cause(&findings);
        findings.push(launch(host, wanted, None, &probe, cause));
        return findings;
    };
    let snapshot = match Snapshot::of(&table, host) {
        Ok(snapshot) => snapshot,
        Err(error) => return vec![Finding::unknown("binfmt_misc", format!("{error:#}"))],
    };
    findings.push(enabled(host, wanted, &snapshot, &probe, &cover));
    findings.extend(entry(host, wanted, &snapshot));
    let cause = cause(&findings);
    findings.push(launch(host, wanted, Some(&snapshot), &probe, cause));
    findings.extend(claims(host, &snapshot));
    findings.push(status_file(host, wanted, &cover));
    findings
}

/// What mends that no Windows program starts, if it has been found.
fn cause(findings: &[Finding]) -> Option<Mend> {
    findings.iter().find_map(|finding| finding.mend.clone())
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
/// closed on exec, so the kernel has found one when it says ENOENT, execveat(2).
fn probe() -> Probe {
    let ask = || -> std::io::Result<Infallible> {
        let program = memfd_create(c"wsl-binfmt-probe", MFdFlags::MFD_CLOEXEC)?;
        let mut program = File::from(program);
        program.write_all(b"MZ\x90\0")?;
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

/// What lies on the status file.
struct Cover {
    root: Option<String>,
}

fn cover(host: &Host) -> Option<Cover> {
    let mounts = host.mount_info().ok()?;
    let status = host.path(BINFMT_MISC).join("status");
    Some(Cover {
        root: mounts::on(&mounts, status.as_str()).map(|m| m.root.to_owned()),
    })
}

/// The table, if it is mounted. What else there may be on its path is not touched.
pub fn readable(host: &Host) -> Option<Table> {
    match mounted(host).as_deref() {
        Some(BINFMT_MISC_TYPE) => Table::open(host).ok(),
        _ => None,
    }
}

/// The type of what is mounted on the table's path.
fn mounted(host: &Host) -> Option<String> {
    let mounts = host.mount_info().ok()?;
    let mount = mounts::on(&mounts, host.path(BINFMT_MISC).as_str())?;
    Some(mount.kind.to_owned())
}

fn not_mounted(host: &Host) -> Finding {
    let directory = host.path(BINFMT_MISC);
    let command = host.command();
    let mount = format!("mount -t binfmt_misc binfmt_misc {directory} && {command} guard");
    let (found, mend) = match mounted(host) {
        None => (format!("not mounted on {directory}"), mount),
        Some(kind) => (
            format!("{directory} has something else on it, a file system of type {kind}"),
            format!("umount -l {directory} && {mount}"),
        ),
    };
    Finding::bad("binfmt_misc", Harm::Unprotected, found, Mend::AsRoot(mend))
}

/// The entries that have to do with Windows programs.
struct Snapshot {
    /// Newest first, as the kernel tries them.
    claiming: Vec<(String, Entry, Claim)>,
    /// Our own name, whatever it claims.
    ours: Option<Entry>,
    /// What `restore` would move.
    others: Others,
    /// What the status file says, of the table or of what covers it.
    state: String,
}

impl Snapshot {
    fn of(table: &Table, host: &Host) -> anyhow::Result<Snapshot> {
        let mut claiming = Vec::new();
        for name in table.names()? {
            // Gone since it was listed, or not to be understood.
            let Ok(Some(entry)) = table.read(&name) else {
                continue;
            };
            match entry.claim() {
                Claim::None => {}
                claim => claiming.push((name, entry, claim)),
            }
        }
        Ok(Snapshot {
            claiming,
            ours: table.read(NAME)?,
            others: Others::of(table, host)?,
            state: host.text(&format!("{BINFMT_MISC}/status")),
        })
    }

    /// Who gets a Windows program, if the table is used at all.
    fn first(&self) -> Option<&(String, Entry, Claim)> {
        let takes =
            |(_, entry, claim): &&(String, Entry, Claim)| entry.enabled && *claim == Claim::Equal;
        self.claiming.iter().find(takes)
    }

    /// Whether one of them takes every file that begins with `MZ`, whatever it is called.
    fn takes_any_name(&self) -> bool {
        self.claiming.iter().any(|(_, entry, claim)| {
            entry.enabled
                && *claim == Claim::Equal
                && matches!(entry.pattern, Pattern::Magic { .. })
        })
    }
}

/// The table as a whole. Where its status file is covered the kernel is asked, and answers whenever
/// there is an entry to be used.
fn enabled(
    host: &Host,
    wanted: &Wanted,
    snapshot: &Snapshot,
    probe: &Probe,
    cover: &Cover,
) -> Finding {
    let covered = cover.root.is_some();
    let contradicted = snapshot.takes_any_name() && *probe == Probe::Refused;
    let disabled = contradicted || (!covered && snapshot.state.trim() == "disabled");
    if !disabled {
        let unseen = "mounted; whether it is enabled as a whole cannot be seen";
        return match (covered, probe) {
            (false, _) if snapshot.state.trim() != "enabled" => {
                Finding::unknown("binfmt_misc", unseen)
            }
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
        true => format!("umount {status} && {enable} && {} guard", host.command()),
        false => enable,
    };
    let found = "mounted, but disabled as a whole";
    wanted.interop(
        "binfmt_misc",
        Harm::Broken,
        found.to_owned(),
        Mend::AsRoot(mend),
    )
}

/// WSL's own entry.
fn entry(host: &Host, wanted: &Wanted, snapshot: &Snapshot) -> Vec<Finding> {
    let path = host.path(BINFMT_MISC).join(NAME);
    let restore = format!("{} restore", host.command());
    let fault = |harm, found, command| {
        let mend = Mend::AsRoot(command);
        wanted.interop("entry", harm, found, mend)
    };
    let mut findings = vec![match &snapshot.ours {
        None => fault(Harm::Broken, format!("{NAME} is missing"), restore.clone()),
        Some(entry) => match restore::fault(entry) {
            Some(found) if entry.interpreter == INIT && !entry.enabled => fault(
                Harm::Broken,
                format!("{NAME} {found}"),
                format!("echo 1 >{path} && {restore}"),
            ),
            Some(found) => fault(
                Harm::Broken,
                format!("{NAME} {found}"),
                format!("echo -1 >{path} && {restore}"),
            ),
            None => {
                let flags = &entry.flags;
                let lost: Vec<_> = [
                    ('P', "programs do not learn how they were called"),
                    ('F', "it does not work in containers"),
                ]
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
                    false => fault(
                        harm,
                        format!("{NAME}: {}", lost.join(", ")),
                        restore.clone(),
                    ),
                }
            }
        },
    }];
    let late =
        |(name, entry, _): &(String, Entry, Claim)| name == LATE && entry.interpreter == INIT;
    if snapshot.claiming.iter().any(late) {
        let found = format!("{LATE} doubles it, without all of its flags");
        findings.push(fault(Harm::Degraded, found, restore));
    }
    findings
}

/// Who gets an .exe.
fn launch(
    host: &Host,
    wanted: &Wanted,
    snapshot: Option<&Snapshot>,
    probe: &Probe,
    cause: Option<Mend>,
) -> Finding {
    let first = snapshot.map(Snapshot::first);
    let restore = || cause.unwrap_or_else(|| Mend::AsRoot(format!("{} restore", host.command())));
    match (first, probe) {
        (None, Probe::Taken) => {
            Finding::unknown("launch", ".exe files go to somebody who cannot be seen")
        }
        (_, Probe::Refused) => wanted.interop(
            "launch",
            Harm::Broken,
            ".exe files go to nobody: Exec format error".to_owned(),
            restore(),
        ),
        (None, Probe::Unknown) => Finding::unknown("launch", "the kernel cannot be asked"),
        (Some(None), _) => wanted.interop(
            "launch",
            Harm::Broken,
            ".exe files go to nobody".to_owned(),
            restore(),
        ),
        (Some(Some((name, entry, _))), _) if entry.interpreter == INIT => {
            Finding::good("launch", format!(".exe files go to {name} ({INIT})"))
        }
        (Some(Some((name, entry, _))), _) => wanted.interop(
            "launch",
            Harm::Broken,
            format!(".exe files go to {name} ({})", entry.interpreter),
            restore(),
        ),
    }
}

/// Everyone else who wants Windows programs, or some of them.
fn claims(host: &Host, snapshot: &Snapshot) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut ahead = true;
    for (name, entry, _) in &snapshot.claiming {
        if name == NAME {
            ahead = false;
        }
        if [NAME, LATE].contains(&name.as_str()) {
            continue;
        }
        let what = match &entry.pattern {
            Pattern::Extension(extension) => format!("files called *.{extension}"),
            Pattern::Magic { magic, .. } => {
                let magic = magic.escape_ascii();
                format!("files that begin with {magic}")
            }
        };
        let place = match (entry.enabled, ahead) {
            (false, _) => "disabled",
            (true, true) => "tried before WSLInterop",
            (true, false) => "tried after WSLInterop",
        };
        let found = format!("{name} ({}) is for {what}; {place}", entry.interpreter);
        let shadowed = snapshot.others.shadowed.iter().any(|(n, _)| n == name);
        findings.push(match shadowed && snapshot.ours.is_some() {
            true => Finding::bad(
                "claims",
                Harm::Degraded,
                format!("{found}, which takes these, too"),
                Mend::AsRoot(format!("{} restore", host.command())),
            ),
            false => Finding::note("claims", found),
        });
    }
    findings
}

/// Who may empty the table from here.
fn status_file(host: &Host, wanted: &Wanted, cover: &Cover) -> Finding {
    let status = host.path(BINFMT_MISC).join("status");
    let guard = format!("{} guard", host.command());
    let Some(root) = &cover.root else {
        let found = "open: whoever empties the table does so for all distros".to_owned();
        let mend = Mend::AsRoot(guard);
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
        return wanted.protection(
            "status-file",
            Harm::Degraded,
            format!("{found}, which was deleted, so that systemd-binfmt cannot start"),
            Mend::AsRoot(format!("umount {status} && {guard}")),
        );
    }
    match known.is_some() {
        true => Finding::good("status-file", found),
        false => Finding::note("status-file", found),
    }
}
