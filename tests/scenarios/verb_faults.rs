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

use crate::ours::{extent, Install, Run};
use crate::stand_in::{alone, served};
use crate::strace::{self, Fault};
use crate::verbs::{as_in_a_distro, Test};

const STATUS: &str = "/proc/sys/fs/binfmt_misc/status";
const STATE: &str = "/run/wsl-binfmt";
/// What the guard binds over it, and where it binds that first.
const GUARD_FILE: &str = "/run/wsl-binfmt/status";
const RECORD: &str = "/run/wsl-binfmt/systemd-binfmt.rules";
/// A drop-in of the generator's, and the copy that the guard makes.
const DROP_IN: &str = "/run/systemd/generator.early/systemd-binfmt.service.d/10-wsl-interop.conf";
const COPY: &str = "/run/systemd/system/systemd-binfmt.service.d/10-wsl-interop.conf";
/// Where strace writes what a verb does when nothing fails.
const LOG: &str = "/vm/strace";

pub const FAULTS: &[Test] = &[
    ("faults: restore --watch, 1 of 8", |vm| watch(vm, 0)),
    ("faults: restore --watch, 2 of 8", |vm| watch(vm, 1)),
    ("faults: restore --watch, 3 of 8", |vm| watch(vm, 2)),
    ("faults: restore --watch, 4 of 8", |vm| watch(vm, 3)),
    ("faults: restore --watch, 5 of 8", |vm| watch(vm, 4)),
    ("faults: restore --watch, 6 of 8", |vm| watch(vm, 5)),
    ("faults: restore --watch, 7 of 8", |vm| watch(vm, 6)),
    ("faults: restore --watch, 8 of 8", |vm| watch(vm, 7)),
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
    ("faults: guard", guard),
    ("faults: guard, where its mount propagates", |vm| {
        as_in_a_distro(vm)?;
        guard(vm)
    }),
    ("faults: stopping", |vm| {
        let before = |vm: &Vm| {
            unguarded(vm)?;
            started(vm)?;
            // As if that had failed, and so was not stopped.
            Ok(fs::remove_dir(format!("{STATE}/systemd-binfmt"))?)
        };
        let verb = ["stopping"];
        each(vm, &verb, &before, |vm, said| {
            guarded(vm, said)?;
            kept(vm)
        })
    }),
    ("faults: release", |vm| each(vm, &["release"], &started, |vm, _| kept(vm))),
    ("faults: started systemd-binfmt", |vm| {
        let before = |vm: &Vm| {
            registered(vm)?;
            // What an earlier start has left, of which one is no longer in binfmt.d.
            vm.register(":old:M::OLD::/bin/cat:F")?;
            let [old, testfmt] = ["old", "testfmt"].map(|name| vm.entry_identity(name));
            let rule = FORMATS[1];
            write(RECORD, &format!("{} - :old:\n{} - {rule}\n", old?, testfmt?))
        };
        let verb = ["started", "systemd-binfmt"];
        each(vm, &verb, &before, |vm, said| {
            kept(vm)?;
            ensure!(vm.entry("testfmt") != "missing", "an own entry is gone");
            recorded(said, &["testfmt", "plain", "shared"], &["old", "testfmt"])
        })
    }),
    ("faults: started systemd-binfmt, with nothing for Windows programs", |vm| {
        let before = |vm: &Vm| {
            registered(vm)?;
            vm.write("WSLInterop", "-1")
        };
        let verb = ["started", "systemd-binfmt"];
        each(vm, &verb, &before, |_, said| recorded(said, &["testfmt", "plain", "shared"], &[]))
    }),
    ("faults: stopped systemd-binfmt", |vm| {
        let verb = ["SERVICE_RESULT=success", "stopped", "systemd-binfmt"];
        each(vm, &verb, &started, |vm, _| kept(vm))
    }),
    ("faults: stopped systemd-binfmt, after a start that failed", |vm| {
        let verb = ["SERVICE_RESULT=exit-code", "stopped", "systemd-binfmt"];
        each(vm, &verb, &registered, |vm, said| {
            kept(vm)?;
            ensure!(vm.entry("testfmt") != "missing", "an own entry is gone");
            recorded(said, &["testfmt", "plain", "shared"], &[])
        })
    }),
    ("faults: status of a distro without the entry", status),
];

fn write(path: &str, text: &str) -> anyhow::Result<()> {
    let directory = Path::new(path).parent().context("a directory")?;
    fs::create_dir_all(directory)?;
    Ok(fs::write(path, text)?)
}

fn guard(vm: &Vm) -> anyhow::Result<()> {
    let before = |vm: &Vm| {
        unguarded(vm)?;
        vm.renew_interop()?;
        write(DROP_IN, "[Service]\n")
    };
    each(vm, &["guard"], &before, |vm, said| {
        guarded(vm, said)?;
        // What cannot be noted keeps it from nothing else.
        let of_a_note = ["before", "interop", "wsl.conf", "/run/systemd/system"];
        let only_a_note = of_a_note.iter().any(|note| said.contains(note));
        ensure!(!only_a_note || vm.mounts_on(STATUS)? == 1, "no mount");
        Ok(())
    })
}

