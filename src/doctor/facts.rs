//! The doctor's facts: everything is read here once, in parallel and with one deadline, and nothing
//! is judged. A read that hangs is left behind in its thread.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::mpsc::{channel, Receiver};
use std::thread;
use std::time::Instant;

use anyhow::Context;
use camino::{Utf8Path, Utf8PathBuf};
use nix::errno::Errno;
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::unistd::fexecve;

use super::report::Finding;
use super::services::UNITS;
use super::systemctl::{Show, Unit};
use super::table::KIND;
use crate::binfmt_d::{self, Rule};
use crate::binfmt_misc::{self, Listed};
use crate::host::{
    self, Host, ABOVE_EARLY, BINFMT_MISC, COMMAND, EARLY, FORMATS, GENERATORS, INTEROP_SOCKETS,
    LOCAL_UNITS, MOUNT_INFOS, PROCESSES, SYSTEMD, VENDOR_UNITS,
};
use crate::machine;
use crate::mounts;
use crate::own;
use crate::verbs::generate::{self, Decision};
use crate::wsl::{self, Environment, Verdict};

/// The result of reading something.
#[derive(Default)]
pub enum Fact<T> {
    /// There was no answer in time.
    #[default]
    Silent,
    /// It cannot be read, for this reason.
    Failed(String),
    /// The value.
    Is(T),
}

impl<T> Fact<T> {
    /// The fact that a read resulted in.
    pub fn of(read: anyhow::Result<T>) -> Fact<T> {
        match read {
            Ok(value) => Fact::Is(value),
            Err(error) => Fact::Failed(format!("{error:#}")),
        }
    }

    /// The value, or a finding that it is unknown. `what` names the read.
    pub fn known(&self, check: &'static str, what: &str) -> Result<&T, Finding> {
        Err(match self {
            Fact::Is(value) => return Ok(value),
            Fact::Failed(why) => Finding::unknown(check, why.as_str()),
            Fact::Silent => {
                let found = format!("{what} hangs: no answer within 2 seconds");
                Finding::unknown(check, found)
            }
        })
    }
}

/// All facts about a machine.
#[derive(Default)]
pub struct Facts {
    /// Where this runs. The rest is read only in a WSL2 distro.
    pub place: Fact<Place>,
    /// wsl.conf, and what follows from it.
    pub conf: Fact<Decision>,
    /// The files of systemd, of this project, and of binfmt.d.
    pub files: Fact<Files>,
    /// The kernel's table.
    pub table: Fact<Table>,
    /// What systemd says about its units.
    pub units: Fact<Vec<Unit>>,
    /// The calling shell.
    pub session: Fact<Session>,
}

/// Stores the result of a read in the facts.
pub type Fill = Box<dyn FnOnce(&mut Facts) + Send>;

/// Reads in a new thread. If that cannot be started, there is no answer.
pub fn in_thread(read: Box<dyn FnOnce() -> Fill + Send>) -> Receiver<Fill> {
    let (tell, told) = channel();
    // The receiver may be gone by then.
    let _ = thread::Builder::new().spawn(move || drop(tell.send(read())));
    told
}

macro_rules! reader {
    ($fact:ident, $read:expr) => {
        |host| {
            let read = Fact::of($read(&host));
            Box::new(move |facts| facts.$fact = read)
        }
    };
}

impl Facts {
    /// Reads everything that answers before the deadline.
    pub fn read(host: &Host, deadline: Instant) -> Facts {
        let mut facts = Facts::default();
        let start = |read: fn(Host) -> Fill| {
            let host = host.clone();
            in_thread(Box::new(move || read(host)))
        };
        facts.fill(&start(reader!(place, Place::read)), deadline);
        let has_systemd = match &facts.place {
            Fact::Is(place) if place.verdict == Verdict::Wsl2 => place.has_systemd,
            _ => return facts,
        };
        let show = has_systemd.then(|| Show::start(UNITS));
        match &show {
            Some(Ok(_)) => {}
            Some(Err(error)) => facts.units = Fact::Failed(format!("{error:#}")),
            None => facts.units = Fact::Is(Vec::new()),
        }
        let told = [
            start(reader!(conf, |host| Ok(generate::decide(host)))),
            start(reader!(files, |host| Ok(Files::read(host)))),
            start(reader!(session, Session::read)),
            // Last, as no thread can be started during the probe's execveat.
            start(reader!(table, Table::read)),
        ];
        let shown = show.iter().flatten().map(|show| &show.said);
        for told in told.iter().chain(shown) {
            facts.fill(told, deadline);
        }
        facts
    }

