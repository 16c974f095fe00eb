//! The promises: what is seen on a stock system, and what with us.

use anyhow::{ensure, Context};
use wsl_vm::{Builder, Distro, Vm, WSL_INTEROP};

use crate::ours::Install;
use crate::stand_in::{alone, within, IN_TIME, SOON};

/// A rule of the distro's own, as qemu's are: with `F`.
pub const RULE: &str = r":testfmt:M::\x01\x02\x03\x04::/bin/cat:F";

/// Something that befalls a distro.
pub struct Scenario {
    pub name: &'static str,
    /// What is seen, line by line.
    pub play: fn(&Setting) -> anyhow::Result<Vec<String>>,
    pub expect: Expect,
}

/// What has to be seen.
pub enum Expect {
    /// What is seen on a stock system, and what with us.
    Differs { stock: &'static [&'static str], ours: &'static [&'static str] },
    /// Where we have no business: the same with us.
    Same(&'static [&'static str]),
}

/// What becomes of interop in a restart.
const LOST_OR_KEPT: Expect = Expect::Differs {
    stock: &[
        "done: ",
        ".exe afterwards: Exec format error",
        "WSLInterop: missing",
        "testfmt: enabled, interpreter /bin/cat, flags: F",
        "systemd-binfmt active, system running",
    ],
    ours: &[
        "done: ",
        ".exe afterwards: starts",
        "WSLInterop: enabled, interpreter /init, flags: PF",
        "testfmt: enabled, interpreter /bin/cat, flags: F",
        "systemd-binfmt active, system running",
    ],
};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "boot with rules in binfmt.d",
        play: |setting| {
            let mine = setting.mine().boot()?;
            Ok(vec![setting.exe("at boot"), setting.entry("testfmt"), state(&mine)])
        },
        expect: Expect::Differs {
            stock: &[
                ".exe at boot: Exec format error",
                "testfmt: enabled, interpreter /bin/cat, flags: F",
                "systemd-binfmt active, system running",
            ],
            ours: &[
                ".exe at boot: starts",
                "testfmt: enabled, interpreter /bin/cat, flags: F",
                "systemd-binfmt active, system running",
            ],
        },
    },
    Scenario {
        name: "restart of systemd-binfmt",
        play: |setting| after(setting, "systemctl restart systemd-binfmt"),
        expect: LOST_OR_KEPT,
    },
    Scenario {
        name: "daemon-reload, then restart",
        play: |setting| {
            after(setting, "systemctl daemon-reload && systemctl restart systemd-binfmt")
        },
        expect: LOST_OR_KEPT,
    },
    Scenario {
        name: "stop of systemd-binfmt",
        play: |setting| after(setting, "systemctl stop systemd-binfmt"),
        expect: Expect::Differs {
            stock: &[
                "done: ",
                ".exe afterwards: Exec format error",
                "WSLInterop: missing",
                "testfmt: missing",
                "systemd-binfmt inactive, system running",
            ],
            ours: &[
                "done: ",
                ".exe afterwards: starts",
                "WSLInterop: enabled, interpreter /init, flags: PF",
                "testfmt: missing",
                "systemd-binfmt inactive, system running",
            ],
        },
    },
    Scenario {
        // systemd-binfmt then fails, and what would be run after it is not.
        name: "a rule that fails to register",
        play: |setting| {
            let mine = setting
                .mine()
                .file("/etc/binfmt.d/broken.conf", ":broken:M::BROKEN::/missing:F\n")
                .boot()?;
            let at_boot = setting.exe("at boot");
            setting.vm.renew_interop()?;
            mine.run("systemctl restart systemd-binfmt");
            Ok(vec![
                at_boot,
                setting.exe("after restart"),
                setting.entry("testfmt"),
                setting.entry("broken"),
                state(&mine),
            ])
        },
        expect: Expect::Differs {
            stock: &[
                ".exe at boot: Exec format error",
                ".exe after restart: Exec format error",
                "testfmt: enabled, interpreter /bin/cat, flags: F",
                "broken: missing",
                "systemd-binfmt failed, system degraded",
            ],
            ours: &[
                ".exe at boot: starts",
                ".exe after restart: starts",
                "testfmt: enabled, interpreter /bin/cat, flags: F",
                "broken: missing",
                "systemd-binfmt failed, system degraded",
            ],
        },
    },
    Scenario {
        name: "poweroff beside a running peer",
        play: |setting| {
            let peer = setting.peer().boot()?;
            let mine = setting.mine().boot()?;
            setting.vm.renew_interop()?;
            peer.register(r":peerfmt:M::\x09\x08\x07::/bin/cat:");
            mine.poweroff()?;
            Ok(vec![
                format!("in the peer: {}", peer.launch()),
                setting.entry("WSLInterop"),
                setting.entry("peerfmt"),
            ])
        },
        expect: Expect::Differs {
            stock: &["in the peer: does not start", "WSLInterop: missing", "peerfmt: missing"],
            ours: &[
                "in the peer: starts",
                "WSLInterop: enabled, interpreter /init, flags: PF",
                "peerfmt: enabled, interpreter /bin/cat, flags: ",
            ],
        },
    },
    Scenario {
        name: "hammer through 40 restarts",
        play: |setting| {
            let mine = setting.mine().boot()?;
            setting.vm.renew_interop()?;
            let hammer = setting.vm.hammer_with_pauses();
            // The start limit is systemd's own protection, not what this is about.
            let restarted = mine.run(
                "for i in $(seq 40); do systemctl reset-failed systemd-binfmt && \
                 systemctl restart systemd-binfmt && echo restarted; done | sort | uniq -c",
            );
            let launches = hammer.stop();
            let all = launches.started + launches.failed;
            ensure!(all > 200, "too few launches to tell: {launches:?}");
            eprintln!("{launches:?}");
            let failed = match launches.failed {
                0 => "none".to_owned(),
                failed if failed * 10 > all * 9 => "nearly all".to_owned(),
                failed => format!("{failed} of {all}"),
            };
            Ok(vec![restarted.trim().to_owned(), format!("failed launches: {failed}")])
        },
        expect: Expect::Differs {
            stock: &["40 restarted", "failed launches: nearly all"],
            ours: &["40 restarted", "failed launches: none"],
        },
    },
    Scenario {
        name: "an entry lost before boot, and before a restart",
        play: |setting| {
            setting.vm.write("WSLInterop", "-1")?;
            let mine = setting.mine().boot()?;
            let mut seen = vec![setting.exe("at boot"), setting.settled()];
            setting.vm.write("status", "-1")?;
            mine.run("systemctl restart systemd-binfmt");
            seen.extend([setting.exe("after restart"), setting.settled(), state(&mine)]);
            Ok(seen)
        },
        expect: Expect::Differs {
            stock: &[
                ".exe at boot: Exec format error",
                "WSLInterop: missing",
                ".exe after restart: Exec format error",
                "WSLInterop: missing",
                "systemd-binfmt active, system running",
            ],
            ours: &[
                ".exe at boot: starts",
                "WSLInterop: enabled, interpreter /init, flags: PF",
                ".exe after restart: starts",
                "WSLInterop: enabled, interpreter /init, flags: PF",
                "systemd-binfmt active, system running",
            ],
        },
    },
    Scenario {
        name: "interop switched off in wsl.conf",
        play: |setting| {
            let mine = setting.mine().file("/etc/wsl.conf", "[interop]\nenabled=false\n").boot()?;
            let at_boot = setting.entry("WSLInterop");
            setting.vm.renew_interop()?;
            setting.vm.write("WSLInterop", "-1")?;
            mine.run("systemctl restart systemd-binfmt");
            let not_restored = setting.entry("WSLInterop");
            setting.vm.register(WSL_INTEROP)?;
            mine.poweroff()?;
            Ok(vec![at_boot, not_restored, setting.entry("WSLInterop")])
        },
        // Peers keep their interop; nobody restores it for this distro.
        expect: Expect::Differs {
            stock: &["WSLInterop: missing", "WSLInterop: missing", "WSLInterop: missing"],
            ours: &[
                "WSLInterop: enabled, interpreter /init, flags: PF",
                "WSLInterop: missing",
                "WSLInterop: enabled, interpreter /init, flags: PF",
            ],
        },
    },
    Scenario {
        name: "binfmt-support",
        play: |setting| {
            let peer = setting.peer().boot()?;
            let mine = setting.mine().binfmt_support().boot()?;
            setting.vm.renew_interop()?;
            mine.run(
                "printf 'package supportfmt\\ninterpreter /bin/cat\\nmagic SUPPORT\\n' >/usr/share/binfmts/supportfmt; \
                 update-binfmts --import supportfmt; systemctl restart binfmt-support",
            );
            peer.register(r":peerfmt:M::\x09\x08\x07::/bin/cat:");
            let seen = vec![
                setting.exe("after restart"),
                setting.entry("supportfmt"),
                format!("binfmt-support {}", mine.run("systemctl is-active binfmt-support").trim()),
            ];
            mine.poweroff()?;
            Ok([
                seen,
                vec![
                    setting.exe("after poweroff"),
                    setting.entry("supportfmt"),
                    setting.entry("peerfmt"),
                ],
            ]
            .concat())
        },
        expect: Expect::Differs {
            stock: &[
                ".exe after restart: starts",
                "supportfmt: enabled, interpreter /bin/cat, flags: ",
                "binfmt-support active",
                ".exe after poweroff: Exec format error",
                "supportfmt: missing",
                "peerfmt: missing",
            ],
            ours: &[
                ".exe after restart: starts",
                "supportfmt: enabled, interpreter /bin/cat, flags: ",
                "binfmt-support active",
                ".exe after poweroff: starts",
                "supportfmt: missing",
                "peerfmt: enabled, interpreter /bin/cat, flags: ",
            ],
        },
    },
    Scenario {
        name: "systemd-analyze verify has nothing to say",
        play: |setting| {
            let mine = setting
                .mine()
                .binfmt_support()
                .file(
                    "/etc/systemd/system/wsl-binfmt.service",
                    "[Service]\nType=oneshot\nExecStart=/bin/true\n",
                )
                .file(
                    "/etc/systemd/system/faulty.service",
                    "[Service]\nExecStart=/bin/true\nExecStrat=/bin/true\n",
                )
                .boot()?;
            let units = mine.run(
                "ls /run/systemd/generator.early/*.service 2>/dev/null; \
                 ls -d /run/systemd/generator.early/*.service.d 2>/dev/null | sed 's/\\.d$//'",
            );
            let mut seen = Vec::new();
            for unit in units.split_whitespace() {
                let unit = unit.rsplit('/').next().context("a unit has a name")?;
                // Where the manager has the units from, it looks only if told.
                let path = "SYSTEMD_UNIT_PATH=/run/systemd/generator.early:";
                let words = mine.run(&format!("{path} systemd-analyze verify {unit}"));
                seen.push(format!("{unit}: {words}"));
            }
            let words = mine.run("systemd-analyze verify faulty.service");
            ensure!(words.contains("ExecStrat"), "verify is blind: {words}");
            seen.push(format!("units that are verified: {}", seen.len()));
            Ok(seen)
        },
        expect: Expect::Differs {
            stock: &["units that are verified: 0"],
            ours: &[
                "wsl-binfmt-guard.service: ",
                "wsl-binfmt-release.service: ",
                "wsl-interop-restore.service: ",
                "binfmt-support.service: ",
                "systemd-binfmt.service: ",
                "wsl-binfmt.service: ",
                "units that are verified: 6",
            ],
        },
    },
    Scenario {
        name: "native Linux",
        play: |setting| {
            let mine = setting.mine().osrelease("6.1.0-13-amd64").environment(&[]).without_init();
            as_stock(setting, &mine.boot()?)
        },
        expect: Expect::Same(AS_STOCK),
    },
    Scenario {
        name: "a container on WSL's kernel",
        play: |setting| {
            let mine = setting
                .mine()
                .environment(&["container=docker"])
                .file("/.dockerenv", "")
                .without_init();
            as_stock(setting, &mine.boot()?)
        },
        expect: Expect::Same(AS_STOCK),
    },
    Scenario {
        name: "protection switched off in wsl.conf",
        play: |setting| {
            let mine = setting.mine().file("/etc/wsl.conf", "[boot]\nprotectBinfmt=false\n");
            as_stock(setting, &mine.boot()?)
        },
        expect: Expect::Same(AS_STOCK),
    },
];

