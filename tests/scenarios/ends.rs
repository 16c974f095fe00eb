//! How each WSL ends a distro beside a peer, what is left in the table, and the distro's next boot.

use anyhow::ensure;
use wsl_vm::{Builder, Distro, Generation};

use crate::ours::Install;
use crate::promises::{state, Expect, Scenario, Setting};
use crate::stand_in::RUNNING;

pub const ENDS: &[Scenario] = &[Scenario {
    name: "distros that WSL terminates",
    play: |setting| {
        let mut play = Play {
            setting,
            peer: setting.peer().shared_cgroup().boot()?,
            seen: Vec::new(),
            launches: 0,
            failed_launches: 0,
        };
        for generation in Generation::ALL {
            play.life(generation)?;
        }
        ensure!(play.launches > 100, "too few launches to tell: {}", play.launches);
        let failed = play.failed_launches > 0;
        play.seen.push(format!("launches failed: {failed}"));
        Ok(play.seen)
    },
    // A kill alone harms nobody; the poweroff of a stock distro does, and its next boot.
    expect: Expect::Differs {
        stock: &[
            "none, killed: .exe in the peer starts; its rule is of the first boot",
            "none, booted again: .exe in the peer does not start; its rule is of the second boot",
            "oneshot, killed: .exe in the peer starts; its rule is of the first boot",
            "oneshot, booted again: .exe in the peer starts; its rule is of the second boot",
            "dropin-late, killed: .exe in the peer starts; its rule is of the first boot",
            "dropin-late, booted again: .exe in the peer starts; its rule is of the second boot",
            "dropin, killed: .exe in the peer starts; its rule is of the first boot",
            "dropin, booted again: .exe in the peer starts; its rule is of the second boot",
            "dropin, powered off: .exe in the peer does not start; its rule runs nothing",
            "lock, killed: .exe in the peer starts; its rule is of the first boot",
            "lock, booted again: .exe in the peer starts; its rule is of the second boot",
            "lock, powered off: .exe in the peer starts; its rule is of the second boot",
            "launches failed: true",
        ],
        ours: &[
            "none, killed: .exe in the peer starts; its rule is of the first boot",
            "none, booted again: .exe in the peer starts; its rule is of the second boot",
            "oneshot, killed: .exe in the peer starts; its rule is of the first boot",
            "oneshot, booted again: .exe in the peer starts; its rule is of the second boot",
            "dropin-late, killed: .exe in the peer starts; its rule is of the first boot",
            "dropin-late, booted again: .exe in the peer starts; its rule is of the second boot",
            "dropin, killed: .exe in the peer starts; its rule is of the first boot",
            "dropin, booted again: .exe in the peer starts; its rule is of the second boot",
            "dropin, powered off: .exe in the peer starts; its rule runs nothing",
            "lock, killed: .exe in the peer starts; its rule is of the first boot",
            "lock, booted again: .exe in the peer starts; its rule is of the second boot",
            "lock, powered off: .exe in the peer starts; its rule runs nothing",
            "launches failed: false",
        ],
    },
}];

const INTERPRETER: &str = "/usr/local/bin/own";
const RULE: &str = ":ownfmt:M::OWNFMT::/usr/local/bin/own:F\n";
/// What that rule takes, in any distro.
const PROGRAM: &str = "printf OWNFMT >/run/file; chmod +x /run/file; /run/file";

/// Holds up the shutdown before systemd-binfmt is stopped: otherwise, what a kill leaves would
/// depend on how quick the machine is.
const SLOW: &str = "[Service]\nExecStart=/bin/sleep infinity\nExecStop=/bin/sleep infinity\n";
const SLOW_PATH: &str = "/etc/systemd/system/slow.service";
const SLOW_WANTED: &str = "/etc/systemd/system/multi-user.target.wants/slow.service";

struct Play<'s> {
    setting: &'s Setting<'s>,
    peer: Distro,
    seen: Vec<String>,
    launches: u32,
    failed_launches: u32,
}

impl<'s> Play<'s> {
    fn life(&mut self, generation: Generation) -> anyhow::Result<()> {
        let slow = self.distro(generation, "first");
        let mine = slow
            .file("/etc/wsl.conf", "[boot]\ninitTimeout=100\n")
            .file(SLOW_PATH, SLOW)
            .link(SLOW_WANTED, SLOW_PATH)
            .boot()?;
        let ended = self.at(generation, "killed", || mine.terminate())?;
        ensure!(!ended, "{generation:?}: not killed");
        let mine = self.distro(generation, "second");
        let mine = self.at(generation, "booted again", || mine.boot())?;
        if self.setting.ours {
            ensure!(state(&mine) == RUNNING, "{generation:?}: {}", state(&mine));
            ensure!(mine.launch() == "starts", "{generation:?}: not in it");
        }
        if matches!(generation, Generation::Dropin | Generation::Lock) {
            let ended = self.at(generation, "powered off", || mine.terminate())?;
            ensure!(ended, "{generation:?}: killed");
        } else {
            mine.kill();
        }
        // The next generation is another VM's.
        self.setting.vm.write("status", "-1")
    }

    /// The distro, with a program for its rule that says at `which` boot it came.
    fn distro(&self, generation: Generation, which: &str) -> Builder<'s> {
        let name = format!("{}-{which}", generation.name());
        let distro = self.setting.vm.distro(&name, self.setting.suite);
        distro
            .generation(generation)
            .shared_cgroup()
            .generator(self.setting.ours)
            .file("/etc/binfmt.d/own.conf", RULE)
            .program(INTERPRETER, which)
    }

    /// Every event meets interop as WSL has made it.
    fn at<T>(
        &mut self,
        generation: Generation,
        what: &str,
        event: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        self.setting.vm.renew_interop()?;
        let hammer = self.setting.vm.hammer_with_pauses();
        let result = event();
        let launches = hammer.stop();
        self.launches += launches.all();
        self.failed_launches += launches.failed;
        let printed = self.peer.run(PROGRAM);
        let rule = match printed.split_once(" [") {
            Some((which, _)) => format!("is of the {which} boot"),
            None => "runs nothing".to_owned(),
        };
        let (name, exe) = (generation.name(), self.peer.launch());
        self.seen.push(format!("{name}, {what}: .exe in the peer {exe}; its rule {rule}"));
        result
    }
}
