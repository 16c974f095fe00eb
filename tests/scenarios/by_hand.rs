//! What people, packages and drop-ins for all services do beside systemd's own starts and stops.

use std::thread;

use anyhow::{ensure, Context};
use wsl_vm::{Builder, Distro, Generation, Vm};

use crate::ours::Install;
use crate::promises::{state, RULE};
use crate::stand_in::{alone, served, within, IN_TIME, RUNNING, SOON};
use crate::verbs::Test;

const TABLE: &str = "/proc/sys/fs/binfmt_misc";
const PEERS: &str = ":peerfmt:M::PEERFMT::/bin/cat:";
/// What ours is called with `F`.
const STANDS: &str = "enabled, interpreter /bin/cat, flags: F";

pub const BY_HAND: &[Test] = &[
    ("by hand: a drop-in protects the home of every service", |vm| {
        everywhere(vm, |vm, distro| {
            let mine = for_every_service(distro, "ProtectHome=yes").boot()?;
            guarded(vm, &mine)?;
            stops_without_harm(vm, mine)
        })
    }),
    ("by hand: a drop-in gives every service a /tmp", |vm| {
        everywhere(vm, |vm, distro| {
            // With this, services of systemd wait for each other, and now and then one has to fail.
            let mine = for_every_service(distro, "PrivateTmp=yes").boot()?;
            table_is_guarded(vm, &mine)?;
            let ours = mine.run("systemctl is-active wsl-binfmt-guard systemd-binfmt");
            ensure!(ours == "active\nactive\n", "{ours}");
            stops_without_harm(vm, mine)
        })
    }),
    ("by hand: systemd-binfmt beside its unit", |vm| {
        everywhere(vm, |vm, distro| {
            let mine = distro.boot()?;
            mine.run("echo ':newfmt:M::NEWFMT::/bin/cat:F' >/etc/binfmt.d/new.conf");
            for files in ["", "test.conf new.conf"] {
                // It is not to empty the table, and says that it cannot.
                mine.run(&format!("/usr/lib/systemd/systemd-binfmt {files}"));
                guarded(vm, &mine)?;
                ensure!(vm.entry("testfmt") == STANDS, "{}", vm.entry("testfmt"));
                ensure!(vm.entry("newfmt") == STANDS, "{}", vm.entry("newfmt"));
            }
            // Until the watcher has seen it, too, and taken it for another distro's.
            thread::sleep(SOON);
            mine.poweroff()?;
            ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
            Ok(())
        })
    }),
    ("by hand: systemd-binfmt beside its unit, and beside a peer", |vm| {
        let rule = format!("{RULE}\n");
        let peer = vm.distro("peer", "trixie").generator(true);
        let peer = peer.file("/etc/binfmt.d/test.conf", &rule).boot()?;
        let mine = vm.distro("mine", "trixie").generator(true);
        let mine = mine.file("/etc/binfmt.d/test.conf", &rule).boot()?;
        mine.run("/usr/lib/systemd/systemd-binfmt test.conf");
        // Nobody can tell whose that is, but the peer is not to lose it.
        peer.run("/usr/lib/systemd/systemd-binfmt test.conf");
        let entry = vm.entry_identity("testfmt")?;
        mine.poweroff()?;
        ensure!(vm.entry_identity("testfmt")? == entry, "it went");
        peer.poweroff()?;
        ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
        Ok(())
    }),
    ("by hand: the table's mount unit is restarted", |vm| {
        everywhere(vm, |vm, distro| {
            let mine = distro.boot()?;
            // While the watcher looks into it, the mount is busy, as with any other process.
            thread::sleep(SOON);
            let said = mine.run("systemctl restart proc-sys-fs-binfmt_misc.mount");
            ensure!(said.is_empty(), "{said}");
            // It restarts the mount over the status file, too, which it has no unit file for, and
            // takes note of the guard's new one only when it has looked at the list of mounts.
            let status = "systemctl is-active proc-sys-fs-binfmt_misc-status.mount";
            within(SOON, || {
                let said = mine.run(status);
                ensure!(said == "active\n", "{status}: {said}");
                Ok(())
            })?;
            guarded(vm, &mine)?;
            stops_without_harm(vm, mine)
        })
    }),
    ("by hand: the table's mount unit is stopped", |vm| {
        everywhere(vm, |vm, distro| {
            let mine = distro.boot()?;
            thread::sleep(SOON);
            let said = mine.run("systemctl stop proc-sys-fs-binfmt_misc.mount");
            ensure!(said.is_empty(), "{said}");
            // Whoever looks into it has it mounted.
            mine.run("systemctl start proc-sys-fs-binfmt_misc.mount");
            guarded(vm, &mine)?;
            stops_without_harm(vm, mine)
        })
    }),
    ("by hand: systemd-binfmt is restarted nine times", |vm| {
        everywhere(vm, |vm, distro| {
            let mine = distro.boot()?;
            for _ in 0..9 {
                let said = mine.run("systemctl restart systemd-binfmt");
                ensure!(said.is_empty(), "{said}");
            }
            ensure!(vm.entry("testfmt") == STANDS, "{}", vm.entry("testfmt"));
            guarded(vm, &mine)?;
            stops_without_harm(vm, mine)
        })
    }),
    ("by hand: a watcher that is killed nine times comes back", |vm| {
        everywhere(vm, |vm, distro| {
            let mine = distro.boot()?;
            let pid = || mine.run("systemctl show --property=MainPID --value wsl-interop-restore");
            for _ in 0..9 {
                let before = pid();
                mine.run("systemctl kill --signal=KILL wsl-interop-restore");
                within(5 * SOON, || {
                    let now = pid();
                    ensure!(now != before && now != "0\n", "{before} is {now}");
                    Ok(())
                })?;
            }
            guarded(vm, &mine)?;
            vm.write("status", "-1")?;
            within(SOON, || served(vm))?;
            within(IN_TIME, || alone(vm))?;
            stops_without_harm(vm, mine)
        })
    }),
    ("by hand: our units are ended if they hang at the table", |vm| {
        let mine = vm.distro("mine", "trixie").generator(true).boot()?;
        mine.dead_automount(vm, TABLE)?;
        let said = mine.run(
            "systemctl start wsl-binfmt-release & systemctl restart wsl-binfmt-guard & wait
            systemctl show --property=Result --value wsl-binfmt-release wsl-binfmt-guard",
        );
        ensure!(said.ends_with("timeout\n\ntimeout\n"), "{said}");
        // systemd-shutdown itself would hang there.
        mine.kill();
        Ok(())
    }),
    ("by hand: a container with an /init of its own, and no mark", |vm| {
        let container = vm
            .distro("container", "trixie")
            .generator(true)
            .without_init()
            .program("/init", "not WSL's")
            .environment(&[])
            .boot()?;
        let emitted = container.run("ls /run/systemd/generator.early 2>/dev/null");
        ensure!(!emitted.contains("wsl"), "{emitted}");
        // Its own systemd has wiped the table.
        let said = container.run("wsl-binfmt restore");
        ensure!(said.contains("/init"), "{said}");
        ensure!(vm.entry("WSLInterop") == "missing");
        Ok(())
    }),
    ("by hand: rivals that nobody can read are ahead", |vm| {
        everywhere(vm, |vm, distro| {
            let mine = distro.boot()?;
            for rule in [
                r":riv\377:M::MZ::/bin/false:",
                r":rival:M::MZ::/bin/fal\nse:",
                r":other:M::MZ::/bin/fal\377se:",
            ] {
                let said = mine.run(&format!("printf '{rule}' >{TABLE}/register"));
                ensure!(said.is_empty(), "{rule}: {said}");
                within(SOON, || {
                    let launched = vm.launch();
                    ensure!(launched == "starts", "{rule}: {launched}");
                    Ok(())
                })?;
            }
            within(IN_TIME, || {
                ensure!(vm.entry("WSLInterop-next") == "missing");
                ensure!(vm.launch() == "starts");
                Ok(())
            })?;
            let identity = vm.entry_identity("WSLInterop")?;
            thread::sleep(2 * SOON);
            ensure!(vm.entry_identity("WSLInterop")? == identity, "a fight");
            mine.run(&format!("for rival in {TABLE}/riv* {TABLE}/other; do echo -1 >$rival; done"));
            stops_without_harm(vm, mine)
        })
    }),
];

