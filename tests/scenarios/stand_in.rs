//! The stand-in and the quiet time: Windows programs start again at once, and nobody who registers
//! `WSLInterop` meanwhile is met by it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use wsl_vm::{Generation, Vm};

use crate::ours::{Install, Run};
use crate::promises::{state, RULE};
use crate::verbs::Test;
use crate::watch::Watcher;

const TABLE: &str = "/proc/sys/fs/binfmt_misc";
/// The table at a second mount point, as a container mounts it.
const SECOND: &str = "/vm/second";
pub const WANTED: &str = "enabled, interpreter /init, flags: PF";
/// After this time things have settled, however much else the machine has to do.
pub const SOON: Duration = Duration::from_secs(3);
/// The same where a watcher may take what was done for a fight, in which it waits up to 13 seconds;
/// or where systemd has to start one.
pub const IN_TIME: Duration = Duration::from_secs(30);
/// What the drop-in of WSL 2.6.2 and later registers.
const DROP_IN: &str = ":WSLInterop:M::MZ::/init:P";

pub const STAND_IN: &[Test] = &[
    ("stand-in: a stock peer does not fail beside ours", |vm| {
        let generation = Generation::Dropin;
        let mine = vm.distro("mine", "trixie").generator(true);
        let mine = mine.generation(generation).boot()?;
        let peer = vm.distro("peer", "trixie").generation(generation);
        let peer = peer.file("/etc/binfmt.d/test.conf", &format!("{RULE}\n")).boot()?;
        ensure!(state(&peer) == RUNNING, "at boot: {}", state(&peer));
        let hammer = vm.hammer();
        let restarted = peer.run(
            "for i in $(seq 20); do
                systemctl reset-failed systemd-binfmt
                systemctl restart systemd-binfmt >/dev/null 2>&1
                systemctl is-active systemd-binfmt
            done | sort | uniq -c",
        );
        let launches = hammer.stop();
        eprintln!("{launches:?}");
        ensure!(restarted.trim() == "20 active", "{restarted}");
        ensure!(state(&peer) == RUNNING, "{}", state(&peer));
        // Nobody can be quicker than the kernel in telling of the peer's wipe.
        ensure!(
            launches.started > 500 && launches.longest_outage < Duration::from_millis(250),
            "{launches:?}"
        );
        within(SOON, || alone(vm))?;
        ensure!(vm.entry("testfmt").contains("flags: F"), "{RULE} is lost");
        ensure!(state(&mine) == RUNNING, "{}", state(&mine));
        Ok(())
    }),
    ("stand-in: no wipe is lost, nor a register call", |vm| {
        let wipes = std::env::var("WSL_WIPES").unwrap_or("100".to_owned());
        let wipes: u32 = wipes.parse().context("WSL_WIPES")?;
        let watcher = Watcher::start(vm)?;
        let (mut starts, mut stands) = (Vec::new(), Vec::new());
        for round in 0..wipes {
            let (again, settled) = wipe(vm, round).with_context(|| format!("round {round}"))?;
            starts.push(again);
            stands.push(settled);
            // What is undone at once, again and again, would be a fight.
            thread::sleep(Duration::from_millis(60));
        }
        watcher.stop()?;
        let [median, longest] = summary("a program starts again", starts);
        // Where the machine has nothing else to do it is a tenth of a millisecond.
        ensure!(median < Duration::from_millis(5), "median {median:?}");
        ensure!(longest < Duration::from_millis(500), "{longest:?}");
        let [median, longest] = summary("WSLInterop stands alone again", stands);
        ensure!(median < Duration::from_secs(1), "median {median:?}");
        ensure!(longest < Duration::from_millis(2500), "{longest:?}");
        Ok(())
    }),
    ("stand-in: no register call fails in a table that is never quiet", |vm| {
        let watcher = Watcher::start(vm)?;
        let start = Instant::now();
        // Longer than a watcher waits for quiet.
        while start.elapsed() < Duration::from_secs(3) {
            vm.write("status", "-1")?;
            // On a busy machine, WSL's drop-in may stall for as long as this.
            thread::sleep(Duration::from_millis(100));
            ensure!(vm.launch() == "starts", "{}", vm.launch());
            vm.register(DROP_IN).with_context(|| format!("after {:?}", start.elapsed()))?;
        }
        within(SOON, || alone(vm))?;
        watcher.stop()?;
        Ok(())
    }),
    ("stand-in: what is not as it should be is covered in a table that is never quiet", |vm| {
        // APE's rule is behind an entry that has lost its F.
        vm.write("WSLInterop", "-1")?;
        vm.register(":APE:M::MZqFpD::/bin/echo:")?;
        vm.register(DROP_IN)?;
        let entry = vm.entry_identity("WSLInterop")?;
        let watcher = Watcher::start(vm)?;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(8) {
            vm.register(":other:M::OTHER::/bin/cat:")?;
            thread::sleep(Duration::from_millis(50));
            vm.write("other", "-1")?;
        }
        // At once, before it is quiet.
        let (stand_in, order) = (vm.entry("WSLInterop-next"), vm.entries_in_order());
        ensure!(stand_in == WANTED, "{stand_in}");
        ensure!(vm.entry_identity("WSLInterop")? == entry, "WSLInterop was not left to others");
        ensure!(order == ["APE", "WSLInterop-next", "WSLInterop"], "{order:?}");
        within(IN_TIME, || {
            let order = vm.entries_in_order();
            ensure!(order == ["APE", "WSLInterop"], "{order:?}");
            Ok(())
        })?;
        alone(vm)?;
        watcher.stop()?;
        Ok(())
    }),
    ("stand-in: an entry that has lost its P is covered at once", |vm| {
        let watcher = Watcher::start(vm)?;
        let hammer = vm.hammer();
        for _ in 0..3 {
            vm.write("WSLInterop", "-1")?;
            vm.register(":WSLInterop:M::MZ::/init:F")?;
            within(SOON, || alone(vm))?;
        }
        let launches = hammer.stop();
        // For as long as a watcher waits for quiet at the least, no program without arguments would start.
        ensure!(launches.longest_outage < Duration::from_millis(250), "{launches:?}");
        watcher.stop()?;
        Ok(())
    }),
    ("stand-in: two watchers do each other no harm", |vm| many_watchers(vm, 2)),
    ("stand-in: ten watchers do each other no harm", |vm| many_watchers(vm, 10)),
    ("stand-in: programs start in a fight without end", |vm| {
        let watcher = Watcher::start(vm)?;
        static OVER: AtomicBool = AtomicBool::new(false);
        let fight = thread::spawn(|| {
            while !OVER.load(Ordering::Relaxed) {
                // Mostly it is not there.
                let _ = fs::write(format!("{TABLE}/WSLInterop"), "-1");
                thread::sleep(Duration::from_millis(1));
            }
        });
        let hammer = vm.hammer();
        thread::sleep(Duration::from_secs(6));
        let spent = watcher.processor_time()?;
        let launches = hammer.stop();
        OVER.store(true, Ordering::Relaxed);
        fight.join().expect("it does not panic");
        let end = within(SOON, || alone(vm));
        let log = watcher.stop()?;
        end.with_context(|| log.clone())?;
        eprintln!("{launches:?}, {spent:?} spent");
        ensure!(launches.failed * 10 < launches.all(), "{launches:?}");
        ensure!(spent < Duration::from_millis(600), "{spent:?} of 6 s spent");
        let warnings = log.matches("something keeps changing the table").count();
        ensure!(warnings == 1, "{warnings} warnings:\n{log}");
        Ok(())
    }),
    ("lock: nobody without privileges delays a repair", |vm| {
        let _locks = Locks::held()?;
        let restore = || {
            vm.write("WSLInterop", "-1")?;
            let start = Instant::now();
            let output = vm.generator().arg("restore").output()?;
            ensure!(output.status.success(), "{output:?}");
            Ok(start.elapsed())
        };
        let spent = quickest(restore)?;
        ensure!(spent < LOCK_WAIT, "restore: {spent:?}");

        let watcher = Watcher::start(vm)?;
        let watch = || {
            let _locks = Locks::held()?;
            vm.write("WSLInterop", "-1")?;
            let spent = within(SOON, || served(vm))?;
            within(SOON, || alone(vm))?;
            Ok(spent)
        };
        let spent = quickest(watch)?;
        ensure!(spent < LOCK_WAIT, "the watcher: {spent:?}");
        watcher.stop()?;
        Ok(())
    }),
];

