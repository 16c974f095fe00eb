//! What becomes of Windows programs in a distro from somebody's image, played under one generation
//! of WSL: each occasion on which they could stop starting, with a hammer on it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::distro::{Builder, Distro};
use super::generation::Generation;
use super::image::resolve;
use super::vm::Vm;

/// What is to be played.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Case {
    /// The image's root directory, and systemd's directory in it.
    pub tree: PathBuf,
    pub systemd: PathBuf,
    /// WSL's generation, by its name, and its version.
    pub generation: String,
    pub version: String,
    /// What to put in.
    pub package: Option<Package>,
}

/// What is to be put into an image.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub enum Package {
    /// The directory where a Debian package's files are.
    Files(PathBuf),
    /// A generator of systemd's.
    Generator(PathBuf),
}

/// What was seen.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Seen {
    /// The version of systemd.
    pub systemd: String,
    /// What `systemctl is-system-running` says after boot, and at the end.
    pub state: String,
    pub failed_units: Vec<FailedUnit>,
    /// The entries that came with the boot, but WSL's own.
    pub registered: Vec<String>,
    pub boot_seconds: Option<f64>,
    pub occasions: Vec<Occasion>,
    pub notes: Vec<String>,
}

/// A unit that failed at boot or later.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct FailedUnit {
    pub unit: String,
    pub why: String,
    /// Whether WSL would let it succeed, for what one can tell.
    pub because_of_the_simulation: bool,
}

/// Something after which Windows programs could start no longer.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Occasion {
    pub occasion: String,
    /// Whether they start afterwards.
    pub start: bool,
    pub launches: u32,
    pub failed: u32,
    pub longest_gap_ms: u128,
}

pub const OCCASIONS: [&str; 5] = [
    "boot",
    "restart of systemd-binfmt",
    "daemon-reload and restart",
    "start of another distro",
    "poweroff of another distro",
];

impl Seen {
    /// What does not hold, a line each.
    pub fn wrong(&self) -> Vec<String> {
        let mut wrong: Vec<_> = self
            .occasions
            .iter()
            .filter(|occasion| !occasion.start)
            .map(|o| format!("after {}, Windows programs do not start", o.occasion))
            .collect();
        let real: Vec<_> =
            self.failed_units.iter().filter(|failed| !failed.because_of_the_simulation).collect();
        for failed in &real {
            wrong.push(format!("{} failed ({})", failed.unit, failed.why));
        }
        let excused = self.state == "degraded" && real.is_empty() && !self.failed_units.is_empty();
        if self.state != "running" && !excused {
            wrong.push(format!("the system is {}", self.state));
        }
        wrong
    }
}

/// Plays it.
pub fn play(vm: &Vm, case: &Case) -> anyhow::Result<Seen> {
    let before = vm.entries();
    let mut play = Play { vm, occasions: Vec::new() };
    let mut notes = Vec::new();
    let mine = with_package(distro(vm, "mine", case)?, case, &mut notes)?;
    let mine = play.at(|| mine.boot())?;
    let registered = registered(vm, &before);
    let systemd = mine.systemctl(&["--version"]);
    let systemd = systemd.split_whitespace().nth(1).unwrap_or("unknown");
    let boot_seconds = boot_seconds(&mine);
    let mut failed_units = failed_units(&mine);
    let first_state = state(&mine);

    let known = mine.systemctl(&["show", "--property=LoadState", "--value", BINFMT]);
    if known.trim() != "loaded" {
        notes.push(format!("{BINFMT} is {} in it, so restarting that does nothing.", known.trim()));
    }
    play.at(|| Ok(mine.systemctl(&["restart", BINFMT])))?;
    play.at(|| {
        mine.systemctl(&["daemon-reload"]);
        Ok(mine.systemctl(&["restart", BINFMT]))
    })?;
    let peer = play.at(|| distro(vm, "peer", case)?.boot())?;
    play.at(|| peer.poweroff())?;

    for failed in self::failed_units(&mine) {
        if !failed_units.iter().any(|known| known.unit == failed.unit) {
            failed_units.push(failed);
        }
    }
    let state = match (first_state.as_str(), state(&mine)) {
        ("running", last) => last,
        _ => first_state,
    };
    Ok(Seen {
        systemd: systemd.to_owned(),
        state,
        failed_units,
        registered,
        boot_seconds,
        occasions: play.occasions,
        notes,
    })
}

const BINFMT: &str = "systemd-binfmt.service";

fn distro<'vm>(vm: &'vm Vm, name: &str, case: &Case) -> anyhow::Result<Builder<'vm>> {
    let generation = Generation::named(&case.generation)?;
    // Of four parts, of which people name two or three.
    let zeros = ".0".repeat(3_usize.saturating_sub(case.version.matches('.').count()));
    let version = format!("container_host_version_id={}{zeros}", case.version);
    Ok(vm.image(name, &case.tree).generation(generation).shared_cgroup().environment(&[
        "container=wsl",
        "container_host_id=windows",
        &version,
    ]))
}

struct Play<'vm> {
    vm: &'vm Vm,
    occasions: Vec<Occasion>,
}

