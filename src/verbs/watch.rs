//! `restore --watch`: stay, and repair what others do to the table. It sleeps until the kernel
//! reports a change: what is written to the table shows in inotify(7), whoever wrote and through
//! whichever mount. Then Windows programs get a stand-in at once if they need one. All else has
//! time until nobody writes any more: others may be in the middle of something, and must not meet
//! an entry of ours under a name that they are about to register.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Error};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::binfmt_misc::{is_failed_call, Table};
use crate::host::{Host, BINFMT_MISC, MOUNTS};
use crate::log::Log;
use crate::repair::{self, Pending};

/// How long nobody must have written to the table before it is settled. Up to a third more, another
/// time for each watcher, so that one does the work and the others only see that it is done.
const QUIET: Duration = Duration::from_millis(300);
/// How long that is waited for at most.
const PATIENCE: Duration = Duration::from_secs(2);
/// What is undone so soon after it was settled, so often in a row, is undone by somebody who fights.
const UNDONE: Duration = Duration::from_millis(50);
const UNDONE_IN_A_ROW: u32 = 5;
/// In a fight all that waiting is doubled each time, up to so many times as long.
const LONGEST: u32 = 32;
/// How long it looks away while the table is being written to.
const PACE: Duration = Duration::from_millis(1);
const PACE_IN_A_FIGHT: Duration = Duration::from_millis(20);
/// How long it waits after a call that failed; twice as long each time.
const RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// How often it looks where the kernel cannot report changes.
const UNREPORTED: Duration = Duration::from_secs(1);
/// How long the same deed is not told again.
const REPEAT: Duration = Duration::from_secs(60);

/// Repairs what is out of order, tells systemd when Windows programs start, and goes on until
/// SIGTERM or SIGINT. What others have made of the table, or have not mounted, is told, and
/// repaired as soon as it can be.
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
        // What is written meanwhile is looked at in one.
        let pause = wrote.then(|| Instant::now() + watcher.pace());
        if pause.is_some() && !reports.wait(&signals, pause, false).context("pausing")? {
            return Ok(());
        }
        let due = watcher.due();
        if !reports
            .wait(&signals, due, true)
            .context("waiting for a change")?
        {
            return Ok(());
        }
    }
}

/// What is known of the table's changes since it was last asked for.
struct Change {
    /// There were any.
    wrote: bool,
    /// The table may have been emptied, or anything else have happened.
    flushed: bool,
    /// The files in it that were written to.
    names: Vec<String>,
}

/// The time since somebody began to write to the table.
struct Burst {
    since: Instant,
    quiet_at: Instant,
}

/// One watcher, between its looks at the table.
struct Watcher<'a> {
    host: &'a Host,
    table: Table,
    told: Told<'a>,
    burst: Option<Burst>,
    /// What the kernel reports is not everything, or something failed: another look then.
    again_at: Option<Instant>,
    retry: Duration,
    /// How many times as long as usual it waits, which is more than once in a fight.
    times: u32,
    /// When it did something last, and how often in a row that was undone.
    settled: Option<Instant>,
    undone: u32,
    flushed: bool,
    pending: Pending,
    /// What kept it from being settled.
    unsettled: Vec<Error>,
}

impl<'a> Watcher<'a> {
    fn new(host: &'a Host, log: &'a Log) -> Watcher<'a> {
        Watcher {
            host,
            table: Table::unopened(host),
            told: Told::new(log),
            burst: None,
            again_at: Some(Instant::now()),
            retry: RETRY,
            times: 1,
            settled: None,
            undone: 0,
            // Before it was started, perhaps.
            flushed: true,
            pending: Pending::default(),
            unsettled: Vec::new(),
        }
    }

    /// When there is something to do again, if nothing is written until then.
    fn due(&self) -> Option<Instant> {
        let settle = self.burst.as_ref().map(|burst| self.settle_at(burst));
        settle.into_iter().chain(self.again_at).min()
    }

    fn settle_at(&self, burst: &Burst) -> Instant {
        burst.quiet_at.min(burst.since + PATIENCE * self.times)
    }

    fn is_fight(&self) -> bool {
        self.times > 1
    }

    /// Lets the other side have its way for longer.
    fn give_way(&mut self) {
        // Once may be others of ours who are at the same work.
        if self.times == 2 {
            self.told.fight();
        }
        self.times = (self.times * 2).min(LONGEST);
    }

    fn pace(&self) -> Duration {
        match self.is_fight() {
            true => PACE_IN_A_FIGHT,
            false => PACE,
        }
    }

    /// Does what is to be done now.
    fn look(&mut self, change: anyhow::Result<Change>) {
        let now = Instant::now();
        let (change, unreported) = match change {
            Ok(change) => (change, None),
            Err(error) => {
                let blind = Change {
                    wrote: false,
                    flushed: true,
                    names: Vec::new(),
                };
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
        self.told
            .problems(problems.map(|error| format!("{error:#}")));
    }

    /// Takes note of what has changed, and until when it has to be quiet then.
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
            let quiet_at = now + QUIET * self.times + jitter();
            match &mut self.burst {
                Some(burst) => burst.quiet_at = quiet_at,
                none => {
                    *none = Some(Burst {
                        since: now,
                        quiet_at,
                    })
                }
            }
        }
    }

    /// Gives Windows programs a stand-in if they need one.
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
        // A table that is not there is no longer unsettled.
        self.unsettled.clear();
        if let Err(error) = self.table.require() {
            self.unsettled.push(error);
            self.unsettled.retain(is_failed_call);
            return;
        }
        let quiet = now >= burst.quiet_at;
        if !quiet {
            self.give_way();
            self.burst = Some(Burst {
                since: now,
                quiet_at: burst.quiet_at,
            });
        }
        let table = &self.table;
        let flush = self.flushed && repair::interop_went(self.host, table);
        let settled = repair::settle(self.host, table, flush, quiet, Some(&mut self.pending));
        self.unsettled = settled.problems;
        // Or own rules that went with it would be taken for removed on purpose.
        self.flushed &= settled.unread;
        if !settled.unread && !self.pending.is_missing() {
            let noted = repair::note_interop(self.host, table);
            self.unsettled.extend(noted.err());
        }
        if self.pending.is_any() {
            self.again_at = Some(now);
        }
        match settled.deeds.is_empty() {
            // Undone before it was done.
            false if !self.unsettled.is_empty() => self.note_undone(),
            false => self.settled = Some(Instant::now()),
            true if quiet => (self.times, self.undone) = (1, 0),
            true => {}
        }
        self.told.deeds(settled.deeds);
    }
}

