//! `status`: what is wrong with Windows interop here, and what to do about it.

use crate::doctor;
use crate::host::Host;

/// Examines the machine. Returns what is to be printed, and whether all is well.
pub fn status(host: &Host, json: bool, coloured: bool) -> (String, bool) {
    let report = doctor::examine(host);
    let text = match json {
        true => report.json(),
        false => report.text(coloured),
    };
    (text, report.healthy)
}
