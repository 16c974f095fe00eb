//! Races: whoever mends the entry at the same instant, there is one entry at the end, and no launch
//! fails in between.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context};
use wsl_vm::{Distro, Vm, WSL_INTEROP};

use crate::ours::extent::rounds;
use crate::ours::{Install, Run};
use crate::promises::state;
use crate::stand_in::within;
use crate::verbs::Test;

pub const RACES: &[Test] = &[
    ("races: two distros and two programs restore a lost entry at once", |vm| {
        let (mine, peer) = (unwatched(vm, "mine")?, unwatched(vm, "peer")?);
        let mut racers = Racers::of(vm, &[&mine, &peer])?;
        for round in 0..rounds() {
            vm.write("WSLInterop", "-1")?;
            racers.start()?;
            // A peer that does not know of our lock may register it, too: sooner or later.
            thread::sleep(Duration::from_micros(u64::from(round % 50) * 40));
            let _ = vm.register(WSL_INTEROP);
            racers.next()?;
            // It stands from the first one's end on.
            loop {
                let launch = vm.launch();
                ensure!(launch == "starts", "round {round}: {launch}");
                if racers.have_all_ended()? {
                    break;
                }
            }
            one_entry(vm, "").with_context(|| format!("round {round}"))?;
        }
        Ok(())
    }),
    ("races: two distros and two programs restore flags and order at once", |vm| {
        let (mine, peer) = (unwatched(vm, "mine")?, unwatched(vm, "peer")?);
        let mut racers = Racers::of(vm, &[&mine, &peer])?;
        let hammer = vm.hammer();
        for round in 0..rounds() {
            // The hammer's program is not called so: only a missing entry keeps it from
            // starting.
            let rival = if round % 2 == 0 { "rival" } else { "" };
            match rival {
                "" => lose_flags(vm)?,
                _ => vm.register(":rival:E::exe::/bin/echo:")?,
            }
            racers.start()?;
            racers.finish()?;
            one_entry(vm, rival).with_context(|| format!("round {round}"))?;
            if !rival.is_empty() {
                vm.write(rival, "-1")?;
            }
        }
        let launches = hammer.stop();
        ensure!(launches.started > rounds() / 2 && launches.failed == 0, "{launches:?}");
        Ok(())
    }),
    ("races: systemd-binfmt restarts while interop is restored", |vm| {
        let (mine, peer) = (in_the_way(vm, "mine")?, in_the_way(vm, "peer")?);
        vm.renew_interop()?;
        let restart =
            |distro: &Distro| distro.shell(&on_each_line("systemctl restart systemd-binfmt 2>&1"));
        let mut restarts = Racers::start_up(vec![restart(&mine), restart(&peer)])?;
        let mut restores = Racers::of(vm, &[])?;
        let hammer = vm.hammer();
        // A tenth, as a round takes ten times as long as one of another race.
        for round in 0..rounds() / 10 {
            lose_flags(vm)?;
            restarts.start()?;
            restores.start()?;
            restores.finish()?;
            restarts.finish()?;
            let entry = vm.entry("WSLInterop");
            ensure!(entry == WANTED, "round {round}: {entry}");
        }
        let launches = hammer.stop();
        for distro in [&mine, &peer] {
            let state = state(distro);
            ensure!(state == RUNNING, "{state}");
        }
        // The watchers wait until nobody writes to the table, and longer after what looks like a
        // fight: 32 times 400 ms.
        within(Duration::from_secs(20), || {
            let next = vm.entry("WSLInterop-next");
            ensure!(next == "missing", "WSLInterop-next: {next}");
            Ok(())
        })?;
        one_entry(vm, "cli-mine cli-peer")?;
        ensure!(launches.started > rounds() / 5 && launches.failed == 0, "{launches:?}");
        Ok(())
    }),
    ("races: four guards at once mount once", |vm| {
        let program = vm.generator().get_program().to_string_lossy().into_owned();
        let guard = || in_vm(&format!("{program} guard 2>&1"));
        let mut racers = Racers::start_up((0..4).map(|_| guard()).collect())?;
        for round in 0..rounds() {
            racers.start()?;
            racers.finish()?;
            let mounts = vm.mounts_on(STATUS)?;
            ensure!(mounts == 1, "round {round}: {mounts} mounts");
            vm.unmount(STATUS)?;
        }
        Ok(())
    }),
    ("races: guard and WSL's lock at once", |vm| {
        let mine = vm.distro("mine", "trixie").generator(true).boot()?;
        let counted = mine.run(&GUARD_AND_LOCK.replace("ROUNDS", &rounds().to_string()));
        let counts: Vec<(u32, &str)> = counted
            .lines()
            .filter_map(|line| line.trim().split_once(' '))
            .filter_map(|(count, what)| Some((count.parse().ok()?, what)))
            .collect();
        // WSL mounts whatever is there; what lies on top counts.
        let expected = [
            "at once: 1 mount, read-only",
            "at once: 2 mounts, read-only",
            "guard, then lock: 2 mounts, read-only",
            "lock, then guard: 1 mount, read-only",
            "systemd-binfmt: active",
        ];
        ensure!(
            counts.len() == counted.lines().count()
                && counts.iter().all(|(_, what)| expected.contains(what)),
            "{counted}"
        );
        let all: u32 =
            counts.iter().filter(|(_, what)| what.contains("mount")).map(|(count, _)| count).sum();
        ensure!(all == rounds(), "{counted}");
        let state = state(&mine);
        ensure!(state == RUNNING, "{state}");
        one_entry(vm, "python3.13")
    }),
];

