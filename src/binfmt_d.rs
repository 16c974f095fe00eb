//! The rules that systemd-binfmt registers: binfmt.d(5).

use std::collections::BTreeMap;

use anyhow::{Context, Error};

use crate::binfmt_misc::is_name;
use crate::host::{Host, BINFMT_D};

/// One rule, as far as it matters here.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// The name of its entry.
    pub name: String,
    /// The program that is run.
    pub interpreter: String,
    /// Any of `P`, `O`, `C` and `F`, in any order.
    pub flags: String,
    /// The whole rule, as it is registered.
    pub text: String,
    /// The file that it is in.
    pub path: String,
}

/// All rules in use, except those in files that cannot be read.
pub fn rules(host: &Host) -> Vec<Rule> {
    read(host).0
}

/// All files in use. Of files with the same name, the one in the first directory counts.
pub fn files(host: &Host) -> Vec<String> {
    list(host).0
}

/// All rules in use, and the errors of what cannot be read.
pub fn read(host: &Host) -> (Vec<Rule>, Vec<Error>) {
    let (files, mut errors) = list(host);
    let mut rules = Vec::new();
    for path in files {
        match host.read(&path) {
            Ok(text) => rules.extend(parse(&String::from_utf8_lossy(&text), &path)),
            // Not a regular file: a link to /dev/null masks others.
            Err(error) if error.raw_os_error().is_none() => {}
            Err(error) => {
                errors.push(Error::from(error).context(format!("reading {}", host.path(&path))));
            }
        }
    }
    (rules, errors)
}

fn list(host: &Host) -> (Vec<String>, Vec<Error>) {
    let mut files = BTreeMap::new();
    let mut errors = Vec::new();
    for directory in BINFMT_D {
        let names = host.list(directory);
        let names = names.with_context(|| format!("listing {}", host.path(directory)));
        let names = names.unwrap_or_else(|error| {
            errors.push(error);
            Vec::new()
        });
        for name in names {
            if name.ends_with(".conf") {
                files.entry(name).or_insert_with_key(|name| format!("{directory}/{name}"));
            }
        }
    }
    (files.into_values().collect(), errors)
}

/// The rules in one file.
pub fn parse(text: &str, path: &str) -> Vec<Rule> {
    let rule = |line: &str| {
        let text = line.trim_matches([' ', '\t']);
        let mut characters = text.chars();
        // The kernel takes a single byte. After a part of a longer character, the name would not be
        // UTF-8.
        let between = characters.next().filter(|c| c.is_ascii() && !"#;".contains(*c))?;
        let fields: Vec<&str> = characters.as_str().split(between).collect();
        let field = |at: usize| fields.get(at).copied().unwrap_or_default().to_owned();
        let name = field(0);
        is_name(&name).then(|| Rule {
            name,
            interpreter: field(5),
            flags: field(6),
            text: text.to_owned(),
            path: path.to_owned(),
        })
    };
    // To systemd, each of these ends a line.
    text.split(['\n', '\r', '\0']).filter_map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        parse(text, "x").into_iter().map(|rule| rule.name).collect()
    }

    #[test]
    fn rules_are_named_in_their_first_field() {
        let text = "# :no:M::x::/x:\n; :no:M::x::/x:\n\n:a:M::x::/x:\n  |b:c|M||x||/x|\n:d\n";
        assert_eq!(names(text), ["a", "b:c", "d"]);
        assert!(names("::M::x::/x:\n:../x:M::x::/x:\n:status:M::x::/x:\n:").is_empty());
    }

    #[test]
    fn lines_end_and_blanks_are_cut_as_systemd_does_it() {
        assert_eq!(names(":a:M::x::/x:\r:b:M\r\n\t:c \t\0:d"), ["a", "b", "c", "d"]);
        assert!(names("\u{a0}:a:M::x::/x:\n\u{e9}a\u{e9}M\u{e9}\n").is_empty());
    }

    #[test]
    fn interpreter_and_flags_are_the_last_two_fields() {
        let rules = parse(",WSLInterop,M,,MZ,,/in:it,PF\n", "/etc/binfmt.d/a.conf");
        let rule = Rule {
            name: "WSLInterop".to_owned(),
            interpreter: "/in:it".to_owned(),
            flags: "PF".to_owned(),
            text: ",WSLInterop,M,,MZ,,/in:it,PF".to_owned(),
            path: "/etc/binfmt.d/a.conf".to_owned(),
        };
        assert_eq!(rules, [rule]);
    }
}