impl Play<'_> {
    /// Plays the next occasion, which meets the entry whole, so that it answers only for itself.
    fn at<T>(&mut self, event: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let vm = self.vm;
        if vm.entry("WSLInterop-late") != "missing" {
            vm.write("WSLInterop-late", "-1")?;
        }
        vm.renew_interop()?;
        let hammer = vm.hammer_with_pauses();
        let result = event();
        let launches = hammer.stop();
        let name = OCCASIONS[self.occasions.len()];
        let result = result.with_context(|| format!("at {name}"))?;
        self.occasions.push(Occasion {
            occasion: name.to_owned(),
            start: vm.launch() == "starts",
            launches: launches.all(),
            failed: launches.failed,
            longest_gap_ms: launches.longest_gap.as_millis(),
        });
        Ok(result)
    }
}

fn state(distro: &Distro) -> String {
    let state = distro.systemctl(&["is-system-running"]);
    state.trim().to_owned()
}

/// The entries that were not there before, but WSL's own.
fn registered(vm: &Vm, before: &[String]) -> Vec<String> {
    let entries = vm.entries();
    let new =
        entries.iter().filter(|name| !before.contains(name) && !name.starts_with("WSLInterop"));
    new.map(|name| format!("{name} ({})", flags(&vm.entry(name)))).collect()
}

/// An entry's interpreter and flags.
fn flags(entry: &str) -> String {
    let entry = entry.trim_start_matches("enabled, interpreter ");
    entry.replace("flags: ", "").trim_end_matches([' ', ',']).to_owned()
}

/// systemd's own word for how long it took, as systemd-analyze has it.
fn boot_seconds(distro: &Distro) -> Option<f64> {
    let shown = distro.systemctl(&[
        "show",
        "--property=UserspaceTimestampMonotonic",
        "--property=FinishTimestampMonotonic",
    ]);
    let stamp = |name| {
        let mut lines = shown.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value?.parse::<u64>().ok()
    };
    let start = stamp("UserspaceTimestampMonotonic")?;
    let took = stamp("FinishTimestampMonotonic")?.checked_sub(start)?;
    Some((took / 10_000) as f64 / 100.0)
}

/// What a user namespace can mount.
const MOUNTABLE: [&str; 10] = [
    "binfmt_misc",
    "cgroup2",
    "devpts",
    "fuse",
    "mqueue",
    "none",
    "overlay",
    "proc",
    "sysfs",
    "tmpfs",
];

/// Services that have to do with a machine's devices, kernel or disks, which the VM has not.
const MACHINES: [&str; 11] = [
    "auditd.service",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "lvm2-monitor.service",
    "multipathd.service",
    "systemd-networkd-wait-online.service",
    "systemd-remount-fs.service",
    "systemd-timesyncd.service",
    "systemd-udev-settle.service",
    "systemd-udev-trigger.service",
    "systemd-udevd.service",
];

fn failed_units(distro: &Distro) -> Vec<FailedUnit> {
    let list = distro.systemctl(&["list-units", "--state=failed", "--plain", "--no-legend"]);
    let units = list.lines().filter_map(|line| line.split_whitespace().next());
    // Where there are none, nothing is printed; an error is no list of units.
    let units = units.filter(|unit| unit.contains('.'));
    units.map(|unit| failed_unit(distro, unit)).collect()
}

fn failed_unit(distro: &Distro, unit: &str) -> FailedUnit {
    let shown = distro.systemctl(&["show", "--property=Result,ExecMainStatus,Type", unit]);
    let property = |name| {
        let mut lines = shown.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    };
    let status = property("ExecMainStatus").unwrap_or("0");
    let result = property("Result").unwrap_or("unknown");
    let kind = property("Type").unwrap_or("");
    let why = match (result, status) {
        ("exit-code", "226") => "its mount namespace cannot be made".to_owned(),
        ("exit-code", status) => format!("exit status {status}"),
        (other, _) => other.to_owned(),
    };
    let because_of_the_simulation = match unit.rsplit_once('.') {
        _ if MACHINES.contains(&unit) => true,
        Some((_, "mount")) => !MOUNTABLE.contains(&kind),
        Some((_, "device" | "swap")) => true,
        _ => false,
    };
    FailedUnit { unit: unit.to_owned(), why, because_of_the_simulation }
}

/// The distro with the package put in.
fn with_package<'vm>(
    distro: Builder<'vm>,
    case: &Case,
    notes: &mut Vec<String>,
) -> anyhow::Result<Builder<'vm>> {
    let generators = case.systemd.join("system-generators");
    Ok(match &case.package {
        None => distro,
        Some(Package::Generator(program)) => {
            let name = program.file_name().context("a program has a name")?;
            let generator = generators.join(name);
            let generator = generator.to_str().context("a path that is not UTF-8")?;
            distro.copy(program, generator)
        }
        Some(Package::Files(files)) => {
            for directory in directories_below(files)? {
                let inside = Path::new("/").join(directory.strip_prefix(files)?);
                if inside.ends_with("system-generators")
                    && resolve(&case.tree, &inside)? != generators
                {
                    notes.push(format!(
                        "The package has its generator in {}, and this systemd looks in {}.",
                        inside.display(),
                        generators.display()
                    ));
                }
            }
            distro.copy(files, "/")
        }
    })
}

/// All directories below one.
fn directories_below(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut directories = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            directories.push(entry.path());
            directories.extend(directories_below(&entry.path())?);
        }
    }
    Ok(directories)
}
