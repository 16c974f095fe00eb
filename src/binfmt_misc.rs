//! The kernel's table of binary formats, Documentation/admin-guide/binfmt-misc.rst: reading it,
//! registering, unregistering, and which entries take Windows programs.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::thread;
use std::time::Duration;

use anyhow::{anyhow, bail, Context};
use camino::{Utf8Path, Utf8PathBuf};
use nix::fcntl::{Flock, FlockArg};

use crate::host::{Host, BINFMT_MISC};

/// One entry, as its file shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Whether the kernel uses it.
    pub enabled: bool,
    /// The program that is run.
    pub interpreter: String,
    /// Any of `P`, `O`, `C` and `F`, in the kernel's order.
    pub flags: String,
    /// The files that it matches.
    pub pattern: Pattern,
}

/// The files that an entry matches.
#[derive(Clone, Debug, PartialEq)]
pub enum Pattern {
    /// Those with this extension, the part of the name after the last dot.
    Extension(String),
    /// Those with these bytes at this offset.
    Magic {
        /// The offset, in bytes.
        offset: usize,
        /// The bytes.
        magic: Vec<u8>,
        /// The bits of them that count; all if there is no mask.
        mask: Option<Vec<u8>>,
    },
}

/// An entry's claim to Windows programs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Claim {
    /// It takes no file that begins with `MZ`.
    None,
    /// It takes ordinary Windows programs: the first such entry gets them.
    Ordinary,
    /// It takes only files with a longer magic that begins with `MZ`, like APE's, and has to come
    /// first for that.
    Longer,
}

/// The beginning of an ordinary Windows program, by any linker: the DOS header, the DOS stub, and
/// the signature of the PE header, at the place where GNU's linker and .NET put it.
const ORDINARY_PROGRAM: &[u8] =
    b"MZ\x90\0\x03\0\0\0\x04\0\0\0\xff\xff\0\0\xb8\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\
    \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x80\0\0\0\
    \x0e\x1f\xba\x0e\0\xb4\x09\xcd\x21\xb8\x01\x4c\xcd\x21This program cannot be run in DOS mode.\
    \r\r\n$\0\0\0\0\0\0\0PE\0\0";

/// An entry in a listing of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its inode, which an entry registered later under the same name does not have.
    pub inode: u64,
    /// The entry itself.
    pub entry: Entry,
}

/// The time of a file: seconds and nanoseconds of the kernel's clock.
pub type Time = (i64, i64);

impl Entry {
    /// Parses the text of an entry's file.
    ///
    /// # Errors
    /// The kernel does not write such a text.
    pub fn parse(text: &str) -> anyhow::Result<Entry> {
        let mut lines = text.lines();
        let enabled = match lines.next() {
            Some("enabled") => true,
            Some("disabled") => false,
            other => return Err(anyhow!("expected enabled or disabled, found {other:?}")),
        };
        let mut field = |name: &str| {
            lines
                .next()
                .and_then(|line| line.strip_prefix(name))
                .ok_or_else(|| anyhow!("expected a '{name}' line"))
        };
        let interpreter = field("interpreter ")?.to_owned();
        let flags = field("flags:")?.trim().to_owned();
        let pattern = match field("extension .") {
            Ok(extension) => Pattern::Extension(extension.to_owned()),
            Err(_) => magic(text)?,
        };
        Ok(Entry { enabled, interpreter, flags, pattern })
    }

    /// An entry whose text cannot be parsed: it may match any file.
    fn unreadable(text: &str) -> Entry {
        Entry {
            enabled: !text.starts_with("disabled"),
            interpreter: String::new(),
            flags: String::new(),
            pattern: Pattern::Magic { offset: 0, magic: Vec::new(), mask: None },
        }
    }

    /// Its claim to Windows programs while it is enabled.
    pub fn claim(&self) -> Claim {
        let wants_mz = match &self.pattern {
            Pattern::Extension(extension) if extension.eq_ignore_ascii_case("exe") => {
                return Claim::Ordinary
            }
            Pattern::Extension(_) => false,
            Pattern::Magic { offset, magic, mask } => {
                let whole = |at| bits_that_count(mask, at) != 0;
                *offset == 0 && magic.starts_with(b"MZ") && whole(0) && whole(1)
            }
        };
        match self.is_for("exe", ORDINARY_PROGRAM) {
            true => Claim::Ordinary,
            false if wants_mz => Claim::Longer,
            false => Claim::None,
        }
    }