    fn fill(&mut self, told: &Receiver<Fill>, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Ok(fill) = told.recv_timeout(left) {
            fill(self);
        }
    }
}

/// Where this runs.
pub struct Place {
    /// The generator's verdict.
    pub verdict: Verdict,
    /// Whether /init exists.
    pub has_init: bool,
    /// The version of WSL, which only root can see.
    pub version: Result<Option<String>, ErrorKind>,
    /// Whether systemd is PID 1.
    pub has_systemd: bool,
    /// The command to type for this program.
    pub command: String,
    /// Whether this shell is known to have other mounts than the distro.
    pub has_own_mounts: bool,
}

impl Place {
    fn read(host: &Host) -> anyhow::Result<Place> {
        let files = machine::files(host);
        let version = machine::pid1_variable(host, "container_host_version_id");
        let installed = fs::canonicalize(host.path(COMMAND));
        let command = match host::executable() {
            Ok(path) if installed.is_ok_and(|installed| installed == path) => "wsl-binfmt".into(),
            Ok(path) => path.into_string(),
            Err(_) => env!("CARGO_PKG_NAME").into(),
        };
        Ok(Place {
            has_init: files.init,
            // A shell does not have the variables that systemd sets for generators.
            verdict: wsl::verdict(&Environment::default(), || files),
            version: version.map_err(|error| error.kind()),
            has_systemd: host.path(SYSTEMD).exists(),
            command,
            has_own_mounts: machine::is_elsewhere_mounted(host),
        })
    }
}

/// The files of systemd, of this project, and of binfmt.d.
#[derive(Default)]
pub struct Files {
    /// The generator wherever systemd looks for it, highest priority first: its path, the file that
    /// this resolves to, and what systemd does with it.
    pub generators: Vec<(Utf8PathBuf, Utf8PathBuf, Fate)>,
    /// This program.
    pub executable: Utf8PathBuf,
    /// The generator's output, by path: the text of a file, or `link to` its target.
    pub written: BTreeMap<String, String>,
    /// The rules of binfmt.d.
    pub rules: Vec<Rule>,
    /// Files of binfmt.d that only root can read.
    pub denied: Vec<String>,
    /// The names of the rules of update-binfmts(8).
    pub formats: Vec<String>,
    /// The names of the rules recorded as registered by each service.
    pub recorded: [Vec<String>; 2],
    /// Files that override our units.
    pub above: Vec<String>,
    /// The drop-ins of all units: paths and texts.
    pub drop_ins: Vec<(String, String)>,
    /// The units that the admin has enabled: names, paths and texts.
    pub enabled: Vec<[String; 3]>,
    /// Links to a unit of older WSL that no longer exists.
    pub dangling: Vec<String>,
}

/// What systemd does with a file where it looks for generators.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    /// The file masks other generators of its name.
    Masks,
    /// systemd skips it.
    NotExecutable,
    /// systemd runs it.
    Runs,
    /// systemd runs it, and anybody may write to it.
    WritableByAll,
}

impl Files {
    /// Reads them, taking a file that cannot be read for an empty one.
    pub fn read(host: &Host) -> Files {
        let mut denied = binfmt_d::files(host);
        denied.retain(|path| {
            let read = host.read(path);
            read.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
        });
        let mut files = Files {
            executable: host::executable().unwrap_or_default(),
            rules: binfmt_d::rules(host),
            denied,
            formats: host.names(FORMATS),
            recorded: own::Unit::ALL.map(|unit| {
                let record = own::Record::read(host, unit);
                record.map(|record| record.names()).unwrap_or_default()
            }),
            ..Files::default()
        };
        files.read_generator(host);
        for directory in ABOVE_EARLY {
            let units = UNITS.map(|unit| format!("{directory}/{unit}"));
            let above = units.into_iter();
            let above = above.filter(|path| host.path(path).symlink_metadata().is_ok());
            files.above.extend(above);
        }
        for directory in [&ABOVE_EARLY[..], &LOCAL_UNITS, &VENDOR_UNITS].concat() {
            let names = host.names(directory).into_iter();
            for name in names
                .filter(|name| [".d", ".wants", ".requires"].iter().any(|end| name.ends_with(end)))
            {
                let inside = format!("{directory}/{name}");
                for file in host.names(&inside) {
                    files.read_unit(host, &inside, file);
                }
            }
        }
        files
    }

