//! The kernel's table of binary formats, as Documentation/admin-guide/binfmt-misc.rst has it:
//! reading an entry, registering one.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};

use anyhow::{anyhow, Context};

use crate::host::{Host, BINFMT_MISC};

/// One registered format, as its file shows it.
#[derive(Debug, PartialEq)]
pub struct Entry {
    /// Whether the kernel uses it.
    pub enabled: bool,
    /// The program that is run.
    pub interpreter: String,
    /// `P`, `O`, `C` and `F`, in the kernel's order.
    pub flags: String,
    /// The lines that say what is matched: `extension …`, or `offset …`, `magic …`, `mask …`.
    pub matches: Vec<String>,
}

impl Entry {
    /// Reads the text of an entry's file.
    ///
    /// # Errors
    /// The text is not one that the kernel writes.
    pub fn parse(text: &str) -> anyhow::Result<Entry> {
        let mut lines = text.lines();
        let enabled = match lines.next() {
            Some("enabled") => true,
            Some("disabled") => false,
            other => return Err(anyhow!("neither enabled nor disabled, but {other:?}")),
        };
        let mut field = |name: &str| {
            lines
                .next()
                .and_then(|line| line.strip_prefix(name))
                .map(|value| value.trim().to_owned())
                .ok_or_else(|| anyhow!("no '{name}' line where one belongs"))
        };
        Ok(Entry {
            enabled,
            interpreter: field("interpreter ")?,
            flags: field("flags:")?,
            matches: lines.map(str::to_owned).collect(),
        })
    }
}

/// The entry of that name, if there is one.
///
/// # Errors
/// binfmt_misc is not mounted, or the entry cannot be read.
pub fn read(host: &Host, name: &str) -> anyhow::Result<Option<Entry>> {
    let path = format!("{BINFMT_MISC}/{name}");
    let text = match host.read(&path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            require_mounted(host)?;
            return Ok(None);
        }
        Err(error) => return Err(error).with_context(|| format!("reading {path}")),
    };
    Entry::parse(&text)
        .map(Some)
        .with_context(|| format!("reading {path}"))
}

/// Registers `rule`, `:name:type:offset:magic:mask:interpreter:flags`.
///
/// # Errors
/// The kernel refuses it; `AlreadyExists` in the chain if the name is taken.
pub fn register(host: &Host, rule: &str) -> anyhow::Result<()> {
    let path = host.path(&format!("{BINFMT_MISC}/register"));
    OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| file.write_all(rule.as_bytes()))
        .with_context(|| format!("writing {rule} to {path}"))
}

/// Only the mounted file system has a `register` file.
fn require_mounted(host: &Host) -> anyhow::Result<()> {
    match host.path(&format!("{BINFMT_MISC}/register")).try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => Err(anyhow!("binfmt_misc is not mounted on {BINFMT_MISC}")),
        Err(error) => Err(error).context(format!("looking for {BINFMT_MISC}/register")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_the_kernel_writes_them() {
        let entry = Entry::parse("enabled\ninterpreter /init\nflags: PF\noffset 0\nmagic 4d5a\n");
        let expected = Entry {
            enabled: true,
            interpreter: "/init".to_owned(),
            flags: "PF".to_owned(),
            matches: vec!["offset 0".to_owned(), "magic 4d5a".to_owned()],
        };
        assert_eq!(entry.unwrap(), expected);
        let entry = Entry::parse("disabled\ninterpreter /a b\nflags: \nextension .exe\n").unwrap();
        assert_eq!((entry.enabled, entry.flags.as_str()), (false, ""));
        assert_eq!(entry.interpreter, "/a b");
        assert_eq!(entry.matches, ["extension .exe"]);
    }

    #[test]
    fn a_text_that_the_kernel_does_not_write_is_an_error() {
        for text in ["", "enabled\n", "on\n", "enabled\nflags: P\n"] {
            assert!(Entry::parse(text).is_err(), "{text:?}");
        }
    }
}