/// Restarts and stops as they are without us, and no trace of us.
const AS_STOCK: &[&str] = &[
    ".exe after restart: Exec format error",
    "systemd-binfmt active, system running",
    "testfmt: enabled, interpreter /bin/cat, flags: F",
    "drop-ins: ",
    "emitted: ",
    "testfmt: missing",
    "systemd-binfmt inactive, system running",
];

fn as_stock(setting: &Setting, mine: &Distro) -> anyhow::Result<Vec<String>> {
    setting.vm.renew_interop()?;
    mine.run("systemctl daemon-reload; systemctl restart systemd-binfmt");
    let mut seen = vec![setting.exe("after restart"), state(mine), setting.entry("testfmt")];
    let drop_ins =
        mine.run("systemctl show --property=DropInPaths --value systemd-binfmt binfmt-support");
    seen.push(format!("drop-ins: {}", drop_ins.trim()));
    let emitted = mine.run("find /run/systemd/generator.early /run/wsl-binfmt -type f 2>/dev/null");
    seen.push(format!("emitted: {}", emitted.trim()));
    mine.run("systemctl stop systemd-binfmt");
    seen.extend([setting.entry("testfmt"), state(mine)]);
    Ok(seen)
}

/// What a command in a freshly booted distro does to interop.
fn after(setting: &Setting, command: &str) -> anyhow::Result<Vec<String>> {
    let mine = setting.mine().boot()?;
    setting.vm.renew_interop()?;
    Ok(vec![
        format!("done: {}", mine.run(command).trim()),
        setting.exe("afterwards"),
        setting.entry("WSLInterop"),
        setting.entry("testfmt"),
        state(&mine),
    ])
}

