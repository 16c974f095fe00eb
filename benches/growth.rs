//! How what this project does grows with the table and with the distros of ours on it, in the
//! simulated WSL VM with Debian 13 and the package that is made for it: a restart of systemd-binfmt,
//! the time from a wipe until WSLInterop stands again, and `status`; and what the watchers of many
//! distros do together after one wipe. `cargo bench --bench growth`.

#[allow(dead_code)] // Each user needs a part of it.
#[path = "../tests/ours/mod.rs"]
mod ours;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use wsl_vm::{Builder, Distro, Vm};

use ours::built_package::DebianPackage;
use ours::Run;

const SUITE: &str = "trixie";
const TABLE: &str = "/proc/sys/fs/binfmt_misc";
/// Entries of the table, each a rule of the distro's own: the worst case, as a wipe takes all of
/// them, and the watcher brings all of them back.
const ENTRIES: [usize; 3] = [10, 100, 1000];
/// Distros of ours, all with the rule that Python registers; then each with one of its own, too.
const DISTROS: [usize; 5] = [1, 2, 5, 10, 20];
/// Runs of each, of which the median counts.
const RUNS: usize = 5;
const STATUS_RUNS: usize = 15;
const STORMS: usize = 3;
/// How much more than in proportion is still taken for noise.
const NOISE: f64 = 1.25;

const RESTART: &str = "restart of systemd-binfmt";
const STAND_IN: &str = "wipe to stand-in";
const HEAL: &str = "wipe to WSLInterop";
const STATUS: &str = "status";
/// System calls, wake-ups and processor time of all watchers together, after one wipe.
type Storm = [&'static str; 3];
const ALIKE: Storm = ["system calls", "times woken", "processor time"];
const APART: Storm =
    ["system calls, own rules", "times woken, own rules", "processor time, own rules"];

/// Inside the VM: prints what was measured, a line each: what, of how many, and in microseconds or
/// in number.
fn play(vm: &Vm, arguments: &[String]) -> anyhow::Result<()> {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["entries", whose, count] => entries(vm, whose == "ours", count.parse()?),
        ["distros"] => distros(vm),
        _ => bail!("play what? {arguments:?}"),
    }
}

fn entries(vm: &Vm, ours: bool, count: usize) -> anyhow::Result<()> {
    // Python's own is the first.
    let rules = (1..count).map(|n| rule(&format!("rule{n}"), n));
    let rules: String = rules.collect();
    let distro = match ours {
        true => vm.packaged("mine")?,
        false => vm.distro("mine", SUITE),
    };
    let distro = distro.file("/etc/binfmt.d/rules.conf", &rules).boot()?;
    let registered = || vm.entries().len() - usize::from(ours);
    ensure!(registered() == count, "{} of {count}", registered());
    for time in timed(&distro, RESTARTED, RUNS)? {
        println!("{RESTART}:{count}:{time}");
    }
    if !ours {
        return Ok(());
    }
    ensure!(registered() == count, "{} of {count}", registered());
    for time in timed(&distro, "wsl-binfmt status", STATUS_RUNS)? {
        println!("{STATUS}:{count}:{time}");
    }
    for _ in 0..RUNS {
        heal(vm, count)?;
        settled()?;
        ensure!(registered() == count, "{} of {count}", registered());
    }
    Ok(())
}

fn distros(vm: &Vm) -> anyhow::Result<()> {
    let mut running: Vec<Distro> = Vec::new();
    for count in DISTROS {
        while running.len() < count {
            running.push(boot(vm, &format!("distro{}", running.len()))?);
        }
        settled()?;
        let last = running.last().context("a distro")?;
        for time in timed(last, RESTARTED, RUNS)? {
            println!("{RESTART}:{count}:{time}");
        }
        for time in timed(last, "wsl-binfmt status", STATUS_RUNS)? {
            println!("{STATUS}:{count}:{time}");
        }
        settled()?;
        storm(vm, count, &ALIKE, 0)?;
        for (number, distro) in running.iter().enumerate() {
            let rule = rule(&format!("rule{number}"), number);
            distro.run(&format!("printf '%s' '{rule}' >/etc/binfmt.d/own.conf; {RESTARTED}"));
        }
        settled()?;
        storm(vm, count, &APART, count)?;
        for distro in &running {
            distro.run(&format!("rm /etc/binfmt.d/own.conf; {RESTARTED}"));
        }
    }
    Ok(())
}

