//! Outside of the VM: what it is made of, and starting one. What a VM leaves behind is taken away
//! here, however it ended.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};

use super::cgroup::{self, Cgroup};
use super::{debian, project, VM_STAGE};

/// What a distro of WSL has, as far as it matters here: python3-minimal ships a file for binfmt.d,
/// as on almost every machine; man-db lets `systemd-analyze verify` look for man pages.
const DISTRO: &str = "systemd,systemd-sysv,dbus,python3-minimal,binfmt-support,man-db";

/// Longer than this no scenario takes.
const VM_TIMEOUT: Duration = Duration::from_secs(900);

/// The machine that VMs are started on, with everything that they need in place.
pub struct Machine {
    directory: PathBuf,
}

/// With this, the VM begins a line that is a request.
pub const REQUEST: &str = "@machine ";

/// Says what `directory` is, and this VM's cgroup.
const DIRECTORY: &str = "WSL_VM_DIRECTORY";
const CGROUP: &str = "WSL_VM_CGROUP";

/// Where the VM finds what the machine has made for it.
pub struct Paths {
    /// The directory of all that is made, kept between runs.
    pub directory: PathBuf,
    /// This VM's cgroup.
    pub cgroup: PathBuf,
}

impl Paths {
    /// Inside the VM, the paths that it was started with.
    pub fn of_this_vm() -> anyhow::Result<Paths> {
        let path = |name| std::env::var_os(name).map(PathBuf::from).context(name);
        Ok(Paths {
            directory: path(DIRECTORY)?,
            cgroup: path(CGROUP)?,
        })
    }

    pub fn tree(&self, suite: &str) -> PathBuf {
        self.directory.join("trees").join(suite)
    }

    pub fn init(&self) -> PathBuf {
        self.directory.join("init")
    }

    /// The program under test: the release build, static, so that it runs in every distro.
    pub fn generator(&self) -> PathBuf {
        self.directory.join("wsl-binfmt-generator")
    }
}

