//! Leads a distro's life under every generation of WSL and on every systemd, stock and with this
//! project, and prints what became of Windows programs: the table in
//! docs/every-wsl.md. Then it does the
//! same beside a neighbour that is stock and beside one with this project, and prints what
//! difference that makes. Exit status 1 if it was not as promised.

#[allow(dead_code)] // Each user needs a part of it.
#[path = "../tests/markdown/mod.rs"]
mod markdown;
#[allow(dead_code)] // Each user needs a part of it.
#[path = "../tests/ours/mod.rs"]
mod ours;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;

use anyhow::{bail, Context};
use wsl_vm::{Generation, Machine, Vm};

use ours::life::{Event, Life, PROMISED};
use ours::life_beside::{self, Act, Beside, Whose};

const SUITES: &[&str] = &["bullseye", "bookworm", "trixie", "forky"];
const NEIGHBOURS: &[&str] = &["bookworm", "trixie"];

/// A column for one event or more, of which the worst counts.
const COLUMNS: &[(&str, &[&str])] = &[
    ("boot", &["boot"]),
    ("restart", &["restart"]),
    ("reload, restart", &["reload and restart"]),
    ("stop", &["stop"]),
    ("start", &["start"]),
    ("failing rule", &["boot, failing rule", "restart, failing rule"]),
    ("poweroff", &["poweroff", "poweroff, failing rule"]),
];

#[derive(Clone, Copy, PartialEq)]
struct Case {
    generation: Generation,
    ours: bool,
    /// Whether the neighbour that rules are shared with is ours, if there is one.
    beside: Option<bool>,
    suite: &'static str,
}

impl Case {
    fn arguments(&self) -> Vec<&'static str> {
        let mut arguments = vec![self.suite, self.generation.name(), whose(self.ours)];
        arguments.extend(self.beside.map(whose));
        arguments
    }
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
    let (case, beside) = match arguments {
        [case @ .., beside] if case.len() == 3 => (case, Some(beside == "ours")),
        case => (case, None),
    };
    let [suite, generation, whose] = case else {
        bail!("play what? {arguments:?}");
    };
    let (generation, ours) = (Generation::named(generation)?, whose == "ours");
    let record = match beside {
        Some(beside) => Beside::lead(vm, suite, generation, ours, beside)?.record(),
        None => Life::lead(vm, suite, generation, ours)?.record(),
    };
    print!("{record}");
    Ok(())
}

/// Plays all cases, as many at a time as there are processors.
fn play_all<L: Send>(
    machine: &Machine,
    cases: Vec<Case>,
    parse: fn(&str) -> anyhow::Result<L>,
) -> anyhow::Result<Vec<(Case, L)>> {
    let workers = thread::available_parallelism()?.get();
    let left = Mutex::new(cases.into_iter());
    let played = Mutex::new(Vec::new());
    let work = || loop {
        let Some(case) = left.lock().expect("no worker panics").next() else {
            return anyhow::Ok(());
        };
        let life = machine
            .in_vm(&case.arguments())
            .and_then(|record| parse(&record))
            .with_context(|| case.arguments().join(", "))?;
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
    cells.push(if lost { "for good".to_owned() } else { format!("{gap} ms") });
    Ok(cells)
}

/// How it went for the hammer: the launches that failed, all of them, and the longest gap between
/// two that did not, in milliseconds.
fn hammered<'a>(events: impl Iterator<Item = &'a Event>) -> (u32, u32, u128) {
    events.fold((0, 0, 0), |(failed, all, gap), event| {
        let launches = &event.launches;
        (failed + launches.failed, all + launches.all(), gap.max(launches.longest_gap.as_millis()))
    })
}

