//! What systemd takes longer for with this project than without, in the simulated WSL VM with
//! Debian 13 and the package that is made for it: the boot, restarts of systemd-binfmt, reloads, the
//! poweroff, and apt. Stock and ours in turn. `cargo bench --bench units`.

#[allow(dead_code)] // Each user needs a part of it.
#[path = "../tests/ours/mod.rs"]
mod ours;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use wsl_vm::{Builder, Distro, Generation, Vm};

use ours::built_package::DebianPackage;
use ours::downloads::download_packages;
use ours::{Install, Run};

const SUITE: &str = "trixie";
/// Boots of each, and runs of apt. The other commands are run three times in each boot.
const ROUNDS: usize = 15;
const GENERATIONS: [Generation; 2] = [Generation::None, Generation::Lock];

/// What is measured, and how many times as long as stock it may take.
const GOALS: [(&str, f64); 8] = [
    ("to sysinit.target", 1.05),
    ("to the last unit", 1.03),
    ("restart of systemd-binfmt", 1.3),
    ("stop of systemd-binfmt", 1.1),
    ("daemon-reload", 1.03),
    ("poweroff", 1.1),
    ("apt install qemu-user-static", 1.1),
    ("apt purge qemu-user-static", 1.1),
];

/// In the distro, by bash's own clock.
const TIMED: &str = "
    timed() {
        start=$EPOCHREALTIME; \"${@:2}\" >/dev/null 2>&1; end=$EPOCHREALTIME
        echo \"$1:$(( ${end/.} - ${start/.} ))\"
    }";

/// The start limit is systemd's own protection, not what this is about.
const COMMANDS: &str = "
    for i in 1 2 3; do
        systemctl reset-failed systemd-binfmt
        timed 'restart of systemd-binfmt' systemctl restart systemd-binfmt
        timed 'stop of systemd-binfmt' systemctl stop systemd-binfmt
        systemctl reset-failed systemd-binfmt
        systemctl start systemd-binfmt
        timed daemon-reload systemctl daemon-reload
    done 2>/dev/null";

const APT: &str = "
    export DEBIAN_FRONTEND=noninteractive
    apt='apt-get -q -y -o APT::Sandbox::User=root'
    $apt purge --autoremove binfmt-support >/dev/null 2>&1
    timed 'apt install qemu-user-static' \\
        $apt install --no-install-recommends /var/packages/qemu-user-static/*.deb
    timed 'apt purge qemu-user-static' $apt purge --autoremove '^qemu-user'";

/// Inside the VM: prints what was measured, a line each, in microseconds.
fn play(vm: &Vm, arguments: &[String]) -> anyhow::Result<()> {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let [what, generation] = arguments[..] else {
        bail!("play what? {arguments:?}");
    };
    let generation = Generation::named(generation)?;
    for round in 0..ROUNDS {
        for whose in ["stock", "ours"] {
            let name = format!("{whose}{round}");
            vm.renew_interop()?;
            let distro = builder(vm, &name, whose)?;
            let distro = match what {
                "apt" => distro.bring_packages(SUITE)?.binfmt_support(),
                _ => distro,
            };
            let distro = distro.generation(generation).boot()?;
            let measured = match what {
                "apt" => bash(&distro, APT),
                _ => boot(&distro)? + &bash(&distro, COMMANDS),
            };
            for line in measured.lines() {
                println!("{whose}:{line}");
            }
            let start = Instant::now();
            distro.poweroff()?;
            if what != "apt" {
                println!("{whose}:poweroff:{}", start.elapsed().as_micros());
            }
        }
    }
    Ok(())
}

fn builder<'vm>(vm: &'vm Vm, name: &str, whose: &str) -> anyhow::Result<Builder<'vm>> {
    match whose {
        "ours" => vm.packaged(name),
        _ => Ok(vm.distro(name, SUITE)),
    }
}

fn bash(distro: &Distro, commands: &str) -> String {
    let script = format!("{TIMED}{commands}").replace('\'', r"'\''");
    distro.run(&format!("bash -c '{script}'"))
}

/// When it reached sysinit.target, and when all was started, since systemd started.
fn boot(distro: &Distro) -> anyhow::Result<String> {
    let stamp = |what: &str| -> anyhow::Result<u64> {
        let stamp = distro.run(&format!("systemctl show --value --property={what}"));
        stamp.trim().parse().with_context(|| format!("{what}: {stamp}"))
    };
    let start = stamp("UserspaceTimestampMonotonic")?;
    let sysinit = stamp("ActiveEnterTimestampMonotonic sysinit.target")?;
    let all = stamp("FinishTimestampMonotonic")?;
    ensure!(start < sysinit && sysinit < all, "{start} {sysinit} {all}");
    Ok(format!("to sysinit.target:{}\nto the last unit:{}\n", sysinit - start, all - start))
}

/// The median of what was measured of that.
fn median(measured: &str, whose: &str, what: &str) -> anyhow::Result<(Duration, usize)> {
    let prefix = format!("{whose}:{what}:");
    let times = measured.lines().filter_map(|line| line.strip_prefix(&prefix));
    let mut times: Vec<u64> = times.map(str::parse).collect::<Result<_, _>>()?;
    ensure!(times.len() >= ROUNDS, "{what}: {} of {whose}", times.len());
    times.sort_unstable();
    Ok((Duration::from_micros(times[times.len() / 2]), times.len()))
}

fn show() -> anyhow::Result<bool> {
    let machine = ours::prepare(&[SUITE], &[])?;
    download_packages(&[SUITE])?;
    DebianPackage::built()?;
    for generation in GENERATIONS {
        let mut measured = String::new();
        for what in ["boot", "apt"] {
            measured += &machine.in_vm(&[what, generation.name()])?;
        }
        println!("\nWSL {}: medians, stock and ours in turn\n", generation.versions());
        println!("| | stock | ours | ratio | goal | runs of each |\n|---|---|---|---|---|---|");
        for (what, goal) in GOALS {
            let (stock, runs) = median(&measured, "stock", what)?;
            let (ours, _) = median(&measured, "ours", what)?;
            let ratio = ours.as_secs_f64() / stock.as_secs_f64();
            println!("| {what} | {stock:.1?} | {ours:.1?} | {ratio:.2} | {goal:.2} | {runs} |");
        }
    }
    Ok(true)
}

fn main() -> ExitCode {
    wsl_vm::run_show(play, show)
}
