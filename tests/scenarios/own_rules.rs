//! What a distro registered itself: it stands while the distro runs, whatever others do to the
//! table, and goes with the distro. What is somebody else's, or was removed on purpose, is let be.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context};
use wsl_vm::{Builder, Vm, WSL_INTEROP};

use crate::ours::{Install, Run};
use crate::promises::state;
use crate::release::{disk_afterwards, put_on_a_disk};
use crate::stand_in::{alone, within, RUNNING, SOON};
use crate::verbs::Test;
use crate::watch::Watcher;

/// The distro's own program, as an interpreter.
const OWN: &str = "/usr/local/bin/own";
const RULES: &str = ":ownfmt:M::OWNFMT::/usr/local/bin/own:F\n:plainfmt:M::PLAIN::/bin/cat:\n";
/// Longer than a watcher waits for quiet, and does what it then has to do.
const QUIET: Duration = Duration::from_millis(1200);

pub const OWN_RULES: &[Test] = &[
    ("own rules: they stand again after a flush", |vm| {
        let mine = with_support(distro(vm, "mine", "OF-MINE")?).boot()?;
        stand(vm, "OF-MINE").context("at boot")?;
        for _ in 0..2 {
            vm.write("status", "-1")?;
            within(SOON, || stand(vm, "OF-MINE")).context("after a flush")?;
            // Written down by name and inode.
            within(SOON, || {
                let records = mine.run("cat /run/wsl-binfmt/*.rules");
                for name in ["ownfmt", "plainfmt", "supportfmt"] {
                    let inode = format!("{} ", vm.entry_identity(name)?);
                    let rule = format!(":{name}:");
                    let of = |line: &str| line.starts_with(&inode) && line.contains(&rule);
                    ensure!(records.lines().any(of), "{inode}{name}: {records}");
                }
                Ok(())
            })?;
        }
        within(SOON, || alone(vm))?;
        ensure!(state(&mine) == RUNNING, "{}", state(&mine));
        Ok(())
    }),
    ("own rules: one that a peer replaced comes back", |vm| {
        let mine = distro(vm, "mine", "OF-MINE")?.boot()?;
        vm.write("ownfmt", "-1")?;
        vm.register(":ownfmt:M::OWNFMT::/bin/echo:F")?;
        thread::sleep(QUIET);
        let entry = vm.entry("ownfmt");
        ensure!(entry.contains("/bin/echo"), "the peer's is gone: {entry}");
        vm.write("ownfmt", "-1")?;
        within(SOON, || runs("OWNFMT", "OF-MINE")).context("when the peer's is gone")?;
        mine.poweroff()?;
        ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
        Ok(())
    }),
    ("own rules: what is removed on purpose stays removed", |vm| {
        let mine = with_support(distro(vm, "mine", "OF-MINE")?).boot()?;
        vm.write("plainfmt", "-1")?;
        let removed = mine.run("update-binfmts --package supportfmt --remove supportfmt /bin/cat");
        ensure!(vm.entry("supportfmt") == "missing", "{removed}");
        vm.register(":peerfmt:M::PEERFMT::/bin/cat:F")?;
        thread::sleep(QUIET);
        vm.write("status", "-1")?;
        within(SOON, || runs("OWNFMT", "OF-MINE")).context("after a flush")?;
        thread::sleep(QUIET);
        missing(vm, &["plainfmt", "supportfmt", "peerfmt"])?;

        mine.run("systemctl stop systemd-binfmt");
        vm.write("status", "-1")?;
        within(SOON, || alone(vm))?;
        thread::sleep(QUIET);
        missing(vm, &["ownfmt", "plainfmt", "supportfmt", "peerfmt"])
    }),
    ("own rules: from /home and /tmp, too", |vm| {
        let mine = distro(vm, "mine", "OF-MINE")?.boot()?;
        let done = mine.run(
            "set -e
            mkdir -p /home/user
            for place in home/user tmp; do
                cp /usr/local/bin/own /$place/own
                echo \":${place%/*}fmt:M::OWN-$place::/$place/own:F\" >>/etc/binfmt.d/more.conf
            done
            systemctl restart systemd-binfmt",
        );
        ensure!(done.is_empty(), "{done}");
        let run = || {
            runs("OWN-home/user", "OF-MINE")?;
            runs("OWN-tmp", "OF-MINE")
        };
        run().context("before the flush")?;
        vm.write("status", "-1")?;
        within(SOON, run).context("after a flush")?;
        Ok(())
    }),
    ("own rules: a lost interpreter is told, once", |vm| {
        program("mine", "/usr/local/bin/lost", "OF-LOST")?;
        let lost = ":lostfmt:M::LOSTFMT::/usr/local/bin/lost:F\n";
        let mine = distro(vm, "mine", "OF-MINE")?.file("/etc/binfmt.d/lost.conf", lost).boot()?;
        runs("LOSTFMT", "OF-LOST")?;
        mine.run("rm /usr/local/bin/lost");
        vm.write("status", "-1")?;
        within(SOON, || runs("OWNFMT", "OF-MINE")).context("after a flush")?;
        within(SOON, || runs_plain(vm))?;
        thread::sleep(QUIET);
        let log = mine.run("journalctl -b -u wsl-interop-restore -o cat");
        let names_it = |line: &&str| line.contains("/usr/local/bin/lost");
        let told = log.lines().filter(names_it).count();
        ensure!(told == 1, "{told} times:\n{log}");
        ensure!(state(&mine) == RUNNING, "{}", state(&mine));
        Ok(())
    }),
    ("own rules: another distro's poweroff gives them back", |vm| {
        let first = distro(vm, "first", "OF-ONE")?.boot()?;
        let second = distro(vm, "second", "OF-TWO")?.boot()?;
        runs("OWNFMT", "OF-TWO").context("at boot")?;
        second.poweroff()?;
        within(SOON, || runs("OWNFMT", "OF-ONE")).context("after the poweroff")?;
        within(SOON, || runs_plain(vm))?;
        ensure!(state(&first) == RUNNING, "{}", state(&first));
        first.poweroff()?;
        nothing_is_pinned(vm)
    }),
    ("own rules: the first distro may go first", |vm| {
        let first = distro(vm, "first", "OF-ONE")?.boot()?;
        let second = distro(vm, "second", "OF-TWO")?.boot()?;
        first.poweroff()?;
        runs("OWNFMT", "OF-TWO").context("after the poweroff")?;
        runs_plain(vm)?;
        // Own rules do not depend on whether there was a peer.
        vm.write("status", "-1")?;
        within(SOON, || runs("OWNFMT", "OF-TWO")).context("after a flush")?;
        within(SOON, || runs_plain(vm))?;
        second.poweroff()?;
        nothing_is_pinned(vm)
    }),
    ("own rules: one that was moved goes at poweroff, too", |vm| {
        put_on_a_disk(vm)?;
        program("mine", "/usr/local/bin/ape", "OF-MINE")?;
        let ape = ":APE:M::MZqFpD::/usr/local/bin/ape:F\n";
        let mine = vm.distro("mine", "trixie").generator(true);
        let mine = mine.file("/etc/binfmt.d/ape.conf", ape).boot()?;
        let before = vm.entry_identity("APE")?;
        vm.write("WSLInterop", "-1")?;
        // The watcher may be quicker.
        let _ = vm.register(WSL_INTEROP);
        within(SOON, || {
            let order = vm.entries_in_order();
            let place = |name| order.iter().position(|n| n == name).context("missing");
            ensure!(place("APE")? < place("WSLInterop")?, "{order:?}");
            ensure!(vm.entry_identity("APE")? != before, "it was not moved");
            alone(vm)
        })?;
        runs("MZqFpD='\n", "OF-MINE")?;
        mine.poweroff()?;
        nothing_is_pinned(vm)?;
        let disk = disk_afterwards(vm)?;
        ensure!(disk == "free, clean", "its disk: {disk}");
        Ok(())
    }),
    ("own rules: a failed start makes no peer's its own", |vm| {
        let mine = distro(vm, "mine", "OF-MINE")?.boot()?;
        mine.run(
            "systemctl stop systemd-binfmt
            cp /bin/false /usr/lib/systemd/systemd-binfmt",
        );
        vm.register(":ownfmt:M::OWNFMT::/bin/echo:F")?;
        mine.run("systemctl start systemd-binfmt");
        let state = mine.run("systemctl is-active systemd-binfmt");
        ensure!(state == "failed\n", "{state}");
        mine.poweroff()?;
        let entry = vm.entry("ownfmt");
        ensure!(entry.contains("/bin/echo"), "{entry}");
        Ok(())
    }),
    ("own rules: a format that a peer had before stays", |vm| {
        let theirs = ":supportfmt:M::SUPPORT::/bin/cat:";
        vm.register(theirs)?;
        let mine = with_support(distro(vm, "mine", "OF-MINE")?).boot()?;
        mine.run("systemctl restart binfmt-support");
        ensure!(vm.entry("supportfmt") != "missing", "lost in a restart");
        mine.poweroff()?;
        ensure!(vm.entry("supportfmt") != "missing", "lost at poweroff");
        Ok(())
    }),
    ("more specific: not what takes any Windows program", |vm| {
        real_program()?;
        for rule in NOT_SPECIFIC {
            let name = rule.split(':').nth(1).context("a name")?;
            vm.register(rule)?;
            ensure!(!real_starts(), "{rule} takes nothing");
            let output = vm.generator().arg("restore").output()?;
            ensure!(output.status.success(), "{output:?}");
            behind(vm, name).with_context(|| format!("restore: {rule}"))?;
            vm.write(name, "-1")?;

            let watcher = Watcher::start(vm)?;
            vm.register(rule)?;
            within(SOON, || behind(vm, name)).with_context(|| format!("watcher: {rule}"))?;
            within(SOON, || alone(vm))?;
            vm.write(name, "-1")?;
            watcher.stop()?;
        }
        Ok(())
    }),
    ("more specific: APE stays ahead of them all", |vm| {
        real_program()?;
        vm.register(":APE:M::MZqFpD::/bin/echo:")?;
        NOT_SPECIFIC.iter().try_for_each(|rule| vm.register(rule))?;
        let output = vm.generator().arg("restore").output()?;
        ensure!(output.status.success(), "{output:?}");
        let order = vm.entries_in_order();
        ensure!(order[..2] == ["APE", "WSLInterop"], "{order:?}");
        ensure!(real_starts(), "{order:?}");
        runs("MZqFpD='\n", "/vm/file")
    }),
];