/// As if no guard had run yet.
fn unguarded(vm: &Vm) -> anyhow::Result<()> {
    for path in [STATUS, GUARD_FILE] {
        while vm.mounts_on(path)? > 0 {
            vm.unmount(path)?;
        }
    }
    for directory in [STATE, "/run/systemd"] {
        fs::remove_dir_all(directory).or_else(if_missing)?;
    }
    Ok(())
}

/// The status file is as it was, or nobody can write to it.
fn guarded(vm: &Vm, said: &str) -> anyhow::Result<()> {
    let mounts = vm.mounts_on(STATUS)?;
    ensure!(mounts <= 1, "{mounts} mounts");
    let text = vm.read("status")?;
    ensure!(text == "enabled\n", "the status file says {text:?}");
    let writable = vm.write("status", "1").is_ok();
    ensure!(writable == (mounts == 0), "{mounts} mounts, {said}");
    Ok(())
}

/// What is not this distro's own is still there, and what a peer had before it stands for the peer.
fn kept(vm: &Vm) -> anyhow::Result<()> {
    for name in ["WSLInterop", "shared", "plain"] {
        ensure!(vm.entry(name) != "missing", "{name} is gone");
    }
    Ok(())
}

/// What is written down is what there is to write down, or what was before; or part of that, if
/// the rest could not be read.
fn recorded(said: &str, all: &[&str], before: &[&str]) -> anyhow::Result<()> {
    let text = fs::read_to_string(RECORD).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(String::new()),
        _ => Err(error),
    })?;
    let name = |line: &str| line.split(':').nth(1).unwrap_or_default().to_owned();
    let names: Vec<String> = text.lines().map(name).collect();
    let known = |name: &String| all.contains(&&**name) || before.contains(&&**name);
    let part = says_why(said) && names.iter().all(known);
    ensure!(names == all || names == before || part, "'{said}', and remembered is {text:?}");
    Ok(())
}

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

/// What the distro has registered from binfmt.d; of that, a peer had one before, and has replaced
/// another since.
fn registered(vm: &Vm) -> anyhow::Result<()> {
    table(&FORMATS[..1])(vm)?;
    for path in [RECORD, DROP_IN, COPY] {
        fs::remove_file(path).or_else(if_missing)?;
    }
    write("/run/wsl-binfmt/before", "plain\n")?;
    // As systemd does when it starts the service.
    let runtime_directory = format!("{STATE}/systemd-binfmt");
    fs::remove_dir(&runtime_directory).or_else(if_missing)?;
    fs::create_dir(&runtime_directory)?;
    write("/run/binfmt.d/test.conf", &FORMATS[1..].join("\n"))?;
    FORMATS[1..].iter().try_for_each(|rule| vm.register(rule))
}

fn started(vm: &Vm) -> anyhow::Result<()> {
    registered(vm)?;
    let started = ["started", "systemd-binfmt"];
    ensure!(vm.generator().args(started).status()?.success());
    vm.write("shared", "-1")?;
    vm.register(":shared:M::SHARED::/bin/cat:")
}

/// Each as the kernel shows it, too.
const FORMATS: &[&str] = &[
    ":WSLInterop:M::MZ::/init:FP",
    r":testfmt:M:0:\x54\x45\x53\x54::/bin/cat:F",
    r":plain:M:0:\x50\x4c\x41\x49\x4e::/bin/cat:",
    r":shared:M:0:\x53\x48\x41\x52\x45\x44::/bin/cat:F",
];

