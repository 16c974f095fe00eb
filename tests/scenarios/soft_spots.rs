//! Where it could give way: what admins, distributions and mishaps do to the units.

use std::sync::{mpsc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use wsl_vm::Distro;

use crate::ours::Install;
use crate::promises::{state, Expect, Scenario, Setting};

const PF: &str = "WSLInterop: enabled, interpreter /init, flags: PF";
const MISSING: &str = "WSLInterop: missing";
const RULE: &str = "testfmt: enabled, interpreter /bin/cat, flags: F";
/// Ubuntu's, 2024 and 2025.
const UBUNTUS: &str = "# Ubuntu\n[Unit]\nConditionVirtualization=!wsl\n";
const UBUNTUS_PATH: &str = "/usr/lib/systemd/system/systemd-binfmt.service.d/wsl.conf";

pub const SOFT_SPOTS: &[Scenario] = &[
    Scenario {
        name: "a wipe from outside, and after the watcher was killed",
        play: |setting| {
            let mine = setting.mine().boot()?;
            setting.vm.renew_interop()?;
            setting.vm.write("status", "-1")?;
            let first = setting.settled();
            mine.run("systemctl kill --signal=KILL wsl-interop-restore");
            setting.vm.write("status", "-1")?;
            Ok(vec![first, setting.settled(), state(&mine)])
        },
        expect: Expect::Differs {
            stock: &[MISSING, MISSING, "systemd-binfmt active, system running"],
            ours: &[PF, PF, "systemd-binfmt active, system running"],
        },
    },
    Scenario {
        name: "Ubuntu's condition against WSL",
        play: |setting| {
            let mine = setting.mine().file(UBUNTUS_PATH, UBUNTUS).boot()?;
            Ok(vec![setting.entry("testfmt"), setting.exe("at boot"), state(&mine)])
        },
        expect: Expect::Differs {
            stock: &[
                "testfmt: missing",
                ".exe at boot: starts",
                "systemd-binfmt inactive, system running",
            ],
            ours: &[RULE, ".exe at boot: starts", "systemd-binfmt active, system running"],
        },
    },
    Scenario {
        name: "a condition of the admin's own",
        play: |setting| {
            let admins = "/etc/systemd/system/systemd-binfmt.service.d/wsl.conf";
            let mine = setting.mine().file(UBUNTUS_PATH, UBUNTUS).file(admins, UBUNTUS);
            let mine = mine.boot()?;
            Ok(vec![setting.entry("testfmt"), setting.exe("at boot"), state(&mine)])
        },
        expect: Expect::Same(&[
            "testfmt: missing",
            ".exe at boot: starts",
            "systemd-binfmt inactive, system running",
        ]),
    },
    Scenario {
        name: "the start limit",
        play: |setting| {
            let mine = setting.mine().boot()?;
            setting.vm.renew_interop()?;
            mine.run("for i in 1 2 3 4 5 6 7 8; do systemctl restart systemd-binfmt; done");
            let result = mine.run("systemctl show --property=Result --value systemd-binfmt");
            Ok(vec![result.trim().to_owned(), setting.exe("then")])
        },
        expect: Expect::Differs {
            stock: &["start-limit-hit", ".exe then: Exec format error"],
            ours: &["success", ".exe then: starts"],
        },
    },
    Scenario {
        name: "systemd-binfmt masked",
        play: |setting| {
            let mine = setting.mine().masked("systemd-binfmt.service").boot()?;
            setting.vm.write("status", "-1")?;
            let seen = setting.settled();
            setting.vm.renew_interop()?;
            let state = state(&mine);
            mine.poweroff()?;
            Ok(vec![seen, state, setting.exe("after poweroff")])
        },
        expect: Expect::Differs {
            stock: &[
                MISSING,
                "systemd-binfmt inactive, system running",
                ".exe after poweroff: Exec format error",
            ],
            ours: &[PF, "systemd-binfmt inactive, system running", ".exe after poweroff: starts"],
        },
    },
    Scenario {
        name: "the admin's drop-ins, before and after ours",
        play: |setting| {
            let drop_in =
                |name: &str| format!("/etc/systemd/system/systemd-binfmt.service.d/{name}.conf");
            let mine = setting
                .mine()
                .file(&drop_in("05-admin"), "[Service]\nExecStartPost=/bin/touch /run/before\n")
                .file(&drop_in("override"), "[Service]\nExecStartPost=/bin/touch /run/after\n")
                .boot()?;
            let ran = mine.run("cd /run && ls before after");
            Ok(vec![ran.trim().replace('\n', " "), setting.exe("at boot"), state(&mine)])
        },
        expect: Expect::Differs {
            stock: &[
                "after before",
                ".exe at boot: Exec format error",
                "systemd-binfmt active, system running",
            ],
            ours: &[
                "after before",
                ".exe at boot: starts",
                "systemd-binfmt active, system running",
            ],
        },
    },
    Scenario {
        name: "daemon-reexec, daemon-reload, and no systemd-binfmt",
        play: |setting| {
            let mine = setting.mine().boot()?;
            let mut seen = Vec::new();
            for (what, command) in [
                ("daemon-reexec", "systemctl daemon-reexec"),
                ("daemon-reload", "systemctl daemon-reload"),
                (
                    "no systemd-binfmt",
                    "rm /usr/lib/systemd/systemd-binfmt && systemctl daemon-reload",
                ),
            ] {
                setting.vm.renew_interop()?;
                seen.push(mine.run(command).trim().to_owned());
                mine.run("systemctl restart systemd-binfmt");
                seen.push(setting.exe(what));
                seen.push(state(&mine));
            }
            Ok(seen)
        },
        expect: Expect::Differs {
            // What is not there cannot empty the table.
            stock: &[
                "",
                ".exe daemon-reexec: Exec format error",
                "systemd-binfmt active, system running",
                "",
                ".exe daemon-reload: Exec format error",
                "systemd-binfmt active, system running",
                "",
                ".exe no systemd-binfmt: starts",
                "systemd-binfmt failed, system degraded",
            ],
            ours: &[
                "",
                ".exe daemon-reexec: starts",
                "systemd-binfmt active, system running",
                "",
                ".exe daemon-reload: starts",
                "systemd-binfmt active, system running",
                "",
                ".exe no systemd-binfmt: starts",
                "systemd-binfmt failed, system degraded",
            ],
        },
    },
    Scenario {
        name: "a read-only root",
        play: |setting| {
            let mine = setting.mine().read_only().boot()?;
            let read_only = mine.run("touch /x").contains("Read-only file system");
            let mut seen = vec![format!("read-only: {read_only}"), setting.exe("at boot")];
            mine.run("systemctl daemon-reload; systemctl restart systemd-binfmt");
            let unit = mine.run("systemctl is-active systemd-binfmt");
            seen.extend([
                setting.exe("after restart"),
                setting.entry("testfmt"),
                unit.trim().to_owned(),
            ]);
            Ok(seen)
        },
        expect: Expect::Differs {
            stock: &[
                "read-only: true",
                ".exe at boot: Exec format error",
                ".exe after restart: Exec format error",
                RULE,
                "active",
            ],
            ours: &[
                "read-only: true",
                ".exe at boot: starts",
                ".exe after restart: starts",
                RULE,
                "active",
            ],
        },
    },
    Scenario {
        name: "rescue mode, and poweroff from there",
        play: |setting| {
            let mine = setting.mine().boot()?;
            mine.run("systemctl rescue");
            setting.vm.renew_interop()?;
            setting.vm.register(":peerfmt:M::PEER::/bin/cat:")?;
            mine.poweroff()?;
            Ok(vec![setting.entry("WSLInterop"), setting.entry("peerfmt")])
        },
        expect: Expect::Differs {
            stock: &[MISSING, "peerfmt: missing"],
            ours: &[PF, "peerfmt: enabled, interpreter /bin/cat, flags: "],
        },
    },
    Scenario {
        name: "a boot that ends in emergency mode, and poweroff from there",
        play: |setting| {
            let fstab = "/missing /mnt ext4 x-systemd.device-timeout=1 0 0\n";
            let mine = setting.mine().file("/etc/fstab", fstab).boot()?;
            let state = mine.run("systemctl is-system-running");
            setting.vm.renew_interop()?;
            setting.vm.register(":peerfmt:M::PEER::/bin/cat:")?;
            mine.poweroff()?;
            Ok(vec![state.trim().to_owned(), setting.entry("WSLInterop"), setting.entry("peerfmt")])
        },
        expect: Expect::Differs {
            stock: &["maintenance", MISSING, "peerfmt: missing"],
            ours: &["maintenance", PF, "peerfmt: enabled, interpreter /bin/cat, flags: "],
        },
    },
    Scenario {
        name: "six distros that boot at once",
        play: |setting| {
            // More would be too many instances of inotify: root has 128, in all VMs together. A
            // distro dies with the thread that booted it.
            let (booted, distros) = mpsc::channel();
            let looked = Barrier::new(7);
            thread::scope(|scope| {
                for n in 0..6 {
                    let (booted, looked) = (booted.clone(), &looked);
                    scope.spawn(move || {
                        let distro = six_of(setting, n);
                        let state = distro.as_ref().map(state).map_err(ToString::to_string);
                        booted.send(state).expect("somebody listens");
                        looked.wait();
                    });
                }
                let states = distros.iter().take(6);
                let running =
                    states.filter(|s| s.as_ref().is_ok_and(|s| s.ends_with("system running")));
                let seen = vec![
                    format!("{} running", running.count()),
                    setting.settled(),
                    setting.entry("WSLInterop-next"),
                    setting.exe("then"),
                ];
                looked.wait();
                Ok(seen)
            })
        },
        expect: Expect::Differs {
            stock: &[
                "6 running",
                MISSING,
                "WSLInterop-next: missing",
                ".exe then: Exec format error",
            ],
            ours: &["6 running", PF, "WSLInterop-next: missing", ".exe then: starts"],
        },
    },
    Scenario {
        name: "a rule for MZ in binfmt.d, and one of update-binfmts",
        play: |setting| {
            let rules = ":wine:M::MZ::/bin/echo:\n:exe:E::exe::/bin/echo:\n";
            let mine =
                setting.mine().binfmt_support().file("/etc/binfmt.d/wine.conf", rules).boot()?;
            setting.vm.renew_interop()?;
            let mut seen = vec![setting.exe("at boot")];
            mine.run("systemctl restart systemd-binfmt");
            seen.push(setting.exe("after restart"));
            mine.run(
                "printf 'package cli\\ninterpreter /bin/echo\\nmagic MZ\\n' >/usr/share/binfmts/cli; \
                 update-binfmts --import cli",
            );
            setting.settled();
            seen.extend([setting.exe("after update-binfmts"), setting.entry("cli")]);
            Ok(seen)
        },
        expect: Expect::Differs {
            stock: &[
                ".exe at boot: starts",
                ".exe after restart: exit status: 0: \"/vm/hello.exe a b\\n\"",
                ".exe after update-binfmts: exit status: 0: \"/vm/hello.exe a b\\n\"",
                "cli: enabled, interpreter /bin/echo, flags: ",
            ],
            ours: &[
                ".exe at boot: starts",
                ".exe after restart: starts",
                ".exe after update-binfmts: starts",
                "cli: enabled, interpreter /bin/echo, flags: ",
            ],
        },
    },
];

/// systemd 254 and later.
pub const SOFT_REBOOT: &[Scenario] = &[Scenario {
    name: "soft-reboot",
    play: |setting| {
        let mine = setting.mine().boot()?;
        setting.vm.renew_interop()?;
        let before = userspace(&mine).context("it does not run")?;
        let answer = mine.run("systemctl --no-block soft-reboot");
        let start = Instant::now();
        while userspace(&mine).is_none_or(|now| now == before) {
            let up = start.elapsed() < Duration::from_secs(120);
            anyhow::ensure!(up, "'{answer}', and then {}", state(&mine));
            thread::sleep(Duration::from_millis(50));
        }
        Ok(vec![setting.exe("then"), setting.entry("testfmt"), state(&mine)])
    },
    expect: Expect::Differs {
        stock: &[".exe then: Exec format error", RULE, "systemd-binfmt active, system running"],
        ours: &[".exe then: starts", RULE, "systemd-binfmt active, system running"],
    },
}];

/// When the distro's userspace started, once all of it has.
fn userspace(distro: &Distro) -> Option<u64> {
    let shown = distro.run("systemctl show --property=UserspaceTimestampMonotonic,SystemState");
    let value = |name| shown.lines().find_map(|line| line.strip_prefix(name));
    let runs = value("SystemState=") == Some("running");
    let start = value("UserspaceTimestampMonotonic=").filter(|_| runs);
    start?.parse().ok()
}

/// One of many, with a rule of its own. Python's, which all would have, is left out: where two of
/// systemd-binfmt register the same name in the same instant, one fails with "File exists", which
/// README.md tells as what remains.
fn six_of(setting: &Setting, n: u32) -> anyhow::Result<Distro> {
    setting
        .vm
        .distro(&format!("distro{n}"), setting.suite)
        .generator(setting.ours)
        .file("/etc/binfmt.d/python3.13.conf", "")
        .file("/etc/binfmt.d/own.conf", &format!(":own{n}:M::OWN{n}::/bin/cat:F\n"))
        .boot()
}
