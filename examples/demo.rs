//! Shows what this project is for: a Windows program, launched in a throw-away WSL VM with real
//! systemd, without us and with us. Exit status 1 if it did not hold.

#[allow(dead_code)] // Each user needs a part of it.
#[path = "../tests/ours/mod.rs"]
mod ours;

use std::process::ExitCode;

use anyhow::Context;
use wsl_vm::Vm;

use ours::Install;

/// systemd 257.
const SUITE: &str = "trixie";

/// Plays inside the VM: prints what comes of launching a Windows program, a line an occasion.
fn play(vm: &Vm, arguments: &[String]) -> anyhow::Result<()> {
    let installed = arguments.first().context("with or without?")? == "with";
    let distro = |name| vm.distro(name, SUITE).generator(installed).boot();
    let mine = distro("mine")?;
    println!("at boot\t{}", vm.launch());
    for (when, command) in [
        ("restart of systemd-binfmt", "systemctl restart systemd-binfmt"),
        ("daemon-reload and restart", "systemctl daemon-reload; systemctl restart systemd-binfmt"),
    ] {
        vm.renew_interop()?;
        mine.run(command);
        println!("after {when}\t{}", vm.launch());
    }
    let peer = distro("peer")?;
    vm.renew_interop()?;
    peer.poweroff()?;
    println!("after a peer's poweroff\t{}", vm.launch());
    Ok(())
}

fn show() -> anyhow::Result<bool> {
    let machine = ours::prepare(&[SUITE], &[])?;
    let without = machine.in_vm(&["without"])?;
    let with = machine.in_vm(&["with"])?;
    println!(
        "\n{:34}{:24}with wsl-binfmt-generator",
        "Windows program launched", "stock Debian 13"
    );
    for (without, with) in without.lines().zip(with.lines()) {
        let (when, stock) = without.split_once('\t').context("a line of the VM")?;
        let (_, ours) = with.split_once('\t').context("a line of the VM")?;
        println!("{when:34}{stock:24}{ours}");
    }
    Ok(with.lines().count() == 4 && with.lines().all(|line| line.ends_with("\tstarts")))
}

fn main() -> ExitCode {
    wsl_vm::run_show(play, show)
}