    /// Whether it takes an ordinary Windows program with the usual extension.
    pub fn takes_windows_programs(&self) -> bool {
        self.enabled && self.is_for("exe", ORDINARY_PROGRAM)
    }

    /// Whether it matches a file with this extension and beginning. What follows the beginning is
    /// unknown, and does not match.
    fn is_for(&self, extension: &str, head: &[u8]) -> bool {
        let (offset, magic, mask) = match &self.pattern {
            Pattern::Extension(own) => return own == extension,
            Pattern::Magic { offset, magic, mask } => (*offset, magic, mask),
        };
        magic.iter().enumerate().all(|(i, byte)| {
            let mask = bits_that_count(mask, i);
            let there = head.get(offset.saturating_add(i));
            mask == 0 || there.is_some_and(|there| (there ^ byte) & mask == 0)
        })
    }

    /// Whether it keeps the interpreter's file open (flag `F`).
    pub fn holds_its_file(&self) -> bool {
        self.flags.contains('F')
    }

    /// The rule that registers it under this name.
    pub fn rule(&self, name: &str) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("\\x{b:02x}")).collect::<String>();
        let fields = match &self.pattern {
            Pattern::Extension(extension) => {
                ["E".into(), String::new(), extension.clone(), String::new()]
            }
            Pattern::Magic { offset, magic, mask } => [
                "M".into(),
                offset.to_string(),
                hex(magic),
                mask.as_deref().map(hex).unwrap_or_default(),
            ],
        };
        // Any character can separate the fields, and a path may contain ':'.
        let text = [name, &self.interpreter, &self.flags, &fields.concat()].concat();
        let between = [':', '|', ';', ',']
            .into_iter()
            .chain('!'..='~')
            .find(|c| !text.contains(*c))
            .unwrap_or(':');
        let [kind, offset, magic, mask] = &fields;
        ["", name, kind, offset, magic, mask, &self.interpreter, &self.flags]
            .join(&between.to_string())
    }
}

/// Parses the magic, its offset and its mask.
fn magic(text: &str) -> anyhow::Result<Pattern> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let bytes = |hex: &str| -> Option<Vec<u8>> {
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(hex.get(i..i + 2)?, 16).ok()).collect()
    };
    let pattern = (|| {
        Some(Pattern::Magic {
            offset: field("offset ")?.parse().ok()?,
            magic: bytes(field("magic ")?)?,
            mask: match field("mask ") {
                Some(hex) => Some(bytes(hex)?),
                None => None,
            },
        })
    })();
    pattern.ok_or_else(|| anyhow!("no valid extension or magic"))
}

/// The mounted table.
pub struct Table {
    directory: Utf8PathBuf,
    /// The entries that have been read, by inode. An entry changes only when it is enabled or
    /// disabled; a long-running caller has to `forget` it then. Without this, twenty watchers that
    /// read a hundred entries after each registration would be noticeable.
    read: Cell<BTreeMap<u64, Listed>>,
}

impl Table {
    /// Opens the table of this machine.
    ///
    /// # Errors
    /// binfmt_misc is not mounted.
    pub fn open(host: &Host) -> anyhow::Result<Table> {
        let table = Table::unopened(host);
        table.require().map(|()| table)
    }

    /// The same, whether mounted or not.
    pub fn unopened(host: &Host) -> Table {
        Table { directory: host.path(BINFMT_MISC), read: Cell::default() }
    }

    /// Checks that it is mounted.
    ///
    /// # Errors
    /// It is not.
    pub fn require(&self) -> anyhow::Result<()> {
        let directory = &self.directory;
        // Only the mounted file system has this file.
        match directory.join("register").try_exists() {
            Ok(true) => Ok(()),
            Ok(false) => Err(anyhow!("binfmt_misc is not mounted on {directory}")),
            Err(error) => Err(error).context(format!("looking into {directory}")),
        }
    }

