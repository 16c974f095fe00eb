//! What others do, on purpose or not, is no failure of ours: units stay active, the journal has one
//! line, `status` tells it; and once it is over, protection goes on by itself.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context};
use wsl_vm::{Builder, Distro, Generation, Vm, WSL_INTEROP};

use crate::ours::{Install, Run};
use crate::promises::{state, RULE};
use crate::stand_in::{alone, served, within, RUNNING, SOON};
use crate::status::look;
use crate::verbs::Test;

const TABLE: &str = "/proc/sys/fs/binfmt_misc";
const STATUS: &str = "/proc/sys/fs/binfmt_misc/status";
const PEERS: &str = ":peerfmt:M::PEERFMT::/bin/cat:";
const MOUNT: &str = "mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc";
/// In a user namespace, how many instances of inotify each user may have.
const INOTIFY: &str = "/proc/sys/user/max_inotify_instances";

pub const OTHERS: &[Test] = &[
    ("others: the entry is disabled at boot", |vm| {
        vm.write("WSLInterop", "0")?;
        let mine = distro(vm).boot()?;
        untroubled(&mine, "WSLInterop is disabled")?;
        ensure!(vm.entries().iter().all(|name| name != "WSLInterop-next"));
        vm.write("WSLInterop", "1")?;
        protected(vm, mine)
    }),
    ("others: another interpreter has our name at boot", |vm| {
        vm.write("WSLInterop", "-1")?;
        vm.register(":WSLInterop:M::MZ::/bin/cat:P")?;
        let mine = distro(vm).boot()?;
        untroubled(&mine, "WSLInterop runs /bin/cat")?;
        vm.write("WSLInterop", "-1")?;
        protected(vm, mine)
    }),
    ("others: a rule whose name is too long to move it", |vm| {
        let name = "n".repeat(245);
        immovable(vm, &name, &format!(":{name}:M::MZqFpD::/bin/echo:"))
    }),
    ("others: a rule whose magic is too long to move it", |vm| {
        let magic = format!("MZq{}", "a".repeat(237));
        let mask = "\x7f".repeat(240);
        immovable(vm, "longmagic", &format!(":longmagic:M::{magic}:{mask}:/bin/echo:"))
    }),
    ("others: instances of inotify are used up", |vm| {
        let mine = distro(vm).boot()?;
        let limit = fs::read_to_string(INOTIFY)?;
        // There are more already, and no more can be had.
        fs::write(INOTIFY, "1")?;
        mine.run("systemctl restart wsl-interop-restore");
        untroubled(&mine, "inotify")?;
        vm.write("status", "-1")?;
        within(2 * SOON, || alone(vm)).context("without inotify")?;
        fs::write(INOTIFY, limit.trim())?;
        thread::sleep(SOON);
        // To look once a second would take longer at one of these.
        for _ in 0..4 {
            vm.write("status", "-1")?;
            let time = within(SOON, || served(vm))?;
            ensure!(time < Duration::from_millis(200), "{time:?}");
            within(SOON, || alone(vm))?;
        }
        protected(vm, mine)
    }),
    ("others: binfmt_misc is unmounted before we start", |vm| {
        let unmount = "[Unit]\nDefaultDependencies=no\nBefore=wsl-binfmt-guard.service\n\
            Before=systemd-binfmt.service wsl-interop-restore.service\n\
            [Service]\nType=oneshot\nExecStart=/bin/umount /proc/sys/fs/binfmt_misc\n";
        let units = "/etc/systemd/system";
        let mine = distro(vm)
            .file(&format!("{units}/unmount.service"), unmount)
            .file(
                &format!("{units}/sysinit.target.d/unmount.conf"),
                "[Unit]\nWants=unmount.service\n",
            )
            .boot()?;
        let there = mine.run(&format!("ls {TABLE}"));
        ensure!(there.is_empty(), "it is mounted: {there}");
        untroubled(&mine, "not mounted")?;
        let mounted = mine.run(MOUNT);
        ensure!(mounted.is_empty(), "{mounted}");
        protected(vm, mine)
    }),
    ("others: binfmt_misc is unmounted later", |vm| {
        let mine = distro(vm).boot()?;
        let unmounted = mine.run(&format!("umount -l {TABLE}"));
        ensure!(unmounted.is_empty(), "{unmounted}");
        thread::sleep(SOON);
        // The watcher may have a mount of its own, and nothing to complain about.
        running(&mine)?;
        let lines = complaints(&mine);
        ensure!(lines.lines().count() <= 1, "{lines}");
        status_tells(&mine, "not mounted")?;
        let mounted = mine.run(MOUNT);
        ensure!(mounted.is_empty(), "{mounted}");
        protected(vm, mine)
    }),
    ("others: a killed watcher comes back, whatever the signal", |vm| {
        let mine = distro(vm).boot()?;
        let pid = || mine.run("systemctl show --property=MainPID --value wsl-interop-restore");
        // Rust's runtime takes no notice of the first SEGV that comes from kill(2).
        for signal in ["KILL", "ABRT", "TERM", "HUP"] {
            let before = pid();
            mine.run(&format!("systemctl kill --signal={signal} wsl-interop-restore"));
            within(Duration::from_secs(5), || {
                let active = mine.run("systemctl is-active wsl-interop-restore");
                ensure!(active == "active\n", "{signal}: {active}");
                let now = pid();
                ensure!(now != before && now != "0\n", "{signal}: {before} is {now}");
                Ok(())
            })?;
            vm.write("status", "-1")?;
            within(SOON, || alone(vm)).context(signal)?;
        }
        protected(vm, mine)
    }),
    ("wsl.conf: protection is switched off while it runs", |vm| {
        let conf = "printf '[boot]\\nprotectBinfmt=false\\n' >/etc/wsl.conf";
        changed(vm, conf, RELEASED, next_start)
    }),
    ("wsl.conf: interop is switched off while it runs", |vm| {
        let conf = "printf '[interop]\\nenabled=false\\n' >/etc/wsl.conf";
        changed(vm, conf, RELEASED, next_start)
    }),
    ("the generator is masked while it runs", |vm| {
        let mask = "mkdir -p /etc/systemd/system-generators
            ln -s /dev/null /etc/systemd/system-generators/wsl-binfmt-generator";
        changed(vm, mask, RELEASED, |_| Ok(()))
    }),
    ("the generator is removed while it runs", |vm| {
        let remove = "rm $(readlink -f /usr/bin/wsl-binfmt)";
        changed(vm, remove, HELD, |_| Ok(()))
    }),
    ("guard: read-only in both mount namespaces", |vm| {
        let mine = distro(vm).boot()?;
        // As WSL makes one for another kind of terminal.
        let second = "unshare --mount --propagation=unchanged \
            sh -c 'echo $$ >/run/second; exec sleep infinity'";
        mine.run(&format!(
            "{second} </dev/null >/dev/null 2>&1 &
            while ! [ -s /run/second ]; do sleep 0.1; done
            umount {STATUS}
            systemctl restart wsl-binfmt-guard"
        ));
        let flush = format!("sh -c 'echo -1 >{STATUS}'");
        for enter in ["", "nsenter -t $(cat /run/second) -m -r -w "] {
            let said = mine.run(&format!("{enter}{flush}"));
            ensure!(said.contains("Read-only file system"), "{enter}: {said:?}");
        }
        ensure!(vm.entry("testfmt") != "missing", "{:?}", vm.entries());
        // Why it makes a new mount: that is seen in both, but not a change of its flags.
        let seen = mine.run(
            "mkdir /run/new; mount -t tmpfs new /run/new; mount -o remount,bind,ro /run/new
            touch /run/new/a && echo here
            nsenter -t $(cat /run/second) -m -r sh -c '
                mountpoint -q /run/new && touch /run/new/a && echo there'",
        );
        ensure!(seen.contains("Read-only file system") && seen.ends_with("\nthere\n"), "{seen}");
        Ok(())
    }),
    ("WSL's generator in the VM writes what its version does", |vm| {
        let networkd = "systemd-networkd-wait-online.service\n";
        let manager = "NetworkManager-wait-online.service\n";
        for (generation, version, written) in [
            (Generation::Dropin, "2.6.3.0", String::new()),
            (Generation::Dropin, "2.7.1.0", format!("{manager}{networkd}")),
            (
                Generation::Lock,
                "2.9.8.0",
                format!("{manager}console-getty.service\n{networkd}wsl-mnt-guard.service\n"),
            ),
        ] {
            let environment = format!("container_host_version_id={version}");
            let mine = vm.distro(version, "trixie").generation(generation);
            let mine = mine.environment(&["container=wsl", &environment]).boot()?;
            let seen = mine.run(
                "cd /run/systemd/generator; find . -maxdepth 1 -lname /dev/null -printf '%f\\n' | sort
                ls | grep wsl-mnt-guard",
            );
            ensure!(seen == written, "{version}: {seen}");
            mine.poweroff()?;
        }
        Ok(())
    }),
    ("guard: its restart loses no rule", |vm| {
        let mine = distro(vm).boot()?;
        let rule = vm.entry_identity("testfmt")?;
        let said = mine.run("systemctl restart wsl-binfmt-guard");
        ensure!(said.is_empty(), "{said}");
        ensure!(vm.entry("testfmt") != "missing", "the rule is gone");
        ensure!(vm.entry_identity("testfmt")? == rule, "registered anew");
        protected(vm, mine)
    }),
    ("guard: status tells of a file that was written to", |vm| {
        let mine = distro(vm).boot()?;
        mine.run(
            "umount /run/wsl-binfmt/status 2>/dev/null
            echo -1 >/run/wsl-binfmt/status",
        );
        let said = check(&mine, "status-file")?;
        ensure!(!said.starts_with("ok"), "{said}");
        ensure!(said.contains("/run/wsl-binfmt/status"), "{said}");
        Ok(())
    }),
    ("flags: more than P and F is fine", |vm| {
        vm.write("WSLInterop", "-1")?;
        vm.register(":WSLInterop:M::MZ::/init:POCF")?;
        let before = vm.entry_identity("WSLInterop")?;
        let output = vm.generator().arg("restore").output()?;
        ensure!(output.status.success(), "{output:?}");
        let mine = distro(vm).boot()?;
        thread::sleep(Duration::from_secs(1));
        ensure!(vm.entry_identity("WSLInterop")? == before, "{output:?}");
        let said = check(&mine, "entry")?;
        ensure!(said.starts_with("ok"), "{said}");
        Ok(())
    }),
    ("flags: status tells what is lost without P", |vm| {
        let mine = distro(vm).boot()?;
        mine.run("systemctl stop wsl-interop-restore");
        vm.write("WSLInterop", "-1")?;
        vm.register(":WSLInterop:M::MZ::/init:F")?;
        let said = check(&mine, "entry")?;
        ensure!(said.starts_with("error"), "{said}");
        ensure!(said.contains("without arguments"), "{said}");
        Ok(())
    }),
];

