//! What this project promises, played on real systemd in the simulated WSL VM. Every scenario
//! is played with our generator installed, and stock, which is the control.
//! What is seen is compared line by line. How much of it is played, `ours/extent.rs` says.

#[path = "../build_image/mod.rs"]
mod build_image;
mod by_hand;
mod debian_build;
mod debian_package;
mod ends;
mod generations;
mod image_for_wsl;
mod in_the_image;
#[allow(dead_code)] // Each user needs a part of it.
#[path = "../markdown/mod.rs"]
mod markdown;
mod neighbours;
mod order;
mod others;
#[allow(dead_code)] // Each user needs a part of it.
#[path = "../ours/mod.rs"]
mod ours;
mod own_rules;
mod packages;
mod promises;
mod races;
mod release;
mod security;
#[path = "../shell/mod.rs"]
mod shell;
mod soft_spots;
mod stand_in;
mod status;
#[path = "../strace/mod.rs"]
mod strace;
mod verb_faults;
mod verbs;
mod watch;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;

use anyhow::{bail, ensure, Context};
use libtest_mimic::{Arguments, Failed, Trial};
use wsl_vm::{Lack, Machine, Vm};

use ours::built_package::DebianPackage;
use ours::downloads::download_packages;
use ours::extent::{self, Extent};
use promises::{Expect, Scenario, Setting};
use verbs::Test;

/// systemd 247, 252, 257 and 262.
const SUITES: &[&str] = &["bullseye", "bookworm", "trixie", "forky"];

/// What makes a boot longer, and has nothing to do with this. Images, benchmarks and the matrix have all
/// of it.
const BESIDE_THE_POINT: &[&str] = &[
    "modprobe@.service",
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-debug-generator",
    "systemd-factory-reset-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-rc-local-generator",
    "systemd-run-generator",
    "systemd-ssh-generator",
    "systemd-system-update-generator",
    "systemd-tpm2-generator",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
    "systemd-veritysetup-generator",
];

/// Scenarios, and the Debian suites that they are played on.
const SCENARIOS: &[(&[Scenario], &[&str])] = &[
    (promises::SCENARIOS, SUITES),
    (generations::SCENARIOS, SUITES),
    (generations::LOCK_BEFORE_250, &["bullseye"]),
    (release::RELEASE, &["bookworm", "trixie"]),
    (security::UNITS, SUITES),
    (soft_spots::SOFT_SPOTS, &["trixie"]),
    (soft_spots::SOFT_REBOOT, &["trixie", "forky"]),
];

/// The same, which take longer. By default their controls are left out.
const LONG_SCENARIOS: &[(&[Scenario], &[&str])] = &[
    (packages::SCENARIOS, packages::SUITES),
    (generations::LIVES, SUITES),
    (generations::LOCK, &["bookworm", "trixie", "forky"]),
    (ends::ENDS, SUITES),
];

/// Tests in a VM, in which they boot distros or none. The longest come first.
const TESTS: &[&[Test]] = &[
    neighbours::NEIGHBOURS,
    verb_faults::FAULTS,
    races::RACES,
    verbs::VERBS,
    order::ORDER,
    watch::WATCH,
    stand_in::STAND_IN,
    own_rules::OWN_RULES,
    others::OTHERS,
    by_hand::BY_HAND,
    security::SECURITY,
    status::STATUS,
];

/// Tests that need the Debian package.
const WITH_PACKAGE: &[&[Test]] = &[debian_package::DEBIAN_PACKAGE, in_the_image::IN_THE_IMAGE];

/// Those that are left out by default: they take long, and there is another one like them.
const LONG: &[&str] = &[
    "neighbours: a stock distro, and WSL that does nothing for interop",
    "neighbours: one of ours, and WSL that does nothing for interop",
    "neighbours: a stock distro, and WSL with a lock",
    "neighbours: one of ours, and WSL with a lock",
];

/// Those that measure time, or make the machine busy.
const ALONE: &[&str] = &[
    "six distros that boot at once: trixie, stock",
    "six distros that boot at once: trixie, ours",
    "status: as quick as it can be",
    "status: says the same on a busy machine",
];

/// More would fail on a machine with many processors: root has 128 instances of inotify, in all VMs together,
/// and a distro needs about seven.
const MOST_AT_ONCE: usize = 6;

