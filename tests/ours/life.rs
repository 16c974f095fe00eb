//! A distro's life under one generation of WSL, from boot to poweroff, beside a running peer: the
//! events that cost Windows interop, each with a hammer on it.

use std::time::Duration;

use anyhow::{bail, ensure, Context};
use wsl_vm::{Builder, Distro, Generation, Launches, Vm};

use super::Install;

/// A rule of the distro's own, as qemu's are: with `F`.
const RULE: &str = r":testfmt:M::\x01\x02\x03\x04::/bin/cat:F";
/// What a peer registered.
const PEERS_RULE: &str = r":peerfmt:M::\x09\x08\x07::/bin/cat:";

const RESTART: &str = "systemctl restart systemd-binfmt";
/// The start limit is systemd's own protection, not what this is about. What is printed is how
/// often the unit was really started.
const RESTARTS: &str = "for i in $(seq 10); do
    systemctl reset-failed systemd-binfmt
    systemctl restart systemd-binfmt
    systemctl show --property=InvocationID --value systemd-binfmt
done 2>/dev/null | sort -u | wc -l";

/// What is promised, under every generation.
pub const PROMISED: &[&str] = &[
    "boot: .exe starts; WSLInterop PF, peerfmt, testfmt F; active, running",
    "restart: .exe starts; WSLInterop PF, peerfmt, testfmt F; active, running",
    "reload and restart: .exe starts; WSLInterop PF, peerfmt, testfmt F; active, running",
    "stop: .exe starts; WSLInterop PF, peerfmt; inactive, running",
    "start: .exe starts; WSLInterop PF, peerfmt, testfmt F; active, running",
    "10 restarts: .exe starts; WSLInterop PF, peerfmt, testfmt F; active, running",
    "poweroff: .exe starts; WSLInterop PF, peerfmt; off",
    "boot, failing rule: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "restart, failing rule: .exe starts; WSLInterop PF, peerfmt, testfmt F; failed, degraded",
    "poweroff, failing rule: .exe starts; WSLInterop PF, peerfmt; off",
    "launches that failed: none",
];

/// Something that befell the distro, and what was seen afterwards.
#[derive(Debug)]
pub struct Event {
    pub name: String,
    /// What comes of launching a Windows program.
    pub launch: String,
    /// The entries and their flags.
    pub table: String,
    /// systemd-binfmt's state and the system's.
    pub state: String,
    /// How it went for Windows programs meanwhile.
    pub launches: Launches,
}

/// All that befell a distro.
#[derive(Debug)]
pub struct Life {
    /// The version of its systemd.
    pub systemd: String,
    pub events: Vec<Event>,
}

impl Life {
    /// Leads such a life, and another one in which systemd-binfmt fails.
    pub fn lead(vm: &Vm, suite: &str, generation: Generation, ours: bool) -> anyhow::Result<Life> {
        let distro = |name| {
            vm.distro(name, suite)
                .generation(generation)
                .shared_cgroup()
                .generator(ours)
                .file("/etc/binfmt.d/test.conf", &format!("{RULE}\n"))
        };
        // It does the table no harm and no good, so that all of that comes from the other.
        let peer = vm.distro("peer", suite).masked("systemd-binfmt.service");
        let peer = match generation {
            Generation::Lock => peer,
            _ => peer.shared_cgroup(),
        };
        let peer = peer.boot()?;
        peer.register(PEERS_RULE);

        let mut play = Play { vm, peer, events: Vec::new() };
        let mine = play.boot("boot", distro("mine"))?;
        let systemd = mine.run("systemctl --version");
        let systemd = systemd.split(' ').nth(1).context("systemd's version")?;
        play.command("restart", &mine, RESTART)?;
        play.command("reload and restart", &mine, &format!("systemctl daemon-reload; {RESTART}"))?;
        play.command("stop", &mine, "systemctl stop systemd-binfmt")?;
        play.command("start", &mine, "systemctl start systemd-binfmt")?;
        let restarted = play.command("10 restarts", &mine, RESTARTS)?;
        ensure!(restarted.trim() == "10", "restarted: {restarted}");
        play.poweroff("poweroff", mine)?;

        let broken = ":broken:M::BROKEN::/missing:F\n";
        let failing = distro("failing").file("/etc/binfmt.d/broken.conf", broken);
        let mine = play.boot("boot, failing rule", failing)?;
        play.command("restart, failing rule", &mine, RESTART)?;
        play.poweroff("poweroff, failing rule", mine)?;
        let hammered: u32 = play.events.iter().map(|e| e.launches.all()).sum();
        ensure!(hammered > 100, "too few launches to tell: {hammered}");
        Ok(Life { systemd: systemd.to_owned(), events: play.events })
    }