pub const RUNNING: &str = "systemd-binfmt active, system running";

/// Waits until something holds, and says how long that took, to a quarter.
pub fn within(limit: Duration, holds: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let start = Instant::now();
    loop {
        let asked = start.elapsed();
        match holds() {
            Ok(()) => return Ok(start.elapsed()),
            Err(error) if start.elapsed() > limit => return Err(error),
            // Who asks without a pause keeps from its work what is waited for.
            Err(_) => {
                let answered = start.elapsed() - asked;
                let elapsed = start.elapsed();
                let pause = (elapsed / 20).max((4 * answered).min(elapsed / 4));
                thread::sleep(pause.clamp(Duration::from_micros(100), Duration::from_millis(100)));
            }
        }
    }
}

/// Windows programs go to /init, by whichever name.
pub fn served(vm: &Vm) -> anyhow::Result<()> {
    let serves = |name: &String| vm.entry(name).starts_with("enabled, interpreter /init");
    ensure!(vm.entries().iter().any(serves), "{:?}", vm.entries());
    Ok(())
}

/// `WSLInterop` is as WSL made it, and nothing of ours is left that stood in for it.
pub fn alone(vm: &Vm) -> anyhow::Result<()> {
    ensure!(vm.entry("WSLInterop") == WANTED, "{}", vm.entry("WSLInterop"));
    let ours = |name: &&String| name.starts_with("WSLInterop");
    let entries = vm.entries();
    ensure!(entries.iter().filter(ours).count() == 1, "{entries:?}");
    Ok(())
}