/// Up to a third of QUIET, by chance.
fn jitter() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    QUIET / 3000 * (now.map_or(0, |now| now.subsec_micros()) % 1000)
}

/// What has been told of late, so that it is not told again and again.
struct Told<'a> {
    log: &'a Log,
    deeds: Vec<(String, Instant)>,
    problems: Vec<String>,
}

impl Told<'_> {
    fn new(log: &Log) -> Told<'_> {
        Told {
            log,
            deeds: Vec::new(),
            problems: Vec::new(),
        }
    }

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

    /// Each is told once for as long as it lasts, and to systemd, for `systemctl status`.
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
        for problem in now
            .iter()
            .filter(|problem| !self.problems.contains(problem))
        {
            self.log.error(problem);
        }
        let status = now.join("; ").replace('\n', " ");
        // Only for people to see.
        let _ = notify_systemd(&format!("STATUS={status}"));
        self.problems = now;
    }

    fn fight(&self) {
        self.log.warning(
            "something keeps changing the table; waiting longer before each repair from now on",
        );
    }
}

/// Tells the manager about a service that it has started, as sd_notify(3) does; not for those who
/// were started by somebody else.
///
/// # Errors
/// The manager's socket takes nothing.
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

/// The kernel's reports: of writes to the table, or of mounts while there is no table.
#[derive(Default)]
struct Reports {
    inotify: Option<Inotify>,
    mounts: Option<File>,
}

impl Reports {
    /// Sleeps until something has changed, if `all` are to be waited for, or until that time; false
    /// if a signal says that it is time to go.
    fn wait(&self, signals: &SignalFd, until: Option<Instant>, all: bool) -> nix::Result<bool> {
        let signal = PollFd::new(signals.as_fd(), PollFlags::POLLIN);
        let mounts = self.mounts.as_ref();
        let mounts = mounts.map(|file| PollFd::new(file.as_fd(), PollFlags::POLLPRI));
        let inotify = self.inotify.as_ref();
        let inotify = inotify.map(|inotify| PollFd::new(inotify.as_fd(), PollFlags::POLLIN));
        let mut awaited = vec![signal];
        awaited.extend(mounts.or(inotify).filter(|_| all));
        loop {
            let timeout = match until {
                None => PollTimeout::NONE,
                // Rounded up, or it would be woken just before the time.
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    let left = left + Duration::from_micros(999);
                    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
                }
            };
            match poll(&mut awaited, timeout) {
                Err(Errno::EINTR) => continue,
                result => result?,
            };
            let to_go = awaited.first().and_then(PollFd::any);
            return Ok(!to_go.unwrap_or_default());
        }
    }

    /// What has been reported since it was last asked for. Makes sure that all that comes is, if
    /// the table was not there before or has been unmounted.
    ///
    /// # Errors
    /// Nothing can be reported at present.
    fn take(&mut self, host: &Host) -> anyhow::Result<Change> {
        let mut change = Change {
            wrote: false,
            flushed: false,
            names: Vec::new(),
        };
        let mut lost = self.inotify.is_none();
        while let Some(inotify) = &self.inotify {
            let events = match inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => break,
                Err(error) => {
                    self.inotify = None;
                    return Err(error).context("reading from inotify");
                }
            };
            for event in events {
                let overflown = event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                let name = event
                    .name
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                let of_status = name == "status";
                change.wrote = true;
                change.flushed |= overflown || of_status;
                change
                    .names
                    .extend(Some(name).filter(|name| name != "register"));
                lost |= event.mask.contains(AddWatchFlags::IN_IGNORED);
            }
        }
        if lost {
            self.inotify = None;
            self.begin(host)?;
            // What was not reported may have been anything.
            change.wrote |= self.inotify.is_some();
            change.flushed = true;
        }
        Ok(change)
    }

    /// Has the table's changes reported, wherever it may be mounted now.
    fn begin(&mut self, host: &Host) -> anyhow::Result<()> {
        // Before looking for it: whatever is mounted from now on is reported.
        let mounts = host.path(MOUNTS);
        self.mounts = Some(File::open(&mounts).with_context(|| format!("opening {mounts}"))?);
        if let Err(error) = Table::open(host) {
            return match is_failed_call(&error) {
                true => Err(error),
                false => Ok(()),
            };
        }
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .context("starting inotify")?;
        // Not their closing: our own lock is a file of the table.
        let directory = host.path(BINFMT_MISC);
        inotify
            .add_watch(directory.as_str(), AddWatchFlags::IN_MODIFY)
            .with_context(|| format!("watching {directory} by inotify"))?;
        self.inotify = Some(inotify);
        self.mounts = None;
        Ok(())
    }
}
