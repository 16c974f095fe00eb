//! Messages, one line each. The generator writes them to the kernel's log, because systemd discards
//! its standard error; everything also goes to standard error, for a run by hand.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use camino::Utf8PathBuf;

use crate::host::{Host, KMSG};

/// The priorities used here, from syslog(3).
#[derive(Clone, Copy)]
enum Priority {
    Error = 3,
    Warning = 4,
    Info = 6,
}

/// The destination of messages.
pub struct Log {
    kmsg: Option<Utf8PathBuf>,
    to_journal: bool,
}

impl Log {
    /// The log of the generator. If the kernel's log cannot be written to, only standard error is
    /// used.
    pub fn of_generator(host: &Host) -> Log {
        Log { kmsg: Some(host.path(KMSG)), to_journal: false }
    }

    /// The log of a verb, run by a unit or by hand.
    pub fn of_verb() -> Log {
        Log { kmsg: None, to_journal: stderr_is_the_journal() }
    }

    /// Logs what failed, on which path, and why.
    pub fn error(&self, message: &str) {
        self.line(Priority::Error, message);
    }

    /// Logs a problem that was tolerated.
    pub fn warning(&self, message: &str) {
        self.line(Priority::Warning, message);
    }

    /// Logs what was done.
    pub fn info(&self, message: &str) {
        self.line(Priority::Info, message);
    }

    /// Writes a message with a single write(2), as the kernel's log requires. There is nobody to
    /// tell if that fails.
    fn line(&self, priority: Priority, message: &str) {
        let message = message.replace(['\n', '\r'], " ");
        let program = env!("CARGO_PKG_NAME");
        let level = priority as u8;
        let kmsg = self.kmsg.as_ref().map(|path| OpenOptions::new().append(true).open(path));
        if let Some(Ok(mut kmsg)) = kmsg {
            let pid = std::process::id();
            let line = format!("<{level}>{program}[{pid}]: {message}\n");
            let _ = kmsg.write_all(line.as_bytes());
        }
        // The journal knows the program and its PID, and strips the priority.
        let line = if self.to_journal {
            format!("<{level}>{message}\n")
        } else {
            format!("{program}: {message}\n")
        };
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

/// Whether standard error is the stream that `$JOURNAL_STREAM` names (systemd.exec(5)).
fn stderr_is_the_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else {
        return false;
    };
    std::io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|fd| File::from(fd).metadata())
        .is_ok_and(|m| stream == *format!("{}:{}", m.dev(), m.ino()))
}
