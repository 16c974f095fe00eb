//! Each system call of each verb fails in turn, or is the last that it makes, on the kernel's own
//! table. Whatever happens: Windows programs start if they did before, a line says what failed, and
//! the next run is right.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use wsl_vm::Vm;

use crate::strace::{self, Fault};
use crate::verbs::Test;

const STATUS: &str = "/proc/sys/fs/binfmt_misc/status";
const REGISTERED: &str = "/run/wsl-binfmt/registered";
/// Where strace writes what a verb does when nothing fails.
const LOG: &str = "/vm/strace";

pub const FAULTS: &[Test] = &[
    ("faults: restore, of a missing entry", |vm| {
        each(vm, &["restore"], &table(&[]), |_, _| Ok(()))
    }),
    ("faults: restore, of an entry that has lost its F", |vm| {
        let before = table(&[
            ":ape:M::MZqFpD::/bin/cat:P",
            ":WSLInterop:M::MZ::/init:P",
            ":WSLInterop-late:M::MZ::/init:P",
        ]);
        each(vm, &["restore"], &before, |_, _| Ok(()))
    }),
    ("faults: restore, of an entry that is shadowed", |vm| {
        let before = table(&[":WSLInterop:M::MZ::/init:FP", ":cli:M::MZ::/bin/cat:"]);
        each(vm, &["restore"], &before, |_, _| Ok(()))
    }),
    ("faults: guard", |vm| {
        let guarded = |vm: &Vm, said: &str| {
            let mounts = vm.mounts_on(STATUS)?;
            ensure!(mounts <= 1, "{mounts} mounts");
            ensure!(said.is_empty() || mounts == 0, "{said}, and a mount");
            let text = vm.read("status")?;
            ensure!(text == "enabled\n", "the status file says {text:?}");
            Ok(())
        };
        let before = |vm: &Vm| {
            while vm.mounts_on(STATUS)? > 0 {
                vm.unmount(STATUS)?;
            }
            fs::remove_dir_all("/run/wsl-binfmt").or_else(if_missing)
        };
        each(vm, &["guard"], &before, guarded)
    }),
    ("faults: release", |vm| {
        let before = |vm: &Vm| {
            formats(vm)?;
            ensure!(vm
                .generator()
                .args(["release", "--remember"])
                .status()?
                .success());
            // Since then a peer has registered one of the names.
            vm.write("shared", "-1")?;
            vm.register(":shared:M::SHARED::/bin/cat:")
        };
        each(vm, &["release"], &before, |vm, _| {
            ensure!(vm.entry("shared") != "missing", "a peer's entry is gone");
            Ok(())
        })
    }),
    ("faults: release --remember", |vm| {
        let before = |vm: &Vm| {
            formats(vm)?;
            fs::create_dir_all("/run/wsl-binfmt")?;
            Ok(fs::write(REGISTERED, "1 before\n")?)
        };
        each(vm, &["release", "--remember"], &before, |_, said| {
            let text = fs::read_to_string(REGISTERED)?;
            let all = text.contains(" shared\n") && text.contains(" testfmt\n");
            // What could not be read is not in it.
            let unread = said.contains("binfmt.d") || said.contains("looking at");
            let known = |line: &str| line.ends_with(" shared") || line.ends_with(" testfmt");
            let part = unread && text.lines().all(known);
            ensure!(
                all || part || text == "1 before\n",
                "'{said}', and remembered is {text:?}"
            );
            Ok(())
        })
    }),
    ("faults: restore --watch", watch),
    ("faults: status of a distro without the entry", status),
];

fn if_missing(error: std::io::Error) -> anyhow::Result<()> {
    match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error.into()),
    }
}

/// Makes the table one of these rules, the oldest first.
fn table(rules: &'static [&'static str]) -> impl Fn(&Vm) -> anyhow::Result<()> {
    move |vm| {
        vm.write("status", "-1")?;
        rules.iter().try_for_each(|rule| vm.register(rule))
    }
}

