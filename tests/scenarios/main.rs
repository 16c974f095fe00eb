//! What this project promises, played on real systemd in the simulated WSL VM. Every scenario
//! is played twice on each Debian: stock, which is the control, and with our generator installed.
//! What is seen is compared line by line.

mod promises;
mod verbs;

use std::process::ExitCode;

use anyhow::{bail, ensure, Context};
use libtest_mimic::{Arguments, Failed, Trial};
use wsl_vm::{Machine, Vm};

use promises::{Expect, Scenario, Setting, SCENARIOS};
use verbs::VERBS;

/// systemd 252 and 257.
const SUITES: [&str; 2] = ["bookworm", "trixie"];

/// Plays inside the VM: prints what is seen, a line each.
fn play(vm: &Vm, arguments: &[String]) -> anyhow::Result<()> {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [name] => {
            let verb = VERBS.iter().find(|verb| verb.0 == name);
            verb.context("no such test of a verb")?.1(vm)
        }
        [name, suite, whose] => {
            let scenario = SCENARIOS.iter().find(|s| s.name == name);
            let play = scenario.context("no such scenario")?.play;
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

/// All tests: the arguments for `play`, and what to make of the answer.
fn trials(machine: Option<&'static Machine>) -> Vec<Trial> {
    let mut trials = Vec::new();
    let mut add = |name: String, test: Test| {
        let run = move || match machine {
            Some(machine) => test(machine).map_err(|e| Failed::from(format!("{e:#}"))),
            None => Err("there is no VM to play in".into()),
        };
        trials.push(Trial::test(name, run).with_ignored_flag(machine.is_none()));
    };
    for scenario in SCENARIOS {
        for suite in SUITES {
            for (whose, ours) in [("stock", false), ("ours", true)] {
                add(
                    format!("{}: {suite}, {whose}", scenario.name),
                    Box::new(move |machine| check(machine, scenario, suite, ours)),
                );
            }
        }
    }
    for (name, _) in VERBS {
        let test = |machine: &Machine| machine.in_vm(&[name]).map(drop);
        add((*name).to_owned(), Box::new(test));
    }
    trials
}

type Test = Box<dyn FnOnce(&Machine) -> anyhow::Result<()> + Send>;

/// Where there can be no VM, that is said loudly; where CI runs, it is a failure.
fn main() -> ExitCode {
    if let Some(code) = wsl_vm::run_stage(play) {
        return code;
    }
    let arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, trials(None)).exit_code();
    }
    if let Some(lack) = Machine::lacks() {
        eprintln!("\nNO SCENARIO CAN BE PLAYED HERE: {lack}\n");
        if std::env::var_os("CI").is_some() {
            return ExitCode::FAILURE;
        }
        return libtest_mimic::run(&arguments, trials(None)).exit_code();
    }
    let machine: &'static Machine = match Machine::prepare(&SUITES) {
        Ok(machine) => Box::leak(Box::new(machine)),
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
    };
    let before = Machine::table();
    let conclusion = libtest_mimic::run(&arguments, trials(Some(machine)));
    match (before, Machine::table()) {
        // VMs end with entries in their tables: had one been the machine's, they would be there.
        (Ok(before), Ok(after)) if before == after => conclusion.exit_code(),
        (before, after) => {
            eprintln!("the machine's own table changed: {before:?} to {after:?}");
            ExitCode::FAILURE
        }
    }
}
