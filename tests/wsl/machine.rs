//! Outside of the VM: what it is made of, and starting one. What a VM leaves behind is taken away
//! here, however it ended.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::cgroup::{self, Cgroup};
use super::{debian, VM_STAGE};

/// What every distro has.
const PACKAGES: &str = "systemd,systemd-sysv,dbus";

/// Longer than this no VM runs.
const VM_TIMEOUT: Duration = Duration::from_secs(900);

/// What the VMs of a program are to have.
#[derive(Clone, Copy, Debug, Default)]
pub struct Needs<'a> {
    /// Debian suites to boot distros from, such as `trixie`. Their trees are in `trees` in `directory`.
    pub suites: &'a [&'a str],
    /// Debian packages that their trees have, besides systemd and D-Bus.
    pub packages: &'a [&'a str],
    /// Units and generators that are masked in distros, unless those are built with `Builder::unmasked`.
    pub masked: &'a [&'a str],
    /// Programs to be run outside of distros: `Vm::command`.
    pub programs: &'a [&'a Path],
}

/// Why there can be no VM on this machine.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Lack {
    /// Only root may start one.
    NotRoot,
    /// Root of a container may lack this.
    NotPrivileged(&'static str),
    /// Before Linux 6.7 there is one binfmt_misc table for all. This is the kernel's release.
    OldKernel(String),
    /// Something that is made of Debian's packages cannot be had: what, and why.
    FromDebian(String),
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lack::NotRoot => write!(f, "the simulated WSL VM needs root"),
            Lack::NotPrivileged(what) => {
                write!(f, "the simulated WSL VM needs {what}, which this container does not give")
            }
            Lack::OldKernel(release) => write!(
                f,
                "the simulated WSL VM needs a binfmt_misc table of its own, so Linux 6.7 or \
                 newer; this is {release}"
            ),
            Lack::FromDebian(why) => write!(f, "{why}"),
        }
    }
}

impl std::error::Error for Lack {}

/// The machine that VMs are started on, with everything that they need in place.
pub struct Machine {
    directory: PathBuf,
    masked: Vec<String>,
    programs: Vec<PathBuf>,
}

/// With this, the VM begins a line that is a request.
pub const REQUEST: &str = "@machine ";

/// Says what `directory` is.
const DIRECTORY: &str = "WSL_VM_DIRECTORY";
/// Has the rest of what a VM is given.
const GIVEN: &str = "WSL_VM_GIVEN";

/// What the machine gives to a VM.
#[derive(Deserialize, Serialize)]
pub struct Given {
    /// The directory of all that is made, kept between runs.
    pub directory: PathBuf,
    /// This VM's cgroup.
    pub cgroup: PathBuf,
    pub masked: Vec<String>,
    pub programs: Vec<PathBuf>,
}

impl Given {
    pub fn to_this_vm() -> anyhow::Result<Given> {
        Ok(serde_json::from_str(&std::env::var(GIVEN).context(GIVEN)?)?)
    }

    pub fn tree(&self, suite: &str) -> PathBuf {
        self.directory.join("trees").join(suite)
    }

    pub fn init(&self) -> PathBuf {
        self.directory.join("init")
    }
}