/// Under a WSL that does nothing for interop, and under the newest.
fn everywhere(vm: &Vm, play: impl Fn(&Vm, Builder) -> anyhow::Result<()>) -> anyhow::Result<()> {
    for generation in [Generation::None, Generation::Lock] {
        let name = generation.name();
        let distro = vm.distro(name, "trixie").generator(true);
        let distro = distro.file("/etc/binfmt.d/test.conf", &format!("{RULE}\n"));
        play(vm, distro.generation(generation)).with_context(|| format!("WSL's {name}"))?;
    }
    Ok(())
}

fn for_every_service<'vm>(distro: Builder<'vm>, setting: &str) -> Builder<'vm> {
    let drop_in = format!("[Service]\n{setting}\n");
    distro.file("/etc/systemd/system/service.d/sandbox.conf", &drop_in)
}

/// Nobody here can empty the table, and all is well.
fn guarded(vm: &Vm, mine: &Distro) -> anyhow::Result<()> {
    table_is_guarded(vm, mine)?;
    let failed = mine.run("systemctl --failed --plain --no-legend");
    ensure!(state(mine) == RUNNING && failed.is_empty(), "{}\n{failed}", state(mine));
    Ok(())
}

fn table_is_guarded(vm: &Vm, mine: &Distro) -> anyhow::Result<()> {
    within(SOON, || {
        let mounts = mine.run(&format!("grep {TABLE}/status /proc/1/mountinfo"));
        ensure!(mounts.contains(" ro"), "{mounts:?}");
        Ok(())
    })?;
    let said = mine.run(&format!("sh -c 'echo -1 >{TABLE}/status'"));
    ensure!(said.contains("Read-only file system"), "{said:?}");
    ensure!(vm.launch() == "starts", "{}", vm.launch());
    Ok(())
}

/// A wipe is healed; then, at poweroff, a peer keeps what it has, and nothing of this distro is left.
fn stops_without_harm(vm: &Vm, mine: Distro) -> anyhow::Result<()> {
    vm.write("status", "-1")?;
    within(SOON, || served(vm))?;
    within(IN_TIME, || {
        alone(vm)?;
        ensure!(vm.entry("testfmt") == STANDS, "{}", vm.entry("testfmt"));
        Ok(())
    })
    .context("after a wipe")?;
    vm.register(PEERS)?;
    mine.poweroff()?;
    ensure!(vm.launch() == "starts", "{}", vm.launch());
    let (peers, ours) = (vm.entry("peerfmt"), vm.entry("testfmt"));
    ensure!(peers != "missing", "the peer's rule is gone");
    ensure!(ours == "missing", "{ours} stays");
    vm.write("peerfmt", "-1")
}
