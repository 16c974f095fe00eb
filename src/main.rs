//! Keeps Windows programs starting from Linux on WSL2, whatever systemd does to the kernel's
//! binfmt_misc table.
//!
//! Why a generator: only something that decides before units are loaded can stay invisible
//! outside WSL2, and come back after every daemon-reload. The units that it writes call this same
//! binary with a verb. This file turns the arguments into one call.

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::todo,
    clippy::dbg_macro,
    missing_docs
)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing))]

mod binfmt_d;
mod binfmt_misc;
mod doctor;
mod host;
mod interop;
mod log;
mod machine;
mod mounts;
mod own;
mod plan;
mod repair;
mod reports;
mod units;
mod verbs;
mod wsl;
mod wsl_conf;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use camino::Utf8PathBuf;

use crate::host::Host;
use crate::log::Log;
use crate::own::Unit;

const HELP: &str = "\
Usage: wsl-binfmt-generator NORMAL EARLY LATE
       wsl-binfmt status [--json]
       wsl-binfmt restore [--watch] | guard | release
       wsl-binfmt --help | --version

Keeps Windows programs starting from Linux on WSL2. systemd calls it with three
directories; the units that it writes into EARLY call its verbs.

  NORMAL EARLY LATE  write units and drop-ins into EARLY; if only one directory
                     is given, into that one
  status             say what is wrong with Windows interop, and how to fix it
    --json           the same for scripts
  restore            restore the WSLInterop entry in binfmt_misc
    --watch          keep running, and keep the entry in place
  guard              bind a read-only file over the status file of binfmt_misc,
                     unless something is already bound there
  release            unregister what this distro has registered
  started, stopped   for units: a service that registers rules started, stopped
  stopping           for units: this distro is stopping
  -h, --help         show this help
  -V, --version      show the version

Environment:
  WSL_BINFMT_ROOT    directory to put before every absolute path that is read or
                     written (for tests; the arguments are used unchanged)
  NO_COLOR           if not empty, status prints no colours

Exit status: 0 success or nothing to do, 1 failure (status: something is wrong),
2 wrong usage.
See also: man 8 wsl-binfmt-generator
";

/// One invocation.
#[derive(Debug, PartialEq)]
enum Action {
    Generate { early: Utf8PathBuf },
    Restore { watch: bool },
    Guard,
    Release,
    Started(Unit),
    Stopped(Unit),
    Stopping,
    Status { json: bool },
    Help,
    Version,
}

/// Reads the arguments: one or three directories, a verb, or an option. A slash marks a directory:
/// systemd.generator(7) always passes absolute paths.
fn parse(arguments: &[String]) -> Result<Action, String> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        [directory] | [_, directory, _] if arguments.iter().all(|a| a.contains('/')) => {
            Ok(Action::Generate { early: Utf8PathBuf::from(directory) })
        }
        ["restore"] => Ok(Action::Restore { watch: false }),
        ["restore", "--watch"] => Ok(Action::Restore { watch: true }),
        ["guard"] => Ok(Action::Guard),
        ["release"] => Ok(Action::Release),
        ["stopping"] => Ok(Action::Stopping),
        [verb @ ("started" | "stopped"), name] => {
            let unit = Unit::ALL.into_iter().find(|unit| unit.name() == *name);
            let unit = unit.ok_or_else(|| format!("unknown unit '{name}'"))?;
            Ok(match *verb {
                "started" => Action::Started(unit),
                _ => Action::Stopped(unit),
            })
        }
        ["status"] => Ok(Action::Status { json: false }),
        ["status", "--json"] => Ok(Action::Status { json: true }),
        ["-h" | "--help"] => Ok(Action::Help),
        ["-V" | "--version"] => Ok(Action::Version),
        [] => Err("no arguments".to_owned()),
        [word] => Err(format!("unknown verb '{word}' (a directory needs a slash: './{word}')")),
        all => Err(format!("wrong arguments '{}'", all.join(" "))),
    }
}

/// Prints to standard output. A reader that has gone away is not our error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Whether standard output is a terminal with colours, and the user wants them (no-color.org).
fn wants_colour() -> bool {
    let is_set = |value: Option<String>| value.is_some_and(|v| !v.is_empty());
    std::io::stdout().is_terminal()
        && !is_set(host::variable("NO_COLOR"))
        && host::variable("TERM").is_some_and(|term| term != "dumb")
}

