//! `status`: what is wrong with Windows interop here, and what to do about it. Each check looks at
//! one thing and changes nothing. Whatever a check meets, it is given up in time: a file system or a
//! service that does not answer makes its findings unknown and holds up nobody.

mod generator;
mod interop;
mod leftovers;
mod report;
mod services;
mod table;

use std::io::ErrorKind;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::host::{Host, SYSTEMD, WSL_CONF};
use crate::verbs::generate::{self, Decision, Reading};
use crate::wsl::{self, Environment, Verdict};
use report::{Finding, Harm, Mend, Report};

/// How long the checks may take together.
const PATIENCE: Duration = Duration::from_millis(44);
/// How much of that wsl.conf may take, on which other checks depend, and systemd.
const PATIENCE_WITH_WSL_CONF: Duration = Duration::from_millis(15);
const PATIENCE_WITH_SYSTEMD: Duration = Duration::from_millis(30);

/// What the distro wants, by its wsl.conf, as far as that is known. What it does not want is no
/// fault.
#[derive(Clone, Copy)]
struct Wanted {
    /// Its interop, and the others', protected.
    protect: Option<bool>,
    /// Windows programs to start.
    interop: Option<bool>,
}

impl Wanted {
    /// Something that keeps Windows programs from starting.
    fn interop(&self, check: &'static str, harm: Harm, found: String, mend: Mend) -> Finding {
        fault(self.interop, check, harm, found, mend)
    }

    /// Something that protects no longer.
    fn protection(&self, check: &'static str, harm: Harm, found: String, mend: Mend) -> Finding {
        fault(self.protect, check, harm, found, mend)
    }
}

/// Something that is bad if what it prevents is wanted.
fn fault(
    wanted: Option<bool>,
    check: &'static str,
    harm: Harm,
    found: String,
    mend: Mend,
) -> Finding {
    match wanted {
        Some(true) => Finding::bad(check, harm, found, mend),
        Some(false) => Finding::note(check, found),
        None => Finding::unknown(check, format!("{found}; wsl.conf may have it so")),
    }
}

/// Examines the machine. Returns what is to be printed, and whether all is well.
pub fn status(host: &Host, json: bool, coloured: bool) -> (String, bool) {
    let report = examine(host);
    let text = match json {
        true => report.json(),
        false => report.text(coloured),
    };
    (text, report.healthy)
}

fn examine(host: &Host) -> Report {
    let start = Instant::now();
    let deadline = start + PATIENCE;
    // The variables of a generator are not those of a shell.
    let verdict = |host: &Host| wsl::verdict(&Environment::default(), || host.files());
    let verdict = Pending::start(host, verdict);
    let decision = Pending::start(host, generate::decide);
    match verdict.result(deadline) {
        Some(Verdict::Wsl2) => {}
        Some(Verdict::NoInit) => return Report::of(vec![without_init()], true),
        Some(elsewhere) => return report_elsewhere(&elsewhere),
        None => return Report::of(vec![too_slow("platform")], true),
    }
    let decision = decision.result(start + PATIENCE_WITH_WSL_CONF);
    let known = decision.as_ref().filter(|d| d.reading != Reading::Denied);
    let noted = decision.as_ref().and_then(|d| d.noted.as_ref());
    let in_force = noted.or(known.map(|d| &d.conf));
    let wanted = Wanted {
        protect: in_force.map(|conf| conf.protect_binfmt),
        interop: in_force.map(|conf| conf.interop_enabled),
    };
    let plan = decision.as_ref().filter(|_| in_force.is_some());
    let plan = plan.map(|d| d.plan.clone()).unwrap_or_default();
    let boot_command = known.map(|d| d.conf.boot_command.clone());
    let mut findings = vec![platform(host)];
    findings.extend(match &decision {
        Some(decision) => wsl_conf(host, decision),
        None => vec![too_slow("wsl.conf")],
    });
    let systemd_runs = host.path(SYSTEMD).exists();
    // In the order in which what mends them is to be done.
    let pending = [
        (
            "generator",
            Pending::start(host, move |host| match systemd_runs {
                true => generator::check(host, &wanted, &plan),
                false => vec![without_systemd(host, &wanted)],
            }),
        ),
        (
            "binfmt_misc",
            Pending::start(host, move |host| table::check(host, &wanted)),
        ),
        (
            "systemd",
            Pending::start(host, move |host| match systemd_runs {
                true => services::check(host, &wanted, start + PATIENCE_WITH_SYSTEMD),
                false => Vec::new(),
            }),
        ),
        (
            "leftovers",
            Pending::start(host, move |host| {
                leftovers::check(host, &boot_command.unwrap_or_default())
            }),
        ),
        (
            "WSL_INTEROP",
            Pending::start(host, move |host| interop::check(host, &wanted)),
        ),
    ];
    for (name, pending) in pending {
        let found = pending.result(deadline);
        findings.extend(found.unwrap_or_else(|| vec![too_slow(name)]));
    }
    Report::of(findings, wanted.interop != Some(false))
}