/// The Debian package. It takes a minute to build, which the first test that needs it does.
fn package() -> anyhow::Result<Arc<DebianPackage>> {
    static BUILT: Mutex<Option<Arc<DebianPackage>>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let package = match &*built {
        Some(package) => package.clone(),
        None => Arc::new(DebianPackage::built()?),
    };
    *built = Some(package.clone());
    Ok(package)
}

/// A scenario on a suite, and when its control is played there, too.
type Played = (&'static Scenario, &'static str, Extent);

/// Each scenario on each suite.
fn scenarios() -> impl Iterator<Item = Played> {
    let usual =
        SCENARIOS.iter().map(|(scenarios, on)| (scenarios, on, extent::of(on), Extent::Usual));
    let long = LONG_SCENARIOS.iter();
    let long = long.map(|(scenarios, on)| (scenarios, on, extent::of_long(on), Extent::All));
    usual.chain(long).flat_map(|(scenarios, on, suites, extent)| {
        let control = move |suite| extent.max(extent::of_controls(on, suite));
        let on_each = move |scenario| {
            let suites = suites.clone().into_iter();
            suites.map(move |suite| (scenario, suite, control(suite)))
        };
        scenarios.iter().flat_map(on_each)
    })
}

/// Plays inside the VM: prints what is seen, a line each.
fn play(vm: &Vm, arguments: &[String]) -> anyhow::Result<()> {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [name] => {
            let mut all = TESTS.iter().chain(WITH_PACKAGE).copied().flatten();
            let test = all.find(|test| test.0 == name);
            test.context("no such test")?.1(vm)
        }
        [name, suite, whose] => {
            let scenario =
                scenarios().find(|(scenario, on, _)| scenario.name == name && *on == suite);
            let play = scenario.context("no such scenario")?.0.play;
            let ours = whose == "ours";
            for line in play(&Setting { vm, suite, ours })? {
                println!("{line}");
            }
            Ok(())
        }
        _ => bail!("play what? {arguments:?}"),
    }
}

fn check(machine: &Machine, scenario: &Scenario, suite: &str, ours: bool) -> anyhow::Result<()> {
    let expected = match (&scenario.expect, ours) {
        (Expect::Differs { stock, ours }, _) if stock == ours => bail!("the control shows nothing"),
        (Expect::Differs { ours, .. }, true) => ours,
        (Expect::Differs { stock, .. }, false) => stock,
        (Expect::Same(same), _) => same,
    };
    let whose = if ours { "ours" } else { "stock" };
    let seen = machine.in_vm(&[scenario.name, suite, whose])?;
    ensure!(
        seen.lines().eq(expected.iter().copied()),
        "seen:\n{seen}expected:\n{}",
        expected.join("\n")
    );
    Ok(())
}

/// The checks with their names, in the order in which they are begun. By default what takes long is
/// left out, and the Debian package; not from the `whole`.
fn checks(extent: Extent) -> Vec<(String, Check)> {
    let whole = extent > Extent::Usual;
    let in_vm =
        |name: &'static str| -> Check { Box::new(move |machine| machine.in_vm(&[name]).map(drop)) };
    let mut all: Vec<(String, Check)> = Vec::new();
    let of_package = |(name, check): &'static debian_build::Check| -> (String, Check) {
        ((*name).to_owned(), Box::new(|_| check(&*package()?)))
    };
    // First, so that others are played while it is built.
    let (first, others) = debian_build::DEBIAN_BUILD.split_at(1);
    let others = image_for_wsl::IMAGE_FOR_WSL.iter().chain(others);
    all.extend(first.iter().map(of_package).filter(|_| whole));
    let mut tests =
        TESTS.iter().copied().flatten().map(|(name, _)| (name.to_string(), in_vm(name)));
    let mut played = scenarios().flat_map(|(scenario, suite, control)| {
        let whose = [("stock", false), ("ours", true)].into_iter();
        whose.filter(move |(_, ours)| *ours || control <= extent).map(move |(whose, ours)| {
            let name = format!("{}: {suite}, {whose}", scenario.name);
            let check: Check = Box::new(move |machine| check(machine, scenario, suite, ours));
            (name, check)
        })
    });
    // The former mostly wait, the latter keep the machine busy: in turn they do both.
    loop {
        let pair = [tests.next(), played.next()];
        if pair.iter().all(Option::is_none) {
            break;
        }
        all.extend(pair.into_iter().flatten());
    }
    // Late, as each that waits until it is built keeps others from being played.
    let late = all.len() / 4 * 3;
    all.splice(late..late, others.map(of_package).filter(|_| whole));
    let installed = WITH_PACKAGE.iter().copied().flatten().map(|(name, _)| {
        let check = in_vm(name);
        let check: Check = Box::new(move |machine| package().and_then(|_| check(machine)));
        (name.to_string(), check)
    });
    all.extend(installed.filter(|_| whole));
    // Last, so that nothing waits for them.
    all.sort_by_key(|(name, _)| ALONE.contains(&&**name));
    for listed in ALONE.iter().chain(LONG) {
        assert!(all.iter().any(|(name, _)| name == listed), "{listed}?");
    }
    all.retain(|(name, _)| whole || !LONG.contains(&&**name));
    all
}

