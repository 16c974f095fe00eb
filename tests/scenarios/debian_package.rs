//! The Debian package in the hands of dpkg: from the moment that it is installed interop is
//! protected, an upgrade loses no launch, and when it is removed all is as it was.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use anyhow::{ensure, Context};
use wsl_vm::{Builder, Distro, Generation, Vm};

use crate::ours::{Install, Run};
use crate::promises::{state, RULE};
use crate::stand_in::{alone, within, RUNNING, SOON};
use crate::status::look;
use crate::verbs::Test;

/// Whatever the package brings or makes, outside of /var/lib/dpkg.
const TRACES: &str = "find / -xdev -not -path '/proc/*' -not -path '/var/*' \
                      \\( -name '*wsl-binfmt*' -o -name '*wsl-interop*' \\); \
                      find /run -name '*wsl-binfmt*' -o -name '*wsl-interop*'; \
                      systemctl list-units --all --plain --no-legend 'wsl-binfmt*' 'wsl-interop*'; \
                      grep /wsl-binfmt/ /proc/self/mountinfo";

/// Tests with the package; those who run them build it first.
pub const DEBIAN_PACKAGE: &[Test] = &[
    ("the Debian package takes effect and goes without a trace", |vm| live(vm, Generation::None)),
    ("the Debian package beside WSL's own lock", |vm| live(vm, Generation::Lock)),
    ("the Debian package where it is not WSL", |vm| {
        let mine = vm.distro("mine", "trixie").bring_debian_package()?;
        let mine = mine.osrelease("6.12.0-amd64");
        let mine = mine.environment(&[]).without_init().boot()?;
        install(&mine, "package")?;
        let emitted = mine.run("ls /run/systemd/generator.early /run/wsl-binfmt 2>&1 | grep wsl");
        ensure!(!emitted.contains("interop"), "{emitted}");
        dpkg(&mine, "--purge wsl-binfmt-generator")
    }),
    ("the Debian package protects the first session whole", first_sessions),
    ("the Debian package takes no rule from a stock peer", |vm| {
        beside_a_peer(vm, Generation::None)
    }),
    ("the Debian package takes no rule from a stock peer under WSL's own lock", |vm| {
        beside_a_peer(vm, Generation::Lock)
    }),
    ("the Debian package takes over from 0.1.0", |vm| {
        let mine = with_rules(vm, "mine", "OF-MINE", true)?.boot()?;
        // What that wrote down was another file, and it had neither a watcher of this kind nor a
        // directory for each unit.
        let done = mine.run(
            "set -e; cd /run/wsl-binfmt
            systemctl stop wsl-interop-restore
            stat -c '%i %n' /proc/sys/fs/binfmt_misc/*fmt | sed 's, .*/, ,' >registered
            rm before interop wsl.conf *.rules
            rmdir systemd-binfmt binfmt-support",
        );
        ensure!(done.is_empty(), "{done}");
        install(&mine, "package")?;
        is_protected_whole(vm, mine)
    }),
    ("the Debian package starts nothing that is masked", |vm| {
        for (name, before) in [("early", true), ("late", false)] {
            vm.write("status", "-1")?;
            vm.renew_interop()?;
            let mine = with_rules(vm, name, "OF-MINE", false)?;
            let units = "systemd-binfmt.service binfmt-support.service";
            let mine = match before {
                true => mine.masked("systemd-binfmt.service").masked("binfmt-support.service"),
                false => mine,
            };
            let mine = mine.boot()?;
            if !before {
                mine.run(&format!("systemctl mask {units}"));
            }
            let seen =
                || mine.run(&format!("systemctl show -P ActiveState -P InvocationID {units}"));
            let were = seen();
            install(&mine, "package")?;
            ensure!(seen() == were, "{name}: {}, not {were}", seen());
            ensure!(state(&mine).ends_with("running"), "{}", state(&mine));
            within(SOON, || alone(vm))?;
            mine.poweroff()?;
            ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
        }
        Ok(())
    }),
    ("the Debian package keeps to its own system", keeps_to_its_own_system),
    ("the Debian package stays whole if it cannot be removed", |vm| {
        let mine = protected(vm)?;
        let before = Standing::of(&mine);
        let said = mine.run(
            "prerm=/var/lib/dpkg/info/wsl-binfmt-generator.prerm
            [ -e $prerm ] || printf '#!/bin/sh\\n' >$prerm
            echo 'exit 1' >>$prerm; chmod +x $prerm
            dpkg --remove wsl-binfmt-generator",
        );
        ensure!(said.contains("exit status 1"), "{said}");
        before.still_stands(&mine)
    }),
    ("the Debian package goes, and another copy is in charge", |vm| {
        let mine = protected(vm)?;
        let own = "/usr/local/lib/systemd/system-generators";
        mine.run(&format!(
            "mkdir -p {own}; cp /usr/lib/systemd/system-generators/wsl-binfmt-generator {own}"
        ));
        dpkg(&mine, "--purge wsl-binfmt-generator")?;
        let exe = mine.run("readlink /proc/$(systemctl show -P MainPID wsl-interop-restore)/exe");
        ensure!(exe.ends_with(&format!("{own}/wsl-binfmt-generator\n")), "{exe}");
        let guard = mine.run("systemctl is-active wsl-binfmt-guard");
        ensure!(guard == "active\n", "{guard}");
        vm.write("status", "-1")?;
        within(SOON, || {
            let missing = |name: &&str| vm.entry(name) == "missing";
            ensure!(!NAMES.iter().any(missing), "{:?}", vm.entries());
            Ok(())
        })?;
        restart(&mine)?;
        is_protected_whole(vm, mine)
    }),
];