/// Rules with a longer magic that yet take what any linker makes.
const NOT_SPECIFIC: [&str; 5] = [
    r":mz90:M::MZ\x90::/bin/echo:",
    r":mz9000:M::MZ\x90\x00::/bin/echo:",
    r":mz900003:M::MZ\x90\x00\x03::/bin/echo:",
    r":masked:M::MZ\x90\x00\x03\x07\x00:\xff\xff\xff\xff\xff\x00\xff:/bin/echo:",
    r":stub:M:78:This program cannot be run::/bin/echo:",
];

const REAL: &str = "/vm/real";

/// A Windows program with the DOS header and the stub that linkers put before all else.
fn real_program() -> anyhow::Result<()> {
    let mut program = b"MZ\x90\0\x03\0\0\0\x04\0\0\0\xff\xff\0\0\xb8\0\0\0\0\0\0\0\x40".to_vec();
    program.resize(0x3c, 0);
    program.extend(b"\x80\0\0\0\x0e\x1f\xba\x0e\0\xb4\x09\xcd\x21\xb8\x01\x4c\xcd\x21");
    program.extend(b"This program cannot be run in DOS mode.\r\r\n$");
    program.resize(0x80, 0);
    program.extend(b"PE\0\0\x64\x86");
    program.resize(512, 0);
    executable(REAL, &program)
}