/// What comes out of every round, counted.
const GUARD_AND_LOCK: &str = r#"
    status=/proc/sys/fs/binfmt_misc/status
    mkdir -p /run/wsl
    echo enabled >/run/wsl/binfmt-status-lock
    # As WSL does it, whatever is there already.
    lock() {
        mount --bind /run/wsl/binfmt-status-lock $status
        mount -o remount,bind,ro $status
    }
    for round in $(seq ROUNDS); do
        while umount $status 2>/dev/null; do :; done
        case $((round % 10)) in
        0) order="lock, then guard"; lock; wsl-binfmt guard || echo failed ;;
        1) order="guard, then lock"; wsl-binfmt guard || echo failed; lock ;;
        *) order="at once"
            lock &
            # Sooner or later.
            later=$((round % 50 * 100))
            while [ $later -gt 0 ]; do later=$((later - 1)); done
            wsl-binfmt guard || echo failed
            wait ;;
        esac
        case $(grep -c " $status " /proc/self/mountinfo) in
        1) mounts="1 mount" ;;
        2) mounts="2 mounts" ;;
        *) mounts="other mounts" ;;
        esac
        flushed=$( (echo -1 >$status) 2>&1)
        case $flushed in
        *"Read-only file system") echo "$order: $mounts, read-only" ;;
        *) echo "$order: $mounts, writable: $flushed" ;;
        esac
        if [ $((round % 50)) -lt 2 ]; then
            systemctl reset-failed systemd-binfmt
            systemctl restart systemd-binfmt
            echo "systemd-binfmt: $(systemctl is-active systemd-binfmt)"
        fi
    done | sort | uniq -c"#;

const STATUS: &str = "/proc/sys/fs/binfmt_misc/status";
const WANTED: &str = "enabled, interpreter /init, flags: PF";

const RUNNING: &str = "systemd-binfmt active, system running";

/// A distro that does nothing by itself to what is to be raced for.
fn unwatched(vm: &Vm, name: &str) -> anyhow::Result<Distro> {
    let distro =
        vm.distro(name, "trixie").generator(true).masked("systemd-binfmt.service").boot()?;
    distro.run("systemctl stop wsl-interop-restore.service");
    Ok(distro)
}

/// A distro whose binfmt.d has a rule that takes Windows programs.
fn in_the_way(vm: &Vm, name: &str) -> anyhow::Result<Distro> {
    vm.distro(name, "trixie")
        .generator(true)
        .file(&format!("/etc/binfmt.d/{name}.conf"), &format!(":cli-{name}:E::exe::/bin/echo:\n"))
        // Rules of one name in both distros are another matter, and so is systemd's limit.
        .file("/etc/binfmt.d/python3.13.conf", "")
        .file(
            "/etc/systemd/system/systemd-binfmt.service.d/limit.conf",
            "[Unit]\nStartLimitIntervalSec=0\n",
        )
        .boot()
}