impl Machine {
    /// Why no VM can be had here, if so.
    pub fn lacks() -> Option<String> {
        if !nix::unistd::geteuid().is_root() {
            return Some("the simulated WSL VM needs root".to_owned());
        }
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6u32, 7u32) => None,
            _ => Some(format!(
                "the simulated WSL VM needs a binfmt_misc table of its own, so Linux 6.7 or \
                 newer; this is {}",
                release.trim()
            )),
        }
    }

    /// Whether a test of this can be run here. If not, that is said, past the harness of Rust's tests,
    /// which keeps to itself what a test that passes has said.
    ///
    /// # Errors
    /// It cannot, and this is CI, where that is a failure.
    pub fn is_had_for(what: &str) -> anyhow::Result<bool> {
        let Some(lack) = Machine::lacks() else {
            return Ok(true);
        };
        ensure!(std::env::var_os("CI").is_none(), "{lack}");
        writeln!(io::stderr(), "\n{what} NOT TESTED: {lack}\n")?;
        Ok(false)
    }

    /// Makes what VMs with distros of these Debian suites need, or finds it made.
    pub fn prepare(suites: &[&str]) -> anyhow::Result<Machine> {
        let directory = directory()?;
        let paths = Paths {
            directory: directory.clone(),
            cgroup: PathBuf::new(),
        };
        fs::create_dir_all(directory.join("root"))?;
        let trees = directory.join("trees");
        thread::scope(|scope| {
            for program in ["mmdebstrap", "strace"] {
                debian::require(program, program)?;
            }
            let making: Vec<_> = suites
                .iter()
                .map(|suite| scope.spawn(|| debian::tree(&trees, suite, DISTRO, None)))
                .collect();
            build_generator(&directory, &paths.generator())?;
            build_init(&paths.init())?;
            for tree in making {
                tree.join().expect("making a tree does not panic")?;
            }
            anyhow::Ok(())
        })?;
        cgroup::remove_those_of_the_dead()?;
        Ok(Machine { directory })
    }

    /// Makes no more than what VMs with distros from images need.
    pub(super) fn prepare_for_images() -> anyhow::Result<Machine> {
        let directory = directory()?;
        fs::create_dir_all(directory.join("root"))?;
        build_init(&directory.join("init"))?;
        cgroup::remove_those_of_the_dead()?;
        Ok(Machine { directory })
    }

    /// The program under test, as distros have it.
    pub fn generator(&self) -> PathBuf {
        self.directory.join("wsl-binfmt-generator")
    }

    /// The machine's own binfmt_misc table, as text.
    pub fn table() -> anyhow::Result<String> {
        let list = "mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc \
                    && cd /proc/sys/fs/binfmt_misc && ls && cat $(ls | grep -v '^register$')";
        let output = Command::new("unshare")
            .args(["--mount", "sh", "-c", list])
            .output()?;
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
        let mut child = Command::new("/proc/self/exe")
            .arg(VM_STAGE)
            .args(arguments)
            .env(DIRECTORY, &self.directory)
            .env(CGROUP, &cgroup.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting the VM")?;
        let mut stdout = BufReader::new(child.stdout.take().context("stdout")?);
        let stderr = child.stderr.take().context("stderr")?;
        let complaints = thread::spawn(move || read_all(stderr));

        let started = (|| {
            cgroup.add(&child)?;
            let mut line = String::new();
            stdout.read_line(&mut line)?;
            ensure!(line == "unshared\n", "no user namespace for the VM");
            for map in ["uid_map", "gid_map"] {
                let path = format!("/proc/{}/{map}", child.id());
                fs::write(&path, "0 0 4294967295").with_context(|| format!("writing {path}"))?;
            }
            let mut stdin = child.stdin.take().context("stdin")?;
            stdin.write_all(b"mapped\n").context("telling the VM")?;
            Ok(stdin)
        })();
        let (started, stdin) = match started {
            Ok(stdin) => (Ok(()), Some(stdin)),
            Err(error) => (Err(error), None),
        };
        let pid = child.id();
        let printed = thread::spawn(move || serve(pid, stdout, stdin));
        if started.is_err() {
            child.kill()?;
        }
        let deadline = Instant::now() + VM_TIMEOUT;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if Instant::now() > deadline {
                break None;
            }
            thread::sleep(Duration::from_millis(10));
        };
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

/// Builds the program under test.
fn build_generator(directory: &Path, program: &Path) -> anyhow::Result<()> {
    let version = Command::new("rustc").arg("-vV").output()?.stdout;
    let host = String::from_utf8(version)?
        .lines()
        .find_map(|line| line.strip_prefix("host: ").map(str::to_owned))
        .context("rustc does not say for what it builds")?;
    succeed(
        Command::new(env!("CARGO"))
            .args(["build", "--release", "--locked", "--quiet"])
            // Named, so that what runs while building is not built static.
            .args(["--target", &host])
            .arg("--manifest-path")
            .arg(project().join("Cargo.toml"))
            .arg("--target-dir")
            .arg(directory.join("build"))
            .env("RUSTFLAGS", "-C target-feature=+crt-static"),
    )?;
    let built = directory
        .join("build")
        .join(host)
        .join("release/wsl-binfmt-generator");
    replace(&built, program)
}

/// Compiles the stand-in for WSL's /init, static, as that is.
fn build_init(program: &Path) -> anyhow::Result<()> {
    let unfinished = program.with_extension("unfinished");
    succeed(
        Command::new("rustc")
            .args(["--edition=2021", "-O", "-C", "target-feature=+crt-static"])
            .arg(project().join("tests/wsl/init.rs"))
            .arg("-o")
            .arg(&unfinished),
    )?;
    Ok(fs::rename(unfinished, program)?)
}

/// Copies over a program that may be running.
fn replace(from: &Path, to: &Path) -> anyhow::Result<()> {
    let unfinished = to.with_extension("unfinished");
    fs::copy(from, &unfinished)?;
    Ok(fs::rename(unfinished, to)?)
}

/// Runs a command that must succeed; its output is in the error if it does not.
pub fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {command:?}"))?;
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