/// A distro of ours with a rule.
fn distro(vm: &Vm) -> Builder<'_> {
    named(vm, "mine")
}

fn named<'vm>(vm: &'vm Vm, name: &str) -> Builder<'vm> {
    let distro = vm.distro(name, "trixie").generator(true);
    distro.file("/etc/binfmt.d/test.conf", &format!("{RULE}\n"))
}

/// No unit has failed.
fn running(mine: &Distro) -> anyhow::Result<()> {
    let system = mine.run("systemctl is-system-running; systemctl --failed --plain --no-legend");
    ensure!(system == "running\n", "{system}");
    for unit in ["wsl-binfmt-guard", "wsl-interop-restore", "systemd-binfmt"] {
        let show = |property: &str| {
            mine.run(&format!("systemctl show --property={property} --value {unit}"))
        };
        let (state, condition) = (show("ActiveState"), show("ConditionResult"));
        let skipped = (state.trim(), condition.trim()) == ("inactive", "no");
        ensure!(state == "active\n" || skipped, "{unit}: {state}");
    }
    Ok(())
}

/// What the watcher has to complain about, a line each.
fn complaints(mine: &Distro) -> String {
    mine.run("journalctl -b -q -p warning -u wsl-interop-restore -o cat")
}

/// All units are well, and it is told once in the journal, and by `status`.
fn untroubled(mine: &Distro, told: &str) -> anyhow::Result<()> {
    let once = || {
        running(mine)?;
        let lines = complaints(mine);
        ensure!(
            lines.lines().count() == 1 && lines.contains(told),
            "not one line with {told}:\n{lines}"
        );
        Ok(())
    };
    within(SOON, once)?;
    status_tells(mine, told)?;
    // Not that there will be more.
    thread::sleep(SOON);
    once()
}

