//! A simulated WSL2 VM: real systemd on a real binfmt_misc table, and nothing of the machine
//! touched.
//!
//! - `machine.rs`, outside: what a VM is made of, and starting one
//! - `cgroup.rs`: what holds a VM's processes, and ends them
//! - `debian.rs`: the Debian trees that distros boot from
//! - `vm.rs`, inside: the table, launching an `.exe`, the hammer
//! - `distro.rs`: booting a distro in the VM, running commands in it, powering it off
//! - `stages.rs`: what a distro's first processes do before systemd runs
//! - `generation.rs`: what WSL itself does for interop, by its version
//! - `life.rs`: a distro's life under one of these, played and put into words
//! - `neighbours.rs`: a distro's life beside one that has rules of the same names
//! - `packages.rs`: real packages to install in a distro, as files
//! - `debian_package.rs`: this project's Debian package, to be installed in a distro
//! - `image.rs`: images that somebody made, unpacked and looked at
//! - `examine.rs`: what becomes of Windows programs in a distro from one
//! - `images.rs`, `main.rs`: the program that plays that under every WSL and prints it
//! - `chroot.rs`: a Debian tree to measure programs in
//! - `init.rs`: the stand-in for WSL's `/init`, a program of its own
//!
//! A VM is a user namespace with a table of its own; a distro is a set of all other namespaces
//! in it. A process can only get there when it is started anew, so a program that uses this
//! crate calls `run_stage` first of all: it is itself started again as the VM's process, and
//! from there as each distro's first one.

mod cgroup;
mod chroot;
mod debian;
mod debian_package;
mod distro;
mod examine;
mod generation;
mod image;
pub mod images;
pub mod life;
mod machine;
pub mod neighbours;
mod packages;
mod stages;
mod vm;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

pub use chroot::enter_tree;
pub use debian::require;
pub use debian_package::{DebianPackage, FOREIGN};
pub use distro::{Builder, Distro};
pub use generation::Generation;
pub use machine::Machine;
pub use packages::download_packages;
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
        Some(lack) => Err(anyhow::anyhow!(lack)),
        None => show(),
    };
    match held {
        Ok(true) => return ExitCode::SUCCESS,
        Ok(false) => eprintln!("\nIt did not hold."),
        Err(error) => eprintln!("{error:#}"),
    }
    ExitCode::FAILURE
}

/// The project that is tested.
pub fn project() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// mount(8) in short: `options` are the file system's own.
fn mount(what: &str, on: &str, kind: &str, options: &str) -> anyhow::Result<()> {
    use nix::mount::MsFlags;
    let flags = match kind {
        "bind" => MsFlags::MS_BIND,
        "rbind" => MsFlags::MS_BIND | MsFlags::MS_REC,
        "read-only" => MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
        "shared" => MsFlags::MS_SHARED,
        "rprivate" => MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        _ => MsFlags::empty(),
    };
    nix::mount::mount(Some(what), on, Some(kind), flags, Some(options))
        .with_context(|| format!("mounting {what} on {on} ({kind})"))
}
