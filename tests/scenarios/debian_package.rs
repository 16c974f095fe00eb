//! The Debian package in the hands of dpkg: from the moment that it is installed interop is
//! protected, an upgrade loses no launch, and when it is removed all is as it was.

use anyhow::ensure;
use wsl_vm::{Distro, Generation, Vm};

use crate::promises::RULE;
use crate::status::look;
use crate::verbs::Test;

/// Whatever the package brings or makes, outside of /var/lib/dpkg.
const TRACES: &str = "find / -xdev -not -path '/proc/*' -not -path '/var/*' \
                      \\( -name '*wsl-binfmt*' -o -name '*wsl-interop*' \\); \
                      find /run -name '*wsl-binfmt*' -o -name '*wsl-interop*'; \
                      systemctl list-units --all --plain --no-legend 'wsl-*'; \
                      grep /wsl-binfmt/ /proc/self/mountinfo";

/// Tests with the package; those who run them build it first.
pub const DEBIAN_PACKAGE: &[Test] = &[
    (
        "the Debian package takes effect and goes without a trace",
        |vm| live(vm, Generation::None),
    ),
    ("the Debian package beside WSL's own lock", |vm| {
        live(vm, Generation::Lock)
    }),
    ("the Debian package where it is not WSL", |vm| {
        let mine = vm.distro("mine", "trixie").osrelease("6.12.0-amd64");
        vm.bring_debian_package("mine")?;
        let mine = mine.environment(&[]).without_init().boot()?;
        install(&mine, "package")?;
        let emitted = mine.run("ls /run/systemd/generator.early /run/wsl-binfmt 2>&1 | grep wsl");
        ensure!(!emitted.contains("interop"), "{emitted}");
        dpkg(&mine, "--purge wsl-binfmt-generator")
    }),
];

/// Installs, upgrades, removes and purges it, with launches all the time.
fn live(vm: &Vm, generation: Generation) -> anyhow::Result<()> {
    let mine = vm.distro("mine", "trixie").generation(generation);
    vm.bring_debian_package("mine")?;
    let mine = mine
        .file("/etc/binfmt.d/test.conf", &format!("{RULE}\n"))
        .boot()?;
    let before = Seen::of(vm, &mine);
    vm.renew_interop()?;

    let hammer = vm.hammer();
    install(&mine, "package")?;
    let status = look(&mine, "", "");
    let is_bad = |line: &&str| line.starts_with("error") || line.starts_with("warning");
    let bad: Vec<_> = status.lines().filter(is_bad).collect();
    // In a shell without a WSL terminal there is no socket for Windows programs.
    ensure!(bad.len() == 1 && bad[0].contains("WSL_INTEROP"), "{status}");
    restart(&mine)?;
    let watcher = pid(&mine);
    install(&mine, "upgrade")?;
    ensure!(pid(&mine) != watcher, "the old program watches on");
    let exe = mine.run("readlink /proc/$(systemctl show -P MainPID wsl-interop-restore)/exe");
    ensure!(!exe.contains("deleted"), "{exe}");
    restart(&mine)?;
    dpkg(&mine, "--remove wsl-binfmt-generator")?;
    let launches = hammer.stop();
    ensure!(launches.failed == 0, "{launches:?}");

    let after = Seen::of(vm, &mine);
    ensure!(after == before, "{after:#?}\nnot {before:#?}");
    dpkg(&mine, "--purge wsl-binfmt-generator")?;
    let traces = mine.run(TRACES);
    ensure!(traces.is_empty(), "{traces}");
    // And installed again, as after any purge.
    vm.renew_interop()?;
    install(&mine, "package")?;
    restart(&mine)?;
    ensure!(vm.launch() == "starts", "{}", vm.launch());
    Ok(())
}

/// What a distro without us looks like.
#[derive(Debug, PartialEq)]
struct Seen {
    entries: Vec<String>,
    units: String,
    mounts: String,
    status: String,
}

impl Seen {
    fn of(vm: &Vm, distro: &Distro) -> Seen {
        // What the stock unit does to the table, and what becomes of it.
        distro.run("systemctl reset-failed systemd-binfmt; systemctl restart systemd-binfmt");
        let units = "systemctl cat systemd-binfmt.service binfmt-support.service; \
                     systemctl show -P ActiveState -P Result systemd-binfmt; \
                     systemctl list-units --all --plain --no-legend 'wsl-*'";
        Seen {
            entries: vm.entries(),
            units: distro.run(units),
            mounts: distro.run("grep -c binfmt_misc /proc/self/mountinfo"),
            status: distro.run("cat /proc/sys/fs/binfmt_misc/status"),
        }
    }
}

fn install(distro: &Distro, which: &str) -> anyhow::Result<()> {
    dpkg(distro, &format!("--install /var/{which}/*.deb"))
}

fn dpkg(distro: &Distro, what: &str) -> anyhow::Result<()> {
    let said = distro.run(&format!("dpkg {what} && echo done"));
    let complaints = ["warning", "error", "Failed", "failed", "ignoring"];
    ensure!(said.ends_with("done\n"), "dpkg {what}: {said}");
    ensure!(
        !complaints.iter().any(|c| said.contains(c)),
        "dpkg {what}: {said}"
    );
    Ok(())
}

fn restart(distro: &Distro) -> anyhow::Result<()> {
    let said = distro.run("systemctl daemon-reload && systemctl restart systemd-binfmt");
    ensure!(said.is_empty(), "{said}");
    Ok(())
}

fn pid(distro: &Distro) -> String {
    distro.run("systemctl show -P MainPID wsl-interop-restore")
}
