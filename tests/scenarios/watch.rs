//! `restore --watch` by itself, in a VM without a distro.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use wsl_vm::Vm;

use crate::verbs::Test;

const WANTED: &str = "enabled, interpreter /init, flags: PF";
const SOON: Duration = Duration::from_secs(5);

pub const WATCH: &[Test] = &[
    (
        "watch heals 1,000 wipes, mostly within a millisecond",
        |vm| {
            // Without it, nobody does.
            vm.write("status", "-1")?;
            thread::sleep(Duration::from_millis(50));
            ensure!(vm.entry("WSLInterop") == "missing");

            let watcher = Watcher::start(vm)?;
            fs::create_dir("/vm/second")?;
            vm.mount_table("/vm/second")?;
            let mut times = Vec::new();
            for round in 0..1000 {
                match round % 4 {
                    0 => vm.write("status", "-1")?,
                    1 => vm.write("WSLInterop", "-1")?,
                    2 => fs::write("/vm/second/status", "-1")?,
                    _ => {
                        vm.write("status", "-1")?;
                        thread::sleep(Duration::from_millis(2));
                        vm.write("status", "-1")?;
                    }
                }
                times.push(healed(vm).with_context(|| format!("round {round}"))?);
            }
            times.sort();
            let [median, longest] = [times[500], times[999]];
            eprintln!("healed in {median:?} (median), {longest:?} at most");
            ensure!(median < Duration::from_millis(1), "median {median:?}");
            watcher.stop()?;
            Ok(())
        },
    ),
    ("watch sleeps while nothing happens", |vm| {
        let watcher = Watcher::start(vm)?;
        // It may still be looking at what it did itself.
        thread::sleep(Duration::from_millis(200));
        let before = watcher.wake_ups()?;
        thread::sleep(Duration::from_secs(2));
        ensure!(
            watcher.wake_ups()? == before,
            "{} more",
            watcher.wake_ups()? - before
        );
        vm.write("WSLInterop", "-1")?;
        healed(vm)?;
        // Counted when it goes to sleep again.
        let start = Instant::now();
        while watcher.wake_ups()? == before {
            ensure!(start.elapsed() < SOON, "wake-ups are not counted");
        }
        watcher.stop()?;
        Ok(())
    }),
    ("watch gives way in a fight, with one warning", |vm| {
        let watcher = Watcher::start(vm)?;
        static OVER: AtomicBool = AtomicBool::new(false);
        let fight = thread::spawn(|| {
            while !OVER.load(Ordering::Relaxed) {
                // Mostly it is there.
                let _ = fs::write("/proc/sys/fs/binfmt_misc/WSLInterop", "-1");
            }
        });
        thread::sleep(Duration::from_secs(4));
        let before = watcher.processor_time()?;
        thread::sleep(Duration::from_secs(3));
        let spent = watcher.processor_time()? - before;
        OVER.store(true, Ordering::Relaxed);
        fight.join().expect("it does not panic");
        let end = healed(vm);
        let log = watcher.stop()?;
        end.with_context(|| log.clone())?;
        ensure!(
            spent < Duration::from_millis(300),
            "{spent:?} of 3 s spent on it"
        );
        let warnings = log.matches("something undoes this again and again").count();
        ensure!(
            warnings == 1,
            "{warnings} warnings in {} lines",
            log.lines().count()
        );
        Ok(())
    }),
    ("watch outlives an unmounted table", |vm| {
        let watcher = Watcher::start(vm)?;
        vm.unmount("/proc/sys/fs/binfmt_misc")?;
        thread::sleep(Duration::from_millis(100));
        vm.mount_table("/proc/sys/fs/binfmt_misc")?;
        healed(vm)?;
        vm.write("status", "-1")?;
        healed(vm)?;
        let log = watcher.stop()?;
        ensure!(log.contains("binfmt_misc is not mounted"), "{log}");
        Ok(())
    }),
    ("watch outlives a full event queue", |vm| {
        let watcher = Watcher::start(vm)?;
        watcher.signal("STOP")?;
        let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")?;
        // Each makes two events.
        for _ in 0..limit.trim().parse::<u32>()? {
            vm.write("status", "1")?;
        }
        vm.write("status", "-1")?;
        watcher.signal("CONT")?;
        healed(vm)?;
        vm.write("status", "-1")?;
        healed(vm)?;
        watcher.stop()?;
        Ok(())
    }),
    ("watch is ready only once the entry stands", |vm| {
        vm.write("WSLInterop", "0")?;
        let Err(error) = Watcher::start(vm) else {
            bail!("ready, with a disabled entry");
        };
        let error = format!("{error:#}");
        ensure!(error.contains("exit status: 1"), "{error}");
        ensure!(error.contains("WSLInterop is disabled"), "{error}");

        vm.write("WSLInterop", "-1")?;
        let watcher = Watcher::start(vm)?;
        ensure!(vm.entry("WSLInterop") == WANTED);
        watcher.stop()?;
        Ok(())
    }),
    ("watch leaves to the admin what the admin disables", |vm| {
        let watcher = Watcher::start(vm)?;
        for state in ["0", "0", "1"] {
            vm.write("WSLInterop", state)?;
            thread::sleep(Duration::from_millis(100));
            let entry = vm.entry("WSLInterop");
            ensure!(
                entry.starts_with(if state == "0" { "dis" } else { "en" }),
                "{entry}"
            );
        }
        let log = watcher.stop()?;
        let said =
            "wsl-binfmt-generator: WSLInterop is disabled: somebody made it so, left alone\n";
        ensure!(log == said, "{log}");
        Ok(())
    }),
];