/// A distro with the package, which is installed while it runs.
fn protected(vm: &Vm) -> anyhow::Result<Distro> {
    let mine = with_rules(vm, "mine", "OF-MINE", false)?.boot()?;
    install(&mine, "package")?;
    ensure!(state(&mine) == RUNNING, "{}", state(&mine));
    within(SOON, || alone(vm))?;
    Ok(mine)
}

/// What dpkg is to leave alone. It tells units that were started again, and the output of a
/// generator that was run again.
#[derive(Debug, PartialEq)]
struct Standing(String);

impl Standing {
    fn of(distro: &Distro) -> Standing {
        Standing(distro.run(
            "for unit in wsl-binfmt-guard wsl-interop-restore systemd-binfmt binfmt-support; do
                systemctl show -P ActiveState -P InvocationID -P MainPID $unit
            done
            cd /run; find wsl-binfmt | sort
            find systemd/system systemd/generator.early -printf '%p %i\\n' | sort
            grep ' /proc/sys/fs/binfmt_misc' /proc/self/mountinfo",
        ))
    }

    fn still_stands(&self, distro: &Distro) -> anyhow::Result<()> {
        let now = Standing::of(distro);
        ensure!(now == *self, "{}\nnot\n{}", now.0, self.0);
        Ok(())
    }
}

/// Installed and purged in a tree within the distro, in ways in which images are made and containers
/// run, each with the distro's /run; and in the distro itself, where that is not to have effect.
fn keeps_to_its_own_system(vm: &Vm) -> anyhow::Result<()> {
    let mine = protected(vm)?;
    let made = mine.run(
        "set -e; cd /; mkdir -p srv/tree
        cp -a bin etc lib lib64 sbin usr var srv/tree; cd srv/tree
        mkdir dev proc root run tmp; mount --bind /dev dev; mount --rbind --make-rslave /run run",
    );
    ensure!(made.is_empty(), "{made}");
    let before = Standing::of(&mine);
    let policy = "printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d";
    for (prepare, how) in [
        ("", "dpkg --root=/srv/tree"),
        ("", "dpkg --root=/srv/tree --force-script-chrootless"),
        ("", "unshare --mount --pid --fork --mount-proc=/srv/tree/proc chroot /srv/tree dpkg"),
        ("mount --rbind --make-rslave /proc /srv/tree/proc", "chroot /srv/tree dpkg"),
        ("", "SYSTEMD_OFFLINE=1 dpkg"),
        (policy, "dpkg"),
    ] {
        mine.run(prepare);
        for what in ["--purge wsl-binfmt-generator", "--install /var/package/*.deb"] {
            let said = mine.run(&format!("{how} {what} && echo done"));
            ensure!(said.ends_with("done\n"), "{how} {what}: {said}");
            before.still_stands(&mine).with_context(|| format!("{how} {what}"))?;
        }
    }
    is_protected_whole(vm, mine)
}

/// Of the distro's own, a rule with `F` and one without; and a format that is binfmt-support's.
const RULES: &str = ":ownfmt:M::OWNFMT::/usr/local/bin/own:F\n:plainfmt:M::PLAIN::/bin/cat:\n";
const FORMAT: &str = "supportfmt\nmagic\n0\nSUPPORT\n\n/usr/local/bin/own\n\n\n\nyes\n";
const NAMES: [&str; 3] = ["ownfmt", "plainfmt", "supportfmt"];