/// The tests, numbered.
fn trials(arguments: &Arguments, machine: Option<&'static Machine>) -> Vec<Trial> {
    static QUIET: RwLock<()> = RwLock::new(());
    // Who names some, or asks for the names, means all.
    let is_any = arguments.filter.is_some() || arguments.list;
    let checks = checks(if is_any { Extent::Release } else { extent::extent() });
    let all = checks.len();
    let trial = |(at, (name, check)): (usize, (String, Check))| {
        let alone = ALONE.contains(&&*name);
        let run = move || {
            let machine = machine.ok_or("there is no VM to play in")?;
            // Those that failed have nothing to do with it.
            let checked = if alone {
                let _quiet = QUIET.write().unwrap_or_else(PoisonError::into_inner);
                check(machine)
            } else {
                let _beside_others = QUIET.read().unwrap_or_else(PoisonError::into_inner);
                check(machine)
            };
            checked.map_err(|error| Failed::from(format!("{error:#}")))
        };
        Trial::test(name, run)
            .with_kind(format!("{} of {all}", at + 1))
            .with_ignored_flag(machine.is_none())
    };
    checks.into_iter().enumerate().map(trial).collect()
}

type Check = Box<dyn FnOnce(&Machine) -> anyhow::Result<()> + Send>;

/// The machine, with all that scenarios need.
fn prepared(arguments: &Arguments) -> anyhow::Result<Machine> {
    if let Some(lack) = Machine::lacks() {
        bail!(lack);
    }
    eprintln!("\n{}", extent::in_words());
    let machine = ours::prepare(&extent::of(SUITES), BESIDE_THE_POINT)?;
    if arguments.filter.is_none() {
        extent::has("THE DEBIAN PACKAGE AND THE IMAGE FOR WSL ARE")?;
    }
    download_packages(&extent::of(packages::SUITES))?;
    wsl_vm::debian::require("jsonschema", "python3-jsonschema")?;
    Ok(machine)
}

/// Where there can be no VM, that is said loudly; where CI runs, it is a failure.
fn main() -> ExitCode {
    if let Some(code) = wsl_vm::run_stage(play) {
        return code;
    }
    let mut arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, trials(&arguments, None)).exit_code();
    }
    let unplayed = trials(&arguments, None);
    if unplayed.iter().all(|trial| arguments.is_filtered_out(trial)) {
        let more = if extent::is_all() { "" } else { "; with WSL_TESTS=all there are more" };
        eprintln!("\nNO SCENARIO HAS SUCH A NAME{more}\n");
        if std::env::var_os("CI").is_some() {
            return ExitCode::FAILURE;
        }
        return libtest_mimic::run(&arguments, unplayed).exit_code();
    }
    let machine: &'static Machine = match prepared(&arguments) {
        Ok(machine) => Box::leak(Box::new(machine)),
        Err(error) if error.is::<Lack>() => {
            eprintln!("\nNO SCENARIO CAN BE PLAYED HERE: {error}; what needs no VM is tested\n");
            if std::env::var_os("CI").is_some() {
                return ExitCode::FAILURE;
            }
            return libtest_mimic::run(&arguments, trials(&arguments, None)).exit_code();
        }
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
    };
    // Half of the time systemd, or a test, waits for something.
    let processors = thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads.get_or_insert((2 * processors + 1).min(MOST_AT_ONCE));
    let before = Machine::table();
    let conclusion = libtest_mimic::run(&arguments, trials(&arguments, Some(machine)));
    match (before, Machine::table()) {
        // VMs end with entries in their tables: had one been the machine's, they would be there.
        (Ok(before), Ok(after)) if before == after => conclusion.exit_code(),
        (before, after) => {
            eprintln!("the machine's own table changed: {before:?} to {after:?}");
            ExitCode::FAILURE
        }
    }
}