    /// Makes the next look read the entry of that name again, or all entries.
    pub fn forget(&self, name: Option<&str>) {
        let mut read = self.read.take();
        read.retain(|_, listed| name.is_some_and(|name| listed.name != name));
        self.read.set(read);
    }

    /// Locks the table against this project's processes in all distros. They share the file, and
    /// only root can open it, so nobody else can hold the lock. If it is held for too long, Windows
    /// programs must not wait for it: this gives up after 0.2 seconds, and the caller goes on
    /// without.
    pub fn lock(&self) -> Option<Flock<File>> {
        let register = self.directory.join("register");
        let mut file = OpenOptions::new().write(true).open(register).ok()?;
        for _ in 0..200 {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Some(lock),
                Err((same, _)) => file = same,
            }
            thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// The names and inodes of all entries, newest first, as the kernel tries them. It lists the
    /// directory in that order; neither inode numbers nor times tell which of two entries is newer.
    fn list(&self) -> anyhow::Result<Vec<(OsString, u64)>> {
        let list = || -> std::io::Result<Vec<(OsString, u64)>> {
            let entries = fs::read_dir(&self.directory)?;
            let entries = entries.map(|entry| entry.map(|e| (e.file_name(), e.ino())));
            let mut entries = entries.collect::<std::io::Result<Vec<_>>>()?;
            entries.retain(|(name, _)| name != "register" && name != "status");
            Ok(entries)
        };
        list().with_context(|| format!("listing {}", self.directory))
    }

    /// The names of all entries, except those that are not UTF-8: no rule of ours has such a name.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn names(&self) -> anyhow::Result<Vec<String>> {
        let names = self.list()?.into_iter();
        Ok(names.filter_map(|(name, _)| name.into_string().ok()).collect())
    }

    /// All entries, newest first. One that is removed after it was listed is skipped.
    ///
    /// # Errors
    /// The directory, or an entry, cannot be read.
    pub fn entries(&self) -> anyhow::Result<Vec<Listed>> {
        let mut known = self.read.take();
        let mut entries = Vec::new();
        for (name, inode) in self.list()? {
            let path = self.directory.as_std_path().join(&name);
            let name = name.to_string_lossy().into_owned();
            if let Some(listed) = known.remove(&inode).filter(|listed| listed.name == name) {
                entries.push(listed);
                continue;
            }
            match fs::read(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                text => {
                    let text = text.with_context(|| format!("reading {}", path.display()))?;
                    let text = String::from_utf8_lossy(&text);
                    let entry = Entry::parse(&text).unwrap_or_else(|_| Entry::unreadable(&text));
                    entries.push(Listed { name, inode, entry });
                }
            }
        }
        let by_inode = entries.iter().map(|listed| (listed.inode, listed.clone()));
        self.read.set(by_inode.collect());
        Ok(entries)
    }