fn status_tells(mine: &Distro, told: &str) -> anyhow::Result<()> {
    let said = look(mine, "", "");
    ensure!(said.contains(told), "nothing of {told}:\n{said}");
    Ok(())
}

/// Protection goes on: a wipe is healed, and poweroff leaves to others what is theirs.
fn protected(vm: &Vm, mine: Distro) -> anyhow::Result<()> {
    within(SOON, || alone(vm))?;
    vm.write("status", "-1")?;
    within(SOON, || alone(vm)).context("after a wipe")?;
    running(&mine)?;
    vm.register(PEERS)?;
    mine.poweroff()?;
    ensure!(vm.entry("peerfmt") != "missing", "the table was emptied");
    alone(vm).context("after poweroff")
}

/// A rule for some programs comes behind `WSLInterop`, which takes them all, and perhaps it cannot
/// be put ahead.
fn immovable(vm: &Vm, name: &str, rule: &str) -> anyhow::Result<()> {
    vm.register(rule)?;
    vm.write("WSLInterop", "-1")?;
    vm.register(WSL_INTEROP)?;
    let mine = distro(vm).boot()?;
    thread::sleep(SOON);
    let order = vm.entries_in_order();
    let place = |name: &str| order.iter().position(|n| n == name).context("missing");
    if place(name)? < place("WSLInterop")? {
        running(&mine)?;
        ensure!(complaints(&mine).is_empty(), "{}", complaints(&mine));
    } else {
        untroubled(&mine, &name[..name.len().min(20)])?;
    }
    vm.write(name, "-1")?;
    protected(vm, mine)
}