fn real_starts() -> bool {
    let output = Command::new(REAL).output();
    output.is_ok_and(|output| output.stdout.starts_with(b"INTEROP"))
}

/// That rule comes after `WSLInterop`, and the program gets to Windows.
fn behind(vm: &Vm, name: &str) -> anyhow::Result<()> {
    let order = vm.entries_in_order();
    ensure!(order == ["WSLInterop", name], "{order:?}");
    ensure!(real_starts(), "{order:?}, and it does not start");
    Ok(())
}

/// A distro of ours with two rules, one of them with `F` and a program that says whose it is.
fn distro<'vm>(vm: &'vm Vm, name: &str, whose: &str) -> anyhow::Result<Builder<'vm>> {
    program(name, OWN, whose)?;
    let distro = vm.distro(name, "trixie").generator(true);
    // Python's, which comes with the tree, is not what this is about.
    let distro = distro.file("/etc/binfmt.d/python3.13.conf", "");
    Ok(distro.file("/etc/binfmt.d/own.conf", RULES))
}

/// With a format that binfmt-support registers at boot.
fn with_support(distro: Builder) -> Builder {
    let format = "supportfmt\nmagic\n0\nSUPPORT\n\n/bin/cat\n\n\n\nyes\n";
    distro.file("/var/lib/binfmts/supportfmt", format).binfmt_support()
}