/// What the distro has registered from binfmt.d.
fn formats(vm: &Vm) -> anyhow::Result<()> {
    table(FORMATS)(vm)?;
    fs::create_dir_all("/run/binfmt.d")?;
    let rules = FORMATS.get(1..).unwrap_or_default().join("\n");
    Ok(fs::write("/run/binfmt.d/test.conf", rules)?)
}

const FORMATS: &[&str] = &[
    ":WSLInterop:M::MZ::/init:FP",
    ":testfmt:M::TESTFMT::/bin/cat:F",
    ":shared:M::SHARED::/bin/cat:F",
];

/// All that a verb may have changed, but for numbers of inodes.
fn state(vm: &Vm) -> anyhow::Result<String> {
    let mut lines: Vec<_> = vm
        .entries_in_order()
        .iter()
        .map(|name| format!("{name}: {}", vm.entry(name)))
        .collect();
    lines.push(format!(
        "status: {}, {} mounts",
        vm.read("status")?.trim(),
        vm.mounts_on(STATUS)?
    ));
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let over = mounts.lines().filter(|line| line.contains(STATUS));
    lines.extend(over.map(|line| line.split(',').next().unwrap_or_default().to_owned()));
    if Path::new("/run/wsl-binfmt").exists() {
        for file in fs::read_dir("/run/wsl-binfmt")? {
            let path = file?.path();
            if !path.to_string_lossy().ends_with(".unfinished") {
                let text = fs::read_to_string(&path)?;
                let text = text.replace(|c: char| c.is_ascii_digit(), "");
                lines.push(format!("{}: {text}", path.display()));
            }
        }
    }
    Ok(lines.join("\n"))
}

/// Tries all faults of a verb, from the same state each time. `sound` is asked after each.
fn each(
    vm: &Vm,
    verb: &[&str],
    before: &(dyn Fn(&Vm) -> anyhow::Result<()> + Sync),
    sound: impl Fn(&Vm, &str) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    // The machine's own is seen here otherwise, and by other VMs.
    vm.mount_tmpfs("/run", "1m")?;
    let program = || {
        let mut command = vm.generator();
        command.args(verb);
        command
    };
    before(vm)?;
    let faults = strace::faults(&program(), Path::new(LOG))?;
    let right = state(vm)?;
    let tried = strace::try_all(&faults, [vm], |vm, fault| {
        before(vm)?;
        let started = vm.launch() == "starts";
        let output = fault.put_into(&program()).output()?;
        let said = check(fault, &output)?;
        if started {
            ensure!(
                vm.launch() == "starts",
                "{said}; then {}: {}",
                vm.launch(),
                state(vm)?
            );
        }
        sound(vm, &said).with_context(|| format!("{said}; then"))?;
        if output.status.success() {
            ensure!(
                state(vm)? == right,
                "'{said}', exit status 0, and {}",
                state(vm)?
            );
        }
        let output = program().output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "the next run: {}: {said}",
            output.status
        );
        ensure!(state(vm)? == right, "the next run leaves {}", state(vm)?);
        Ok(())
    });
    eprintln!("{} faults", faults.len());
    tried
}

/// It does not panic, and if it fails, it says why.
fn check(fault: &Fault, output: &Output) -> anyhow::Result<String> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!said.contains("panicked"), "{said}");
    match output.status.code() {
        _ if fault.kills => ensure!(output.status.signal() == Some(9), "not killed: {said}"),
        Some(0) => {}
        Some(1) => ensure!(says_why(&said), "'{said}', and exit status 1"),
        _ => bail!("{}: {said}", output.status),
    }
    Ok(said)
}

/// Whether a line names something and the cause.
fn says_why(said: &str) -> bool {
    said.lines()
        .any(|line| line.contains('/') && (line.contains("(os error ") || line.contains(": E")))
}