/// Wipes the table, and prints how long it takes to heal, and what the watchers use for it.
fn storm(
    vm: &Vm,
    count: usize,
    [calls, woken, processor]: &Storm,
    own: usize,
) -> anyhow::Result<()> {
    let watchers = watchers()?;
    ensure!(watchers.len() == count, "{watchers:?} of {count}");
    // Python's and WSLInterop are there, too.
    let whole = || {
        let there = vm.entries();
        ensure!(there.len() == 2 + own, "{there:?}");
        anyhow::Ok(())
    };
    whole()?;
    for _ in 0..STORMS {
        let before = used()?;
        heal(vm, count)?;
        let after = settled()?;
        println!("{woken}:{count}:{}", after.woken - before.woken);
        let spent = after.processor - before.processor;
        println!("{processor}:{count}:{}", spent.as_micros());
        whole()?;
    }
    println!("{calls}:{count}:{}", system_calls(vm, &watchers)?);
    whole()
}

fn boot(vm: &Vm, name: &str) -> anyhow::Result<Distro> {
    // All distros of the VM are one user's, who has 128 inotify instances.
    let builder: Builder =
        SPARED.iter().fold(vm.packaged(name)?, |builder, unit| builder.masked(unit));
    builder.boot()
}

/// Nothing of this is about them.
const SPARED: [&str; 6] = [
    "dbus.service",
    "dbus.socket",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-logind.service",
    "systemd-udevd.service",
];

/// As qemu's are: with `F`.
fn rule(name: &str, number: usize) -> String {
    let [high, low] = [number / 256, number % 256];
    format!(":{name}:M::\\xf0\\x0f\\x{high:02x}\\x{low:02x}::/bin/cat:F\n")
}

/// The start limit is systemd's own protection, not what this is about.
const RESTARTED: &str = "systemctl restart systemd-binfmt";

/// Times a command in the distro, by bash's own clock, in microseconds.
fn timed(distro: &Distro, command: &str, runs: usize) -> anyhow::Result<Vec<u64>> {
    let printed = distro.run(&format!(
        "bash -c 'for i in $(seq {runs}); do \
         systemctl reset-failed systemd-binfmt; \
         start=$EPOCHREALTIME; {command} >/dev/null; end=$EPOCHREALTIME; \
         echo $(( ${{end/.}} - ${{start/.}} )); done'"
    ));
    let times: Result<Vec<_>, _> = printed.lines().map(str::parse).collect();
    times.with_context(|| format!("{command}: {printed}"))
}

/// Wipes the table, and prints how long it takes until Windows programs start again, and until
/// WSLInterop itself stands.
fn heal(vm: &Vm, count: usize) -> anyhow::Result<()> {
    let start = Instant::now();
    vm.write("status", "-1")?;
    for (what, name) in [(STAND_IN, "WSLInterop-next"), (HEAL, "WSLInterop")] {
        while !Path::new(TABLE).join(name).exists() {
            ensure!(start.elapsed() < Duration::from_secs(10), "no {name}");
            // A watcher may need the processor more.
            thread::sleep(Duration::from_micros(100));
        }
        println!("{what}:{count}:{}", start.elapsed().as_micros());
    }
    Ok(())
}

