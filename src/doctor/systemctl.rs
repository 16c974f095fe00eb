//! What systemd says about its units, from `systemctl show`: the only program that this project
//! runs, and only for `status`.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::mpsc::Receiver;

use anyhow::{ensure, Context};
use nix::fcntl::OFlag;
use nix::spawn::{posix_spawnp, PosixSpawnAttr, PosixSpawnFileActions};
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::{pipe2, Pid};

use super::facts::{in_thread, Fact, Fill};

const PROPERTIES: &str = "--property=Id,LoadState,ActiveState,Result,ExecMainStatus,StatusText,\
    FragmentPath,DropInPaths,NeedDaemonReload,ConditionResult,ConditionTimestampMonotonic,BindPaths";

/// A unit: its properties as text. systemctl prints them in any order.
#[derive(Clone, Debug, Default)]
pub struct Unit(pub BTreeMap<String, String>);

impl Unit {
    /// A property, or an empty text.
    pub fn get(&self, property: &str) -> &str {
        self.0.get(property).map_or("", String::as_str)
    }

    /// The drop-ins that are in use.
    pub fn drop_ins(&self) -> Vec<&str> {
        self.get("DropInPaths").split_ascii_whitespace().collect()
    }

    /// Whether the unit binds something over this path.
    pub fn binds_over(&self, path: &str) -> bool {
        let mut binds = self.get("BindPaths").split_ascii_whitespace();
        binds.any(|bind| bind.split(':').nth(1) == Some(path))
    }
}

/// Parses the output of `systemctl show`: one property per line, an empty line between units.
pub fn parse(said: &str) -> Vec<Unit> {
    let property = |line: &str| {
        let (name, value) = line.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    let units = said.split("\n\n");
    let units = units.map(|unit| Unit(unit.lines().filter_map(property).collect()));
    units.filter(|unit| !unit.get("Id").is_empty()).collect()
}

/// A running systemctl, killed when this is dropped.
pub struct Show {
    child: Pid,
    /// Its output, once it has ended.
    pub said: Receiver<Fill>,
}

impl Show {
    /// Asks about all units at once. std's `Command` would add 40 kB to the program.
    ///
    /// # Errors
    /// systemctl cannot be run.
    pub fn start(units: [&'static str; 4]) -> anyhow::Result<Show> {
        let arguments = ["systemctl", "show", "--no-pager", PROPERTIES, "--"];
        let arguments = arguments.into_iter().chain(units).map(CString::new);
        let arguments = arguments.collect::<Result<Vec<_>, _>>()?;
        let variables = std::env::vars_os()
            .map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()));
        let variables = variables.collect::<Result<Vec<_>, _>>()?;
        let (output, input) = pipe2(OFlag::O_CLOEXEC)?;
        let mut files = PosixSpawnFileActions::init()?;
        files.add_dup2(input.as_raw_fd(), 1)?;
        files.add_dup2(input.as_raw_fd(), 2)?;
        let how = PosixSpawnAttr::init()?;
        let child = posix_spawnp(c"systemctl", &files, &how, &arguments, &variables);
        let child = child.context("running systemctl")?;
        let read = move || -> anyhow::Result<Vec<Unit>> {
            let mut said = Vec::new();
            File::from(output).read_to_end(&mut said)?;
            let said = String::from_utf8_lossy(&said);
            let units = parse(&said);
            ensure!(units.len() == 4, "systemctl show: {}", said.trim());
            Ok(units)
        };
        let said = in_thread(Box::new(move || {
            let units = Fact::of(read());
            Box::new(move |facts| facts.units = units)
        }));
        Ok(Show { child, said })
    }
}

impl Drop for Show {
    /// Kills and reaps it, though it has usually ended by then.
    fn drop(&mut self) {
        let _ = kill(self.child, Signal::SIGKILL);
        let _ = waitpid(self.child, None);
    }
}
