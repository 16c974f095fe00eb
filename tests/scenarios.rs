//! What this project promises, played on real systemd in the simulated WSL VM. Every scenario
//! is played twice on each Debian: stock, which is the control, and with our generator installed.
//! What is seen is compared line by line.

mod wsl;

use std::process::ExitCode;

use anyhow::{bail, ensure, Context};
use libtest_mimic::{Arguments, Failed, Trial};

use wsl::{Builder, Distro, Machine, Vm, WSL_INTEROP};

/// systemd 252 and 257.
const SUITES: [&str; 2] = ["bookworm", "trixie"];

/// A rule of the distro's own, as qemu's are: with `F`.
const RULE: &str = r":testfmt:M::\x01\x02\x03\x04::/bin/cat:F";

struct Scenario {
    name: &'static str,
    play: fn(&Setting) -> anyhow::Result<Vec<String>>,
    expect: Expect,
}

enum Expect {
    /// What is seen on a stock system, and what with us.
    Differs {
        stock: &'static [&'static str],
        ours: &'static [&'static str],
    },
    /// Where we have no business: the same with us.
    Same(&'static [&'static str]),
}

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "boot with rules in binfmt.d",
        play: |setting| {
            let mine = setting.mine().boot()?;
            Ok(vec![
                setting.exe("at boot"),
                setting.entry("testfmt"),
                state(&mine),
            ])
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
        expect: Expect::Differs {
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
        },
    },
    Scenario {
        name: "daemon-reload, then restart",
        play: |setting| {
            after(
                setting,
                "systemctl daemon-reload && systemctl restart systemd-binfmt",
            )
        },
        expect: Expect::Differs {
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
        },
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
                "testfmt: enabled, interpreter /bin/cat, flags: F",
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
                .file(
                    "/etc/binfmt.d/broken.conf",
                    ":broken:M::BROKEN::/missing:F\n",
                )
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
            stock: &[
                "in the peer: does not start",
                "WSLInterop: missing",
                "peerfmt: missing",
            ],
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
            let hammer = setting.vm.hammer();
            // The start limit is systemd's own protection, not what this is about.
            let restarted = mine.run(
                "for i in $(seq 40); do systemctl reset-failed systemd-binfmt && \
                 systemctl restart systemd-binfmt && echo restarted; done | sort | uniq -c",
            );
            let launches = hammer.stop();
            let all = launches.started + launches.failed;
            ensure!(all > 500, "too few launches to tell: {launches:?}");
            eprintln!("{launches:?}");
            let failed = match launches.failed {
                0 => "none".to_owned(),
                failed if failed * 10 > all * 9 => "nearly all".to_owned(),
                failed => format!("{failed} of {all}"),
            };
            Ok(vec![
                restarted.trim().to_owned(),
                format!("failed launches: {failed}"),
            ])
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
            let at_boot = setting.entry("WSLInterop");
            setting.vm.write("status", "-1")?;
            mine.run("systemctl restart systemd-binfmt");
            Ok(vec![at_boot, setting.entry("WSLInterop"), state(&mine)])
        },
        expect: Expect::Differs {
            stock: &[
                "WSLInterop: missing",
                "WSLInterop: missing",
                "systemd-binfmt active, system running",
            ],
            ours: &[
                "WSLInterop: enabled, interpreter /init, flags: PF",
                "WSLInterop: enabled, interpreter /init, flags: PF",
                "systemd-binfmt active, system running",
            ],
        },
    },
    Scenario {
        name: "interop switched off in wsl.conf",
        play: |setting| {
            let mine = setting
                .mine()
                .file("/etc/wsl.conf", "[interop]\nenabled=false\n")
                .boot()?;
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
            stock: &[
                "WSLInterop: missing",
                "WSLInterop: missing",
                "WSLInterop: missing",
            ],
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
                format!(
                    "binfmt-support {}",
                    mine.run("systemctl is-active binfmt-support").trim()
                ),
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
                "wsl-interop-restore.service: ",
                "binfmt-support.service: ",
                "systemd-binfmt.service: ",
                "units that are verified: 4",
            ],
        },
    },
    Scenario {
        name: "native Linux",
        play: |setting| {
            let mine = setting
                .mine()
                .osrelease("6.1.0-13-amd64")
                .environment(&[])
                .without_init();
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
            let mine = setting
                .mine()
                .file("/etc/wsl.conf", "[boot]\nprotectBinfmt=false\n");
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
    let mut seen = vec![
        setting.exe("after restart"),
        state(mine),
        setting.entry("testfmt"),
    ];
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

fn state(distro: &Distro) -> String {
    let unit = distro.run("systemctl is-active systemd-binfmt");
    let system = distro.run("systemctl is-system-running");
    format!("systemd-binfmt {}, system {}", unit.trim(), system.trim())
}

/// A VM, and which distros to boot in it.
struct Setting<'vm> {
    vm: &'vm Vm,
    suite: &'vm str,
    ours: bool,
}

impl Setting<'_> {
    /// The distro that it is about: with a rule of its own, and with or without us.
    fn mine(&self) -> Builder<'_> {
        self.vm
            .distro("mine", self.suite)
            .generator(self.ours)
            .file("/etc/binfmt.d/test.conf", &format!("{RULE}\n"))
    }

    /// Another one, which does the table no harm, so that all harm comes from the first.
    fn peer(&self) -> Builder<'_> {
        self.vm
            .distro("peer", self.suite)
            .masked("systemd-binfmt.service")
    }

    fn exe(&self, when: &str) -> String {
        format!(".exe {when}: {}", self.vm.launch())
    }

    fn entry(&self, name: &str) -> String {
        format!("{name}: {}", self.vm.entry(name))
    }
}