/// Empties the table, or takes the entry away, in one of the ways in which others do. Returns how
/// long it then takes until a program starts, and until all is as it was.
fn wipe(vm: &Vm, round: u32) -> anyhow::Result<(Duration, Duration)> {
    let start = match round % 4 {
        0 => vm.write("WSLInterop", "-1").map(|()| Instant::now()),
        1 => {
            if !fs::exists(SECOND)? {
                fs::create_dir(SECOND)?;
                vm.mount_table(SECOND)?;
            }
            fs::write(format!("{SECOND}/status"), "-1")?;
            Ok(Instant::now())
        }
        2 => {
            vm.write("status", "-1")?;
            thread::sleep(Duration::from_millis(2));
            vm.write("status", "-1").map(|()| Instant::now())
        }
        _ => vm.write("status", "-1").map(|()| Instant::now()),
    }?;
    within(SOON, || served(vm))?;
    let again = start.elapsed();
    ensure!(vm.launch() == "starts", "{}", vm.launch());
    if round % 4 == 3 {
        // As systemd-binfmt goes on under WSL's drop-in. What is not there cannot be removed.
        let _ = vm.write("WSLInterop", "-1");
        thread::sleep(Duration::from_millis(1));
        vm.register(DROP_IN).context("WSL's drop-in")?;
    }
    within(SOON, || alone(vm))?;
    Ok((again, start.elapsed()))
}

/// The median, and the longest, of what took these times.
fn summary(what: &str, mut times: Vec<Duration>) -> [Duration; 2] {
    times.sort();
    let part = |percent: usize| times[(times.len() - 1) * percent / 100];
    let [p50, p99, longest] = [50, 99, 100].map(part);
    let of = times.len();
    eprintln!("{what}: p50 {p50:?}, p99 {p99:?}, at most {longest:?}, of {of}");
    [p50, longest]
}

fn many_watchers(vm: &Vm, count: u32) -> anyhow::Result<()> {
    let watchers: Vec<_> = (0..count).map(|_| Watcher::start(vm)).collect::<Result<_, _>>()?;
    for round in 0..20 {
        wipe(vm, round).with_context(|| format!("round {round}"))?;
        // One that comes late must not spoil it again.
        thread::sleep(Duration::from_millis(20));
        alone(vm).with_context(|| format!("after round {round}"))?;
    }
    for watcher in watchers {
        let log = watcher.stop()?;
        let error = log.lines().find(|line| {
            let signs = ["os error", "EEXIST", "ENOENT", "reads back differently"];
            signs.iter().any(|sign| line.contains(sign))
        });
        ensure!(error.is_none(), "{log}");
    }
    Ok(())
}

/// Who heeds somebody's lock waits for as long as this, each time.
const LOCK_WAIT: Duration = Duration::from_millis(200);

/// The quickest of five, as a busy machine makes single ones slow.
fn quickest(of: impl Fn() -> anyhow::Result<Duration>) -> anyhow::Result<Duration> {
    let times = (0..5).map(|_| of()).collect::<Result<Vec<_>, _>>()?;
    times.into_iter().min().context("no times")
}

/// An unprivileged user's locks on all of the table that he can open.
struct Locks(Child);

impl Locks {
    fn held() -> anyhow::Result<Locks> {
        let script = format!(
            "cd {TABLE}
            for file in . *; do
                n=$((${{n:-2}} + 1))
                [ -r $file ] && eval \"exec $n<$file\" && flock -xn $n && echo $file
            done
            echo held
            exec sleep 300"
        );
        let mut child = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .args(["sh", "-c", &script])
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
        let locks = Locks(child);
        let locked: Vec<_> =
            lines.map_while(Result::ok).take_while(|line| line != "held").collect();
        match locked.len() {
            0 => bail!("he can lock nothing"),
            _ => eprintln!("locked: {}", locked.join(" ")),
        }
        Ok(locks)
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