    fn read_generator(&mut self, host: &Host) {
        for directory in GENERATORS {
            let path = host.path(directory).join(env!("CARGO_PKG_NAME"));
            let real = path.canonicalize_utf8().unwrap_or_else(|_| path.clone());
            let known = self.generators.iter().any(|(_, other, _)| *other == real);
            if let Some(fate) = fate(&path).filter(|_| !known) {
                self.generators.push((path, real, fate));
            }
        }
        for name in host.names(EARLY) {
            let inside = host.names(&format!("{EARLY}/{name}")).into_iter();
            let inside = inside.map(|file| format!("{name}/{file}"));
            for path in inside.chain([name.clone()]) {
                let text = match host.path(EARLY).join(&path).read_link_utf8() {
                    Ok(target) => format!("link to {target}"),
                    Err(_) => host.text(&format!("{EARLY}/{path}")),
                };
                self.written.insert(path, text);
            }
        }
    }

    /// Reads a file in a directory of drop-ins, or of links that enable units.
    fn read_unit(&mut self, host: &Host, directory: &str, file: String) {
        let path = format!("{directory}/{file}");
        let below = host.path(&path);
        if directory.ends_with(".d") {
            self.drop_ins.push((path.clone(), host.text(&path)));
        } else if file == "wsl-binfmt.service" && below.is_symlink() && !below.exists() {
            self.dangling.push(path);
        } else if !VENDOR_UNITS.iter().any(|vendor| path.starts_with(vendor)) {
            // A timer or a path unit starts the service of its name.
            let stem = file.rsplit_once('.').map_or(&*file, |(stem, _)| stem);
            let service = match stem.split_once('@') {
                Some((template, _)) => format!("{template}@.service"),
                None => format!("{stem}.service"),
            };
            let mut all = LOCAL_UNITS.iter().chain(&VENDOR_UNITS);
            let path = all.find(|unit| host.path(unit).join(&service).exists());
            let path = path.map(|unit| format!("{unit}/{service}"));
            let unit = path.map(|path| [file, path.clone(), host.text(&path)]);
            self.enabled.extend(unit);
        }
    }
}

fn fate(path: &Utf8Path) -> Option<Fate> {
    let is_null = path.read_link_utf8().is_ok_and(|to| to == "/dev/null");
    let metadata = fs::metadata(path).ok()?;
    let mode = metadata.permissions().mode();
    match metadata.is_file() {
        _ if is_null => Some(Fate::Masks),
        true if metadata.len() == 0 => Some(Fate::Masks),
        true if mode & 0o111 == 0 => Some(Fate::NotExecutable),
        true if mode & 0o002 != 0 => Some(Fate::WritableByAll),
        true => Some(Fate::Runs),
        false => None,
    }
}

/// The kernel's table.
pub struct Table {
    /// The type of the file system that is mounted there.
    pub mounted: Option<String>,
    /// The entries, newest first, as the kernel tries them; none if the table cannot be seen.
    pub entries: Option<Vec<Listed>>,
    /// The text of its status file.
    pub state: String,
    /// The file that is mounted over its status file.
    pub cover: Option<String>,
    /// What the kernel does with a Windows program.
    pub probe: Probe,
}

/// What the kernel does with a file that begins with `MZ`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Probe {
    /// An interpreter takes it.
    Taken,
    /// No interpreter does: "Exec format error".
    Refused,
    /// This kernel does not tell.
    Unknown,
}