/// The watchers of this VM.
fn watchers() -> anyhow::Result<Vec<u32>> {
    let here = fs::read_link("/proc/self/ns/user")?;
    let mut watchers = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let process = entry?.path();
        let pid = process.file_name().and_then(|name| name.to_str());
        let Some(Ok(pid)) = pid.map(str::parse) else {
            continue;
        };
        let called = fs::read(process.join("cmdline")).unwrap_or_default();
        let namespace = fs::read_link(process.join("ns/user"));
        if called.ends_with(b"\0restore\0--watch\0") && namespace.is_ok_and(|n| n == here) {
            watchers.push(pid);
        }
    }
    Ok(watchers)
}

/// What the watchers have used so far, all together.
#[derive(PartialEq)]
struct Used {
    woken: u64,
    processor: Duration,
}

fn used() -> anyhow::Result<Used> {
    let mut used = Used { woken: 0, processor: Duration::ZERO };
    for pid in watchers()? {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let woken = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        used.woken += woken.context("no count")?.trim().parse::<u64>()?;
        let times = fs::read_to_string(format!("/proc/{pid}/schedstat"))?;
        let running = times.split(' ').next().context("no time")?;
        used.processor += Duration::from_nanos(running.parse()?);
    }
    Ok(used)
}

/// Waits until the watchers have had nothing to do for longer than they wait for quiet.
fn settled() -> anyhow::Result<Used> {
    let start = Instant::now();
    let mut before = used()?;
    loop {
        thread::sleep(Duration::from_millis(700));
        let now = used()?;
        if now.woken == before.woken {
            return Ok(now);
        }
        ensure!(start.elapsed() < Duration::from_secs(30), "no quiet");
        before = now;
    }
}

/// System calls of these watchers after one wipe, until they sleep again.
fn system_calls(vm: &Vm, watchers: &[u32]) -> anyhow::Result<u64> {
    let mut strace = Command::new("strace");
    strace.args(["-c", "-U", "calls,name", "-o", "/vm/calls"]);
    for pid in watchers {
        strace.args(["-p", &pid.to_string()]);
    }
    let mut strace = strace.stderr(Stdio::null()).spawn()?;
    let traced = |pid: &u32| -> anyhow::Result<bool> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        Ok(!status.contains("TracerPid:\t0\n"))
    };
    let start = Instant::now();
    for pid in watchers {
        while !traced(pid)? {
            ensure!(start.elapsed() < Duration::from_secs(10), "not traced");
            thread::sleep(Duration::from_millis(10));
        }
    }
    vm.write("status", "-1")?;
    settled()?;
    let told = Command::new("kill").args(["-s", "INT", &strace.id().to_string()]).status()?;
    ensure!(told.success(), "kill: {told}");
    strace.wait()?;
    let counted = fs::read_to_string("/vm/calls")?;
    let total = counted.lines().find(|line| line.ends_with(" total"));
    let total = total.with_context(|| format!("what did strace say? {counted}"))?;
    Ok(total.split_whitespace().next().context("count")?.parse()?)
}

fn shown(what: &str, value: u64) -> String {
    let is_number = what.starts_with("system calls") || what.starts_with("times");
    match is_number {
        true => value.to_string(),
        false => format!("{:.1?}", Duration::from_micros(value)),
    }
}

/// Medians by what was measured and of how many.
struct Medians(BTreeMap<(String, usize), u64>);

impl Medians {
    fn of(measured: &str) -> anyhow::Result<Medians> {
        let mut all: BTreeMap<_, Vec<u64>> = BTreeMap::new();
        for line in measured.lines() {
            let mut fields = line.split(':');
            let mut next = || fields.next().with_context(|| line.to_owned());
            let (what, count, value) = (next()?, next()?.parse()?, next()?.parse()?);
            all.entry((what.to_owned(), count)).or_default().push(value);
        }
        let median = |mut values: Vec<u64>| {
            values.sort_unstable();
            values[values.len() / 2]
        };
        let medians = all.into_iter().map(|(key, values)| (key, median(values)));
        Ok(Medians(medians.collect()))
    }

