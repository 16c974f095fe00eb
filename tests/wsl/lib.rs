#![doc = include_str!("README.md")]
#![deny(missing_docs)]

// - `machine.rs`, outside: what a VM is made of, and starting one
// - `cgroup.rs`: what holds a VM's processes, and ends them
// - `debian.rs`: the Debian trees that distros boot from
// - `vm.rs`, inside: the table, launching an `.exe`, the hammer
// - `distro.rs`: booting a distro in the VM, running commands in it, ending it
// - `stages.rs`: what a distro's first processes do before systemd runs
// - `generation.rs`: what WSL itself does for interop, by its version
// - `image.rs`, `unpack.rs`: images that somebody made, looked at and unpacked
// - `examine.rs`: what becomes of Windows programs in a distro from one
// - `images.rs`, `main.rs`: the program that plays that under every WSL and prints it
// - `chroot.rs`: a Debian tree to measure programs in
// - `init.rs`: the stand-in for WSL's `/init`, a program of its own

mod cgroup;
mod chroot;
pub mod debian;
mod distro;
mod examine;
mod generation;
pub mod image;
pub mod images;
mod machine;
mod stages;
mod unpack;
mod vm;

use std::process::ExitCode;

use anyhow::Context;

pub use chroot::enter_tree;
pub use distro::{Builder, Distro};
pub use generation::Generation;
pub use machine::{directory, lock, Lack, Machine, Needs};
pub use vm::{Hammer, Launches, Vm, WSL_INTEROP};

/// A program that stands for this part of the VM, by its first argument.
const VM_STAGE: &str = "--wsl-vm";
const DISTRO_STAGE: &str = "--wsl-distro";
const PID1_STAGE: &str = "--wsl-pid1";

/// Plays the part that this process was started for, if it was: `play` is then called inside the
/// VM, with the arguments given to `Machine::in_vm`.
pub fn run_stage(play: impl FnOnce(&Vm, &[String]) -> anyhow::Result<()>) -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first()? {
        (stage, rest) if stage == VM_STAGE => vm::stage(|vm| play(vm, rest)),
        (stage, rest) if stage == DISTRO_STAGE => stages::distro(&rest[0]),
        (stage, rest) if stage == PID1_STAGE => stages::pid1(&rest[0]),
        _ => return None,
    };
    Some(match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

/// The whole of a program that shows something: `play` is its part inside the VM, and `show`, on
/// the machine, says whether it held.
pub fn run_show(
    play: impl FnOnce(&Vm, &[String]) -> anyhow::Result<()>,
    show: impl FnOnce() -> anyhow::Result<bool>,
) -> ExitCode {
    if let Some(code) = run_stage(play) {
        return code;
    }
    let held = match Machine::lacks() {
        Some(lack) => Err(lack.into()),
        None => show(),
    };
    match held {
        Ok(true) => return ExitCode::SUCCESS,
        Ok(false) => eprintln!("\nIt did not hold."),
        Err(error) => eprintln!("{error:#}"),
    }
    ExitCode::FAILURE
}

/// mount(8) in short: `options` are the file system's own.
fn mount(what: &str, on: &str, kind: &str, options: &str) -> anyhow::Result<()> {
    use nix::mount::MsFlags;
    let flags = match kind {
        "bind" => MsFlags::MS_BIND,
        "rbind" => MsFlags::MS_BIND | MsFlags::MS_REC,
        "read-only" => MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
        "shared" => MsFlags::MS_SHARED,
        "rshared" => MsFlags::MS_SHARED | MsFlags::MS_REC,
        "rprivate" => MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        _ => MsFlags::empty(),
    };
    nix::mount::mount(Some(what), on, Some(kind), flags, Some(options))
        .with_context(|| format!("mounting {what} on {on} ({kind})"))
}