    /// The entry of that name, if there is one.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&self, name: &str) -> anyhow::Result<Option<Entry>> {
        let path = self.file_of(name)?;
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            text => text
                .map_err(anyhow::Error::from)
                .and_then(|text| Entry::parse(&text))
                .map(Some)
                .with_context(|| format!("reading {path}")),
        }
    }

    /// The inode of an entry, if there is one. An entry registered later under the same name has
    /// another.
    ///
    /// # Errors
    /// It cannot be inspected, or the name is not valid.
    pub fn inode(&self, name: &str) -> anyhow::Result<Option<u64>> {
        Ok(self.identity(name)?.map(|(inode, _)| inode))
    }

    /// The inode of an entry, and the time of its registration.
    ///
    /// # Errors
    /// As above.
    pub fn identity(&self, name: &str) -> anyhow::Result<Option<(u64, Time)>> {
        let path = self.file_of(name)?;
        match fs::metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            metadata => metadata
                .map(|m| Some((m.ino(), (m.ctime(), m.ctime_nsec()))))
                .with_context(|| format!("looking at {path}")),
        }
    }

    /// Registers a rule, `:name:type:offset:magic:mask:interpreter:flags`.
    ///
    /// # Errors
    /// The kernel refuses it, for instance because the name is taken.
    pub fn register(&self, rule: &str) -> anyhow::Result<()> {
        write(&self.directory.join("register"), rule)
    }

    /// Removes an entry, if there is one.
    ///
    /// # Errors
    /// The kernel refuses it, or the name is not valid.
    pub fn unregister(&self, name: &str) -> anyhow::Result<()> {
        match write(&self.file_of(name)?, "-1") {
            Err(error) if is_not_found(&error) => Ok(()),
            result => result,
        }
    }

    /// Removes an entry if it still has this inode. Returns whether it had.
    ///
    /// # Errors
    /// As above.
    pub fn unregister_exactly(&self, name: &str, inode: u64) -> anyhow::Result<bool> {
        let path = self.file_of(name)?;
        // The open file belongs to this one entry, whatever is registered under the name later.
        let remove = || -> std::io::Result<bool> {
            let mut file = OpenOptions::new().write(true).open(&path)?;
            let is_it = file.metadata()?.ino() == inode;
            if is_it {
                file.write_all(b"-1")?;
            }
            Ok(is_it)
        };
        match remove() {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            removed => removed.with_context(|| format!("writing -1 to {path}")),
        }
    }

    /// Registers an entry again, so that the kernel tries it first. Meanwhile another entry stands
    /// in for it, so that it is never missing. Returns the new inode. An entry that no longer has
    /// this inode is somebody else's, and stays.
    ///
    /// # Errors
    /// The kernel refuses it, or the rule is too long to be registered under both names.
    pub fn replace(
        &self,
        name: &str,
        inode: u64,
        stand_in: &str,
        entry: &Entry,
    ) -> anyhow::Result<u64> {
        let rule = entry.rule(stand_in);
        if !fits(stand_in, &rule) {
            bail!("its rule is too long to be registered under a second name");
        }
        self.unregister(stand_in)?;
        self.register(&rule)?;
        if self.unregister_exactly(name, inode)? {
            self.register(&entry.rule(name))?;
        }
        self.unregister(stand_in)?;
        Ok(self.inode(name)?.unwrap_or_default())
    }

    fn file_of(&self, name: &str) -> anyhow::Result<Utf8PathBuf> {
        if !is_name(name) {
            bail!("{name:?} is not a valid entry name");
        }
        Ok(self.directory.join(name))
    }
}

/// The bits of a byte of the magic that count; without a mask, all.
fn bits_that_count(mask: &Option<Vec<u8>>, byte: usize) -> u8 {
    mask.as_ref().map_or(0xff, |mask| mask.get(byte).copied().unwrap_or(0))
}

/// NAME_MAX of <linux/limits.h>, in bytes.
const NAME_MAX: usize = 255;

/// Whether this is a valid name of an entry: one that the kernel accepts, and whose path leads
/// neither out of the table nor to a file in it that is not an entry. A listed name with a
/// replacement character was not UTF-8, and is not valid.
pub fn is_name(name: &str) -> bool {
    !["", ".", "..", "register", "status"].contains(&name)
        && name.len() <= NAME_MAX
        && !name.contains(['/', '\0', char::REPLACEMENT_CHARACTER])
}

/// Whether the kernel accepts a rule and a name of these lengths.
pub fn fits(name: &str, rule: &str) -> bool {
    // MAX_REGISTER_LENGTH of fs/binfmt_misc.c.
    name.len() <= NAME_MAX && rule.len() <= 1920
}

/// Whether a system call failed, which may work at the next try. A changed table, or a missing one,
/// is no such error.
pub fn is_failed_call(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.raw_os_error().is_some())
}

fn write(path: &Utf8Path, text: &str) -> anyhow::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("writing {text} to {path}"))
}

fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(pattern: &str) -> Entry {
        Entry::parse(&format!("enabled\ninterpreter /a b\nflags: PF\n{pattern}\n")).unwrap()
    }

    #[test]
    fn entries_are_read_as_the_kernel_writes_them() {
        let expected = Entry {
            enabled: true,
            interpreter: "/a b".to_owned(),
            flags: "PF".to_owned(),
            pattern: Pattern::Magic {
                offset: 4,
                magic: b"MZ".to_vec(),
                mask: Some(vec![0xff, 0x0f]),
            },
        };
        assert_eq!(entry("offset 4\nmagic 4d5a\nmask ff0f"), expected);
        let entry = Entry::parse("disabled\ninterpreter /init\nflags: \nextension .exe\n").unwrap();
        assert_eq!((entry.enabled, entry.flags.as_str()), (false, ""));
        assert_eq!(entry.pattern, Pattern::Extension("exe".to_owned()));
    }

    #[test]
    fn a_text_that_the_kernel_does_not_write_is_an_error() {
        let start = "enabled\ninterpreter /init\nflags: P\n";
        for text in [
            "",
            "enabled\n",
            "on\n",
            "enabled\nflags: P\n",
            start,
            &format!("{start}offset 0\n"),
            &format!("{start}offset x\nmagic 4d5a\n"),
            &format!("{start}offset 0\nmagic 4d5\n"),
            &format!("{start}offset 0\nmagic 4d\u{e4}\n"),
        ] {
            assert!(Entry::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_rule_registers_what_the_entry_shows() {
        let magic = entry("offset 4\nmagic 4d5a\nmask ff0f");
        assert_eq!(magic.rule("a"), r":a:M:4:\x4d\x5a:\xff\x0f:/a b:PF");
        assert_eq!(magic.rule("a:b"), r"|a:b|M|4|\x4d\x5a|\xff\x0f|/a b|PF");
        assert_eq!(magic.rule(":|;,"), r"!:|;,!M!4!\x4d\x5a!\xff\x0f!/a b!PF");
        assert_eq!(entry("extension .exe").rule("a"), ":a:E::exe::/a b:PF");
    }

    #[test]
    fn a_windows_program_is_taken_by_its_name_or_its_first_bytes() {
        for (pattern, taken) in [
            ("offset 0\nmagic 4d5a", true),
            ("offset 0\nmagic 4d5a9000", true),
            ("offset 2\nmagic 9000", true),
            ("offset 0\nmagic 00009000\nmask 0000ffff", true),
            ("extension .exe", true),
            ("extension .EXE", false),
            ("offset 0\nmagic 4d5a7146", false),
            ("offset 3\nmagic 0003", true),
            ("offset 128\nmagic 5045", true),
            ("offset 128\nmagic 50450001", false),
            ("offset 132\nmagic 64", false),
        ] {
            assert_eq!(entry(pattern).takes_windows_programs(), taken, "{pattern}");
        }
        let mut disabled = entry("extension .exe");
        disabled.enabled = false;
        assert!(!disabled.takes_windows_programs());
    }

    #[test]
    fn what_takes_an_ordinary_windows_program_is_not_more_specific() {
        assert_eq!(ORDINARY_PROGRAM.len(), 132);
        for (pattern, claim) in [
            ("offset 0\nmagic 4d5a", Claim::Ordinary),
            ("offset 0\nmagic 4d", Claim::Ordinary),
            ("offset 0\nmagic 4d5a9000\nmask ffff0000", Claim::Ordinary),
            ("offset 0\nmagic 4d5a90", Claim::Ordinary),
            ("offset 0\nmagic 4d5a90000300", Claim::Ordinary),
            ("offset 0\nmagic 4d5a9000\nmask ffffff00", Claim::Ordinary),
            ("offset 0\nmagic 4d00\nmask ff00", Claim::Ordinary),
            ("offset 1\nmagic 5a", Claim::Ordinary),
            ("offset 4\nmagic 5045\nmask 0000", Claim::Ordinary),
            ("offset 78\nmagic 546869732070726f6772616d", Claim::Ordinary),
            ("offset 128\nmagic 50450000", Claim::Ordinary),
            ("offset 0\nmagic 00009000\nmask 0000ffff", Claim::Ordinary),
            ("extension .exe", Claim::Ordinary),
            ("extension .EXE", Claim::Ordinary),
            ("offset 0\nmagic 4d5a71467044", Claim::Longer),
            ("offset 0\nmagic 4d5a9000\nmask fffff000", Claim::Ordinary),
            ("offset 0\nmagic 4d5a5000", Claim::Longer),
            ("offset 0\nmagic 7f454c46", Claim::None),
            ("offset 2\nmagic 4d5a", Claim::None),
            ("offset 128\nmagic 50450100", Claim::None),
            ("extension .py", Claim::None),
        ] {
            assert_eq!(entry(pattern).claim(), claim, "{pattern}");
        }
    }
}
