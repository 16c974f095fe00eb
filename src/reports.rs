//! The kernel's reports of changes to the table, by inotify(7).

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signalfd::SignalFd;

use crate::binfmt_misc::{is_failed_call, Table};
use crate::host::{Host, BINFMT_MISC, MOUNTS};

/// The changes to the table since the last look.
#[derive(Default)]
pub struct Change {
    /// Whether there were any.
    pub wrote: bool,
    /// Whether the table may have been emptied, or anything else may have happened.
    pub flushed: bool,
    /// The files in it that were written to.
    pub names: Vec<String>,
}

/// The kernel's reports: writes to the table, or new mounts while there is no table.
#[derive(Default)]
pub struct Reports {
    inotify: Option<Inotify>,
    mounts: Option<File>,
}

impl Reports {
    /// Sleeps until the given time, or if `all`, until something changes. Returns false on a signal
    /// to stop.
    ///
    /// # Errors
    /// The kernel does not let it wait.
    pub fn wait(&self, signals: &SignalFd, until: Option<Instant>, all: bool) -> nix::Result<bool> {
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
                // Rounded up, or it would wake just before that time.
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

    /// Returns the changes since the last call. Starts watching again if the table was not mounted
    /// before, or has been unmounted.
    ///
    /// # Errors
    /// The kernel cannot report changes at present.
    pub fn take(&mut self, host: &Host) -> anyhow::Result<Change> {
        let mut change = Change::default();
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
                let name = event.name.unwrap_or_default().to_string_lossy().into_owned();
                let of_status = name == "status";
                change.wrote = true;
                change.flushed |= overflown || of_status;
                change.names.extend(Some(name).filter(|name| name != "register"));
                lost |= event.mask.contains(AddWatchFlags::IN_IGNORED);
            }
        }
        if lost {
            self.inotify = None;
            self.begin(host)?;
            // Anything may have happened unreported.
            change.wrote |= self.inotify.is_some();
            change.flushed = true;
        }
        Ok(change)
    }

    /// Starts watching the table, or the mounts if there is no table.
    fn begin(&mut self, host: &Host) -> anyhow::Result<()> {
        // Before looking for the table, so that no later mount is missed.
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
        // Not IN_CLOSE_WRITE: our own lock opens a file of the table.
        let directory = host.path(BINFMT_MISC);
        inotify
            .add_watch(directory.as_str(), AddWatchFlags::IN_MODIFY)
            .with_context(|| format!("watching {directory} by inotify"))?;
        self.inotify = Some(inotify);
        self.mounts = None;
        Ok(())
    }
}
