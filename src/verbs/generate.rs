//! The generator call, systemd.generator(7): find out where this runs, decide, write.

use std::io::ErrorKind;

use anyhow::bail;
use camino::Utf8Path;

use crate::host::{self, Host, BOOT_CONF, WSL_CONF};
use crate::log::Log;
use crate::plan::Output;
use crate::wsl::Verdict;
use crate::wsl_conf::WslConf;
use crate::{machine, plan, units, wsl, wsl_conf};

/// Writes the units and drop-ins into `early`. Outside a WSL2 distro it writes nothing.
///
/// # Errors
/// Some output could not be written. Everything else was.
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
        bail!("{} of {} files not written to {early}", errors.len(), decision.plan.len());
    }
    Ok(())
}

/// What the generator decides in a WSL2 distro. `status` uses the same.
pub struct Decision {
    /// The settings of wsl.conf now. If it is missing or unreadable, WSL's defaults apply: the
    /// distro must not lose its protection.
    pub conf: WslConf,
    /// The settings at the start of the distro. They count until it stops, as for WSL itself,
    /// because what already runs cannot be half undone. None before the guard has recorded them.
    pub noted: Option<WslConf>,
    /// Why wsl.conf cannot be read, if it cannot.
    pub unread: Option<ErrorKind>,
    /// What is wrong with it, for its owner.
    pub warning: Option<String>,
    /// Files of others that could not be checked.
    pub doubts: Vec<String>,
    /// What to emit.
    pub plan: Vec<Output>,
}

/// Decides what a WSL2 distro gets.
pub fn decide(host: &Host) -> Decision {
    let (conf, unread, warning) = read(host);
    let noted = noted(host);
    let mut doubts = Vec::new();
    let plan = plan::plan(
        noted.as_ref().unwrap_or(&conf),
        &machine::others_files(host, |doubt| doubts.push(doubt)),
    );
    Decision { conf, noted, unread, warning, doubts, plan }
}

/// The settings of wsl.conf that are in effect while the distro runs.
pub fn in_force(host: &Host) -> WslConf {
    noted(host).unwrap_or_else(|| read(host).0)
}

/// The settings that the guard recorded when the distro started.
fn noted(host: &Host) -> Option<WslConf> {
    host.read(BOOT_CONF).ok().map(|noted| wsl_conf::parse(&noted))
}

/// Reads wsl.conf. Returns the settings, why it cannot be read, and what is wrong with it.
fn read(host: &Host) -> (WslConf, Option<ErrorKind>, Option<String>) {
    let path = host.path(WSL_CONF);
    match host.read(WSL_CONF) {
        Ok(bytes) => {
            let conf = wsl_conf::parse(&bytes);
            let stops = "WSL stops reading at this line, ignoring the rest";
            let warning = conf.refused_line.map(|line| format!("{path}:{line}: {stops}"));
            (conf, None, warning)
        }
        Err(error) => {
            let is_there = error.kind() != ErrorKind::NotFound;
            let warning = is_there.then(|| format!("reading {path}: {error}, ignoring"));
            (WslConf::default(), Some(error.kind()), warning)
        }
    }
}
