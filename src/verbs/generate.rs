//! The generator call, as systemd.generator(7) has it: find out where we are, decide, write.

use std::io::ErrorKind;

use anyhow::{bail, Context};
use camino::Utf8Path;

use crate::host::{self, Host, WSL_CONF};
use crate::log::Log;
use crate::plan::Plan;
use crate::wsl::Verdict;
use crate::wsl_conf::WslConf;
use crate::{plan, units, wsl, wsl_conf};

/// Writes the units and drop-ins into `early`, or nothing where this is not a WSL2 distro.
///
/// # Errors
/// Something that was decided could not be written. Everything else was.
pub fn generate(host: &Host, early: &Utf8Path, log: &Log) -> anyhow::Result<()> {
    let verdict = wsl::verdict(&host.environment(early), || host.files());
    if verdict != Verdict::Wsl2 {
        return Ok(());
    }
    let decision = decide(host);
    if let Some(warning) = &decision.warning {
        log.warning(warning);
    }
    let errors = units::write(&decision.plan, early, &host::executable()?);
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
    /// What its wsl.conf says.
    pub conf: WslConf,
    /// What is wrong with its wsl.conf.
    pub warning: Option<String>,
    /// What is to be emitted.
    pub plan: Plan,
}

/// Decides what a WSL2 distro gets.
pub fn decide(host: &Host) -> Decision {
    let (conf, warning) = read_wsl_conf(host);
    let plan = plan::plan(&conf, &host.neighbors());
    Decision {
        conf,
        warning,
        plan,
    }
}

/// wsl.conf as far as it can be read, and what is wrong with it. A distro without one is as WSL's
/// defaults have it; one that is unreadable must not lose its protection, but its owner should hear
/// of it.
fn read_wsl_conf(host: &Host) -> (WslConf, Option<String>) {
    let path = host.path(WSL_CONF);
    let conf = match host.read(WSL_CONF) {
        Err(error) if error.kind() == ErrorKind::NotFound => return (WslConf::default(), None),
        read => read
            .map_err(anyhow::Error::from)
            .and_then(|bytes| wsl_conf::parse(&bytes)),
    }
    .with_context(|| format!("reading {path}"));
    match conf {
        Ok(conf) => {
            let warning = match conf.refused_line {
                Some(line) => Some(format!(
                    "{path}:{line}: WSL stops reading at this line, ignoring the rest"
                )),
                None if conf.cut => Some(format!("{path}: longer than 64 KiB, ignoring the rest")),
                None => None,
            };
            (conf, warning)
        }
        Err(error) => (WslConf::default(), Some(format!("{error:#}, ignoring"))),
    }
}
