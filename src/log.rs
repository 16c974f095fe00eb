//! One line a message: to the kernel's log from the generator, whose standard error systemd
//! throws away, and to standard error always, for whoever runs it by hand.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use camino::Utf8PathBuf;

use crate::host::{Host, KMSG};

/// The priorities of syslog(3) that are used here.
#[derive(Clone, Copy)]
enum Priority {
    Error = 3,
    Warning = 4,
    Info = 6,
}

/// Where messages go.
pub struct Log {
    kmsg: Option<Utf8PathBuf>,
    to_journal: bool,
}

impl Log {
    /// For the generator. Without a kernel log to write to, standard error remains.
    pub fn of_generator(host: &Host) -> Log {
        Log {
            kmsg: Some(host.path(KMSG)),
            to_journal: false,
        }
    }

    /// For a verb, run by a unit or by hand.
    pub fn of_verb() -> Log {
        Log {
            kmsg: None,
            to_journal: stderr_is_the_journal(),
        }
    }

    /// What failed, on which path, and why.
    pub fn error(&self, message: &str) {
        self.line(Priority::Error, message);
    }

    /// What is not as it should be, and was passed over.
    pub fn warning(&self, message: &str) {
        self.line(Priority::Warning, message);
    }

    /// What was done.
    pub fn info(&self, message: &str) {
        self.line(Priority::Info, message);
    }

    /// One write(2) a message, as the kernel's log wants it. There is nobody left to tell when
    /// that fails.
    fn line(&self, priority: Priority, message: &str) {
        let message = message.replace(['\n', '\r'], " ");
        let program = env!("CARGO_PKG_NAME");
        let level = priority as u8;
        let kmsg = self
            .kmsg
            .as_ref()
            .map(|path| OpenOptions::new().append(true).open(path));
        if let Some(Ok(mut kmsg)) = kmsg {
            let pid = std::process::id();
            let line = format!("<{level}>{program}[{pid}]: {message}\n");
            let _ = kmsg.write_all(line.as_bytes());
        }
        // The journal knows the program and its PID, and takes the priority off.
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
