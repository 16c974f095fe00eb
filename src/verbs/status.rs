//! `status`: say what is wrong with Windows interop, and how to fix it.

use crate::doctor;
use crate::host::Host;

/// Examines the machine. Returns the text to print, and whether all is well.
pub fn status(host: &Host, json: bool, coloured: bool) -> (String, bool) {
    let report = doctor::examine(host);
    let text = match json {
        true => report.json(),
        false => report.text(coloured),
    };
    (text, report.healthy)
}
