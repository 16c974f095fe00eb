//! Units for a program with any path, read back as systemd reads them.

#![no_main]

use camino::Utf8Path;
use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::plan::{plan, Neighbors, Output};
use wsl_binfmt_generator_fuzz::units::fill;
use wsl_binfmt_generator_fuzz::wsl_conf::WslConf;

fuzz_target!(|path: &str| {
    if path.contains('\0') {
        return;
    }
    let path = format!("/{path}");
    let plan = plan(&WslConf::default(), &Neighbors::default());
    for output in &plan.outputs {
        if let Output::File { template, .. } = output {
            check(template, &path);
        }
    }
});

fn check(template: &str, path: &str) {
    let text = fill(template, Utf8Path::new(path));
    let mut lines = text.split('\n');
    for line in template.split_terminator('\n') {
        let filled = lines.next().unwrap();
        assert!(!filled.contains(['\r', '\0']), "{filled:?}");
        if let Some((before, after)) = line.split_once("@EXE@") {
            let word = between(filled, before, after);
            assert_eq!(word_read(word).as_deref(), Some(path), "{filled:?}");
        } else if let Some((before, after)) = line.split_once("@SOURCE@") {
            let value = between(filled, before, after);
            // What no value can be is left out.
            if !value.is_empty()
                || !path.contains(char::is_control) && !path.ends_with(' ') && !path.ends_with('\\')
            {
                assert_eq!(specifiers_read(value).as_deref(), Some(path), "{filled:?}");
                assert_eq!(
                    value.trim_end_matches([' ', '\t', '\\']),
                    value,
                    "{filled:?}"
                );
            }
        } else {
            assert_eq!(filled, line);
        }
    }
    assert_eq!(lines.collect::<Vec<_>>(), [""], "{text:?}");
}

fn between<'a>(line: &'a str, before: &str, after: &str) -> &'a str {
    line.strip_prefix(before)
        .and_then(|rest| rest.strip_suffix(after))
        .unwrap_or_else(|| panic!("{line:?}"))
}

/// A word of a command line: systemd.syntax(7), then the specifiers of systemd.unit(5).
fn word_read(word: &str) -> Option<String> {
    if word.contains(|c: char| c.is_ascii_whitespace() || "\"'".contains(c)) {
        return None;
    }
    let mut parts = word.split("\\x");
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(part.get(..2)?, 16).ok()?);
        bytes.extend(part[2..].bytes());
    }
    // A backslash that was left over would have begun another escape.
    let backslashes = word.matches('\\').count();
    (backslashes == word.matches("\\x").count()).then_some(())?;
    specifiers_read(&String::from_utf8(bytes).ok()?)
}

fn specifiers_read(text: &str) -> Option<String> {
    let parts: Vec<&str> = text.split("%%").collect();
    parts
        .iter()
        .all(|part| !part.contains('%'))
        .then(|| parts.join("%"))
}
