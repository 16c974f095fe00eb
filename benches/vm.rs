//! What this project costs a running distro, and what it spares it, in the simulated WSL VM with
//! Debian 13 and the package that is made for it: its verbs, the watcher, and launches during 40
//! restarts of systemd-binfmt under every generation of WSL. `cargo bench --bench vm`.

#[allow(dead_code)] // Each user needs a part of it.
#[path = "../tests/ours/mod.rs"]
mod ours;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use wsl_vm::{Builder, Distro, Generation, Vm};

use ours::built_package::DebianPackage;
use ours::{Install, Run};

const SUITE: &str = "trixie";
/// The verbs as units call them, mostly with nothing to do; true(1) to compare with.
const VERBS: [&str; 5] = [
    "/bin/true",
    "/bin/wsl-binfmt restore",
    "/bin/wsl-binfmt guard",
    "/bin/wsl-binfmt release",
    "/bin/wsl-binfmt status",
];
const RUNS: usize = 300;
const WIPES: usize = 1000;
/// KiB.
const PSS_GOAL: u64 = 900;
/// The start limit is systemd's own protection, not what this is about.
const RESTARTS: &str = "for i in $(seq 40); do
    systemctl reset-failed systemd-binfmt
    systemctl restart systemd-binfmt
done 2>&1";

/// Inside the VM.
fn play(vm: &Vm, arguments: &[String]) -> anyhow::Result<()> {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["verbs"] => verbs(vm),
        ["watcher"] => watcher(vm),
        ["restarts", generation, whose] => restarts(vm, generation, whose == "ours"),
        _ => bail!("play what? {arguments:?}"),
    }
}

fn distro<'vm>(vm: &'vm Vm, name: &str, ours: bool) -> anyhow::Result<Builder<'vm>> {
    match ours {
        true => vm.packaged(name),
        false => Ok(vm.distro(name, SUITE)),
    }
}

/// Times each by bash's own clock, in turn.
fn verbs(vm: &Vm) -> anyhow::Result<()> {
    let mine = distro(vm, "mine", true)?.boot()?;
    let script = format!(
        "bash -c 'for i in $(seq {RUNS}); do for verb in {}; do \
         start=$EPOCHREALTIME; $verb >/dev/null 2>&1; end=$EPOCHREALTIME; \
         echo \"$verb:$(( ${{end/.}} - ${{start/.}} ))\"; done; done'",
        VERBS.map(|verb| format!("\"{verb}\"")).join(" ")
    );
    let printed = mine.run(&script);
    let mut times: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for line in printed.lines() {
        let (verb, time) = line.split_once(':').with_context(|| printed.clone())?;
        let time = Duration::from_micros(time.parse()?);
        times.entry(verb).or_default().push(time);
    }
    let median = |verb| {
        let times = times.get(verb).context("a verb was not run")?;
        ensure!(times.len() == RUNS, "{} runs of {verb}", times.len());
        anyhow::Ok(at(times, 50))
    };
    let floor = median(VERBS[0])?;
    println!("Verbs with nothing to do, medians of {RUNS} runs:");
    for verb in &VERBS[1..] {
        let time = median(verb)?;
        let ratio = time.as_secs_f64() / floor.as_secs_f64();
        let name = verb.trim_start_matches("/bin/wsl-binfmt ");
        println!("    {name:10}{ratio:4.1} x true(1)  ({time:.1?})");
    }
    Ok(())
}

fn watcher(vm: &Vm) -> anyhow::Result<()> {
    let linked_static = vm.distro("static", SUITE).generator(true).boot()?;
    let static_memory = pss(&of_watcher(&linked_static, "smaps_rollup"));
    linked_static.poweroff()?;

    let mine = distro(vm, "mine", true)?.boot()?;
    // systemd may still write a status file now and then.
    thread::sleep(Duration::from_secs(5));
    let before = switches(&mine)?;
    thread::sleep(Duration::from_secs(60));
    let woken = switches(&mine)? - before;
    let memory = pss(&of_watcher(&mine, "smaps_rollup"));

    let mut times = Vec::new();
    for _ in 0..WIPES {
        vm.write("status", "-1")?;
        let start = Instant::now();
        while vm.entries().is_empty() {
            ensure!(start.elapsed() < Duration::from_secs(5), "nothing stands in");
        }
        times.push(start.elapsed());
        thread::sleep(Duration::from_millis(1));
    }
    println!("Watcher:");
    println!(
        "    memory (Pss) {} KiB, linked static {} KiB; wanted {PSS_GOAL}",
        memory?, static_memory?
    );
    println!("    woken {woken} times in a minute without changes; wanted 0");
    println!(
        "    from wipe to stand-in, {WIPES} wipes: p50 {:.0?}, p99 {:.0?}, longest {:.1?}",
        at(&times, 50),
        at(&times, 99),
        at(&times, 100)
    );
    Ok(())
}

fn pss(rollup: &str) -> anyhow::Result<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let line = line.with_context(|| format!("no Pss: {rollup}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// A file of /proc about the distro's watcher.
fn of_watcher(mine: &Distro, file: &str) -> String {
    let pid = mine.run("systemctl show --property=MainPID --value wsl-interop-restore");
    mine.run(&format!("cat /proc/{}/{file}", pid.trim()))
}

/// How often it has been given a processor.
fn switches(mine: &Distro) -> anyhow::Result<u64> {
    let status = of_watcher(mine, "status");
    let counts = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
    let counts: Vec<u64> =
        counts.map(|(_, count)| count.trim().parse()).collect::<Result<_, _>>()?;
    ensure!(counts.len() == 2, "{status}");
    Ok(counts.iter().sum())
}

/// A line of the table for `print_restarts`.
fn restarts(vm: &Vm, generation: &str, ours: bool) -> anyhow::Result<()> {
    let mine = distro(vm, "mine", ours)?
        .generation(Generation::named(generation)?)
        .file("/etc/binfmt.d/test.conf", ":testfmt:M::\\x01\\x02::/bin/cat:F\n")
        .boot()?;
    vm.renew_interop()?;
    let hammer = vm.hammer();
    mine.run(RESTARTS);
    let launches = hammer.stop();
    let gap = match vm.launch().as_str() {
        "starts" => format!("{:.0?}", launches.longest_gap),
        _ => "for good".to_owned(),
    };
    println!("{} of {} | {gap}", launches.failed, launches.all());
    Ok(())
}

/// The percentile.
fn at(times: &[Duration], percent: usize) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[(times.len() - 1) * percent / 100]
}

fn show() -> anyhow::Result<bool> {
    let machine = ours::prepare(&[SUITE], &[])?;
    DebianPackage::built()?;
    for what in ["verbs", "watcher"] {
        println!("{}", machine.in_vm(&[what])?);
    }
    println!("Launches that failed during 40 restarts of systemd-binfmt, and the longest gap:\n");
    println!("| WSL | stock | | ours | |\n|---|---|---|---|---|");
    for generation in Generation::ALL {
        let of = |whose| machine.in_vm(&["restarts", generation.name(), whose]);
        let (stock, ours) = (of("stock")?, of("ours")?);
        println!("| {} | {} | {} |", generation.versions(), stock.trim(), ours.trim());
    }
    Ok(true)
}

fn main() -> ExitCode {
    wsl_vm::run_show(play, show)
}