/// How long it takes until the entry stands again.
fn healed(vm: &Vm) -> anyhow::Result<Duration> {
    let start = Instant::now();
    while vm.entry("WSLInterop") != WANTED {
        ensure!(
            start.elapsed() < SOON,
            "not healed: {}",
            vm.entry("WSLInterop")
        );
    }
    Ok(start.elapsed())
}

/// A running `restore --watch`.
struct Watcher {
    child: Child,
}

impl Watcher {
    /// Starts it, and waits as systemd does until it says that it is ready.
    fn start(vm: &Vm) -> anyhow::Result<Watcher> {
        let path = "/vm/notify";
        let _ = fs::remove_file(path);
        let socket = UnixDatagram::bind(path)?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let child = vm
            .generator()
            .args(["restore", "--watch"])
            .env("NOTIFY_SOCKET", path)
            .stderr(Stdio::piped())
            .spawn()?;
        let mut watcher = Watcher { child };
        let start = Instant::now();
        let mut said = [0; 64];
        loop {
            if let Ok(length) = socket.recv(&mut said) {
                ensure!(said.get(..length) == Some(b"READY=1"), "{said:?}");
                return Ok(watcher);
            }
            if let Some(status) = watcher.child.try_wait()? {
                bail!("{status}: {}", watcher.log()?);
            }
            ensure!(start.elapsed() < SOON, "not ready");
        }
    }

    /// Stops it as systemd does, and returns what it has logged.
    fn stop(mut self) -> anyhow::Result<String> {
        self.signal("TERM")?;
        let log = self.log()?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}: {log}");
        Ok(log)
    }

    fn signal(&self, name: &str) -> anyhow::Result<()> {
        let pid = self.child.id().to_string();
        let kill = std::process::Command::new("kill")
            .args(["-s", name, &pid])
            .status()?;
        ensure!(kill.success(), "kill: {kill}");
        Ok(())
    }

    fn log(&mut self) -> anyhow::Result<String> {
        let mut log = String::new();
        let stderr = self.child.stderr.as_mut().context("stderr")?;
        stderr.read_to_string(&mut log)?;
        Ok(log)
    }

    /// How often it has gone to sleep, and so how often it has been woken.
    fn wake_ups(&self) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let count = status
            .lines()
            .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        Ok(count.context("no count")?.trim().parse()?)
    }

    /// The processor time that it has used.
    fn processor_time(&self) -> anyhow::Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let (_, fields) = stat.rsplit_once(") ").context("stat")?;
        let ticks = |n: usize| -> anyhow::Result<u64> {
            Ok(fields.split(' ').nth(n).context("a field")?.parse()?)
        };
        // In hundredths of a second on every Linux that Debian builds.
        Ok(Duration::from_millis(10 * (ticks(11)? + ticks(12)?)))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
