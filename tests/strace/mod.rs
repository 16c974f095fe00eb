//! Faults that strace(1) puts into the system calls of a program, one in each run.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{ensure, Context};

/// What becomes of one system call.
#[derive(Debug)]
pub struct Fault {
    /// For `strace --inject`.
    inject: String,
    /// The program is killed instead of calling.
    pub kills: bool,
    /// What is seen of the call in the run without a fault.
    pub call: String,
}

impl Fault {
    /// The program, arguments and environment included, with this fault.
    pub fn put_into(&self, program: &Command) -> Command {
        let name = self.inject.split(':').next().unwrap_or_default();
        let only = format!("trace={name}");
        let inject = format!("inject={}", self.inject);
        let mut options = vec!["-e", &only, "-e", &inject];
        if !self.kills {
            // Stops at no other call; but at this one it takes no signal.
            options.push("--seccomp-bpf");
        }
        traced(program, &options, Path::new("/dev/null"))
    }
}

/// All faults that are to be tried, as one run without a fault shows them. Left out is what happens
/// before the program's own first call: the dynamic loader, libc, and the runtime of Rust, which
/// ends with a handler for SIGBUS. None of that is ours, and a static build has less of it.
pub fn faults(program: &Command, log: &Path) -> anyhow::Result<Vec<Fault>> {
    let output = traced(program, &[], log).output().context("strace")?;
    let text = std::fs::read_to_string(log)?;
    ensure!(output.status.success(), "{output:?}\n{text}");
    let faults = faults_of(&text);
    ensure!(faults.len() > 20, "no calls to speak of:\n{text}");
    Ok(faults)
}

pub fn faults_of(log: &str) -> Vec<Fault> {
    // strace counts the calls of each thread by itself.
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut calls: BTreeMap<(&str, usize), &str> = BTreeMap::new();
    for line in log.lines() {
        let Some((thread, call)) = line.split_once(' ') else {
            continue;
        };
        let call = call.trim_start();
        let Some((name, _)) = call.split_once('(').filter(|(name, _)| is_name(name)) else {
            continue;
        };
        let count = counts.entry((thread, name)).or_default();
        *count += 1;
        calls.entry((name, *count)).or_insert(call);
        if call.starts_with("rt_sigaction(SIGBUS, {") {
            // What is counted so far is not ours, and a fault at such a number would hit it.
            calls.values_mut().for_each(|call| *call = "");
        }
    }
    let mut faults = Vec::new();
    for ((name, count), call) in calls {
        let errors = match call {
            "" => continue,
            _ if name.starts_with("exit") => continue,
            call => errors(name, call),
        };
        let mut add = |what: String, kills| {
            faults.push(Fault {
                inject: format!("{name}:{what}:when={count}"),
                kills,
                call: call.to_owned(),
            })
        };
        for error in errors {
            add(format!("error={error}"), false);
        }
        add("signal=SIGKILL".to_owned(), true);
    }
    faults
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// The errors that a call may well meet.
fn errors(name: &str, call: &str) -> &'static [&'static str] {
    match name {
        // They cannot fail as they are called here.
        "sigaltstack" | "rt_sigaction" | "rt_sigprocmask" | "gettid" | "getpid" | "getppid"
        | "rseq" | "set_robust_list" | "futex" | "madvise" | "restart_syscall" | "rt_sigreturn"
        | "wait4" => &[],
        "flock" if call.contains("LOCK_UN") => &[],
        // Nothing that a close could still lose; Rust takes any other error for a bug.
        "close" => &["EINTR"],
        "brk" | "mmap" | "mremap" | "munmap" | "mprotect" => &["ENOMEM"],
        "clone" | "clone3" => &["EAGAIN"],
        "getrandom" => &["ENOSYS"],
        "openat" if call.contains("O_CREAT") => &["ENOSPC", "EROFS", "EMFILE"],
        "openat" => &["EACCES", "EIO", "EMFILE"],
        "write" | "pwrite64" => &["ENOSPC", "EIO", "EINTR"],
        "read" | "poll" => &["EIO", "EINTR"],
        "mkdir" | "mkdirat" | "link" | "linkat" | "symlink" | "symlinkat" | "rename"
        | "renameat" => &["ENOSPC", "EROFS"],
        "statx" | "newfstatat" | "fstat" => &["EACCES", "EIO"],
        "mount" => &["EPERM", "ENOMEM"],
        _ => &["EIO"],
    }
}

pub fn traced(program: &Command, options: &[&str], log: &Path) -> Command {
    let mut command = Command::new("strace");
    command.args(["-f", "--quiet=all", "-e", "signal=none"]);
    command.args(options).arg("-o").arg(log);
    command.arg(program.get_program()).args(program.get_args());
    // All of these commands start from an empty environment, which cannot be seen.
    command.env_clear();
    for (name, value) in program.get_envs() {
        if let Some(value) = value {
            command.env(name, OsString::from(value));
        }
    }
    command
}

/// Tries all of them, in a thread for each `place`. What is wrong is collected, so that
/// one run shows it all.
pub fn try_all<P: Send>(
    faults: &[Fault],
    places: impl IntoIterator<Item = P>,
    try_one: impl Fn(&P, &Fault) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    let next = AtomicUsize::new(0);
    let wrong = thread::scope(|scope| {
        let work = |place: P| {
            let (next, try_one) = (&next, &try_one);
            scope.spawn(move || {
                let mut wrong = Vec::new();
                while let Some(fault) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = try_one(&place, fault) {
                        let Fault { inject, call, .. } = fault;
                        wrong.push(format!("{inject} in {call}\n    {error:#}"));
                    }
                }
                wrong
            })
        };
        let working: Vec<_> = places.into_iter().map(work).collect();
        let wrong = working.into_iter().map(|w| w.join().expect("no panic"));
        wrong.flatten().collect::<Vec<_>>()
    });
    ensure!(wrong.is_empty(), "{} of {} faults:\n{}", wrong.len(), faults.len(), wrong.join("\n"));
    Ok(())
}
