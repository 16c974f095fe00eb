//! `started`, `stopped` and `stopping`: what to do, as root and outside the sandbox, after a
//! service that registers rules has started or stopped, and when the distro stops.

use crate::binfmt_misc::{is_failed_call, Table};
use crate::host::Host;
use crate::own::{self, Record, Unit};
use crate::repair;
use crate::verbs::generate::in_force;
use crate::verbs::guard;

/// Records what the service has registered, and makes sure that Windows programs start.
///
/// # Errors
/// binfmt_misc is not mounted; or one step failed, and the others were done.
pub fn started(host: &Host, unit: Unit, succeeded: bool) -> anyhow::Result<()> {
    let table = Table::open(host)?;
    let covered = match in_force(host).interop_enabled {
        true => repair::cover(host, &table).map(drop),
        false => Ok(()),
    };
    let _lock = table.lock();
    covered.and(own::record(host, &table, unit, succeeded))
}

/// Unregisters what the service had registered. `result` is its `$SERVICE_RESULT`, systemd.exec(5):
/// after a failed start its rules stay.
///
/// # Errors
/// As above.
pub fn stopped(host: &Host, unit: Unit, result: Option<&str>) -> anyhow::Result<()> {
    if result.is_some_and(|result| result != "success") {
        return started(host, unit, false);
    }
    let table = Table::open(host)?;
    let _lock = table.lock();
    let released = own::release(host, &table, unit);
    released.and(own::note_before(host, &table))
}

/// Runs when the distro stops, after those services. Guards again, because systemd-shutdown empties
/// the table next and it may have been remounted; and unregisters what is left.
///
/// # Errors
/// As above.
pub fn stopping(host: &Host) -> anyhow::Result<()> {
    guard::join_distro(host)?;
    let guarded = match Table::open(host) {
        Err(error) if !is_failed_call(&error) => Ok(()),
        _ => guard::bind_over_status(host),
    };
    guarded.and(release(host))
}

/// Unregisters everything that this distro has registered.
///
/// # Errors
/// As above.
pub fn release(host: &Host) -> anyhow::Result<()> {
    let records = Record::read_all(host)?;
    let table = match Table::open(host) {
        Err(error) if !is_failed_call(&error) && records.iter().all(Record::is_empty) => {
            return Ok(())
        }
        table => table?,
    };
    let _lock = table.lock();
    let released = Unit::ALL.map(|unit| own::release(host, &table, unit));
    released.into_iter().fold(Ok(()), Result::and)
}