/// As another tool does it that knows of `P` only, but with no gap of its own.
fn lose_flags(vm: &Vm) -> anyhow::Result<()> {
    vm.register(":tool:M::MZ::/init:P")?;
    // A watcher may be there first.
    let _ = vm.write("WSLInterop", "-1");
    let _ = vm.register(":WSLInterop:M::MZ::/init:P");
    vm.write("tool", "-1")
}

/// That the entry is as it should be, that it gets Windows programs, and that there is no other
/// than those named.
fn one_entry(vm: &Vm, others: &str) -> anyhow::Result<()> {
    let (entry, launch) = (vm.entry("WSLInterop"), vm.launch());
    ensure!((entry.as_str(), launch.as_str()) == (WANTED, "starts"), "{entry}, {launch}");
    let mut names = vm.entries();
    names.retain(|name| name != "WSLInterop");
    ensure!(names.join(" ") == others, "{names:?}, not {others}");
    Ok(())
}

/// A shell command that is run for each line that is read, and how it ended.
fn on_each_line(command: &str) -> String {
    format!(
        "while read -r _; do
            if said=$({command}); then echo ended; else echo \"failed: $said\"; fi
        done"
    )
}

/// That in a shell that is in no distro.
fn in_vm(command: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &on_each_line(command)]);
    shell
}

/// Shells that wait for the same starting gun.
struct Racers {
    shells: Vec<(Child, ChildStdin)>,
    ended: mpsc::Receiver<String>,
    running: usize,
}

impl Racers {
    /// One in each distro and two in none, that restore.
    fn of(vm: &Vm, distros: &[&Distro]) -> anyhow::Result<Racers> {
        let program = vm.generator().get_program().to_string_lossy().into_owned();
        let restore = format!("{program} restore 2>&1");
        let in_distro = |distro: &&Distro| distro.shell(&on_each_line("wsl-binfmt restore 2>&1"));
        let mut shells: Vec<Command> = distros.iter().map(in_distro).collect();
        shells.extend([in_vm(&restore), in_vm(&restore)]);
        Racers::start_up(shells)
    }

    fn start_up(shells: Vec<Command>) -> anyhow::Result<Racers> {
        let (tell, ended) = mpsc::channel();
        let mut started = Vec::new();
        for mut shell in shells {
            let mut child = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let stdin = child.stdin.take().context("stdin")?;
            let stdout = child.stdout.take().context("stdout")?;
            let tell = tell.clone();
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if tell.send(line).is_err() {
                        break;
                    }
                }
            });
            started.push((child, stdin));
        }
        Ok(Racers { shells: started, ended, running: 0 })
    }

    fn start(&mut self) -> anyhow::Result<()> {
        for (_, stdin) in &mut self.shells {
            stdin.write_all(b"\n")?;
            self.running += 1;
        }
        Ok(())
    }

    /// Waits until one has ended, well.
    fn next(&mut self) -> anyhow::Result<()> {
        let said = self.ended.recv_timeout(Duration::from_secs(60))?;
        self.note(&said)
    }

    /// Waits until they all have.
    fn finish(&mut self) -> anyhow::Result<()> {
        while self.running > 0 {
            self.next()?;
        }
        Ok(())
    }

    /// Whether they all have.
    fn have_all_ended(&mut self) -> anyhow::Result<bool> {
        while let Ok(said) = self.ended.try_recv() {
            self.note(&said)?;
        }
        Ok(self.running == 0)
    }

    fn note(&mut self, said: &str) -> anyhow::Result<()> {
        self.running -= 1;
        ensure!(said == "ended", "{said}");
        Ok(())
    }
}

impl Drop for Racers {
    fn drop(&mut self) {
        for (mut child, stdin) in self.shells.drain(..) {
            drop(stdin);
            let _ = child.wait();
        }
    }
}
