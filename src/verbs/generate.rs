//! The generator call, as systemd.generator(7) has it: find out where we are, decide, write.

use std::io::ErrorKind;

use anyhow::bail;
use camino::Utf8Path;

use crate::host::{self, Host, BOOT_CONF, WSL_CONF};
use crate::log::Log;
use crate::plan::Plan;
use crate::wsl::Verdict;
use crate::wsl_conf::WslConf;
use crate::{machine, plan, units, wsl, wsl_conf};

/// Writes the units and drop-ins into `early`, or nothing where this is not a WSL2 distro.
///
/// # Errors
/// Something that was decided could not be written. Everything else was.
pub fn generate(host: &Host, early: &Utf8Path, log: &Log) -> anyhow::Result<()> {
    let verdict = wsl::verdict(&machine::environment(early), || machine::files(host));
    if verdict != Verdict::Wsl2 {
        return Ok(());
    }
    let decision = decide(host);
    for warning in decision.warning.iter().chain(&decision.doubts) {
        log.warning(warning);
    }
    let errors = units::write(&decision.plan, early, &host::executable()?)?;
    for error in &errors {
        log.error(&format!("{error:#}"));
    }
    if !errors.is_empty() {
        bail!(
            "{} of {} files not written to {early}",
            errors.len(),
            decision.plan.outputs.len()
        );
    }
    Ok(())
}

/// What the generator makes of a WSL2 distro; `status` tells of the same.
pub struct Decision {
    /// What its wsl.conf says, as far as it can be read. A distro without one is as WSL's defaults
    /// have it; one that is unreadable must not lose its protection.
    pub conf: WslConf,
    /// What it said when the distro started, which counts until it stops, as for WSL itself: what is
    /// running by then cannot be taken back by halves. None if nothing is running yet.
    pub noted: Option<WslConf>,
    /// How it was read.
    pub reading: Reading,
    /// What is wrong with it, of which its owner should hear.
    pub warning: Option<String>,
    /// What could not be seen of what stands beside the output.
    pub doubts: Vec<String>,
    /// What is to be emitted.
    pub plan: Plan,
}

/// How wsl.conf was read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reading {
    /// It was.
    Done,
    /// There is none.
    Missing,
    /// Only root may.
    Denied,
    /// It cannot be read at all.
    Failed,
}

/// Decides what a WSL2 distro gets.
pub fn decide(host: &Host) -> Decision {
    let (conf, reading, warning) = read(host);
    let noted = noted(host);
    let mut doubts = Vec::new();
    let plan = plan::plan(
        noted.as_ref().unwrap_or(&conf),
        &machine::neighbors(host, |doubt| doubts.push(doubt)),
    );
    Decision {
        conf,
        noted,
        reading,
        warning,
        doubts,
        plan,
    }
}

/// What counts of wsl.conf while the distro runs.
pub fn in_force(host: &Host) -> WslConf {
    noted(host).unwrap_or_else(|| read(host).0)
}

/// What the guard noted when the distro started.
fn noted(host: &Host) -> Option<WslConf> {
    host.read(BOOT_CONF)
        .ok()
        .map(|noted| wsl_conf::parse(&noted))
}

/// Reads wsl.conf; with what is wrong with it.
fn read(host: &Host) -> (WslConf, Reading, Option<String>) {
    let path = host.path(WSL_CONF);
    let read = host.read(WSL_CONF);
    let reading = match &read {
        Ok(_) => Reading::Done,
        Err(error) if error.kind() == ErrorKind::NotFound => Reading::Missing,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Reading::Denied,
        Err(_) => Reading::Failed,
    };
    let (conf, warning) = match read {
        Ok(bytes) => {
            let conf = wsl_conf::parse(&bytes);
            let warning = match conf.refused_line {
                Some(line) => Some(format!(
                    "{path}:{line}: WSL stops reading at this line, ignoring the rest"
                )),
                None if conf.cut => Some(format!("{path}: longer than 64 KiB, ignoring the rest")),
                None => None,
            };
            (conf, warning)
        }
        Err(_) if reading == Reading::Missing => (WslConf::default(), None),
        Err(error) => (
            WslConf::default(),
            Some(format!("reading {path}: {error}, ignoring")),
        ),
    };
    (conf, reading, warning)
}