impl Table {
    fn read(host: &Host) -> anyhow::Result<Table> {
        // A shell may have other mounts than systemd, whose mounts matter; but only root sees those.
        let [distro, own] = MOUNT_INFOS.map(|path| host.path(path));
        let mounts = fs::read_to_string(distro).or_else(|_| fs::read_to_string(own));
        let mounts = mounts.context("reading the list of mounts")?;
        let directory = host.path(BINFMT_MISC);
        let on_it = mounts::on(&mounts, directory.as_str());
        let table = on_it.as_ref().filter(|on| on.kind == KIND);
        let status = directory.join("status");
        let cover = table.and_then(|table| mounts::within(&mounts, status.as_str(), table));
        // Any other file system is not touched: it may hang.
        let open = table.and_then(|_| binfmt_misc::Table::open(host).ok());
        Ok(Table {
            mounted: on_it.as_ref().map(|on| on.kind.to_owned()),
            state: match open {
                Some(_) => host.text(&format!("{BINFMT_MISC}/status")).trim().into(),
                None => String::new(),
            },
            entries: open.map(|table| table.entries()).transpose()?,
            // The status file bound over itself covers nothing.
            cover: cover.filter(|on| on.kind != KIND).map(|on| on.root.into()),
            probe: probe(),
        })
    }
}

/// Asks the kernel without starting anything: an interpreter could not open a close-on-exec file,
/// so ENOENT means that the kernel has found one, execveat(2). Four printable bytes keep it from
/// looking for a module.
fn probe() -> Probe {
    let ask = || -> io::Result<Infallible> {
        let program = memfd_create(c"wsl-binfmt-probe", MFdFlags::MFD_CLOEXEC)?;
        let mut program = File::from(program);
        program.write_all(b"MZ  ")?;
        let nothing: [CString; 0] = [];
        Ok(fexecve(program, &[c"wsl-binfmt-probe"], &nothing)?)
    };
    let errno = match ask() {
        Ok(never) => match never {},
        Err(error) => error.raw_os_error().map(Errno::from_raw),
    };
    match errno {
        Some(Errno::ENOENT) => Probe::Taken,
        Some(Errno::ENOEXEC) => Probe::Refused,
        _ => Probe::Unknown,
    }
}

/// The sockets through which /init starts a program on Windows. It uses that of `$WSL_INTEROP`, or
/// else that of the nearest ancestor process (UtilConnectToInteropServer in WSL).
#[derive(Default)]
pub struct Session {
    /// The socket that `$WSL_INTEROP` names.
    pub variable: Option<Socket>,
    /// The socket of the nearest ancestor that has one.
    pub inherited: Option<Socket>,
    /// Any socket of WSL's with a listener.
    pub other: Option<String>,
}

/// A socket's path and state.
pub struct Socket {
    /// Its path.
    pub path: String,
    /// Whether the file exists.
    pub exists: bool,
    /// Whether it has a listener.
    pub is_alive: bool,
}

impl Session {
    /// Reads the list of sockets. Connecting would also tell, but would reach WSL, and could hang.
    ///
    /// # Errors
    /// /proc is not mounted.
    pub fn read(host: &Host) -> anyhow::Result<Session> {
        let sockets = machine::unix_sockets(host)?;
        let look = |path: String| {
            let below = host.path(&path);
            let real = below.canonicalize_utf8().unwrap_or_else(|_| below.clone());
            Socket {
                exists: below.exists(),
                is_alive: machine::listening(&sockets).any(|path| path == real),
                path,
            }
        };
        let of_wsl = |name: String| look(format!("{INTEROP_SOCKETS}/{name}"));
        // Anybody may create files there. WSL's own belong to root, and are named `PID_interop`.
        let is_wsls = |name: &String| {
            let number = name.strip_suffix("_interop").unwrap_or_default();
            let path = host.path(INTEROP_SOCKETS).join(name);
            number.parse::<u32>().is_ok() && path.metadata().is_ok_and(|m| m.uid() == 0)
        };
        let names = host.names(INTEROP_SOCKETS).into_iter();
        let mut others = names.filter(is_wsls).map(of_wsl);
        let ancestors = ancestors(host).into_iter();
        let mut inherited = ancestors.map(|pid| of_wsl(format!("{pid}_interop")));
        Ok(Session {
            variable: host::variable("WSL_INTEROP").map(look),
            inherited: inherited.find(|socket| socket.exists),
            other: others.find(|socket| socket.is_alive).map(|s| s.path),
        })
    }
}

/// The ancestors of this process, nearest first.
fn ancestors(host: &Host) -> Vec<u32> {
    let parent = |of: &u32| {
        let status = host.text(&format!("{PROCESSES}/{of}/status"));
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        parent.trim().parse().ok().filter(|pid| *pid != 0)
    };
    let own = std::os::unix::process::parent_id();
    let all = std::iter::successors(Some(own).filter(|pid| *pid != 0), parent);
    all.take(64).collect()
}
