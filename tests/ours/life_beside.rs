//! A distro's life beside a neighbour that has rules of the same names, each of them stock or with
//! this project: all that befalls either, and how the distro stands after it. Interpreters of one
//! path are different files: each says whose it is.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use wsl_vm::{Distro, Generation, Vm};

use super::Install;

/// What both have: a rule without `F`, and one with it.
const RULES: &str = ":shared:M::SHARED::/bin/cat:\n:who:M::WHO?::/usr/local/bin/who:F\n";
const INTERPRETER: &str = "/usr/local/bin/who";
/// What that rule with `F` takes.
const PROGRAM: &str = "printf 'WHO?' >/run/who; chmod +x /run/who; /run/who";
const SETTLED: Duration = Duration::from_secs(1);

/// The start limit is systemd's own protection, not what this is about. The pauses let restarts
/// fall into what a neighbour does some time after one.
const RESTARTS: &str = "for pause in 0 0.1 0.2 0.3 0.4; do
    sleep $pause; systemctl reset-failed systemd-binfmt
    systemctl restart systemd-binfmt; systemctl is-failed systemd-binfmt
done 2>/dev/null";
const RESTART: &str = "systemctl reset-failed systemd-binfmt
    systemctl restart systemd-binfmt 2>/dev/null; systemctl is-failed systemd-binfmt";
const IS_FAILED: &str = "systemctl is-failed systemd-binfmt";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    Own,
    Neighbours,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Boot,
    Restarts,
    Reload,
    Restart,
    Poweroff,
    Kill,
}

use Act::{Boot, Kill, Poweroff, Reload, Restart, Restarts};
use Whose::{Neighbours, Own};

/// The neighbour runs already. What it does finds the distro's rules as the distro has made them.
const LIFE: &[(Whose, Act)] = &[
    (Own, Boot),
    (Neighbours, Restarts),
    (Own, Restarts),
    (Own, Reload),
    (Neighbours, Reload),
    (Neighbours, Poweroff),
    (Own, Restart),
    (Neighbours, Boot),
    (Own, Poweroff),
    (Own, Boot),
    (Own, Kill),
    (Own, Boot),
    (Neighbours, Kill),
    (Own, Poweroff),
];

/// Something that befell either, and how the distro stands after it.
#[derive(Clone, Debug)]
pub struct Event {
    pub whose: Whose,
    pub act: Act,
    /// How often systemd-binfmt was started, and how often it then was failed.
    pub starts: u32,
    pub failed: u32,
    pub system: String,
    /// Windows programs that did not start meanwhile.
    pub lost_launches: u32,
    /// Of its rules without `F`, those that there are: `only`, `shared`.
    pub rules: Vec<String>,
    /// Whose file its rule with `F` runs: `own`, `neighbour's`, `none`.
    pub runs: String,
}

impl Event {
    /// What a rule ran, or a system was, from good to bad.
    fn rank(word: &str) -> usize {
        let order = ["own", "neighbour's", "none", "running", "degraded"];
        let found = order.iter().position(|known| *known == word);
        found.unwrap_or(order.len())
    }

    /// Of two such words the worse one.
    pub fn worst<'a>(words: impl Iterator<Item = &'a str>) -> &'a str {
        words.max_by_key(|word| Event::rank(word)).unwrap_or("none")
    }

    pub fn is_start(&self) -> bool {
        !matches!(self.act, Poweroff | Kill)
    }

    /// What there is of its rules, the one with `F` only as far as it is its own.
    pub fn left(&self) -> Vec<&str> {
        let with_f = (self.runs == "own").then_some("who with F");
        self.rules.iter().map(String::as_str).chain(with_f).collect()
    }

    /// How many rules worked before it, and do not after.
    pub fn lost_rules(&self, before: &Event) -> usize {
        let gone = before.rules.iter().filter(|rule| !self.rules.contains(rule));
        gone.count() + usize::from(before.runs != "none" && self.runs == "none")
    }

    /// In which ways this is worse than the same beside another neighbour.
    fn worse_than(&self, other: &Event) -> Vec<String> {
        let mut worse = Vec::new();
        if self.act == Poweroff && self.whose == Own {
            // What has no `F` holds nothing of a distro that is gone.
            if self.runs == "own" && other.runs != "own" {
                worse.push("its rule with F is left".to_owned());
            }
        } else if self.system != "off" {
            for (seen, control) in [(&self.system, &other.system), (&self.runs, &other.runs)] {
                if Event::rank(seen) > Event::rank(control) {
                    worse.push(format!("{seen}, not {control}"));
                }
            }
            let gone = other.rules.iter().filter(|rule| !self.rules.contains(rule));
            worse.extend(gone.map(|rule| format!("no {rule}")));
        }
        if self.failed > other.failed {
            worse.push(format!("{} starts failed, not {}", self.failed, other.failed));
        }
        let name = format!("{:?} {:?}", self.whose, self.act);
        worse.iter().map(|what| format!("{name}: {what}")).collect()
    }
}