/// All that a verb may have changed, but for numbers of inodes.
fn state(vm: &Vm) -> anyhow::Result<String> {
    let names = vm.entries_in_order();
    let mut lines: Vec<_> =
        names.iter().map(|name| format!("{name}: {}", vm.entry(name))).collect();
    lines.push(format!("status: {}", vm.read("status")?.trim()));
    for path in [STATUS, GUARD_FILE] {
        lines.push(format!("{path}: {} mounts", vm.mounts_on(path)?));
    }
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let over = mounts.lines().filter(|line| line.contains(STATUS));
    lines.extend(over.map(|line| line.split(',').next().unwrap_or_default().to_owned()));
    lines.push(format!("a copy: {}", Path::new(COPY).exists()));
    let inodes: Vec<(String, String)> = names
        .iter()
        .map(|name| Ok((vm.entry_identity(name)?.to_string(), name.clone())))
        .collect::<anyhow::Result<_>>()?;
    // An inode by the name of its entry.
    let named = |word: &str| match inodes.iter().find(|(inode, _)| inode == word) {
        Some((_, name)) => format!("<{name}>"),
        None if word != "0" && word.parse::<u64>().is_ok() => "<gone>".to_owned(),
        None => word.to_owned(),
    };
    if Path::new(STATE).exists() {
        let mut files: Vec<_> = fs::read_dir(STATE)?.collect::<Result<_, _>>()?;
        files.sort_by_key(fs::DirEntry::path);
        for file in files {
            let path = file.path();
            if path.is_file() && !path.to_string_lossy().ends_with(".unfinished") {
                let text = fs::read_to_string(&path)?;
                let words = text.split_inclusive([' ', '\n']);
                let text: String =
                    words.map(|word| word.replace(word.trim(), &named(word.trim()))).collect();
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
    // The machine's own rules are none of the VM's.
    for directory in ["/etc/binfmt.d", "/usr/lib/binfmt.d"] {
        if Path::new(directory).exists() {
            vm.mount_tmpfs(directory, "1m")?;
        }
    }
    let program = || {
        let mut command = vm.generator();
        for word in verb {
            match word.split_once('=') {
                Some((name, value)) => command.env(name, value),
                None => command.arg(word),
            };
        }
        command
    };
    before(vm)?;
    let faults = strace::faults(&program(), Path::new(LOG))?;
    let right = state(vm)?;
    let faults = extent::sample(faults);
    let tried = strace::try_all(&faults, [vm], |vm, fault| {
        before(vm)?;
        let started = vm.launch() == "starts";
        let output = fault.put_into(&program()).output()?;
        let said = check(fault, &output)?;
        if started {
            ensure!(vm.launch() == "starts", "{said}; then {}: {}", vm.launch(), state(vm)?);
        }
        sound(vm, &said).with_context(|| format!("{said}; then"))?;
        if output.status.success() {
            ensure!(state(vm)? == right, "'{said}', exit status 0, and {}", state(vm)?);
        }
        let output = program().output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the next run: {}: {said}", output.status);
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
/// all the same, or ends and says why, for systemd to start it again; and once Windows programs
/// start, they do so until the end.
fn watch(vm: &Vm, part: usize) -> anyhow::Result<()> {
    vm.mount_tmpfs("/run", "1m")?;
    let mut program = vm.generator();
    program.args(["restore", "--watch"]).env("NOTIFY_SOCKET", "/vm/notify");
    vm.renew_interop()?;
    let watched = Watched::start(strace::traced(&program, &[], Path::new(LOG)))?;
    ensure!(watched.ready, "{}", watched.end()?.1);
    vm.write("status", "-1")?;
    let healed = within(SETTLED, || alone(vm).is_ok());
    let (status, said) = watched.end()?;
    ensure!(healed && status.success(), "{status}: {said}");
    let faults = strace::faults_of(&fs::read_to_string(LOG)?);
    ensure!(faults.len() > 20);
    // Each waits until nobody writes any more, so all of them in one would keep the others waiting.
    let faults = extent::sample(faults.into_iter().skip(part).step_by(8).collect());
    let tried = strace::try_all(&faults, [vm], |vm, fault| {
        vm.renew_interop()?;
        let _ = fs::remove_dir_all(STATE);
        let watched = Watched::start(fault.put_into(&program))?;
        vm.write("status", "-1")?;
        let served = within(SERVED, || served(vm).is_ok() || watched.has_ended());
        let mut launch = vm.launch();
        let is_served = served && launch == "starts";
        let healed = within(SETTLED, || {
            if is_served && launch == "starts" {
                launch = vm.launch();
            }
            alone(vm).is_ok() || watched.has_ended()
        });
        let (status, said) = watched.end()?;
        ensure!(!said.contains("panicked"), "{said}");
        ensure!(served && healed, "{status}: '{said}', and the table is {:?}", vm.entries());
        ensure!(!is_served || launch == "starts", "{status}: '{said}', and later: {launch}");
        if alone(vm).is_err() && !fault.kills {
            ensure!(status.code() == Some(1), "{status}: {said}");
            ensure!(says_why(&said), "'{said}', and {status}");
        }
        ensure!(vm.generator().arg("restore").status()?.success());
        ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
        alone(vm)
    });
    eprintln!("{} faults", faults.len());
    tried
}

/// How long it may take until Windows programs start again, and until all is in order.
const SERVED: Duration = Duration::from_secs(3);
const SETTLED: Duration = Duration::from_secs(8);

fn within(time: Duration, mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < time {
        if done() {
            return true;
        }
        thread::sleep(Duration::from_millis(5));
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
        let mut watched = Watched { strace, ready: false };
        within(Duration::from_secs(5), || socket.recv(&mut [0; 64]).is_ok() || watched.has_ended());
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
            Command::new("kill").arg(pid).stderr(Stdio::null()).status()?;
        }
        let output = self.strace.wait_with_output()?;
        Ok((output.status, String::from_utf8_lossy(&output.stderr).into_owned()))
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
    ensure!(faults.len() > 40, "{}", faults.len());
    let faults = extent::sample(faults);
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
