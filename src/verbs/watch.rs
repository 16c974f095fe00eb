//! `restore --watch`: keep running, and repair what others do to the table. It sleeps until the
//! kernel reports a change: inotify(7) shows every write to the table, whoever makes it and through
//! whichever mount. Then it registers a stand-in for Windows programs at once, if they need one.
//! Everything else waits until the writing stops: a registration that others are about to make must
//! not fail because we have just taken the name.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Error};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::binfmt_misc::{is_failed_call, Table};
use crate::host::Host;
use crate::log::Log;
use crate::repair::{self, Pending};
use crate::reports::{Change, Reports};

/// How long the table must have been quiet before it is settled. Each watcher adds a random time,
/// up to a third of this, so that one does the work and the others find it done.
const QUIET: Duration = Duration::from_millis(300);
/// The longest wait for that, after which all but WSLInterop itself is settled.
const PATIENCE: Duration = Duration::from_secs(2);
/// A repair that is undone this soon, this often in a row, means that somebody fights it.
const UNDONE: Duration = Duration::from_millis(50);
const UNDONE_IN_A_ROW: u32 = 5;
/// In a fight these waits are doubled each time, up to this factor.
const LONGEST: u32 = 32;
/// The same while others write on and on, but undo nothing.
const LONGEST_UNQUIET: u32 = 4;
/// The pause between two looks at a table that is being written to.
const PACE: Duration = Duration::from_millis(1);
const PACE_IN_A_FIGHT: Duration = Duration::from_millis(20);
/// The wait after a failed call, doubled each time.
const RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// The time between looks while the kernel cannot report changes.
const UNREPORTED: Duration = Duration::from_secs(1);
/// How long the same repair is not logged again.
const REPEAT: Duration = Duration::from_secs(60);

/// Repairs the table, tells systemd when Windows programs start, and keeps watching until SIGTERM
/// or SIGINT. What it must not or cannot repair is logged, and repaired as soon as possible.
///
/// # Errors
/// The kernel does not let it wait at all, or systemd cannot be told.
pub fn watch(host: &Host, log: &Log) -> anyhow::Result<()> {
    let signals = catch_signals().context("catching signals")?;
    let mut reports = Reports::default();
    let mut watcher = Watcher::new(host, log);
    let mut ready = false;
    loop {
        let change = reports.take(host);
        let wrote = change.as_ref().is_ok_and(|change| change.wrote);
        watcher.look(change);
        if !ready {
            notify_systemd("READY=1").context("telling systemd that it is ready")?;
            ready = true;
        }
        // Writes during the pause are handled together.
        let pause = wrote.then(|| Instant::now() + watcher.pace());
        if pause.is_some() && !reports.wait(&signals, pause, false).context("pausing")? {
            return Ok(());
        }
        let due = watcher.due();
        if !reports.wait(&signals, due, true).context("waiting for a change")? {
            return Ok(());
        }
    }
}

/// A series of writes to the table.
struct Burst {
    since: Instant,
    quiet_at: Instant,
}

/// The state of the watcher between two looks at the table.
struct Watcher<'a> {
    host: &'a Host,
    table: Table,
    told: Told<'a>,
    burst: Option<Burst>,
    /// When to look again because the kernel's reports are incomplete, or a call failed.
    again_at: Option<Instant>,
    retry: Duration,
    /// The factor by which its waits are longer than usual, more than 1 in a fight.
    times: u32,
    /// When it last repaired something, and how often in a row that was undone.
    settled: Option<Instant>,
    undone: u32,
    flushed: bool,
    pending: Pending,
    /// What kept the table from being settled.
    unsettled: Vec<Error>,
}