fn table(played: &[(Case, Life)]) -> anyhow::Result<String> {
    let mut lines = Vec::new();
    let mut header = vec!["WSL", ""];
    header.extend(COLUMNS.iter().map(|(name, _)| *name));
    header.extend(["entry", "peer's entry", "system"]);
    header.extend(["failed in 10 restarts", "longest gap"]);
    lines.push(format!("| {} |", header.join(" | ")));
    lines.push(format!("|{}", "---|".repeat(header.len())));
    for generation in Generation::ALL {
        for ours in [false, true] {
            let of_this =
                |(case, _): &&(Case, _)| case.generation == generation && case.ours == ours;
            let lives: Vec<_> = played.iter().filter(of_this).map(|(_, life)| life).collect();
            let cells = row(&lives)?.join(" | ");
            let wsl = generation.versions();
            lines.push(format!("| {wsl} | {} | {cells} |", whose(ours)));
        }
    }
    let versions: BTreeSet<_> = played.iter().map(|(_, life)| life.systemd.as_str()).collect();
    let versions: Vec<_> = versions.into_iter().collect();
    let ours = played.iter().filter(|(case, _)| case.ours);
    let (failed, all, gap) = hammered(ours.flat_map(|(_, life)| &life.events));
    lines.push(format!(
        "\nok: every launch started; outage: some failed meanwhile; lost: afterwards none starts.\n\
         It is the worst of systemd {}.\nFrom boot to poweroff, all events together, with us \
         {failed} of {all} launches failed; the longest gap was {gap} ms.",
        versions.join(", ")
    ));
    Ok(lines.join("\n"))
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

/// A cell of the second table: how a distro fared in these lives, one a suite.
type Cell = fn(&[&Beside]) -> String;

const CELLS: &[(&str, Cell)] = &[
    ("failed starts", |lives| {
        let starts: u32 = events(lives, |_| true).map(|event| event.starts).sum();
        let failed: u32 = events(lives, |_| true).map(|event| event.failed).sum();
        format!("{failed} of {starts}")
    }),
    ("system", |lives| {
        let on = events(lives, |event| event.system != "off");
        life_beside::Event::worst(on.map(|event| event.system.as_str())).to_owned()
    }),
    ("launches lost at own events", |lives| launches_lost(lives, Whose::Own)),
    ("at a neighbour's", |lives| launches_lost(lives, Whose::Neighbours)),
    ("F rule runs, after own start", |lives| {
        runs(lives, |e| e.whose == Whose::Own && e.is_start())
    }),
    ("after a neighbour's start", |lives| {
        runs(lives, |e| e.whose == Whose::Neighbours && e.is_start())
    }),
    ("after its end", |lives| runs(lives, |e| e.whose == Whose::Neighbours && !e.is_start())),
    ("rules lost at a neighbour's starts", |lives| {
        let lost = lives.iter().map(|life| life.lost_rules(|e| e.is_start()));
        lost.sum::<usize>().to_string()
    }),
    ("at its poweroff, kill", |lives| {
        let lost = |act| {
            let of = |life: &&Beside| match act {
                Act::Kill => life.lost_rules(|event| event.act == Act::Kill),
                _ => life.lost_rules(|event| event.act == Act::Poweroff),
            };
            lives.iter().map(of).sum::<usize>()
        };
        format!("{}, {}", lost(Act::Poweroff), lost(Act::Kill))
    }),
    ("left at the end", |lives| {
        let ends = lives.iter().filter_map(|life| life.events.last());
        let left: BTreeSet<_> = ends.flat_map(|event| event.left()).collect();
        match left.into_iter().collect::<Vec<_>>().join(", ") {
            none if none.is_empty() => "nothing".to_owned(),
            left => left,
        }
    }),
];

fn events<'a>(
    lives: &'a [&Beside],
    which: fn(&life_beside::Event) -> bool,
) -> impl Iterator<Item = &'a life_beside::Event> {
    let all = lives.iter().flat_map(|life| &life.events);
    all.filter(move |event| which(event))
}

fn launches_lost(lives: &[&Beside], whose: Whose) -> String {
    let some = lives.iter().any(|life| life.lost_launches(whose));
    if some { "some" } else { "none" }.to_owned()
}

