//! Real packages, with their own scripts and triggers, installed, upgraded and purged by apt while
//! Windows programs are launched all the time.

use std::thread;
use std::time::Duration;

use anyhow::ensure;
use wsl_vm::{Distro, Launches};

use crate::ours::Install;
use crate::promises::{Expect, Scenario, Setting};

/// The suites that the packages come from.
pub const SUITES: &[&str] = &["bookworm", "trixie"];

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        // dpkg's trigger for /usr/lib/binfmt.d restarts systemd-binfmt.
        name: "qemu-user-static installed, upgraded and purged",
        play: |setting| {
            let mine = without_binfmt_support(setting)?;
            let mut seen = foreign_program(&mine, "before");
            for what in ["install qemu-user-static", "upgrade qemu-user-static", "purge ^qemu-user"]
            {
                let started = mine.run(STARTED);
                let failed = some_failed(&under_hammer(setting, &mine, what)?);
                let restarted = match mine.run(STARTED) == started {
                    true => "not restarted",
                    false => "restarted",
                };
                seen.push(format!("{what}: systemd-binfmt {restarted}, failed launches: {failed}"));
                if what.starts_with("upgrade") {
                    seen.extend(foreign_program(&mine, "now"));
                }
            }
            seen.extend(foreign_program(&mine, "afterwards"));
            Ok(seen)
        },
        expect: Expect::Differs {
            stock: &[
                "foreign program, before: does not run",
                "foreign program in a chroot, before: does not run",
                "install qemu-user-static: systemd-binfmt restarted, failed launches: some",
                "upgrade qemu-user-static: systemd-binfmt restarted, failed launches: some",
                "foreign program, now: runs",
                "foreign program in a chroot, now: runs",
                "purge ^qemu-user: systemd-binfmt restarted, failed launches: some",
                "foreign program, afterwards: does not run",
                "foreign program in a chroot, afterwards: does not run",
            ],
            ours: &[
                "foreign program, before: does not run",
                "foreign program in a chroot, before: does not run",
                "install qemu-user-static: systemd-binfmt restarted, failed launches: none",
                "upgrade qemu-user-static: systemd-binfmt restarted, failed launches: none",
                "foreign program, now: runs",
                "foreign program in a chroot, now: runs",
                "purge ^qemu-user: systemd-binfmt restarted, failed launches: none",
                "foreign program, afterwards: does not run",
                "foreign program in a chroot, afterwards: does not run",
            ],
        },
    },
    Scenario {
        // On Debian 12, systemd's trigger leaves the formats to a running binfmt-support; it
        // restarts systemd-binfmt once that is purged.
        name: "qemu-user-static together with binfmt-support",
        play: |setting| {
            let mine = without_binfmt_support(setting)?;
            let both = "install qemu-user-static binfmt-support";
            let mut launches = under_hammer(setting, &mine, both)?;
            let mut seen = foreign_program(&mine, "now");
            let purged = under_hammer(setting, &mine, "purge ^qemu-user binfmt-support")?;
            launches.failed += purged.failed;
            seen.push(format!("failed launches: {}", some_failed(&launches)));
            Ok(seen)
        },
        expect: Expect::Differs {
            stock: &[
                "foreign program, now: runs",
                "foreign program in a chroot, now: runs",
                "failed launches: some",
            ],
            ours: &[
                "foreign program, now: runs",
                "foreign program in a chroot, now: runs",
                "failed launches: none",
            ],
        },
    },
    Scenario {
        // Almost every distro has this one, and its file for binfmt.d.
        name: "a package purged, and its format with it",
        play: |setting| {
            let mine = without_binfmt_support(setting)?;
            // binfmt-support took this format with it.
            mine.run("systemctl restart systemd-binfmt");
            let formats = || {
                let mut names = setting.vm.entries();
                names.retain(|name| name.starts_with("python"));
                names.len()
            };
            let before = formats();
            let launches = under_hammer(setting, &mine, "purge python3-minimal")?;
            Ok(vec![
                format!("failed launches: {}", some_failed(&launches)),
                format!("formats of python: {before}, then {}", formats()),
            ])
        },
        expect: Expect::Differs {
            stock: &["failed launches: some", "formats of python: 1, then 0"],
            ours: &["failed launches: none", "formats of python: 1, then 0"],
        },
    },
    Scenario {
        // Its rule for MZ comes later than WSL's, and so first. Somebody has to notice that: a
        // launch in the moment until then may fail.
        name: "mono-runtime installed, upgraded and purged",
        play: |setting| {
            let mine = boot(setting)?;
            let mut seen = Vec::new();
            for change in ["install", "upgrade", "purge"] {
                let what = format!("{change} mono-runtime");
                let launches = under_hammer(setting, &mine, &what)?;
                let outage = match launches.longest_outage > WAIT / 2 {
                    // How long it lasts without us, until the rule is gone, is up to dpkg.
                    _ if change == "purge" => "done",
                    true => "an outage",
                    false => "a moment at most",
                };
                seen.push(format!("{what}: {outage}, then .exe {}", mine.launch()));
            }
            Ok(seen)
        },
        expect: Expect::Differs {
            stock: &[
                "install mono-runtime: an outage, then .exe does not start",
                "upgrade mono-runtime: an outage, then .exe does not start",
                "purge mono-runtime: done, then .exe starts",
            ],
            ours: &[
                "install mono-runtime: a moment at most, then .exe starts",
                "upgrade mono-runtime: a moment at most, then .exe starts",
                "purge mono-runtime: done, then .exe starts",
            ],
        },
    },
];