/// The verbs by themselves, in a VM without a distro.
const VERBS: &[(&str, fn(&Vm) -> anyhow::Result<()>)] = &[
    ("restore leaves an entry that is as it should be", |vm| {
        let before = vm.entry_identity("WSLInterop")?;
        expect(vm, &["restore"], 0, "")?;
        ensure!(
            vm.entry_identity("WSLInterop")? == before,
            "it was replaced"
        );
        Ok(())
    }),
    ("restore registers a missing entry", |vm| {
        vm.write("WSLInterop", "-1")?;
        expect(vm, &["restore"], 0, "WSLInterop was missing, registered it")?;
        let entry = vm.entry("WSLInterop");
        ensure!(entry == "enabled, interpreter /init, flags: PF", "{entry}");
        ensure!(vm.launch() == "starts", "{}", vm.launch());
        Ok(())
    }),
    ("restore leaves a disabled entry to the admin", |vm| {
        vm.write("WSLInterop", "0")?;
        expect(
            vm,
            &["restore"],
            1,
            "WSLInterop is disabled: somebody made it so, left alone",
        )?;
        let entry = vm.entry("WSLInterop");
        ensure!(entry.starts_with("disabled, interpreter /init"), "{entry}");
        Ok(())
    }),
    ("restore leaves another interpreter alone", |vm| {
        vm.write("WSLInterop", "-1")?;
        vm.register(":WSLInterop:M::MZ::/bin/cat:P")?;
        expect(
            vm,
            &["restore"],
            1,
            "WSLInterop runs /bin/cat, not /init: somebody made it so, left alone",
        )?;
        let entry = vm.entry("WSLInterop");
        ensure!(
            entry == "enabled, interpreter /bin/cat, flags: P",
            "{entry}"
        );
        Ok(())
    }),
    ("restore needs an executable init", |vm| {
        vm.write("WSLInterop", "-1")?;
        vm.cover("/init", "/dev/null")?;
        expect(
            vm,
            &["restore"],
            1,
            "/init: not an executable file, so this is no WSL2 distro",
        )?;
        ensure!(vm.entry("WSLInterop") == "missing");
        Ok(())
    }),
    ("restore says that binfmt_misc is not mounted", |vm| {
        vm.unmount("/proc/sys/fs/binfmt_misc")?;
        expect(
            vm,
            &["restore"],
            1,
            "binfmt_misc is not mounted on /proc/sys/fs/binfmt_misc",
        )
    }),
    ("guard makes the flush fail, and nothing else", |vm| {
        expect(vm, &["guard"], 0, "")?;
        let Err(error) = vm.write("status", "-1") else {
            bail!("the table was emptied: {:?}", vm.entries());
        };
        ensure!(
            format!("{error:#}").contains("Read-only file system"),
            "{error:#}"
        );
        ensure!(vm.read("status")? == "enabled\n", "{}", vm.read("status")?);
        vm.register(RULE)?;
        ensure!(
            vm.entries() == ["WSLInterop", "testfmt"],
            "{:?}",
            vm.entries()
        );
        Ok(())
    }),
    ("guard shows the state that the table has", |vm| {
        vm.write("status", "0")?;
        expect(vm, &["guard"], 0, "")?;
        ensure!(vm.read("status")? == "disabled\n", "{}", vm.read("status")?);
        Ok(())
    }),
    ("guard leaves a lock that is there already", |vm| {
        vm.cover("/proc/sys/fs/binfmt_misc/status", "/etc/hostname")?;
        expect(vm, &["guard"], 0, "")?;
        expect(vm, &["guard"], 0, "")?;
        ensure!(vm.mounts_on("/proc/sys/fs/binfmt_misc/status")? == 1);
        Ok(())
    }),
    ("guard twice mounts once", |vm| {
        expect(vm, &["guard"], 0, "")?;
        expect(vm, &["guard"], 0, "")?;
        ensure!(vm.mounts_on("/proc/sys/fs/binfmt_misc/status")? == 1);
        Ok(())
    }),
    ("guard undoes its first step if the second fails", |vm| {
        let mounts = vm.mounts_on("/proc/sys/fs/binfmt_misc/status")?;
        ensure!(mounts == 0, "{mounts} mounts before");
        // The second mount(2) of the program is the one that makes the first read-only.
        expect_of(
            vm.generator_under_strace("inject=mount:error=EPERM:when=2")
                .arg("guard"),
            1,
            "making /proc/sys/fs/binfmt_misc/status read-only: EPERM: Operation not permitted",
        )?;
        ensure!(vm.mounts_on("/proc/sys/fs/binfmt_misc/status")? == 0);
        vm.write("status", "-1")?;
        ensure!(vm.entries().is_empty(), "{:?}", vm.entries());
        Ok(())
    }),
    ("guard says that binfmt_misc is not mounted", |vm| {
        vm.unmount("/proc/sys/fs/binfmt_misc")?;
        expect(
            vm,
            &["guard"],
            1,
            "looking at /proc/sys/fs/binfmt_misc/status (is binfmt_misc mounted?): \
             No such file or directory (os error 2)",
        )
    }),
];

