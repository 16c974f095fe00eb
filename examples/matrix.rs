//! Leads a distro's life under every generation of WSL and on every systemd, stock and with this
//! project, and prints what became of Windows programs: the table in README.md. Exit status 1 if
//! it was not as promised.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;

use anyhow::{bail, Context};

use wsl_vm::life::{Event, Life, PROMISED};
use wsl_vm::{Generation, Machine, Vm};

const SUITES: &[&str] = &["bullseye", "bookworm", "trixie", "forky"];

/// A column for one event or more, of which the worst counts.
const COLUMNS: &[(&str, &[&str])] = &[
    ("boot", &["boot"]),
    ("restart", &["restart"]),
    ("reload, restart", &["reload and restart"]),
    ("stop", &["stop"]),
    ("start", &["start"]),
    (
        "failing rule",
        &["boot, failing rule", "restart, failing rule"],
    ),
    ("poweroff", &["poweroff", "poweroff, failing rule"]),
];

#[derive(Clone, Copy)]
struct Case {
    generation: Generation,
    ours: bool,
    suite: &'static str,
}

fn whose(ours: bool) -> &'static str {
    if ours {
        "ours"
    } else {
        "stock"
    }
}

/// Inside the VM.
fn play(vm: &Vm, arguments: &[String]) -> anyhow::Result<()> {
    let [suite, generation, whose] = arguments else {
        bail!("play what? {arguments:?}");
    };
    let life = Life::lead(vm, suite, Generation::named(generation)?, whose == "ours")?;
    print!("{}", life.record());
    Ok(())
}

/// Plays all cases, as many at a time as there are processors.
fn play_all(machine: &Machine, cases: Vec<Case>) -> anyhow::Result<Vec<(Case, Life)>> {
    let workers = thread::available_parallelism()?.get();
    let left = Mutex::new(cases.into_iter());
    let played = Mutex::new(Vec::new());
    let work = || loop {
        let Some(case) = left.lock().expect("no worker panics").next() else {
            return anyhow::Ok(());
        };
        let (name, whose) = (case.generation.name(), whose(case.ours));
        let life = machine
            .in_vm(&[case.suite, name, whose])
            .and_then(|record| Life::parse(&record))
            .with_context(|| format!("{name}, {whose}, {}", case.suite))?;
        let mut played = played.lock().expect("no worker panics");
        played.push((case, life));
        eprint!(".");
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().expect("no worker panics")?;
        }
        anyhow::Ok(())
    })?;
    eprintln!();
    Ok(played.into_inner().expect("no worker panics"))
}

/// What became of Windows programs: the later in this list, the worse.
const VERDICTS: [&str; 3] = ["ok", "outage", "lost"];

fn verdict(event: &Event) -> usize {
    match (event.launch.as_str(), event.launches.failed) {
        ("starts", 0) => 0,
        ("starts", _) => 1,
        _ => 2,
    }
}

/// The lives under one generation, on all suites, as a line of the table: the worst counts.
fn row(lives: &[&Life]) -> anyhow::Result<Vec<String>> {
    let events = |names: &'static [&str]| {
        let all = lives.iter().flat_map(|life| &life.events);
        all.filter(move |event| names.contains(&event.name.as_str()))
    };
    let mut cells = Vec::new();
    for (_, names) in COLUMNS {
        let worst = events(names).map(verdict).max();
        cells.push(VERDICTS[worst.context("no such event")?].to_owned());
    }

    let entries = |event: &Event| {
        let entries = event.table.split(", ");
        let ours: Vec<_> = entries.filter(|e| e.starts_with("WSLInterop")).collect();
        match ours[..] {
            [] => "none".to_owned(),
            _ => ours.join(", "),
        }
    };
    let seen: BTreeSet<_> = events(&["start"]).map(entries).collect();
    cells.push(seen.into_iter().collect::<Vec<_>>().join(" or "));

    let mut all = lives.iter().flat_map(|life| &life.events);
    let kept = all.all(|event| event.table.split(", ").any(|entry| entry == "peerfmt"));
    cells.push(if kept { "kept" } else { "lost" }.to_owned());

    let healthy = events(&["boot", "restart", "reload and restart", "stop", "start"])
        .all(|event| event.state.ends_with(", running"));
    cells.push(if healthy { "running" } else { "degraded" }.to_owned());

    let (failed, launched, gap) = hammered(events(&["10 restarts"]));
    let lost = events(&["10 restarts"]).any(|event| event.launch != "starts");
    cells.push(format!("{failed} of {launched}"));
    cells.push(if lost {
        "for good".to_owned()
    } else {
        format!("{gap} ms")
    });
    Ok(cells)
}

/// How it went for the hammer: the launches that failed, all of them, and the longest gap between
/// two that did not, in milliseconds.
fn hammered<'a>(events: impl Iterator<Item = &'a Event>) -> (u32, u32, u128) {
    events.fold((0, 0, 0), |(failed, all, gap), event| {
        let launches = &event.launches;
        (
            failed + launches.failed,
            all + launches.all(),
            gap.max(launches.longest_gap.as_millis()),
        )
    })
}

fn print_table(played: &[(Case, Life)]) -> anyhow::Result<()> {
    let mut header = vec!["WSL", ""];
    header.extend(COLUMNS.iter().map(|(name, _)| *name));
    header.extend(["entry", "peer's entry", "system"]);
    header.extend(["failed in 10 restarts", "longest gap"]);
    println!("| {} |", header.join(" | "));
    println!("|{}", "---|".repeat(header.len()));
    for generation in Generation::ALL {
        for ours in [false, true] {
            let of_this =
                |(case, _): &&(Case, _)| case.generation == generation && case.ours == ours;
            let lives: Vec<_> = played
                .iter()
                .filter(of_this)
                .map(|(_, life)| life)
                .collect();
            let cells = row(&lives)?.join(" | ");
            println!("| {} | {} | {cells} |", generation.versions(), whose(ours));
        }
    }
    let versions: BTreeSet<_> = played
        .iter()
        .map(|(_, life)| life.systemd.as_str())
        .collect();
    let versions: Vec<_> = versions.into_iter().collect();
    let ours = played.iter().filter(|(case, _)| case.ours);
    let (failed, all, gap) = hammered(ours.flat_map(|(_, life)| &life.events));
    println!(
        "\nok: every launch started; outage: some failed meanwhile; lost: afterwards none starts. \
         It is the worst of systemd {}.\nFrom boot to poweroff, all events together, with us \
         {failed} of {all} launches failed; the longest gap was {gap} ms.",
        versions.join(", ")
    );
    Ok(())
}

/// Whether all our lives were as promised; says what was not.
fn held(played: &[(Case, Life)]) -> bool {
    let mut held = true;
    for (case, life) in played.iter().filter(|(case, _)| case.ours) {
        let lines = life.lines();
        if lines != PROMISED {
            held = false;
            let name = case.generation.name();
            eprintln!("{name}, {}:\n{}\n", case.suite, lines.join("\n"));
        }
    }
    held
}

/// Prints the table; whether all was as promised.
fn show() -> anyhow::Result<bool> {
    let machine = Machine::prepare(SUITES)?;
    let mut cases = Vec::new();
    for generation in Generation::ALL {
        for ours in [false, true] {
            cases.extend(SUITES.iter().map(|suite| Case {
                generation,
                ours,
                suite,
            }));
        }
    }
    let played = play_all(&machine, cases)?;
    print_table(&played)?;
    Ok(held(&played))
}

fn main() -> ExitCode {
    wsl_vm::run_show(play, show)
}