/// A distro with all of that, and the files of the package if it has it from the start.
fn with_rules<'vm>(
    vm: &'vm Vm,
    name: &str,
    whose: &str,
    packaged: bool,
) -> anyhow::Result<Builder<'vm>> {
    let formats = PathBuf::from(format!("/vm/{name}/upper/var/lib/binfmts"));
    fs::create_dir_all(&formats)?;
    fs::write(formats.join("supportfmt"), FORMAT)?;
    // What is registered at once when such a file is written, is known by that to be this distro's.
    File::open(formats.join("supportfmt"))?.set_modified(UNIX_EPOCH)?;
    let distro = match packaged {
        true => vm.packaged(name)?,
        false => vm.distro(name, "trixie"),
    };
    let distro = distro.bring_debian_package()?.binfmt_support();
    let distro = distro.program("/usr/local/bin/own", whose);
    // Python's, which comes with the tree, is not what this is about.
    let distro = distro.file("/etc/binfmt.d/python3.13.conf", "");
    Ok(distro.file("/etc/binfmt.d/own.conf", RULES))
}

/// Installed in a distro that has run without it so far.
fn first_sessions(vm: &Vm) -> anyhow::Result<()> {
    for generation in Generation::ALL {
        let name = generation.name();
        vm.write("status", "-1")?;
        vm.renew_interop()?;
        let mine = with_rules(vm, name, "OF-MINE", false)?;
        let mine = mine.generation(generation).boot()?;
        install(&mine, "package").context(name)?;
        is_protected_whole(vm, mine).context(name)?;
    }
    Ok(())
}

/// Nothing is left to be wanted, and nothing is left after the poweroff.
fn is_protected_whole(vm: &Vm, mine: Distro) -> anyhow::Result<()> {
    ensure!(state(&mine) == RUNNING, "{}", state(&mine));
    let records = mine.run("cat /run/wsl-binfmt/*.rules");
    for name in NAMES {
        let inode = format!("{} - ", vm.entry_identity(name)?);
        let of = |line: &str| line.starts_with(&inode) && line.contains(&format!(":{name}:"));
        ensure!(records.lines().any(of), "{inode}{name}: {records}");
    }
    within(SOON, || alone(vm))?;
    mine.poweroff()?;
    ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
    Ok(())
}

/// Installed beside a peer that has the same rules, whichever of the two had started first: the
/// peer's stay, and run the peer's program.
fn beside_a_peer(vm: &Vm, generation: Generation) -> anyhow::Result<()> {
    for peer_is_first in [true, false] {
        let suffix = if peer_is_first { "first" } else { "second" };
        let (mine, peer) = (format!("mine-{suffix}"), format!("peer-{suffix}"));
        vm.write("status", "-1")?;
        vm.renew_interop()?;
        let boot = |name: &str, whose| {
            let distro = with_rules(vm, name, whose, false)?;
            distro.generation(generation).boot()
        };
        let mut peer_distro = None;
        if peer_is_first {
            peer_distro = Some(boot(&peer, "OF-PEER")?);
        }
        let mine = boot(&mine, "OF-MINE")?;
        let peer = match peer_distro {
            Some(distro) => distro,
            None => boot(&peer, "OF-PEER")?,
        };
        install(&mine, "package").context(suffix)?;
        ensure!(state(&mine) == RUNNING, "{suffix}: {}", state(&mine));
        let ran = run_in(&mine, "OWNFMT");
        ensure!(ran.starts_with("OF-MINE"), "{suffix}, installed: {ran}");
        mine.poweroff()?;
        for (magic, whose) in [("OWNFMT", "OF-PEER"), ("SUPPORT", "OF-PEER"), ("PLAIN", "PLAIN")] {
            let ran = run_in(&peer, magic);
            ensure!(ran.starts_with(whose), "{suffix}, {magic} run by {ran:?}");
        }
        let entry = vm.entry("plainfmt");
        let as_it_was = "enabled, interpreter /bin/cat, flags: ";
        ensure!(entry == as_it_was, "{suffix}, plainfmt: {entry}");
    }
    Ok(())
}

/// What comes of running a file with that magic in a distro.
fn run_in(distro: &Distro, magic: &str) -> String {
    distro.run(&format!("printf {magic} >/run/file; chmod +x /run/file; /run/file"))
}

/// Installs, upgrades, removes and purges it, with launches all the time.
fn live(vm: &Vm, generation: Generation) -> anyhow::Result<()> {
    let mine = vm.distro("mine", "trixie").bring_debian_package()?;
    let mine =
        mine.generation(generation).file("/etc/binfmt.d/test.conf", &format!("{RULE}\n")).boot()?;
    let before = Seen::of(vm, &mine);
    vm.renew_interop()?;

    let hammer = vm.hammer_with_pauses();
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
                     systemctl list-units --all --plain --no-legend 'wsl-binfmt*' 'wsl-interop*'";
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
    ensure!(!complaints.iter().any(|c| said.contains(c)), "dpkg {what}: {said}");
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