impl Machine {
    /// Why no VM can be had here, if so.
    pub fn lacks() -> Option<Lack> {
        if !nix::unistd::geteuid().is_root() {
            return Some(Lack::NotRoot);
        }
        if !may_mount() {
            return Some(Lack::NotPrivileged("CAP_SYS_ADMIN"));
        }
        if !cgroup::may_be_made() {
            return Some(Lack::NotPrivileged("a cgroup2 file system that can be written to"));
        }
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6u32, 7u32) => None,
            _ => Some(Lack::OldKernel(release.trim().to_owned())),
        }
    }

    /// Whether a test of this can be run here. If not, that is said, past the harness of Rust's tests,
    /// which keeps to itself what a test that passes has said.
    ///
    /// # Errors
    /// It cannot, and this is CI, where that is a failure.
    pub fn is_had_for(what: &str) -> anyhow::Result<bool> {
        Machine::lacks().map_or(Ok(true), |lack| said(what, lack.into()).map(|()| false))
    }

    /// The same, with all that its VMs need made, too.
    ///
    /// # Errors
    /// This is CI, or what is needed fails in some other way.
    pub fn is_prepared_for(what: &str, needs: &Needs) -> anyhow::Result<bool> {
        if !Machine::is_had_for(what)? {
            return Ok(false);
        }
        Ok(Machine::had_for(what, Machine::prepare(needs))?.is_some())
    }

    /// What was made for a test of this, or nothing where that is for a [`Lack`], which is then said.
    ///
    /// # Errors
    /// It could not be made for another reason, or this is CI.
    pub fn had_for<T>(what: &str, made: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        made.map_or_else(|error| said(what, error).map(|()| None), |made| Ok(Some(made)))
    }

    /// Makes what VMs need, or finds it made.
    ///
    /// # Errors
    /// It cannot be made; a [`Lack`] if it is of Debian's packages.
    pub fn prepare(needs: &Needs) -> anyhow::Result<Machine> {
        let directory = directory()?;
        fs::create_dir_all(directory.join("root"))?;
        let _lock = lock()?;
        let trees = directory.join("trees");
        let packages = [&[PACKAGES][..], needs.packages].concat().join(",");
        if !needs.suites.is_empty() {
            debian::require("mmdebstrap", "mmdebstrap")?;
        }
        thread::scope(|scope| {
            let making: Vec<_> = needs
                .suites
                .iter()
                .map(|suite| scope.spawn(|| debian::tree(&trees, suite, &packages, None)))
                .collect();
            build_init(&directory.join("init"))?;
            for tree in making {
                tree.join().expect("making a tree does not panic")?;
            }
            anyhow::Ok(())
        })?;
        cgroup::remove_those_of_the_dead()?;
        let owned = |unit: &&str| (*unit).to_owned();
        Ok(Machine {
            directory,
            masked: needs.masked.iter().map(owned).collect(),
            programs: needs.programs.iter().map(|p| p.to_path_buf()).collect(),
        })
    }

    /// The machine's own binfmt_misc table, as text.
    pub fn table() -> anyhow::Result<String> {
        let list = "mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc \
                    && cd /proc/sys/fs/binfmt_misc && ls && cat $(ls | grep -v '^register$')";
        let output = Command::new("unshare").args(["--mount", "sh", "-c", list]).output()?;
        ensure!(
            output.status.success(),
            "reading the machine's table: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Starts this program again inside a fresh VM, with `arguments` for its `play`, and returns
    /// what it printed; an error holds its complaints, too.
    pub fn in_vm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let cgroup = Cgroup::new()?;
        let given = serde_json::to_string(&Given {
            directory: self.directory.clone(),
            cgroup: cgroup.path.clone(),
            masked: self.masked.clone(),
            programs: self.programs.clone(),
        })?;
        let mut child = Command::new("/proc/self/exe")
            .arg(VM_STAGE)
            .args(arguments)
            .env(DIRECTORY, &self.directory)
            .env(GIVEN, given)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting the VM")?;
        let mut stdout = BufReader::new(child.stdout.take().context("stdout")?);
        let stderr = child.stderr.take().context("stderr")?;
        let complaints = thread::spawn(move || read_all(stderr));

        let (started, stdin) = match map_users(&mut child, &cgroup, &mut stdout) {
            Ok(stdin) => (Ok(()), Some(stdin)),
            Err(error) => (Err(error), None),
        };
        let pid = child.id();
        let printed = thread::spawn(move || serve(pid, stdout, stdin));
        if started.is_err() {
            child.kill()?;
        }
        let status = end_of(&mut child)?;
        drop(cgroup);
        let printed = printed.join().expect("reading does not panic");
        let complaints = complaints.join().expect("reading does not panic");
        started.with_context(|| complaints.clone())?;
        match status {
            Some(status) if status.success() => Ok(printed),
            Some(status) => bail!("the VM ended with {status}\n{printed}{complaints}"),
            None => bail!("the VM was still running after {VM_TIMEOUT:?}\n{printed}{complaints}"),
        }
    }
}

/// Whether this process has CAP_SYS_ADMIN, capabilities(7).
fn may_mount() -> bool {
    const SYS_ADMIN: u64 = 1 << 21;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    effective.is_some_and(|mask| mask & SYS_ADMIN != 0)
}

/// Says what is not tested for a [`Lack`]. In CI that is an error, and another error is one anywhere.
fn said(what: &str, error: anyhow::Error) -> anyhow::Result<()> {
    if !error.is::<Lack>() || std::env::var_os("CI").is_some() {
        return Err(error);
    }
    // In one piece, as the harness prints at the same time.
    Ok(io::stderr().write_all(format!("\n{what} NOT TESTED: {error}\n\n").as_bytes())?)
}

