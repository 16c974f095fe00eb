//! A good neighbour: whatever befalls either, no distro fares worse beside one of ours than beside
//! a stock one, which is the control; and two of ours leave each other all that is theirs.

use anyhow::ensure;
use wsl_vm::{Generation, Vm};

use crate::ours::life_beside::{Act, Beside, Whose};
use crate::verbs::Test;

/// The other generations, and systemd 252: `cargo run --example matrix`.
pub const NEIGHBOURS: &[Test] = &[
    ("neighbours: a stock distro, and WSL that does nothing for interop", |vm| {
        play(vm, Generation::None, false)
    }),
    ("neighbours: one of ours, and WSL that does nothing for interop", |vm| {
        play(vm, Generation::None, true)
    }),
    ("neighbours: a stock distro, and WSL with drop-ins", |vm| play(vm, Generation::Dropin, false)),
    ("neighbours: one of ours, and WSL with drop-ins", |vm| play(vm, Generation::Dropin, true)),
    ("neighbours: a stock distro, and WSL with a lock", |vm| play(vm, Generation::Lock, false)),
    ("neighbours: one of ours, and WSL with a lock", |vm| play(vm, Generation::Lock, true)),
];

/// A distro beside a stock one and beside one of ours, in one VM.
fn play(vm: &Vm, generation: Generation, ours: bool) -> anyhow::Result<()> {
    let control = Beside::lead(vm, "trixie", generation, ours, false)?;
    let life = Beside::lead(vm, "trixie", generation, ours, true)?;
    let worse = life.worse_than(&control);
    let mut faults: Vec<_> = worse.iter().map(|what| format!("beside ours: {what}")).collect();
    if ours {
        faults.extend(broken(&life));
    }
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

/// What is not as it has to be between two of ours.
fn broken(life: &Beside) -> Vec<String> {
    let mut broken = Vec::new();
    for event in &life.events {
        let mut faults = Vec::new();
        if event.failed > 0 || !["running", "off"].contains(&event.system.as_str()) {
            faults.push("systemd-binfmt or the system failed");
        }
        if event.lost_launches > 0 {
            faults.push("launches lost");
        }
        let on = event.system != "off";
        if on && event.rules != ["only", "shared"] {
            faults.push("a rule without F is missing");
        }
        // A start of the neighbour replaces it, and after a kill nobody can tell.
        let own = event.whose == Whose::Own || event.act == Act::Poweroff;
        if on && (event.runs == "none" || own && event.runs != "own") {
            faults.push("the rule with F is not its own");
        }
        if event.act == Act::Poweroff && !on && event.runs == "own" {
            faults.push("its rule with F is left");
        }
        broken.extend(faults.iter().map(|fault| format!("both ours: {fault}: {event:?}")));
    }
    broken
}
