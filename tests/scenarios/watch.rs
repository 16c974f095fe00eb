//! `restore --watch` by itself, in a VM without a distro.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use wsl_vm::Vm;

use crate::ours::Run;
use crate::stand_in::{alone, within};
use crate::verbs::Test;

const SOON: Duration = Duration::from_secs(5);

pub const WATCH: &[Test] = &[
    ("watch sleeps while nothing happens", |vm| {
        let watcher = Watcher::start(vm)?;
        // It looks once more when all has been quiet.
        thread::sleep(SETTLED);
        let before = watcher.wake_ups()?;
        thread::sleep(Duration::from_secs(2));
        ensure!(watcher.wake_ups()? == before, "{} more", watcher.wake_ups()? - before);
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
                thread::sleep(Duration::from_micros(100));
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
        ensure!(spent < Duration::from_millis(300), "{spent:?} of 3 s spent on it");
        let warnings = log.matches("something keeps changing the table").count();
        ensure!(warnings == 1, "{warnings} warnings in {} lines", log.lines().count());
        Ok(())
    }),
    ("watch outlives an unmounted table", |vm| {
        let watcher = Watcher::start(vm)?;
        vm.unmount("/proc/sys/fs/binfmt_misc")?;
        watcher.tells("binfmt_misc is not mounted")?;
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
    ("watch is ready only once Windows programs start", |vm| {
        vm.write("status", "-1")?;
        // Without it, nobody makes them.
        thread::sleep(SETTLED);
        ensure!(vm.entries().is_empty(), "{:?}", vm.entries());
        let watcher = Watcher::start(vm)?;
        ensure!(vm.launch() == "starts", "{}", vm.launch());
        healed(vm)?;
        watcher.stop()?;
        Ok(())
    }),
    ("watch is ready with an entry that is not its own", |vm| {
        vm.write("WSLInterop", "0")?;
        let watcher = Watcher::start(vm)?;
        thread::sleep(SETTLED);
        let (entry, entries) = (vm.entry("WSLInterop"), vm.entries());
        ensure!(entry.starts_with("disabled"), "{entry}");
        ensure!(entries == ["WSLInterop"], "{entries:?}");
        // It is looked after from when it is gone.
        vm.write("WSLInterop", "-1")?;
        healed(vm)?;
        let log = watcher.stop()?;
        let lines = log.lines().filter(|line| line.contains(LEFT_ALONE));
        ensure!(lines.count() == 1, "{log}");
        Ok(())
    }),
    ("watch leaves to the admin what the admin disables", |vm| {
        let watcher = Watcher::start(vm)?;
        for state in ["0", "0", "1"] {
            vm.write("WSLInterop", state)?;
            thread::sleep(SETTLED);
            let entry = vm.entry("WSLInterop");
            ensure!(entry.starts_with(if state == "0" { "dis" } else { "en" }), "{entry}");
            ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
        }
        let log = watcher.stop()?;
        let said = format!("wsl-binfmt-generator: {LEFT_ALONE}\n");
        ensure!(log == said, "{log}");
        Ok(())
    }),
];

const LEFT_ALONE: &str = "WSLInterop is disabled: somebody changed it, leaving it alone";
/// Longer than it waits for quiet, and then needs to settle.
const SETTLED: Duration = Duration::from_millis(1000);

/// How long it takes until the entry stands again, and alone.
fn healed(vm: &Vm) -> anyhow::Result<Duration> {
    within(SOON, || alone(vm)).context("not healed")
}

/// A running `restore --watch`.
pub struct Watcher {
    child: Child,
    /// What it has told systemd.
    told: mpsc::Receiver<String>,
}

impl Watcher {
    /// Starts it, and waits as systemd does until it says that it is ready.
    pub fn start(vm: &Vm) -> anyhow::Result<Watcher> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let path = format!("/vm/notify{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let socket = UnixDatagram::bind(&path)?;
        let child = vm
            .generator()
            .args(["restore", "--watch"])
            .env("NOTIFY_SOCKET", path)
            .stderr(Stdio::piped())
            .spawn()?;
        let (tell, told) = mpsc::channel();
        let mut watcher = Watcher { child, told };
        // As systemd does, it listens on: there may be more to tell later.
        thread::spawn(move || {
            let mut said = [0; 1024];
            while let Ok(length) = socket.recv(&mut said) {
                let _ = tell.send(String::from_utf8_lossy(&said[..length]).into_owned());
            }
        });
        let start = Instant::now();
        while !watcher.told.recv_timeout(Duration::from_millis(20)).is_ok_and(|t| t == "READY=1") {
            if let Some(status) = watcher.child.try_wait()? {
                bail!("{status}: {}", watcher.log()?);
            }
            ensure!(start.elapsed() < SOON, "not ready");
        }
        Ok(watcher)
    }

    /// Waits until it tells systemd that.
    fn tells(&self, what: &str) -> anyhow::Result<()> {
        while !self.told.recv_timeout(SOON).context(what.to_owned())?.contains(what) {}
        Ok(())
    }

    /// Stops it as systemd does, and returns what it has logged.
    pub fn stop(mut self) -> anyhow::Result<String> {
        self.signal("TERM")?;
        let log = self.log()?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}: {log}");
        Ok(log)
    }

    fn signal(&self, name: &str) -> anyhow::Result<()> {
        let pid = self.child.id().to_string();
        let kill = std::process::Command::new("kill").args(["-s", name, &pid]).status()?;
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
        let count = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        Ok(count.context("no count")?.trim().parse()?)
    }

    /// The processor time that it has used.
    pub fn processor_time(&self) -> anyhow::Result<Duration> {
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