/// What is left of the distro's own rule, which has `F`, after its poweroff.
type Rest = &'static str;
const RELEASED: Rest = "missing";
/// Where no program of ours is left, nobody releases it.
const HELD: Rest = "enabled, interpreter /bin/cat, flags: F";

/// Something is changed of which only the next start of the distro is to take notice.
fn changed(
    vm: &Vm,
    change: &str,
    rest: Rest,
    told: fn(&Distro) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for generation in [Generation::None, Generation::Lock] {
        let name = generation.name();
        let mine = named(vm, name).generation(generation).boot()?;
        let done = mine.run(&format!(
            "set -e
            {change}
            systemctl daemon-reload
            systemctl restart systemd-binfmt"
        ));
        ensure!(done.is_empty(), "{name}: {done}");
        ensure!(state(&mine) == RUNNING, "{name}: {}", state(&mine));
        within(SOON, || alone(vm)).context(name)?;
        told(&mine)?;
        vm.register(PEERS)?;
        mine.poweroff()?;
        alone(vm).with_context(|| format!("{name}: after poweroff"))?;
        ensure!(vm.entry("peerfmt") != "missing", "{name}: emptied");
        let left = vm.entry("testfmt");
        ensure!(left == rest || left == RELEASED, "{name}: {left}");
        vm.write("status", "-1")?;
        vm.register(WSL_INTEROP)?;
    }
    Ok(())
}

/// `status` says when a change of wsl.conf will count.
fn next_start(mine: &Distro) -> anyhow::Result<()> {
    let said = check(mine, "wsl.conf")?;
    ensure!(said.contains("next start"), "{said}");
    // Until then nothing is half there.
    let restarted = mine.run("systemctl restart wsl-interop-restore wsl-binfmt-guard");
    ensure!(restarted.is_empty(), "{restarted}");
    running(mine)
}

/// The line of `status` about something.
fn check(mine: &Distro, what: &str) -> anyhow::Result<String> {
    let said = look(mine, "", "");
    let about = |line: &&str| line.split_whitespace().nth(1) == Some(what);
    let line = said.lines().find(about);
    Ok(line.with_context(|| said.clone())?.to_owned())
}