pub fn state(distro: &Distro) -> String {
    let unit = distro.run("systemctl is-active systemd-binfmt");
    let system = distro.run("systemctl is-system-running");
    format!("systemd-binfmt {}, system {}", unit.trim(), system.trim())
}

/// A VM, and which distros to boot in it.
pub struct Setting<'vm> {
    pub vm: &'vm Vm,
    pub suite: &'vm str,
    pub ours: bool,
}

impl Setting<'_> {
    /// The distro that it is about: with a rule of its own, and with or without us.
    pub fn mine(&self) -> Builder<'_> {
        self.vm
            .distro("mine", self.suite)
            .generator(self.ours)
            .file("/etc/binfmt.d/test.conf", &format!("{RULE}\n"))
    }

    /// Another one, which does the table no harm, so that all harm comes from the first.
    pub fn peer(&self) -> Builder<'_> {
        self.vm.distro("peer", self.suite).masked("systemd-binfmt.service")
    }

    pub fn exe(&self, when: &str) -> String {
        format!(".exe {when}: {}", self.vm.launch())
    }

    pub fn entry(&self, name: &str) -> String {
        format!("{name}: {}", self.vm.entry(name))
    }

    /// The interop entry, once there has been time for a watcher to come back and to settle it.
    pub fn settled(&self) -> String {
        // On a busy machine it may take systemd seconds to start one. Where nobody comes, that is seen.
        let patience = if self.ours { IN_TIME } else { SOON };
        let _ = within(patience, || alone(self.vm));
        self.entry("WSLInterop")
    }
}
