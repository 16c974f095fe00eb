//! The generator call, as systemd.generator(7) has it: find out where we are, decide, write.

use std::io::ErrorKind;

use anyhow::{bail, Context};
use camino::Utf8Path;

use crate::host::{self, Host, WSL_CONF};
use crate::log::Log;
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
    let plan = plan::plan(&read_wsl_conf(host, log), &host.neighbors());
    let errors = units::write(&plan, early, &host::executable()?);
    for error in &errors {
        log.error(&format!("{error:#}"));
    }
    if !errors.is_empty() {
        bail!(
            "{} of {} files not written to {early}",
            errors.len(),
            plan.outputs.len()
        );
    }
    Ok(())
}

/// wsl.conf as far as it can be read. A distro without one is as WSL's defaults have it; one that
/// is unreadable must not lose its protection, but its owner should hear of it.
fn read_wsl_conf(host: &Host, log: &Log) -> WslConf {
    let path = host.path(WSL_CONF);
    let conf = match host.read(WSL_CONF) {
        Err(error) if error.kind() == ErrorKind::NotFound => return WslConf::default(),
        read => read
            .map_err(anyhow::Error::from)
            .and_then(|bytes| wsl_conf::parse(&bytes)),
    }
    .with_context(|| format!("reading {path}"));
    match conf {
        Ok(conf) => {
            if let Some(line) = conf.refused_line {
                log.warning(&format!(
                    "{path}:{line}: WSL stops reading at this line, ignoring the rest"
                ));
            }
            conf
        }
        Err(error) => {
            log.warning(&format!("{error:#}, ignoring"));
            WslConf::default()
        }
    }
}
