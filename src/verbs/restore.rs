//! `restore`: restore the interop entry, and put it ahead of others that claim Windows programs.

use crate::binfmt_misc::Table;
use crate::host::Host;
use crate::log::Log;
use crate::repair::{self, Pending};

/// Restores the entry at once, and logs what was done.
///
/// # Errors
/// binfmt_misc is not mounted; /init is missing; the entry is disabled or not WSL's, and so is left
/// alone; or the kernel refuses something.
pub fn restore(host: &Host, log: &Log) -> anyhow::Result<()> {
    let table = Table::open(host)?;
    repair::cover(host, &table)?;
    let flush = repair::interop_went(host, &table);
    let settled = repair::settle(host, &table, flush, true, &mut Pending::default());
    for deed in settled.deeds {
        log.info(&deed);
    }
    let noted = match settled.problems.is_empty() {
        true => repair::note_interop(host, &table),
        false => Ok(()),
    };
    let mut problems = settled.problems.into_iter().chain(noted.err());
    let first = problems.next();
    for problem in problems {
        log.error(&format!("{problem:#}"));
    }
    first.map_or(Ok(()), Err)
}
