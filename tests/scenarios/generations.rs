//! Every generation of WSL: what a distro's life is like without us, and that it is as promised
//! with us.

use wsl_vm::Generation;

use crate::ours::life::{Life, PROMISED};
use crate::ours::Install;
use crate::promises::{state, Expect, Scenario, Setting};

const fn scenario(
    name: &'static str,
    play: fn(&Setting) -> anyhow::Result<Vec<String>>,
    stock: &'static [&'static str],
) -> Scenario {
    let ours = PROMISED;
    let expect = Expect::Differs { stock, ours };
    Scenario { name, play, expect }
}

fn play(setting: &Setting, generation: Generation) -> anyhow::Result<Vec<String>> {
    let life = Life::lead(setting.vm, setting.suite, generation, setting.ours)?;
    Ok(life.lines())
}

/// Whole lives.
pub const LIVES: &[Scenario] = &[
    scenario("WSL that does nothing for interop", |setting| play(setting, Generation::None), NONE),
    scenario("WSL with a one-shot unit", |setting| play(setting, Generation::Oneshot), ONESHOT),
    scenario(
        "WSL with drop-ins for a second entry",
        |setting| play(setting, Generation::DropinLate),
        DROPIN_LATE,
    ),
    scenario("WSL with drop-ins", |setting| play(setting, Generation::Dropin), DROPIN),
];

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "WSL with drop-ins, told not to protect",
        play: |setting| {
            let mine = setting.vm.distro("mine", setting.suite);
            let mine = mine
                .generation(Generation::Dropin)
                .generator(setting.ours)
                .file("/etc/binfmt.d/test.conf", ":testfmt:M::TEST::/bin/cat:\n")
                .file("/etc/wsl.conf", "[boot]\nprotectBinfmt=false\n")
                .boot()?;
            let drop_ins = "systemctl show --property=DropInPaths --value systemd-binfmt";
            Ok(vec![
                format!(".exe at boot: {}", setting.vm.launch()),
                format!("drop-ins: {}", mine.run(drop_ins).trim()),
            ])
        },
        expect: Expect::Same(&[".exe at boot: Exec format error", "drop-ins: "]),
    },
    Scenario {
        name: "WSL with a cgroup for each distro",
        play: |setting| {
            let mine = setting.mine().nested_cgroup().boot()?;
            let mut seen =
                vec![mine.run("grep ^0: /proc/1/cgroup").trim().to_owned(), setting.exe("at boot")];
            for command in ["restart systemd-binfmt", "daemon-reload"] {
                setting.vm.renew_interop()?;
                mine.run(&format!("systemctl {command}"));
                seen.push(setting.exe(&format!("after {command}")));
            }
            seen.push(state(&mine));
            Ok(seen)
        },
        expect: Expect::Differs {
            stock: &[
                "0::/wsl-user/distro-mine/systemd/init.scope",
                ".exe at boot: Exec format error",
                ".exe after restart systemd-binfmt: Exec format error",
                ".exe after daemon-reload: starts",
                "systemd-binfmt active, system running",
            ],
            ours: &[
                "0::/wsl-user/distro-mine/systemd/init.scope",
                ".exe at boot: starts",
                ".exe after restart systemd-binfmt: starts",
                ".exe after daemon-reload: starts",
                "systemd-binfmt active, system running",
            ],
        },
    },
];

/// For systemd since 250: what it cannot flush makes it fail.
pub const LOCK: &[Scenario] =
    &[scenario("WSL with a lock", |setting| play(setting, Generation::Lock), LOCKED)];

/// For systemd before 250: it fails only when stopped.
pub const LOCK_BEFORE_250: &[Scenario] =
    &[scenario("WSL with a lock", |setting| play(setting, Generation::Lock), LOCKED_BEFORE_250)];

