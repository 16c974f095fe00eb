//! Templates to a directory. In a template `@EXE@` is this program's path as a command line
//! wants it, `@SOURCE@` the same as `SourcePath=` wants it, and a line that begins with
//! `@INTEROP@` is there only while interop is on.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{symlink, OpenOptionsExt};

use anyhow::{Context, Error};
use camino::Utf8Path;

use crate::plan::{Output, Plan};

/// Writes all of the plan below `directory`. What stands in the way of one output does not keep
/// the others from being written: every error is returned.
pub fn write(plan: &Plan, directory: &Utf8Path, exe: &Utf8Path) -> Vec<Error> {
    let write_one = |output: &Output| match output {
        Output::File { path, template } => {
            let path = directory.join(path);
            create_file(&path, &fill(template, exe, plan.interop))
                .with_context(|| format!("writing {path}"))
        }
        Output::Link { path, target } => {
            let path = directory.join(path);
            create_parent(&path)
                .and_then(|()| symlink(target, &path))
                .with_context(|| format!("linking {path}"))
        }
    };
    plan.outputs
        .iter()
        .filter_map(|output| write_one(output).err())
        .collect()
}

/// A template with its placeholders filled in.
pub fn fill(template: &str, exe: &Utf8Path, interop: bool) -> String {
    let mut text = String::with_capacity(template.len());
    for line in template.lines() {
        let line = match line.strip_prefix("@INTEROP@") {
            Some(_) if !interop => continue,
            Some(line) => line,
            None => line,
        };
        text.push_str(line);
        text.push('\n');
    }
    text.replace("@EXE@", &escape_command(exe))
        .replace("@SOURCE@", &escape_value(exe))
}

/// A program's path as the first word of `ExecStart=`: what would end the word or open a quote is
/// written as an escape (systemd.syntax(7)).
fn escape_command(exe: &Utf8Path) -> String {
    let mut word = String::new();
    for c in exe.as_str().chars() {
        match c {
            // The last of them would be a placeholder's.
            '\\' | '"' | '\'' | '@' => word.push_str(&format!("\\x{:02x}", c as u32)),
            c if c.is_ascii_whitespace() || c.is_ascii_control() => {
                word.push_str(&format!("\\x{:02x}", c as u32));
            }
            c => word.push(c),
        }
    }
    escape_specifiers(&word)
}

/// A program's path as the value of a setting, where nothing else can be escaped. What would end
/// the line, go on in the next or be cut, is left out: the setting is there for people.
fn escape_value(exe: &Utf8Path) -> String {
    let path = exe.as_str();
    if path.contains(char::is_control) || path.ends_with(['\\', ' ']) {
        return String::new();
    }
    escape_specifiers(path)
}

/// `%` begins a specifier almost everywhere in a unit (systemd.unit(5)).
fn escape_specifiers(text: &str) -> String {
    text.replace('%', "%%")
}

/// The file appears whole or not at all, and never in place of another one.
fn create_file(path: &Utf8Path, text: &str) -> io::Result<()> {
    create_parent(path)?;
    let name = path.file_name().unwrap_or_default();
    let unfinished = path.with_file_name(format!(".{name}.unfinished"));
    let result = write_new(&unfinished, text).and_then(|()| fs::hard_link(&unfinished, path));
    let removed = fs::remove_file(&unfinished);
    result.and(removed)
}

fn write_new(path: &Utf8Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    file.write_all(text.as_bytes())
}

fn create_parent(path: &Utf8Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_filled_and_escaped() {
        let template = "A=@EXE@ x\n@INTEROP@B=@EXE@\nC=@SOURCE@\n";
        let exe = Utf8Path::new("/a 100%/\"b\"");
        let command = "/a\\x20100%%/\\x22b\\x22";
        let source = "/a 100%%/\"b\"";
        assert_eq!(
            fill(template, exe, true),
            format!("A={command} x\nB={command}\nC={source}\n")
        );
        assert_eq!(
            fill(template, exe, false),
            format!("A={command} x\nC={source}\n")
        );
    }

    #[test]
    fn no_path_adds_to_a_unit_what_is_not_its_own() {
        for (exe, command, source) in [
            ("/a\nExecStop=b", "/a\\x0aExecStop=b", ""),
            ("/a\\", "/a\\x5c", ""),
            ("/@SOURCE@", "/\\x40SOURCE\\x40", "/@SOURCE@"),
        ] {
            let filled = fill("A=@EXE@\nC=@SOURCE@\n", Utf8Path::new(exe), true);
            assert_eq!(filled, format!("A={command}\nC={source}\n"));
        }
    }
}
