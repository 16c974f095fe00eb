//! Writes templates to a directory. A template is the final text except for this program's path:
//! `@EXE@` is the path escaped for a command line, `@SOURCE@` for `SourcePath=`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Error};
use camino::Utf8Path;
use nix::errno::Errno;
use nix::fcntl::{openat, readlinkat, AtFlags, OFlag, AT_FDCWD};
use nix::sys::stat::{mkdirat, Mode};
use nix::unistd::{linkat, symlinkat, unlinkat, UnlinkatFlags};

use crate::plan::Output;

/// Writes the plan below `directory`, which is created if necessary. If an output cannot be
/// written, only those that need it are left out as well. Returns all such errors. No link is
/// followed, so that nothing is written outside; `directory` must not be a link either, since
/// systemd creates a real directory.
///
/// # Errors
/// The directory cannot be opened, and nothing was written.
pub fn write(plan: &[Output], directory: &Utf8Path, exe: &Utf8Path) -> anyhow::Result<Vec<Error>> {
    let top = open_directory(AT_FDCWD, directory.as_str())
        .or_else(|error| match error {
            Errno::ENOENT => {
                fs::create_dir_all(directory)?;
                Ok(open_directory(AT_FDCWD, directory.as_str())?)
            }
            error => Err(io::Error::from(error)),
        })
        .with_context(|| {
            format!("opening {directory}, which must be a real directory, not a link")
        })?;
    let mut errors = Vec::new();
    let mut written = Vec::new();
    for output in plan {
        let (path, doing, result) = match output {
            Output::File { path, template } => {
                let text = fill(template, exe);
                (path, "writing", create_file(&top, path, &text))
            }
            Output::Link { path, needs, .. } if !written.contains(needs) => {
                let error = Error::msg(format!("it needs {needs}, which was not written"));
                (path, "linking", Err(error))
            }
            Output::Link { path, target, .. } => (path, "linking", create_link(&top, path, target)),
        };
        match result {
            Ok(()) => written.push(path),
            Err(error) => errors.push(error.context(format!("{doing} {directory}/{path}"))),
        }
    }
    Ok(errors)
}

/// Fills in the placeholders of a template.
pub fn fill(template: &str, exe: &Utf8Path) -> String {
    template.replace("@EXE@", &escape_command(exe)).replace("@SOURCE@", &escape_value(exe))
}

/// Escapes a program's path for the first word of `ExecStart=`: whatever would end the word or open
/// a quote (systemd.syntax(7)).
fn escape_command(exe: &Utf8Path) -> String {
    let mut word = String::new();
    for c in exe.as_str().chars() {
        match c {
            // '@' could be part of a placeholder.
            '\\' | '"' | '\'' | '@' => word.push_str(&format!("\\x{:02x}", c as u32)),
            c if c.is_ascii_whitespace() || c.is_ascii_control() => {
                word.push_str(&format!("\\x{:02x}", c as u32));
            }
            c => word.push(c),
        }
    }
    escape_specifiers(&word)
}

/// Escapes a program's path for the value of a setting, where only `%` can be escaped. A path that
/// would end or continue the line, or lose its end, is left out: the setting is only for people.
fn escape_value(exe: &Utf8Path) -> String {
    let path = exe.as_str();
    if path.contains(char::is_control) || path.ends_with(['\\', ' ']) {
        return String::new();
    }
    escape_specifiers(path)
}

/// Escapes `%`, which begins a specifier almost everywhere in a unit (systemd.unit(5)).
fn escape_specifiers(text: &str) -> String {
    text.replace('%', "%%")
}

/// Creates a file whole or not at all, and never replaces one. An existing file with the same text
/// is fine: an earlier run was killed after writing it.
fn create_file(top: &OwnedFd, path: &str, text: &str) -> anyhow::Result<()> {
    let (directory, name) = open_parent(top, path)?;
    let unfinished = format!(".{name}.unfinished");
    let remove = || match unlinkat(&directory, &*unfinished, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(io::Error::from(error)).context(format!("removing {unfinished}")),
    };
    // Left by a killed run, or put there by somebody to lead us elsewhere.
    remove()?;
    let result = write_new(&directory, &unfinished, text).and_then(|()| {
        let none = AtFlags::empty();
        match linkat(&directory, &*unfinished, &directory, name, none) {
            Err(Errno::EEXIST) if says(&directory, name, text) => Ok(()),
            result => Ok(result?),
        }
    });
    let removed = remove();
    result?;
    removed
}

fn write_new(directory: &OwnedFd, name: &str, text: &str) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let file = openat(directory, name, flags, Mode::from_bits_truncate(0o644))?;
    File::from(file).write_all(text.as_bytes())
}

/// Whether a regular file of that name has this text.
fn says(directory: &OwnedFd, name: &str, text: &str) -> bool {
    let read = || -> io::Result<bool> {
        // Do not wait for a writer if it is a FIFO.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = File::from(openat(directory, name, flags, Mode::empty())?);
        let mut there = String::new();
        let is_file = file.metadata()?.is_file();
        file.take(text.len() as u64 + 1).read_to_string(&mut there)?;
        Ok(is_file && there == text)
    };
    read().unwrap_or(false)
}

fn create_link(top: &OwnedFd, path: &str, target: &str) -> anyhow::Result<()> {
    let (directory, name) = open_parent(top, path)?;
    match symlinkat(target, &directory, name) {
        Err(Errno::EEXIST) if readlinkat(&directory, name).is_ok_and(|t| t == *target) => Ok(()),
        result => Ok(result.map_err(io::Error::from)?),
    }
}

/// Opens the directory of a path, creating it if necessary. Returns it and the name in it.
fn open_parent<'a>(top: &OwnedFd, path: &'a str) -> anyhow::Result<(OwnedFd, &'a str)> {
    let (parent, name) = path.split_once('/').unwrap_or((".", path));
    let open = || -> io::Result<OwnedFd> {
        match mkdirat(top, parent, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => Ok(open_directory(top, parent)?),
            Err(error) => Err(error.into()),
        }
    };
    Ok((open().with_context(|| format!("opening {parent}"))?, name))
}

/// Opens a directory to work in, unless it is a link.
fn open_directory(from: impl AsFd, path: &str) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(from, path, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_filled_and_escaped() {
        let template = "A=@EXE@ x\nC=@SOURCE@\n";
        let exe = Utf8Path::new("/a 100%/\"b\"");
        assert_eq!(fill(template, exe), "A=/a\\x20100%%/\\x22b\\x22 x\nC=/a 100%%/\"b\"\n");
    }

    #[test]
    fn no_path_adds_to_a_unit_what_is_not_its_own() {
        for (exe, command, source) in [
            ("/a\nExecStop=b", "/a\\x0aExecStop=b", ""),
            ("/a\\", "/a\\x5c", ""),
            ("/@SOURCE@", "/\\x40SOURCE\\x40", "/@SOURCE@"),
        ] {
            let filled = fill("A=@EXE@\nC=@SOURCE@\n", Utf8Path::new(exe));
            assert_eq!(filled, format!("A={command}\nC={source}\n"));
        }
    }
}