    fn get(&self, what: &str, count: usize) -> anyhow::Result<u64> {
        let median = self.0.get(&(what.to_owned(), count));
        Ok(*median.with_context(|| format!("no {what} of {count}"))?)
    }

    /// A line each, with a bar as long as it took, and whether it grew no more than in proportion.
    fn plot(&self, what: &str, of: &str, counts: &[usize]) -> anyhow::Result<String> {
        let values = counts.iter().map(|count| self.get(what, *count));
        let values: Vec<u64> = values.collect::<anyhow::Result<_>>()?;
        let longest = values.iter().max().copied().unwrap_or(1).max(1);
        let mut plot = format!("{what}\n");
        for (count, value) in counts.iter().zip(&values) {
            let bar = "=".repeat((value * 50).div_ceil(longest) as usize);
            writeln!(plot, "    {count:4} {of:8}{bar} {}", shown(what, *value))?;
        }
        let steps = counts.windows(2).zip(values.windows(2));
        let worst = steps
            .map(|(counts, values)| {
                let proportion = counts[1] as f64 / counts[0] as f64;
                values[1] as f64 / values[0].max(1) as f64 / proportion
            })
            .fold(0.0, f64::max);
        let verdict = match worst <= NOISE {
            true => "met",
            false => "missed",
        };
        writeln!(plot, "    {verdict}: at most {worst:.2} of linear from one to the next\n")?;
        Ok(plot)
    }
}

fn show() -> anyhow::Result<bool> {
    let machine = ours::prepare(&[SUITE], &[])?;
    DebianPackage::built()?;
    let measured = |whose| -> anyhow::Result<Medians> {
        let mut measured = String::new();
        for count in ENTRIES {
            measured += &machine.in_vm(&["entries", whose, &count.to_string()])?;
        }
        Medians::of(&measured)
    };
    let (stock, ours) = (measured("stock")?, measured("ours")?);
    println!("Own rules of one distro, medians of {RUNS} runs (status {STATUS_RUNS}):\n");
    println!("| | {} |\n|---|---|---|---|", ENTRIES.map(|n| n.to_string()).join(" | "));
    let row = |name: &str, of: &Medians, what: &str, counts: &[usize]| -> anyhow::Result<()> {
        let cell =
            |count: &usize| -> anyhow::Result<String> { Ok(shown(what, of.get(what, *count)?)) };
        let cells: anyhow::Result<Vec<_>> = counts.iter().map(cell).collect();
        println!("| {name} | {} |", cells?.join(" | "));
        Ok(())
    };
    row(&format!("{RESTART}, stock"), &stock, RESTART, &ENTRIES)?;
    for what in [RESTART, STAND_IN, HEAL, STATUS] {
        row(what, &ours, what, &ENTRIES)?;
    }
    println!();
    for what in [RESTART, STAND_IN, HEAL, STATUS] {
        print!("{}", ours.plot(what, "entries", &ENTRIES)?);
    }

    let together = Medians::of(&machine.in_vm(&["distros"])?)?;
    println!(
        "Distros of ours, medians of {RUNS} runs (status {STATUS_RUNS}, the rest {STORMS}):\n"
    );
    println!("| | {} |\n|---|---|---|---|---|---|", DISTROS.map(|n| n.to_string()).join(" | "));
    let all = || {
        let of_one = [RESTART, STAND_IN, HEAL, STATUS].into_iter();
        of_one.chain(ALIKE).chain(APART)
    };
    for what in all() {
        row(what, &together, what, &DISTROS)?;
    }
    println!("\nThe last six are of all watchers together, after one wipe.\n");
    for what in all() {
        print!("{}", together.plot(what, "distros", &DISTROS)?);
    }
    Ok(true)
}

fn main() -> ExitCode {
    wsl_vm::run_show(play, show)
}
