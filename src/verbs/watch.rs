//! `restore --watch`: stay, and mend the entry whenever the table changes. It sleeps until the
//! kernel reports a change: removals and registrations show in inotify(7), whoever made them and
//! through whichever mount.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::host::{self, Host, BINFMT_MISC, MOUNTS};
use crate::log::Log;
use crate::registry::{is_failed_call, Table};
use crate::verbs::restore;

/// Mends the entry, tells systemd that it stands, and goes on until SIGTERM or SIGINT.
///
/// # Errors
/// The entry could not be made to stand at the start, as in `restore::mend`. What fails later is
/// logged, and tried again after the next change.
pub fn watch(host: &Host, log: &Log) -> anyhow::Result<()> {
    let signals = catch_signals().context("catching signals")?;
    let mut watched = Watched::start(host)?;
    restore::restore(host, log)?;
    host::notify_systemd("READY=1").context("telling systemd that the entry stands")?;

    let mut patience = Patience::new(Instant::now());
    let mut said = Said::default();
    let mut again = false;
    while again
        || watched
            .wait(&signals, None)
            .context("waiting for a change")?
    {
        watched.follow(host)?;
        let outcome = restore::mend(host);
        // The next change may be far, and the entry missing until then.
        again = outcome.as_ref().is_err_and(is_failed_call);
        let outcome = match outcome {
            Ok(deeds) if deeds.is_empty() => continue,
            outcome => outcome.map(|deeds| deeds.join("; ")),
        };
        let spent = patience.spend(Instant::now());
        said.outcome(log, outcome, spent);
        let pause = match spent {
            Spent::All => Some(PAUSE),
            _ => again.then_some(RETRY),
        };
        if pause.is_some() && !watched.wait(&signals, pause).context("pausing")? {
            break;
        }
    }
    Ok(())
}

/// What has been said of late, so that it is not said again and again.
#[derive(Default)]
struct Said {
    of_late: Vec<(String, Instant)>,
    fight: bool,
}

impl Said {
    fn outcome(&mut self, log: &Log, outcome: anyhow::Result<String>, spent: Spent) {
        let failed = outcome.is_err();
        let message = outcome.unwrap_or_else(|error| format!("{error:#}"));
        if spent == Spent::All && !self.fight {
            log.warning(&format!(
                "something undoes this again and again: {message}; from now on tried about \
                 {REGAINED} times a second at most"
            ));
        }
        self.fight = spent != Spent::Willingly;
        self.of_late.retain(|(_, when)| when.elapsed() < REPEAT);
        if self.fight || self.of_late.iter().any(|(said, _)| *said == message) {
            return;
        }
        if failed {
            log.error(&message);
        } else {
            log.info(&message);
        }
        self.of_late.push((message, Instant::now()));
    }
}

fn catch_signals() -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)
}

/// The table's directory, or the list of mounts while there is no table.
struct Watched {
    inotify: Inotify,
    mounts: Option<File>,
}

impl Watched {
    fn start(host: &Host) -> anyhow::Result<Watched> {
        let flags = InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC;
        let inotify = Inotify::init(flags).context("starting inotify")?;
        let mut watched = Watched {
            inotify,
            mounts: None,
        };
        watched.find(host)?;
        Ok(watched)
    }

    /// Watches the table, wherever it may be mounted now.
    fn find(&mut self, host: &Host) -> anyhow::Result<()> {
        // Before looking for it: whatever is mounted from now on is reported.
        let mounts = host.path(MOUNTS);
        let mounts = File::open(&mounts).with_context(|| format!("opening {mounts}"))?;
        self.mounts = match Table::open(host) {
            Ok(_) => {
                let changes = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MODIFY;
                let directory = host.path(BINFMT_MISC);
                self.inotify
                    .add_watch(directory.as_str(), changes)
                    .with_context(|| format!("watching {directory}"))?;
                None
            }
            Err(error) if is_failed_call(&error) => return Err(error),
            Err(_) => Some(mounts),
        };
        Ok(())
    }

    /// Sleeps until something has changed, or until the pause is over; false if it is time to go.
    fn wait(&self, signals: &SignalFd, pause: Option<Duration>) -> nix::Result<bool> {
        let signal = PollFd::new(signals.as_fd(), PollFlags::POLLIN);
        let change = match &self.mounts {
            Some(mounts) => PollFd::new(mounts.as_fd(), PollFlags::POLLPRI),
            None => PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
        };
        let mut both = [signal, change];
        let (awaited, timeout) = match pause {
            None => (2, PollTimeout::NONE),
            Some(pause) => (1, PollTimeout::try_from(pause).unwrap_or(PollTimeout::MAX)),
        };
        loop {
            match poll(both.get_mut(..awaited).unwrap_or_default(), timeout) {
                Err(Errno::EINTR) => continue,
                result => result?,
            };
            return Ok(!both[0].any().unwrap_or_default());
        }
    }

    /// Takes note of all changes so far. What they were does not matter, nor whether some were
    /// lost in an overflow; but the end of the watch does, which an unmounted table brings.
    fn follow(&mut self, host: &Host) -> anyhow::Result<()> {
        let mut ended = self.mounts.is_some();
        loop {
            match self.inotify.read_events() {
                Ok(events) => {
                    ended |= events
                        .iter()
                        .any(|e| e.mask.contains(AddWatchFlags::IN_IGNORED))
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("reading from inotify"),
            }
        }
        if ended {
            self.find(host)?;
        }
        Ok(())
    }
}

/// How long the same is not said again.
const REPEAT: Duration = Duration::from_secs(60);
/// How often it mends at once, before it takes what happens for a fight.
const BURST: f64 = 2000.0;
/// How often it mends a second from then on.
// Not a float, whose printing costs 13 kB in the binary.
const REGAINED: u32 = 10;
/// How long it waits after a call that failed.
const RETRY: Duration = Duration::from_millis(100);
/// How long it lets the other side have its way.
const PAUSE: Duration = Duration::from_secs(1);

/// What keeps a fight over the entry from costing a processor: a token bucket.
struct Patience {
    left: f64,
    counted: Instant,
    lost: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Spent {
    /// There is enough of it.
    Willingly,
    /// There is some again, but the fight goes on.
    Grudgingly,
    /// There is none left.
    All,
}

impl Patience {
    fn new(now: Instant) -> Patience {
        Patience {
            left: BURST,
            counted: now,
            lost: false,
        }
    }

    fn spend(&mut self, now: Instant) -> Spent {
        let regained = now.duration_since(self.counted).as_secs_f64() * f64::from(REGAINED);
        self.counted = now;
        self.left = (self.left + regained).min(BURST) - 1.0;
        if self.left < 0.0 {
            self.left = 0.0;
            self.lost = true;
            return Spent::All;
        }
        // The fight is over when half of it is back.
        self.lost &= self.left < BURST / 2.0;
        if self.lost {
            Spent::Grudgingly
        } else {
            Spent::Willingly
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_ends_and_comes_back() {
        let mut now = Instant::now();
        let mut patience = Patience::new(now);
        for _ in 0..2000 {
            assert_eq!(patience.spend(now), Spent::Willingly);
        }
        assert_eq!(patience.spend(now), Spent::All);
        assert_eq!(patience.spend(now), Spent::All);
        now += PAUSE;
        for _ in 0..10 {
            assert_eq!(patience.spend(now), Spent::Grudgingly);
        }
        assert_eq!(patience.spend(now), Spent::All);
        now += Duration::from_secs(600);
        assert_eq!(patience.spend(now), Spent::Willingly);
    }
}