const NONE: &[&str] = &[
    "boot: .exe Exec format error; testfmt F; active, running",
    "restart: .exe Exec format error; testfmt F; active, running",
    "reload and restart: .exe Exec format error; testfmt F; active, running",
    "stop: .exe Exec format error; ; inactive, running",
    "start: .exe Exec format error; testfmt F; active, running",
    "10 restarts: .exe Exec format error; testfmt F; active, running",
    "poweroff: .exe does not start; ; off",
    "boot, failing rule: .exe Exec format error; testfmt F; failed, degraded",
    "restart, failing rule: .exe Exec format error; testfmt F; failed, degraded",
    "poweroff, failing rule: .exe does not start; ; off",
    "launches that failed: some",
];

const ONESHOT: &[&str] = &[
    "boot: .exe starts; WSLInterop-late P, testfmt F; active, running",
    "restart: .exe Exec format error; testfmt F; active, running",
    "reload and restart: .exe Exec format error; testfmt F; active, running",
    "stop: .exe Exec format error; ; inactive, running",
    "start: .exe Exec format error; testfmt F; active, running",
    "10 restarts: .exe Exec format error; testfmt F; active, running",
    "poweroff: .exe does not start; ; off",
    "boot, failing rule: .exe starts; WSLInterop-late P, testfmt F; failed, degraded",
    "restart, failing rule: .exe Exec format error; testfmt F; failed, degraded",
    "poweroff, failing rule: .exe does not start; ; off",
    "launches that failed: some",
];

const DROPIN_LATE: &[&str] = &[
    "boot: .exe starts; WSLInterop-late P, testfmt F; active, running",
    "restart: .exe starts; WSLInterop-late P, testfmt F; active, running",
    "reload and restart: .exe starts; WSLInterop-late P, testfmt F; active, running",
    "stop: .exe starts; WSLInterop PF, peerfmt, testfmt F; inactive, running",
    "start: .exe starts; WSLInterop-late P, testfmt F; active, running",
    "10 restarts: .exe starts; WSLInterop-late P, testfmt F; active, running",
    "poweroff: .exe does not start; ; off",
    "boot, failing rule: .exe Exec format error; testfmt F; failed, degraded",
    "restart, failing rule: .exe Exec format error; testfmt F; failed, degraded",
    "poweroff, failing rule: .exe does not start; ; off",
    "launches that failed: some",
];

const DROPIN: &[&str] = &[
    "boot: .exe starts; WSLInterop P, testfmt F; active, running",
    "restart: .exe starts; WSLInterop P, testfmt F; active, running",
    "reload and restart: .exe starts; WSLInterop P, testfmt F; active, running",
    "stop: .exe starts; WSLInterop PF, peerfmt, testfmt F; inactive, running",
    "start: .exe starts; WSLInterop P, testfmt F; active, running",
    "10 restarts: .exe starts; WSLInterop P, testfmt F; active, running",
    "poweroff: .exe does not start; ; off",
    "boot, failing rule: .exe Exec format error; testfmt F; failed, degraded",
    "restart, failing rule: .exe Exec format error; testfmt F; failed, degraded",
    "poweroff, failing rule: .exe does not start; ; off",
    "launches that failed: some",
];

const LOCKED: &[&str] = &[
    "boot: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "restart: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "reload and restart: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "stop: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "start: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "10 restarts: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "poweroff: .exe starts; WSLInterop PF, peerfmt, testfmt F; off",
    "boot, failing rule: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "restart, failing rule: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "poweroff, failing rule: .exe starts; WSLInterop PF, peerfmt, testfmt F; off",
    "launches that failed: none",
];

const LOCKED_BEFORE_250: &[&str] = &[
    "boot: .exe starts; WSLInterop PF, peerfmt, testfmt F; active, running",
    "restart: .exe starts; WSLInterop PF, peerfmt, testfmt F; active, running",
    "reload and restart: .exe starts; WSLInterop PF, peerfmt, testfmt F; active, running",
    "stop: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "start: .exe starts; WSLInterop PF, peerfmt, testfmt F; active, running",
    "10 restarts: .exe starts; WSLInterop PF, peerfmt, testfmt F; active, running",
    "poweroff: .exe starts; WSLInterop PF, peerfmt, testfmt F; off",
    "boot, failing rule: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "restart, failing rule: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "poweroff, failing rule: .exe starts; WSLInterop PF, peerfmt, testfmt F; off",
    "launches that failed: none",
];
