//! How much is tested: all of it where `WSL_TESTS=all` is set, as CI does; and otherwise what a
//! contributor can wait for. That is every kind of scenario, but not on every systemd, nor a thousand
//! times; and no package, no image, no fuzzing, and nothing for arm64.
//! `WSL_TESTS=release` is also what takes too long for each change, and stock distros of each Debian.

use std::io::{self, Write};

use anyhow::ensure;

/// Debian 11 and 13: systemd 247, the oldest that is supported, and 257.
const USUAL: [&str; 2] = ["bullseye", NEWEST];
/// The one for what takes longer, and for controls.
pub const NEWEST: &str = "trixie";

/// From what is tested always to what takes too long for each change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    Usual,
    All,
    Release,
}

/// What is wanted.
pub fn extent() -> Extent {
    let wanted = std::env::var_os("WSL_TESTS");
    match wanted.as_ref().map(|wanted| wanted.to_str()) {
        None => Extent::Usual,
        Some(Some("all")) => Extent::All,
        Some(Some("release")) => Extent::Release,
        _ => panic!("WSL_TESTS={wanted:?}: neither all nor release"),
    }
}

/// Whether all is, but for what takes many minutes.
pub fn is_all() -> bool {
    extent() >= Extent::All
}

/// Whether a test of this is to be made. If not, that is said, past the harness of Rust's tests.
///
/// # Errors
/// It is not, and this is CI, where all is to be.
pub fn has(what: &str) -> anyhow::Result<bool> {
    let is_ci = std::env::var_os("CI").is_some();
    ensure!(is_all() || !is_ci, "CI has to set WSL_TESTS=all");
    said(what, is_all(), "all")
}

/// The same of one that takes many minutes.
///
/// # Errors
/// It cannot be said.
pub fn has_for_release(what: &str) -> anyhow::Result<bool> {
    said(what, extent() == Extent::Release, "release")
}

fn said(what: &str, has: bool, extent: &str) -> anyhow::Result<bool> {
    if !has {
        // In one piece, as the harness prints at the same time.
        let line = format!("\n{what} NOT TESTED: only WSL_TESTS={extent} does\n\n");
        io::stderr().write_all(line.as_bytes())?;
    }
    Ok(has)
}

/// Which of these Debian suites distros are booted from.
pub fn of(suites: &[&'static str]) -> Vec<&'static str> {
    let mut suites = suites.to_vec();
    suites.retain(|suite| is_all() || USUAL.contains(suite));
    suites
}

/// The same of what takes longer.
pub fn of_long(suites: &[&'static str]) -> Vec<&'static str> {
    let mut suites = suites.to_vec();
    suites.retain(|suite| is_all() || *suite == NEWEST);
    assert!(!suites.is_empty(), "nothing of it is played by default");
    suites
}

/// From when on stock distros are the control on one of the suites that something is played on: the newest
/// release always, the oldest with all, and the others, which do the same as one of these, for a release.
pub fn of_controls(suites: &[&str], suite: &str) -> Extent {
    match suite {
        NEWEST => Extent::Usual,
        _ if suites.first() == Some(&suite) => Extent::All,
        _ => Extent::Release,
    }
}

/// How often a race is run.
pub fn rounds() -> u32 {
    if is_all() {
        1000
    } else {
        100
    }
}

/// How many of these are tried.
pub fn sample<T>(of: Vec<T>) -> Vec<T> {
    // Most calls have two to four faults each, in a row: of those, not the same one every time.
    let every = if is_all() { 1 } else { 5 };
    of.into_iter().step_by(every).collect()
}

/// The extent in words, for whoever waits.
pub fn in_words() -> &'static str {
    match extent() {
        Extent::Usual => {
            "on systemd 247 and 257, the longest only on 257, stock distros only there and not for \
             the longest, races 100 times, every fifth fault; WSL_TESTS=all does nearly all of it"
        }
        Extent::All => {
            "WSL_TESTS=all: on systemd 247, 252, 257 and 262, stock distros on the oldest of them \
             and on 257, races 1,000 times, each fault"
        }
        Extent::Release => {
            "WSL_TESTS=release: on systemd 247, 252, 257 and 262, races 1,000 times, each fault"
        }
    }
}