/// Runs the program under test: its exit status, and what it says.
fn expect(vm: &Vm, arguments: &[&str], status: i32, says: &str) -> anyhow::Result<()> {
    expect_of(vm.generator().args(arguments), status, says)
}

fn expect_of(command: &mut std::process::Command, status: i32, says: &str) -> anyhow::Result<()> {
    let output = command.output()?;
    let said = String::from_utf8(output.stderr)?;
    let says = match says {
        "" => String::new(),
        says => format!("wsl-binfmt-generator: {says}\n"),
    };
    ensure!(
        (output.status.code(), &said) == (Some(status), &says),
        "{command:?}: {}, says {said:?}, not {status}, {says:?}",
        output.status
    );
    Ok(())
}

/// Plays inside the VM: prints what is seen, a line each.
fn play(vm: &Vm, arguments: &[String]) -> anyhow::Result<()> {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [name] => {
            let verb = VERBS.iter().find(|verb| verb.0 == name);
            verb.context("no such test of a verb")?.1(vm)
        }
        [name, suite, whose] => {
            let scenario = SCENARIOS.iter().find(|s| s.name == name);
            let play = scenario.context("no such scenario")?.play;
            let ours = whose == "ours";
            for line in play(&Setting { vm, suite, ours })? {
                println!("{line}");
            }
            Ok(())
        }
        _ => bail!("play what? {arguments:?}"),
    }
}

fn check(machine: &Machine, scenario: &Scenario, suite: &str, ours: bool) -> anyhow::Result<()> {
    let expected = match (&scenario.expect, ours) {
        (Expect::Differs { stock, ours }, _) if stock == ours => bail!("the control shows nothing"),
        (Expect::Differs { ours, .. }, true) => ours,
        (Expect::Differs { stock, .. }, false) => stock,
        (Expect::Same(same), _) => same,
    };
    let whose = if ours { "ours" } else { "stock" };
    let seen = machine.in_vm(&[scenario.name, suite, whose])?;
    ensure!(
        seen.lines().eq(expected.iter().copied()),
        "seen:\n{seen}expected:\n{}",
        expected.join("\n")
    );
    Ok(())
}

fn trials(machine: Option<&'static Machine>) -> Vec<Trial> {
    let trial = |name: String, run: Box<dyn FnOnce(&Machine) -> anyhow::Result<()> + Send>| {
        let test = move || match machine {
            Some(machine) => run(machine).map_err(|e| Failed::from(format!("{e:#}"))),
            None => Err("there is no VM to play in".into()),
        };
        Trial::test(name, test).with_ignored_flag(machine.is_none())
    };
    let scenarios = SCENARIOS.iter().flat_map(|scenario| {
        SUITES.iter().flat_map(move |suite| {
            [false, true].into_iter().map(move |ours| {
                let whose = if ours { "ours" } else { "stock" };
                trial(
                    format!("{}: {suite}, {whose}", scenario.name),
                    Box::new(move |machine| check(machine, scenario, suite, ours)),
                )
            })
        })
    });
    let verbs = VERBS.iter().map(|(name, _)| {
        trial(
            (*name).to_owned(),
            Box::new(move |machine| machine.in_vm(&[name]).map(drop)),
        )
    });
    scenarios.chain(verbs).collect()
}

/// Where there can be no VM, that is said loudly; where CI runs, it is a failure.
fn main() -> ExitCode {
    if let Some(code) = wsl::run_stage(play) {
        return code;
    }
    let arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, trials(None)).exit_code();
    }
    if let Some(lack) = Machine::lacks() {
        eprintln!("\nNO SCENARIO CAN BE PLAYED HERE: {lack}\n");
        if std::env::var_os("CI").is_some() {
            return ExitCode::FAILURE;
        }
        return libtest_mimic::run(&arguments, trials(None)).exit_code();
    }
    let machine: &'static Machine = match Machine::prepare(&SUITES) {
        Ok(machine) => Box::leak(Box::new(machine)),
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
    };
    let before = Machine::table();
    let conclusion = libtest_mimic::run(&arguments, trials(Some(machine)));
    match (before, Machine::table()) {
        // VMs end with entries in their tables: had one been the machine's, they would be there.
        (Ok(before), Ok(after)) if before == after => conclusion.exit_code(),
        (before, after) => {
            eprintln!("the machine's own table changed: {before:?} to {after:?}");
            ExitCode::FAILURE
        }
    }
}