/// How long Windows programs are launched once it is done: what is out of order then stays so.
const WAIT: Duration = Duration::from_millis(400);

/// Tells one start of a service from the next.
const STARTED: &str = "systemctl show --property=InvocationID systemd-binfmt";

fn boot(setting: &Setting) -> anyhow::Result<Distro> {
    setting
        .vm
        .distro("mine", setting.suite)
        .bring_packages(setting.suite)?
        .generator(setting.ours)
        .binfmt_support()
        .boot()
}

fn without_binfmt_support(setting: &Setting) -> anyhow::Result<Distro> {
    let mine = boot(setting)?;
    apt(&mine, "purge binfmt-support")?;
    Ok(mine)
}

/// `install`, `upgrade` or `purge`, and packages.
fn apt(distro: &Distro, what: &str) -> anyhow::Result<()> {
    let mut words = what.split(' ');
    let change = words.next().unwrap_or_default();
    let mut command = match change {
        "purge" => "purge --autoremove".to_owned(),
        _ => "install --no-install-recommends".to_owned(),
    };
    for package in words {
        command += &match change {
            "install" => format!(" /var/packages/{package}/*.deb"),
            "upgrade" => format!(" /var/packages/{package}/upgrade/*.deb"),
            _ => format!(" {package}"),
        };
    }
    let said = distro.run(&format!(
        "export DEBIAN_FRONTEND=noninteractive; \
         apt-get -q -y -o APT::Sandbox::User=root {command} && echo done"
    ));
    ensure!(said.ends_with("done\n"), "{what}: {said}");
    Ok(())
}

/// How launches go while apt does that, and for a moment after.
fn under_hammer(setting: &Setting, mine: &Distro, what: &str) -> anyhow::Result<Launches> {
    // What one change has broken must not make the next one fail.
    setting.vm.renew_interop()?;
    let hammer = setting.vm.hammer_with_pauses();
    let done = apt(mine, what);
    thread::sleep(WAIT);
    let launches = hammer.stop();
    done?;
    let all = launches.started + launches.failed;
    ensure!(all > 50, "too few launches to tell: {launches:?}");
    Ok(launches)
}

fn some_failed(launches: &Launches) -> &'static str {
    match launches.failed {
        0 => "none",
        _ => "some",
    }
}

/// Runs a program for another architecture, also where no interpreter can be found by its path.
fn foreign_program(mine: &Distro, when: &str) -> Vec<String> {
    let program = "/var/packages/foreign/busybox";
    let run = |launch: &str| {
        let answer = mine.run(&format!("{launch} echo runs 2>&- || echo does not run"));
        answer.trim().to_owned()
    };
    mine.run(&format!("mkdir -p /srv/chroot && cp {program} /srv/chroot"));
    vec![
        format!("foreign program, {when}: {}", run(&format!("env {program}"))),
        format!("foreign program in a chroot, {when}: {}", run("chroot /srv/chroot /busybox")),
    ]
}
