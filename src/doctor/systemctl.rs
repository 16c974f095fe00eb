//! What systemd says of its units, by a run of `systemctl show`: the one program that this project
//! runs, and only for a person who has typed `status`.

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

/// A unit: its properties as text, whatever order systemctl has them in.
#[derive(Clone, Debug, Default)]
pub struct Unit(pub BTreeMap<String, String>);

impl Unit {
    /// A property; empty where it has none.
    pub fn get(&self, property: &str) -> &str {
        self.0.get(property).map_or("", String::as_str)
    }

    /// The files that change the unit.
    pub fn drop_ins(&self) -> Vec<&str> {
        self.get("DropInPaths").split_ascii_whitespace().collect()
    }

    /// Whether something is bound over this path for the service.
    pub fn binds_over(&self, path: &str) -> bool {
        let mut binds = self.get("BindPaths").split_ascii_whitespace();
        binds.any(|bind| bind.split(':').nth(1) == Some(path))
    }
}

/// Units from the output of `systemctl show`: a line each property, an empty one between units.
pub fn parse(said: &str) -> Vec<Unit> {
    let property = |line: &str| {
        let (name, value) = line.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    let units = said.split("\n\n");
    let units = units.map(|unit| Unit(unit.lines().filter_map(property).collect()));
    units.filter(|unit| !unit.get("Id").is_empty()).collect()
}

/// A run of systemctl, which ends with this.
pub struct Show {
    child: Pid,
    /// What it will have said.
    pub said: Receiver<Fill>,
}

impl Show {
    /// Asks for all units at once. std's `Command` would add 40 kB to the program.
    ///
    /// # Errors
    /// There is no systemctl.
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
    /// Nobody waits for it any longer; mostly it has ended by itself.
    fn drop(&mut self) {
        let _ = kill(self.child, Signal::SIGKILL);
        let _ = waitpid(self.child, None);
    }
}