/// All that befell a distro and its neighbour.
#[derive(Debug)]
pub struct Beside {
    pub events: Vec<Event>,
}

impl Beside {
    /// Leads such a life, from an empty table on.
    pub fn lead(
        vm: &Vm,
        suite: &str,
        generation: Generation,
        ours: bool,
        neighbour_ours: bool,
    ) -> anyhow::Result<Beside> {
        vm.write("status", "-1")?;
        let side =
            |role, ours| Side { vm, suite: suite.to_owned(), generation, role, ours, distro: None };
        let mut play =
            Play { vm, mine: side("own", ours), neighbour: side("neighbour's", neighbour_ours) };
        vm.renew_interop()?;
        play.neighbour.act(Boot)?;
        let events = LIFE.iter().map(|&(whose, act)| play.event(whose, act));
        Ok(Beside { events: events.collect::<anyhow::Result<_>>()? })
    }

    /// The distro's own events, or its neighbour's.
    pub fn of(&self, whose: Whose) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(move |event| event.whose == whose)
    }

    pub fn lost_launches(&self, whose: Whose) -> bool {
        self.of(whose).any(|event| event.lost_launches > 0)
    }

    /// The rules that were lost in the neighbour's events of that kind.
    pub fn lost_rules(&self, of_kind: fn(&Event) -> bool) -> usize {
        let pairs = self.events.windows(2);
        let its = pairs.filter(|pair| pair[1].whose == Neighbours && of_kind(&pair[1]));
        its.map(|pair| pair[1].lost_rules(&pair[0])).sum()
    }

    /// In which ways the distro fares worse than beside another neighbour. How many launches fail
    /// says little: those that fail are quicker.
    pub fn worse_than(&self, other: &Beside) -> Vec<String> {
        let pairs = self.events.iter().zip(&other.events);
        let mut worse: Vec<_> = pairs.flat_map(|(seen, o)| seen.worse_than(o)).collect();
        for whose in [Own, Neighbours] {
            if self.lost_launches(whose) && !other.lost_launches(whose) {
                worse.push(format!("{whose:?} events: launches lost"));
            }
        }
        worse
    }

    /// It for `parse`.
    pub fn record(&self) -> String {
        let line = |e: &Event| {
            let numbers = format!("{}\t{}\t{}", e.starts, e.failed, e.lost_launches);
            format!("{numbers}\t{}\t{}\t{}\n", e.system, e.rules.join(" "), e.runs)
        };
        self.events.iter().map(line).collect()
    }

    /// The life of that record.
    pub fn parse(record: &str) -> anyhow::Result<Beside> {
        ensure!(record.lines().count() == LIFE.len(), "not a life: {record}");
        let parse = |(&(whose, act), line): (&(Whose, Act), &str)| {
            let fields: Vec<_> = line.split('\t').collect();
            let &[starts, failed, lost_launches, system, rules, runs] = &fields[..] else {
                anyhow::bail!("no record of an event: {line}");
            };
            Ok(Event {
                whose,
                act,
                starts: starts.parse()?,
                failed: failed.parse()?,
                lost_launches: lost_launches.parse()?,
                system: system.to_owned(),
                rules: rules.split_whitespace().map(str::to_owned).collect(),
                runs: runs.to_owned(),
            })
        };
        let events = LIFE.iter().zip(record.lines()).map(parse);
        Ok(Beside { events: events.collect::<anyhow::Result<_>>()? })
    }
}

/// One of the two.
struct Side<'vm> {
    vm: &'vm Vm,
    suite: String,
    generation: Generation,
    /// What its interpreter says.
    role: &'static str,
    ours: bool,
    distro: Option<Distro>,
}