/// Whose file it is at the worst of these events.
fn runs(lives: &[&Beside], which: fn(&life_beside::Event) -> bool) -> String {
    let seen = events(lives, which).map(|event| event.runs.as_str());
    life_beside::Event::worst(seen).to_owned()
}

fn neighbours_table(played: &[(Case, Beside)]) -> String {
    let mut lines = Vec::new();
    let header: Vec<_> = CELLS.iter().map(|(name, _)| *name).collect();
    lines.push(format!("| WSL | | {} |", header.join(" | ")));
    lines.push(format!("|{}", "---|".repeat(header.len() + 2)));
    for generation in Generation::ALL {
        for ours in [false, true] {
            let lives = |beside| -> Vec<_> {
                let of_this = |(case, _): &&(Case, Beside)| {
                    (case.generation, case.ours, case.beside) == (generation, ours, Some(beside))
                };
                let these = played.iter().filter(of_this);
                these.map(|(_, life)| life).collect()
            };
            let (stock, beside_ours) = (lives(false), lives(true));
            let cell = |(_, cell): &(&str, Cell)| match (cell(&stock), cell(&beside_ours)) {
                (stock, beside_ours) if stock == beside_ours => stock,
                (stock, beside_ours) => format!("{stock} → {beside_ours}"),
            };
            let cells: Vec<_> = CELLS.iter().map(cell).collect();
            let (wsl, whose) = (generation.versions(), whose(ours));
            lines.push(format!("| {wsl} | {whose} | {} |", cells.join(" | ")));
        }
    }
    let suites: BTreeSet<_> = played.iter().map(|(case, _)| case.suite).collect();
    let suites: Vec<_> = suites.into_iter().collect();
    lines.push(format!(
        "\nA distro that is stock or ours, beside a neighbour that is stock → ours, where that \
         makes\na difference. Both have a rule with F and one without of the same names, and one of \
         its own name.\nNumbers are those of {} together, the rest is the worst of them.",
        suites.join(" and ")
    ));
    lines.join("\n")
}

/// Whether no distro fared worse beside ours than beside stock; says which did.
fn good_neighbours(played: &[(Case, Beside)]) -> bool {
    let mut good = true;
    for (case, life) in played.iter().filter(|(case, _)| case.beside == Some(true)) {
        let control = Case { beside: Some(false), ..*case };
        let control = played.iter().find(|(other, _)| *other == control);
        let worse =
            control.map_or(vec!["no control".to_owned()], |(_, control)| life.worse_than(control));
        if !worse.is_empty() {
            good = false;
            let name = case.arguments().join(", ");
            eprintln!("{name}, worse than beside stock:\n{}\n", worse.join("\n"));
        }
    }
    good
}

/// Every generation, stock and ours, on these suites.
fn cases(suites: &[&'static str], besides: &[Option<bool>]) -> Vec<Case> {
    let mut cases = Vec::new();
    for generation in Generation::ALL {
        for ours in [false, true] {
            for &beside in besides {
                cases.extend(suites.iter().map(|suite| Case { generation, ours, beside, suite }));
            }
        }
    }
    cases
}

/// Prints the tables; whether all was as promised.
fn show() -> anyhow::Result<bool> {
    let machine = ours::prepare(SUITES, &[])?;
    // The lives of the first table are played by `cargo test`, too.
    let alone = match std::env::args().nth(1).as_deref() {
        Some("neighbours") => Vec::new(),
        _ => cases(SUITES, &[None]),
    };
    let played = play_all(&machine, alone, Life::parse)?;
    if !played.is_empty() {
        markdown::print("docs/every-wsl.md", "matrix", &table(&played)?)?;
    }
    let beside = cases(NEIGHBOURS, &[Some(false), Some(true)]);
    let neighbours = play_all(&machine, beside, Beside::parse)?;
    markdown::print("docs/neighbours.md", "neighbours", &neighbours_table(&neighbours))?;
    let good = good_neighbours(&neighbours);
    Ok(held(&played) && good)
}

fn main() -> ExitCode {
    wsl_vm::run_show(play, show)
}