fn main() -> ExitCode {
    let host = Host::from_environment();
    let arguments = std::env::args_os().skip(1).map(|argument| {
        argument.into_string().map_err(|argument| format!("argument {argument:?} is not UTF-8"))
    });
    let arguments: Result<Vec<_>, _> = arguments.collect();
    let action = arguments.and_then(|arguments| parse(&arguments));
    let log = match action {
        Ok(Action::Generate { .. }) => Log::of_generator(&host),
        _ => Log::of_verb(),
    };
    match action.map(|action| act(action, &host, &log)) {
        Ok(Ok(true)) => ExitCode::SUCCESS,
        Ok(Ok(false)) => ExitCode::FAILURE,
        Ok(Err(error)) => {
            log.error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
        Err(wrong) => {
            log.error(&format!("{wrong}; see --help"));
            ExitCode::from(2)
        }
    }
}

/// Carries out the action. Returns false if `status` finds something wrong.
fn act(action: Action, host: &Host, log: &Log) -> anyhow::Result<bool> {
    let done = match action {
        Action::Generate { early } => verbs::generate::generate(host, &early, log),
        Action::Restore { watch: true } => verbs::watch::watch(host, log),
        Action::Restore { watch: false } => verbs::restore::restore(host, log),
        Action::Guard => verbs::guard::guard(host, log),
        Action::Release => verbs::unit::release(host),
        Action::Started(unit) => verbs::unit::started(host, unit, true),
        Action::Stopped(unit) => {
            let result = host::variable("SERVICE_RESULT");
            verbs::unit::stopped(host, unit, result.as_deref())
        }
        Action::Stopping => verbs::unit::stopping(host),
        Action::Status { json } => {
            let report = doctor::examine(host);
            print(&match json {
                true => report.json(),
                false => report.text(wants_colour()),
            });
            return Ok(report.healthy);
        }
        Action::Help => {
            print(HELP);
            Ok(())
        }
        Action::Version => {
            print(concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"), "\n"));
            Ok(())
        }
    };
    done.map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Action, String> {
        parse(&arguments.iter().map(|a| a.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn every_form_of_the_arguments_has_one_meaning() {
        let generate = |early: &str| Ok(Action::Generate { early: early.into() });
        assert_eq!(parsed(&["/n", "/e", "/l"]), generate("/e"));
        assert_eq!(parsed(&["/n"]), generate("/n"));
        assert_eq!(parsed(&["./n"]), generate("./n"));
        let restore = |watch| Ok(Action::Restore { watch });
        assert_eq!(parsed(&["restore"]), restore(false));
        assert_eq!(parsed(&["restore", "--watch"]), restore(true));
        assert_eq!(parsed(&["guard"]), Ok(Action::Guard));
        assert_eq!(parsed(&["release"]), Ok(Action::Release));
        let [binfmt, support] = Unit::ALL;
        assert_eq!(parsed(&["started", "systemd-binfmt"]), Ok(Action::Started(binfmt)));
        assert_eq!(parsed(&["stopped", "binfmt-support"]), Ok(Action::Stopped(support)));
        assert_eq!(parsed(&["stopping"]), Ok(Action::Stopping));
        let status = |json| Ok(Action::Status { json });
        assert_eq!(parsed(&["status"]), status(false));
        assert_eq!(parsed(&["status", "--json"]), status(true));
        assert_eq!(parsed(&["-h"]), Ok(Action::Help));
        assert_eq!(parsed(&["--help"]), Ok(Action::Help));
        assert_eq!(parsed(&["-V"]), Ok(Action::Version));
        assert_eq!(parsed(&["--version"]), Ok(Action::Version));
    }

    #[test]
    fn whatever_else_is_wrong() {
        for wrong in [
            &[] as &[&str],
            &["/n", "/e"],
            &["/n", "/e", "/l", "/x"],
            &["n"],
            &[""],
            &["n", "/e", "/l"],
            &["--watch"],
            &["restore", "--watch", "/x"],
            &["restore", "--wait"],
            &["guard", "/x"],
            &["release", "/x"],
            &["started"],
            &["started", "wsl-binfmt-guard"],
            &["stopped", "x"],
            &["stopped", "systemd-binfmt", "x"],
            &["status", "/x"],
            &["status", "--json", "/x"],
            &["--json"],
        ] {
            assert!(parsed(wrong).is_err(), "{wrong:?}");
        }
    }
}