impl<'a> Watcher<'a> {
    fn new(host: &'a Host, log: &'a Log) -> Watcher<'a> {
        Watcher {
            host,
            table: Table::unopened(host),
            told: Told { log, deeds: Vec::new(), problems: Vec::new() },
            burst: None,
            again_at: Some(Instant::now()),
            retry: RETRY,
            times: 1,
            settled: None,
            undone: 0,
            // Possibly before the watcher started.
            flushed: true,
            pending: Pending { again: true, ..Pending::default() },
            unsettled: Vec::new(),
        }
    }

    /// When to act next if nothing is written until then.
    fn due(&self) -> Option<Instant> {
        let settle = self.burst.as_ref().map(|burst| self.settle_at(burst));
        settle.into_iter().chain(self.again_at).min()
    }

    fn settle_at(&self, burst: &Burst) -> Instant {
        burst.quiet_at.min(burst.since + PATIENCE * self.times)
    }

    /// Waits longer from now on, so that the other side can finish.
    fn give_way(&mut self) {
        // The first time it may just be other watchers doing the same work.
        if self.times == 2 {
            self.told.log.warning(
                "something keeps changing the table; waiting longer before each repair from now on",
            );
        }
        self.times = (self.times * 2).min(LONGEST);
    }

    fn pace(&self) -> Duration {
        match self.times {
            1 => PACE,
            _ => PACE_IN_A_FIGHT,
        }
    }

    /// Looks at the table, and does what is due.
    fn look(&mut self, change: anyhow::Result<Change>) {
        let now = Instant::now();
        let (change, unreported) = match change {
            Ok(change) => (change, None),
            Err(error) => {
                let blind = Change { flushed: true, ..Change::default() };
                (blind, Some(error))
            }
        };
        self.note(&change, now);
        let uncovered = self.cover().err();
        self.settle_if_due(now);

        let failed = uncovered.iter().chain(&self.unsettled).any(is_failed_call);
        let wait = match &unreported {
            Some(_) => Some(UNREPORTED),
            None => failed.then_some(self.retry),
        };
        self.retry = match failed {
            true => (self.retry * 2).min(LONGEST_RETRY),
            false => RETRY,
        };
        self.again_at = self.again_at.or(wait.map(|wait| now + wait));
        let problems = unreported.iter().chain(&uncovered).chain(&self.unsettled);
        self.told.problems(problems.map(|error| format!("{error:#}")));
    }

    /// Records what has changed, and when the table may be settled.
    fn note(&mut self, change: &Change, now: Instant) {
        let again = self.again_at.is_some_and(|at| now >= at);
        if again {
            self.again_at = None;
        }
        self.flushed |= change.flushed;
        if change.flushed {
            self.table.forget(None);
        }
        for name in &change.names {
            self.table.forget(Some(name));
        }
        if change.wrote || (again && self.burst.is_none()) {
            self.burst = Some(Burst {
                since: self.burst.as_ref().map_or(now, |burst| burst.since),
                quiet_at: now + QUIET * self.times + jitter(),
            });
        }
    }

    /// Registers the stand-in if Windows programs need one.
    fn cover(&mut self) -> anyhow::Result<()> {
        self.table.require()?;
        let Some(deed) = repair::cover(self.host, &self.table)? else {
            return Ok(());
        };
        self.told.deeds(vec![deed]);
        match self.settled.is_some_and(|when| when.elapsed() < UNDONE) {
            true => self.note_undone(),
            false => self.undone = 0,
        }
        Ok(())
    }

    fn note_undone(&mut self) {
        self.undone += 1;
        if self.undone >= UNDONE_IN_A_ROW {
            self.give_way();
        }
    }

    fn settle_if_due(&mut self, now: Instant) {
        let Some(burst) = self.burst.take() else {
            return;
        };
        if now < self.settle_at(&burst) {
            self.burst = Some(burst);
            return;
        }
        // A table that is not mounted has nothing left to settle.
        self.unsettled.clear();
        if let Err(error) = self.table.require() {
            self.unsettled.push(error);
            self.unsettled.retain(is_failed_call);
            return;
        }
        let quiet = now >= burst.quiet_at;
        if !quiet {
            // Only up to a point: whoever just writes on and on undoes nothing.
            if self.times < LONGEST_UNQUIET {
                self.give_way();
            }
            self.burst = Some(Burst { since: now, quiet_at: burst.quiet_at });
        }
        let table = &self.table;
        let flush = self.flushed && repair::interop_went(self.host, table);
        let settled = repair::settle(self.host, table, flush, quiet, &mut self.pending);
        self.unsettled = settled.problems;
        // While the records cannot be read, remember the flush: otherwise own rules that it removed
        // would count as removed on purpose.
        self.flushed &= settled.unread;
        if !settled.unread && self.pending.missing.is_empty() {
            let noted = repair::note_interop(self.host, table);
            self.unsettled.extend(noted.err());
        }
        if self.pending.is_any() {
            self.again_at = Some(now);
        }
        match settled.deeds.is_empty() {
            // It was undone before it was finished.
            false if !self.unsettled.is_empty() => self.note_undone(),
            false => self.settled = Some(Instant::now()),
            true if quiet => (self.times, self.undone) = (1, 0),
            true => {}
        }
        self.told.deeds(settled.deeds);
    }
}

/// A random time, up to a third of QUIET.
fn jitter() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    QUIET / 3000 * (now.map_or(0, |now| now.subsec_micros()) % 1000)
}

/// What has been logged lately, so that it is not logged again and again.
struct Told<'a> {
    log: &'a Log,
    deeds: Vec<(String, Instant)>,
    problems: Vec<String>,
}

impl Told<'_> {
    fn deeds(&mut self, deeds: Vec<String>) {
        if deeds.is_empty() {
            return;
        }
        let deeds = deeds.join("; ");
        self.deeds.retain(|(_, when)| when.elapsed() < REPEAT);
        if !self.deeds.iter().any(|(told, _)| *told == deeds) {
            self.log.info(&deeds);
            self.deeds.push((deeds, Instant::now()));
        }
    }

    /// Logs each problem once while it lasts, and tells systemd all of them: `systemctl status`
    /// shows them.
    fn problems(&mut self, problems: impl Iterator<Item = String>) {
        let mut now: Vec<String> = Vec::new();
        for problem in problems {
            if !now.contains(&problem) {
                now.push(problem);
            }
        }
        if now == self.problems {
            return;
        }
        for problem in now.iter().filter(|problem| !self.problems.contains(problem)) {
            self.log.error(problem);
        }
        let status = now.join("; ").replace('\n', " ");
        // It is only shown to people, so a failure does not matter.
        let _ = notify_systemd(&format!("STATUS={status}"));
        self.problems = now;
    }
}

/// Tells systemd about the state of this service, like sd_notify(3). Does nothing if systemd did
/// not start it.
///
/// # Errors
/// systemd's socket does not accept the message.
fn notify_systemd(state: &str) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}

fn catch_signals() -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)
}