/// Lets the VM have all users, as soon as it has a user namespace, and says so to it.
fn map_users(
    vm: &mut Child,
    cgroup: &Cgroup,
    stdout: &mut impl BufRead,
) -> anyhow::Result<ChildStdin> {
    cgroup.add(vm)?;
    let mut line = String::new();
    stdout.read_line(&mut line)?;
    ensure!(line == "unshared\n", "no user namespace for the VM");
    for map in ["uid_map", "gid_map"] {
        let path = format!("/proc/{}/{map}", vm.id());
        fs::write(&path, "0 0 4294967295").with_context(|| format!("writing {path}"))?;
    }
    let mut stdin = vm.stdin.take().context("stdin")?;
    stdin.write_all(b"mapped\n").context("telling the VM")?;
    Ok(stdin)
}

/// Waits for a VM, but not for ever.
fn end_of(vm: &mut Child) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + VM_TIMEOUT;
    while Instant::now() < deadline {
        if let Some(status) = vm.try_wait()? {
            return Ok(Some(status));
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(None)
}

/// Reads what the VM prints, to its end. What it asks of the machine is done for it meanwhile.
fn serve(vm: u32, stdout: impl BufRead, mut stdin: Option<ChildStdin>) -> String {
    let mut printed = String::new();
    for line in stdout.lines().map_while(Result::ok) {
        match (line.strip_prefix(REQUEST), &mut stdin) {
            (Some(command), Some(stdin)) => {
                let answer = as_machine(vm, command).unwrap_or_else(|error| format!("{error:#}"));
                // A VM that has died does not want its answer any more.
                let _ = writeln!(stdin, "{}", answer.trim_end().replace('\n', "; "));
            }
            _ => printed.extend([&line, "\n"]),
        }
    }
    printed
}

/// A shell command in the VM's mount namespace, with the machine's privileges; what it prints,
/// errors included.
fn as_machine(vm: u32, command: &str) -> anyhow::Result<String> {
    let output = Command::new("nsenter")
        .args(["-t", &vm.to_string(), "-m", "-r", "-w"])
        .args(["sh", "-c", &format!("exec 2>&1; {command}")])
        .stdin(Stdio::null())
        .output()
        .context("entering the VM")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The directory of all that is made, kept between runs: `wsl-vm` in the target directory of this
/// program, or what `WSL_VM_DIRECTORY` says. Inside the VM it is the same.
pub fn directory() -> anyhow::Result<PathBuf> {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return Ok(std::path::absolute(directory)?);
    }
    // A test or an example lies two levels below target/, and a program one.
    let program = std::env::current_exe()?;
    let mut directories = program.ancestors().skip(1);
    let profile = directories.find(|path| !path.ends_with("deps") && !path.ends_with("examples"));
    let target = profile.and_then(Path::parent);
    Ok(target.context("no target directory")?.join("wsl-vm"))
}

/// Keeps other programs from making what is in `directory` while it is held.
///
/// # Errors
/// There is no such directory, and none can be made.
pub fn lock() -> anyhow::Result<Flock<File>> {
    let directory = directory()?;
    fs::create_dir_all(&directory)?;
    let file = File::create(directory.join("lock"))?;
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((file, _)) => file,
    };
    let directory = directory.display();
    eprintln!("waiting until another program has made what it needs in {directory} ...");
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("locking {directory}"))
}

/// Compiles the stand-in for WSL's /init, static, as that is.
fn build_init(program: &Path) -> anyhow::Result<()> {
    let unfinished = program.with_extension("unfinished");
    // Another checkout with the same target directory may have built this one's library.
    let source = program.with_extension("rs");
    fs::write(&source, include_str!("init.rs"))?;
    succeed(
        Command::new("rustc")
            .args(["--edition=2021", "-O", "-C", "target-feature=+crt-static"])
            .arg(&source)
            .arg("-o")
            .arg(&unfinished),
    )?;
    Ok(fs::rename(unfinished, program)?)
}

/// Runs a command that must succeed; its output is in the error if it does not.
pub fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn read_all(mut from: impl Read) -> String {
    let mut bytes = Vec::new();
    // What came before an error is worth showing.
    let _ = from.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}