/// A program in a distro that is yet to be booted, which prints `whose`.
fn program(distro: &str, path: &str, whose: &str) -> anyhow::Result<()> {
    let mut program = fs::read("/vm/init")?;
    program.extend(format!("\nNAME {whose}").bytes());
    executable(&format!("/vm/{distro}/upper{path}"), &program)
}

fn executable(path: &str, contents: &[u8]) -> anyhow::Result<()> {
    fs::create_dir_all(Path::new(path).parent().context("a directory")?)?;
    fs::write(path, contents)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// A file with that magic is run by that distro's program.
fn runs(magic: &str, whose: &str) -> anyhow::Result<()> {
    executable("/vm/file", magic.as_bytes())?;
    let output = Command::new("/vm/file").output()?;
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(printed.starts_with(whose), "run by {printed:?}, not {whose}");
    Ok(())
}

fn runs_plain(vm: &Vm) -> anyhow::Result<()> {
    let entry = vm.entry("plainfmt");
    ensure!(entry == "enabled, interpreter /bin/cat, flags: ", "plainfmt: {entry}");
    runs("PLAIN", "PLAIN")
}

/// All that the distro has registered stands.
fn stand(vm: &Vm, whose: &str) -> anyhow::Result<()> {
    runs("OWNFMT", whose)?;
    runs_plain(vm)?;
    let entry = vm.entry("supportfmt");
    ensure!(entry == "enabled, interpreter /bin/cat, flags: F", "supportfmt: {entry}");
    Ok(())
}

fn missing(vm: &Vm, names: &[&str]) -> anyhow::Result<()> {
    let entries = vm.entries();
    let there = names.iter().find(|name| entries.iter().any(|e| e == *name));
    ensure!(there.is_none(), "{entries:?}");
    Ok(())
}

/// No entry but WSL's own holds a file open.
fn nothing_is_pinned(vm: &Vm) -> anyhow::Result<()> {
    for name in vm.entries().iter().filter(|name| *name != "WSLInterop") {
        let entry = vm.entry(name);
        let (_, flags) = entry.rsplit_once("flags: ").context("flags")?;
        ensure!(!flags.contains('F'), "{name}: {entry}");
    }
    Ok(())
}