impl Side<'_> {
    /// Does that, and says how often systemd-binfmt was started and how often it was failed.
    fn act(&mut self, act: Act) -> anyhow::Result<(u32, u32)> {
        if act == Boot {
            self.distro = Some(self.boot()?);
        }
        if !matches!(act, Poweroff | Kill) {
            let distro = self.distro.as_ref().context("it is off")?;
            let (starts, answers) = match act {
                Restarts => (5, distro.run(RESTARTS)),
                Reload => (1, distro.run(&format!("systemctl daemon-reload; {RESTART}"))),
                Restart => (1, distro.run(RESTART)),
                _ => (1, distro.run(IS_FAILED)),
            };
            ensure!(answers.lines().count() == starts, "{answers}");
            let failed = answers.lines().filter(|answer| *answer == "failed");
            return Ok((u32::try_from(starts)?, u32::try_from(failed.count())?));
        }
        let distro = self.distro.take().context("it is off")?;
        match act {
            Poweroff => distro.poweroff()?,
            _ => distro.kill(),
        }
        Ok((0, 0))
    }

    fn boot(&self) -> anyhow::Result<Distro> {
        static BOOTS: AtomicU32 = AtomicU32::new(0);
        let number = BOOTS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", self.only());
        let only = format!(":{}:M::ONLY::/bin/cat:\n", self.only());
        let builder = self.vm.distro(&name, &self.suite);
        let builder = builder.generation(self.generation).shared_cgroup().generator(self.ours);
        let builder = builder.file("/etc/binfmt.d/rules.conf", &format!("{RULES}{only}"));
        builder.program(INTERPRETER, self.role).boot()
    }

    /// The name of its rule that the other has not.
    fn only(&self) -> &'static str {
        self.role.trim_end_matches("'s")
    }

    /// Whether its own rule is there, as far as it runs.
    fn has_own(&self) -> bool {
        self.distro.is_none() || self.vm.entry(self.only()) != "missing"
    }
}

struct Play<'vm> {
    vm: &'vm Vm,
    mine: Side<'vm>,
    neighbour: Side<'vm>,
}

impl Play<'_> {
    /// Every event meets interop as WSL has made it, so that it answers only for itself.
    fn event(&mut self, whose: Whose, act: Act) -> anyhow::Result<Event> {
        if self.vm.entry("WSLInterop-late") != "missing" {
            self.vm.write("WSLInterop-late", "-1")?;
        }
        self.vm.renew_interop()?;
        let hammer = self.vm.hammer_with_pauses();
        let side = match whose {
            Own => &mut self.mine,
            Neighbours => &mut self.neighbour,
        };
        let acted = side.act(act);
        // A kill writes nothing, so there is nothing to settle.
        if act != Kill {
            self.settle();
        }
        let launches = hammer.stop();
        let (starts, failed) = acted.with_context(|| format!("{whose:?} {act:?}"))?;
        let (starts, failed) = if whose == Own { (starts, failed) } else { (0, 0) };
        let names = [("only", self.mine.only()), ("shared", "shared")];
        let there = names.iter().filter(|n| self.vm.entry(n.1) != "missing");
        let system = self.mine.distro.as_ref();
        let system = system.map(|distro| distro.run("systemctl is-system-running"));
        Ok(Event {
            whose,
            act,
            starts,
            failed,
            system: system.unwrap_or("off".to_owned()).trim().to_owned(),
            lost_launches: launches.failed,
            rules: there.map(|n| n.0.to_owned()).collect(),
            runs: self.runs(),
        })
    }

    /// Waits for what this project does some time after an event; stock does nothing then.
    fn settle(&self) {
        let sides = [&self.mine, &self.neighbour];
        let watched = |side: &&Side| side.ours && side.distro.is_some();
        let deadline = Instant::now() + SETTLED;
        while sides.iter().any(watched) && !self.is_whole() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether there is nothing more to wait for.
    fn is_whole(&self) -> bool {
        let second = |name: &String| name.starts_with("WSLInterop-");
        let runs_well = || match &*self.runs() {
            "own" => self.mine.distro.is_some(),
            "neighbour's" => self.neighbour.distro.is_some(),
            _ => false,
        };
        self.vm.entry("WSLInterop") == "enabled, interpreter /init, flags: PF"
            && !self.vm.entries().iter().any(second)
            && self.vm.entry("shared") != "missing"
            && self.mine.has_own()
            && self.neighbour.has_own()
            && runs_well()
    }

    /// Whose file the rule with `F` runs: in the distro, or in the VM when that is off.
    fn runs(&self) -> String {
        let printed = match &self.mine.distro {
            Some(distro) => distro.run(PROGRAM),
            None => self.vm_runs().unwrap_or_default(),
        };
        let roles = [self.mine.role, self.neighbour.role];
        let whose = roles.iter().find(|role| printed.starts_with(**role));
        (*whose.unwrap_or(&"none")).to_owned()
    }

    fn vm_runs(&self) -> anyhow::Result<String> {
        let path = "/vm/who";
        fs::write(path, "WHO?")?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        let output = Command::new(path).output()?;
        Ok(String::from_utf8(output.stdout)?)
    }
}