/// Each call that the watcher makes fails, once and from then on, or is its last. It mends the table
/// all the same, or ends and says why, for systemd to start it again.
fn watch(vm: &Vm) -> anyhow::Result<()> {
    vm.mount_tmpfs("/run", "1m")?;
    let mut program = vm.generator();
    program
        .args(["restore", "--watch"])
        .env("NOTIFY_SOCKET", "/vm/notify");
    vm.renew_interop()?;
    let watched = Watched::start(strace::traced(&program, &[], Path::new(LOG)))?;
    ensure!(watched.ready, "{}", watched.end()?.1);
    vm.write("status", "-1")?;
    let healed = within(Duration::from_secs(5), || stands(vm));
    let (status, said) = watched.end()?;
    ensure!(healed && status.success(), "{status}: {said}");
    let faults = strace::faults_of(&fs::read_to_string(LOG)?);
    ensure!(faults.len() > 20);
    let tried = strace::try_all(&faults, [vm], |vm, fault| {
        vm.renew_interop()?;
        let watched = Watched::start(fault.put_into(&program))?;
        vm.write("status", "-1")?;
        let over = || stands(vm) || watched.has_ended();
        let healed = within(Duration::from_secs(3), over);
        let (status, said) = watched.end()?;
        ensure!(!said.contains("panicked"), "{said}");
        ensure!(
            healed,
            "{status}: '{said}', and the table is {:?}",
            vm.entries()
        );
        if !stands(vm) && !fault.kills {
            ensure!(status.code() == Some(1), "{status}: {said}");
            ensure!(says_why(&said), "'{said}', and {status}");
        }
        ensure!(vm.generator().arg("restore").status()?.success());
        ensure!(stands(vm) && vm.entries().len() == 1, "{:?}", vm.entries());
        Ok(())
    });
    eprintln!("{} faults", faults.len());
    tried
}

fn stands(vm: &Vm) -> bool {
    vm.entry("WSLInterop") == "enabled, interpreter /init, flags: PF"
}

fn within(time: Duration, done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < time {
        if done() {
            return true;
        }
        thread::sleep(Duration::from_millis(1));
    }
    false
}

/// A watcher under strace.
struct Watched {
    strace: std::process::Child,
    ready: bool,
}

impl Watched {
    /// Starts it, and waits until it is ready or has ended.
    fn start(mut command: Command) -> anyhow::Result<Watched> {
        let _ = fs::remove_file("/vm/notify");
        let socket = UnixDatagram::bind("/vm/notify")?;
        socket.set_nonblocking(true)?;
        let strace = command.stderr(Stdio::piped()).spawn()?;
        let mut watched = Watched {
            strace,
            ready: false,
        };
        within(Duration::from_secs(5), || {
            socket.recv(&mut [0; 64]).is_ok() || watched.has_ended()
        });
        watched.ready = !watched.has_ended();
        Ok(watched)
    }

    fn process(&self) -> Option<String> {
        let pid = self.strace.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        children.split_whitespace().next().map(str::to_owned)
    }

    fn has_ended(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.strace.id()));
        stat.map_or(true, |stat| stat.contains(") Z "))
    }

    /// Stops it as systemd does. How it ended, and what it has said.
    fn end(self) -> anyhow::Result<(std::process::ExitStatus, String)> {
        if let Some(pid) = self.process() {
            Command::new("kill")
                .arg(pid)
                .stderr(Stdio::null())
                .status()?;
        }
        let output = self.strace.wait_with_output()?;
        Ok((
            output.status,
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ))
    }
}

/// A call that fails must not make `status` say that all is well.
fn status(vm: &Vm) -> anyhow::Result<()> {
    let distro = vm.distro("mine", "trixie").generator(true).boot()?;
    distro.run("systemctl stop wsl-interop-restore");
    vm.write("WSLInterop", "-1")?;
    let mut program = distro.command();
    program.args(["wsl-binfmt", "status"]);
    let output = program.output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let _ = strace::traced(&program, &[], Path::new(LOG)).output()?;
    let mut faults = strace::faults_of(&fs::read_to_string(LOG)?);
    faults.retain(|fault| !fault.kills);
    ensure!(faults.len() > 100, "{}", faults.len());
    let tried = strace::try_all(&faults, [(); 2], |(), fault| {
        let output = fault.put_into(&program).output()?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.code() == Some(1), "{}: {said}", output.status);
        ensure!(!said.contains("panicked"), "{said}");
        Ok(())
    });
    eprintln!("{} faults", faults.len());
    tried
}
