//! Who gets a Windows program, when others claim it: `restore` in a VM without a distro.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::ensure;
use wsl_vm::{Vm, WSL_INTEROP};

use crate::ours::extent::rounds;
use crate::ours::Run;
use crate::verbs::Test;

/// Rules that claim every Windows program, as they are found in the wild: Mono's, Wine's by magic
/// and by extension, one by a mask that leaves only `MZ`.
const RIVALS: [&str; 4] = [
    ":cli:M::MZ::/bin/echo:",
    ":wine:M::MZ::/bin/echo:PF",
    ":DOSWin:E::exe::/bin/echo:",
    r":masked:M::MZ\x90\x00:\xff\xff\x00\x00:/bin/echo:",
];

/// APE's rule, for its own files only.
const APE: &str = ":APE:M::MZqFpD::/bin/echo:";

/// The names of all entries, the newest first.
fn order(vm: &Vm) -> String {
    vm.entries_in_order().join(" ")
}

fn restore(vm: &Vm) -> anyhow::Result<()> {
    let output = vm.generator().arg("restore").output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

/// Registers interop again, later than all else.
fn register_anew(vm: &Vm) -> anyhow::Result<()> {
    vm.write("WSLInterop", "-1")?;
    vm.register(WSL_INTEROP)
}

/// What comes of launching one of APE's files.
fn launch_ape() -> anyhow::Result<String> {
    let path = "/vm/a.com";
    fs::write(path, "MZqFpD='\n")?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    let output = Command::new(path).output()?;
    Ok(String::from_utf8(output.stdout)?)
}

pub const ORDER: &[Test] = &[
    ("a rival that registers later is put behind", |vm| {
        for rival in RIVALS {
            vm.register(rival)?;
            let launch = vm.launch();
            ensure!(launch != "starts", "{rival} takes nothing: {launch}");
            restore(vm)?;
            ensure!(vm.launch() == "starts", "{rival}: {}", vm.launch());
            ensure!(vm.entries().len() == 2, "{:?}", vm.entries());
            vm.write(rival.split(':').nth(1).unwrap_or_default(), "-1")?;
        }
        Ok(())
    }),
    ("a rival that is behind already is left where it is", |vm| {
        vm.write("WSLInterop", "-1")?;
        RIVALS.iter().try_for_each(|rival| vm.register(rival))?;
        vm.register(WSL_INTEROP)?;
        let before = vm.entry_identity("WSLInterop")?;
        restore(vm)?;
        ensure!(vm.entry_identity("WSLInterop")? == before, "registered anew");
        ensure!(vm.launch() == "starts", "{}", vm.launch());
        Ok(())
    }),
    ("what is disabled or for other files is no rival", |vm| {
        let before = vm.entry_identity("WSLInterop")?;
        vm.register(":off:M::MZ::/bin/echo:")?;
        vm.write("off", "0")?;
        vm.register(r":pe:M:136:PE\x00\x00::/bin/echo:")?;
        vm.register(":elf:M::ELF::/bin/echo:")?;
        vm.register(":py:E::py::/bin/echo:")?;
        restore(vm)?;
        ensure!(vm.entry_identity("WSLInterop")? == before, "registered anew");
        Ok(())
    }),
    ("what takes only ordinary programs is a rival, too", |vm| {
        for rule in [
            r":stub:M:78:This\x20program::/bin/echo:",
            r":pe:M:128:PE\x00\x00::/bin/echo:",
            r":dos:M::MZ\x90::/bin/echo:",
        ] {
            vm.register(rule)?;
            let name = rule.split(':').nth(1).unwrap_or_default();
            ensure!(order(vm) == format!("{name} WSLInterop"), "{}", order(vm));
            restore(vm)?;
            ensure!(order(vm) == format!("WSLInterop {name}"), "{}", order(vm));
            vm.write(name, "-1")?;
        }
        Ok(())
    }),
    ("names and texts that are not UTF-8 are passed over", |vm| {
        let register = "/proc/sys/fs/binfmt_misc/register";
        fs::write(register, b":\xff:M::MZ::/bin/echo:")?;
        fs::write(register, b":odd:M::odd::/bin/\xff:")?;
        vm.register(RIVALS[0])?;
        restore(vm)?;
        ensure!(vm.launch() == "starts", "{}", vm.launch());
        Ok(())
    }),
    ("APE keeps its own files, wherever it was registered", |vm| {
        // Later than interop; then with a rival on top, earlier, and earlier than that rival.
        vm.register(APE)?;
        restore(vm)?;
        ensure!(order(vm) == "APE WSLInterop", "{}", order(vm));
        vm.register(RIVALS[0])?;
        restore(vm)?;
        ensure!(order(vm) == "APE WSLInterop cli", "{}", order(vm));
        register_anew(vm)?;
        ensure!(order(vm) == "WSLInterop APE cli", "{}", order(vm));
        ensure!(launch_ape()?.starts_with("INTEROP"), "APE is not shadowed");
        restore(vm)?;
        ensure!(order(vm) == "APE WSLInterop cli", "{}", order(vm));
        ensure!(launch_ape()? == "/vm/a.com\n", "{}", launch_ape()?);
        ensure!(vm.launch() == "starts", "{}", vm.launch());
        ensure!(vm.read("APE")?.contains("magic 4d5a71467044\n"), "{}", vm.read("APE")?);
        Ok(())
    }),
    ("APE with a peer's interpreter is left where it is", |vm| {
        fs::copy("/vm/init", "/vm/theirs")?;
        vm.register(":APE:M::MZqFpD::/vm/theirs:F")?;
        fs::remove_file("/vm/theirs")?;
        register_anew(vm)?;
        restore(vm)?;
        ensure!(order(vm) == "WSLInterop APE", "{}", order(vm));
        Ok(())
    }),
    ("re-ordering leaves no instant without an entry", |vm| {
        let hammer = vm.hammer();
        for _ in 0..rounds() {
            // The hammer's program is not called so: only a missing entry keeps it from starting.
            vm.register(":rival:E::exe::/bin/echo:")?;
            restore(vm)?;
            vm.write("rival", "-1")?;
        }
        let launches = hammer.stop();
        ensure!(launches.started > rounds() / 2 && launches.failed == 0, "{launches:?}");
        Ok(())
    }),
    ("a lost F is regained, and leaves no instant without an entry", |vm| {
        let hammer = vm.hammer();
        for _ in 0..rounds() {
            // As another tool does it that knows of P only, but with no gap of its own.
            vm.register(":tool:M::MZ::/init:P")?;
            vm.write("WSLInterop", "-1")?;
            vm.register(":WSLInterop:M::MZ::/init:P")?;
            vm.write("tool", "-1")?;
            restore(vm)?;
            let entry = vm.entry("WSLInterop");
            ensure!(entry == "enabled, interpreter /init, flags: PF", "{entry}");
        }
        let launches = hammer.stop();
        ensure!(launches.started > rounds() / 2 && launches.failed == 0, "{launches:?}");
        Ok(())
    }),
    ("the second entry of older WSL goes once the first stands", |vm| {
        vm.write("WSLInterop", "-1")?;
        vm.register(":WSLInterop-late:M::MZ::/init:P")?;
        let hammer = vm.hammer();
        restore(vm)?;
        let launches = hammer.stop();
        ensure!(order(vm) == "WSLInterop", "{}", order(vm));
        ensure!(launches.failed == 0, "{launches:?}");
        Ok(())
    }),
    ("what a killed restore left behind goes", |vm| {
        vm.register(":WSLInterop-next:M::MZ::/init:PF")?;
        restore(vm)?;
        ensure!(order(vm) == "WSLInterop", "{}", order(vm));
        Ok(())
    }),
    ("restores at the same time do not get into each other's way", |vm| {
        for _ in 0..20 {
            vm.register(":cli:M::MZ::/bin/echo:")?;
            let restores: Vec<_> =
                (0..10).map(|_| vm.generator().arg("restore").spawn()).collect::<Result<_, _>>()?;
            for mut restore in restores {
                let status = restore.wait()?;
                ensure!(status.success(), "{status}");
            }
            ensure!(order(vm) == "WSLInterop cli", "{}", order(vm));
            vm.write("cli", "-1")?;
        }
        Ok(())
    }),
];