    /// It in words, without what differs from run to run.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<_> = self
            .events
            .iter()
            .map(|e| format!("{}: .exe {}; {}; {}", e.name, e.launch, e.table, e.state))
            .collect();
        let failed = self.events.iter().any(|event| event.launches.failed > 0);
        let failed = if failed { "some" } else { "none" };
        lines.push(format!("launches that failed: {failed}"));
        lines
    }

    /// It for `parse`, with all that lines() leaves out.
    pub fn record(&self) -> String {
        let mut record = format!("{}\n", self.systemd);
        for event in &self.events {
            let Event { name, launch, table, state, launches } = event;
            let Launches { started, failed, longest_gap, .. } = launches;
            let gap = longest_gap.as_micros();
            record += &format!("{name}\t{launch}\t{table}\t{state}\t{started}\t{failed}\t{gap}\n");
        }
        record
    }

    /// The life of that record.
    pub fn parse(record: &str) -> anyhow::Result<Life> {
        let (systemd, events) = record.split_once('\n').context("an empty record")?;
        let parse = |line: &str| {
            let fields: Vec<_> = line.split('\t').collect();
            let &[name, launch, table, state, started, failed, gap] = &fields[..] else {
                bail!("no record of an event: {line}");
            };
            Ok(Event {
                name: name.to_owned(),
                launch: launch.to_owned(),
                table: table.to_owned(),
                state: state.to_owned(),
                launches: Launches {
                    started: started.parse()?,
                    failed: failed.parse()?,
                    longest_gap: Duration::from_micros(gap.parse()?),
                    ..Launches::default()
                },
            })
        };
        Ok(Life {
            systemd: systemd.to_owned(),
            events: events.lines().map(parse).collect::<anyhow::Result<_>>()?,
        })
    }
}

struct Play<'vm> {
    vm: &'vm Vm,
    peer: Distro,
    events: Vec<Event>,
}

impl Play<'_> {
    fn boot(&mut self, name: &str, distro: Builder) -> anyhow::Result<Distro> {
        let (distro, launches) = self.hammer(|| distro.boot())?;
        self.note(name, Some(&distro), launches);
        Ok(distro)
    }

    fn command(&mut self, name: &str, distro: &Distro, command: &str) -> anyhow::Result<String> {
        let (printed, launches) = self.hammer(|| Ok(distro.run(command)))?;
        self.note(name, Some(distro), launches);
        Ok(printed)
    }

    fn poweroff(&mut self, name: &str, distro: Distro) -> anyhow::Result<()> {
        let ((), launches) = self.hammer(|| distro.poweroff())?;
        self.note(name, None, launches);
        Ok(())
    }

    /// Every event meets the table whole, so that it answers only for itself.
    fn hammer<T>(
        &self,
        event: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<(T, Launches)> {
        if self.vm.entry("WSLInterop-late") != "missing" {
            self.vm.write("WSLInterop-late", "-1")?;
        }
        self.vm.renew_interop()?;
        if self.vm.entry("peerfmt") == "missing" {
            self.peer.register(PEERS_RULE);
        }
        let hammer = self.vm.hammer_with_pauses();
        let result = event();
        Ok((result?, hammer.stop()))
    }

    fn note(&mut self, name: &str, distro: Option<&Distro>, launches: Launches) {
        let launch = match distro {
            Some(_) => self.vm.launch(),
            None => self.peer.launch().to_owned(),
        };
        self.events.push(Event {
            name: name.to_owned(),
            launch,
            table: table(self.vm),
            state: distro.map_or("off".to_owned(), state),
            launches,
        });
    }
}

/// All entries but Python's own, whose name changes with the suite.
fn table(vm: &Vm) -> String {
    let flags = |name: &String| {
        let entry = vm.entry(name);
        let of_cat = entry.strip_prefix("enabled, interpreter /bin/cat, flags: ");
        let of_init = entry.strip_prefix("enabled, interpreter /init, flags: ");
        let shown = of_cat.or(of_init).unwrap_or(&entry);
        format!("{name} {shown}").trim_end().to_owned()
    };
    let entries: Vec<_> =
        vm.entries().iter().filter(|name| !name.starts_with("python")).map(flags).collect();
    entries.join(", ")
}

fn state(distro: &Distro) -> String {
    let unit = distro.run("systemctl is-active systemd-binfmt");
    let system = distro.run("systemctl is-system-running");
    format!("{}, {}", unit.trim(), system.trim())
}