/// Something that is being looked at, in a thread that is left behind if it takes too long.
struct Pending<T>(Arc<(Mutex<Option<T>>, Condvar)>);

impl<T: Send + 'static> Pending<T> {
    fn start(host: &Host, look: impl FnOnce(&Host) -> T + Send + 'static) -> Pending<T> {
        let pending = Pending(Arc::default());
        let (host, shared) = (host.clone(), Arc::clone(&pending.0));
        // Without a thread there is no result, which is seen below.
        let _ = thread::Builder::new().spawn(move || {
            let result = look(&host);
            *shared.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            shared.1.notify_one();
        });
        pending
    }

    fn result(self, deadline: Instant) -> Option<T> {
        let (result, there) = &*self.0;
        let result = result.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = there.wait_timeout_while(result, left, |result| result.is_none());
        let (mut result, _) = waited.unwrap_or_else(PoisonError::into_inner);
        result.take()
    }
}

fn too_slow(check: &'static str) -> Finding {
    Finding::unknown(
        check,
        "not finished in time; perhaps something there does not answer",
    )
}

/// Where the generator has no business.
fn report_elsewhere(verdict: &Verdict) -> Report {
    let word = match verdict {
        Verdict::NotWsl => "not-wsl",
        Verdict::Wsl1 => "wsl1",
        Verdict::Container => "container",
        Verdict::Initrd => "initrd",
        Verdict::UserManager | Verdict::NoInit | Verdict::Wsl2 => "unknown",
    };
    Report {
        verdict: word,
        summary: format!("{}: nothing to do.", capitalised(verdict.reason())),
        healthy: true,
        findings: Vec::new(),
    }
}

fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(characters).collect()
}

/// A container, perhaps, that does not show that it is one.
fn without_init() -> Finding {
    let found = format!(
        "{}: a container, or a distro that has lost it",
        Verdict::NoInit.reason()
    );
    let mend = Mend::ByHand("if it is a distro, wsl.exe --shutdown on Windows".to_owned());
    Finding::unknown("platform", found).mended_by(mend)
}

fn without_systemd(host: &Host, wanted: &Wanted) -> Finding {
    let found = "does not run here, so nothing keeps the entry".to_owned();
    let path = host.path(WSL_CONF);
    let mend = Mend::Edit(format!("{path}, section [boot]: systemd=true"));
    wanted.protection("systemd", Harm::Unprotected, found, mend)
}

fn platform(host: &Host) -> Finding {
    let distro = |version: &str| format!("{}; WSL version {version}", Verdict::Wsl2.reason());
    match host.pid1_variable("container_host_version_id") {
        Ok(Some(version)) => Finding::good("platform", distro(&version)),
        Ok(None) => Finding::note("platform", distro("unknown: PID 1 has not been told")),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Finding::note("platform", distro("unknown: only root can see it"))
        }
        Err(_) => Finding::note("platform", distro("unknown: PID 1 cannot be looked at")),
    }
}

/// What was read of wsl.conf.
fn wsl_conf(host: &Host, decision: &Decision) -> Vec<Finding> {
    let check = "wsl.conf";
    let path = host.path(WSL_CONF);
    let conf = &decision.conf;
    if decision.reading == Reading::Denied {
        let found = format!("{path}: only root can read it");
        return vec![Finding::unknown(check, found)];
    }
    let again = "then start this distro again";
    let edit = |how: &str| Mend::Edit(format!("{path}{how}; {again}"));
    let mut findings = Vec::new();
    let counts = decision.noted.as_ref().unwrap_or(conf);
    if counts.text() != conf.text() {
        let found = format!(
            "{path} has changed: protectBinfmt={}, interop enabled={}; that counts from the next \
             start of this distro",
            conf.protect_binfmt, conf.interop_enabled
        );
        findings.push(Finding::note(check, found));
    }
    if !counts.protect_binfmt {
        let found = format!("{path}: protectBinfmt=false, so nothing is protected, on purpose");
        let mend = edit(", section [boot]: without protectBinfmt=");
        findings.push(Finding::bad(check, Harm::Unprotected, found, mend));
    }
    if !counts.interop_enabled {
        let found = "enabled=false in [interop], so no Windows programs start here, on purpose";
        findings.push(Finding::note(check, format!("{path}: {found}")));
    }
    // What cannot be read says nothing; the defaults hold, which the warning tells.
    if findings.is_empty() && decision.reading != Reading::Failed {
        let nothing = match decision.reading {
            Reading::Missing => "no ",
            _ => "",
        };
        let found = format!("{nothing}{path}: protection and interop are on");
        findings.push(Finding::good(check, found));
    }
    if let Some(warning) = &decision.warning {
        let note = Finding::note(check, warning.as_str());
        findings.push(match conf.refused_line {
            Some(line) => note.mended_by(edit(&format!(", line {line}"))),
            None => note,
        });
    }
    findings
}
