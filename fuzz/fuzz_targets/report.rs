//! What `status` prints: words as a shell reads them back, JSON as serde_json does, and text in
//! which nothing reaches the terminal.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::doctor::report::{word, Finding, Report, State};

fuzz_target!(|text: &str| {
    // No name has NUL in it.
    if !text.contains('\0') {
        let word = word(text);
        assert_eq!(shell(&word).as_deref(), Ok(text), "{word:?}");
    }

    // What cannot be shown is not to be run.
    let finding = Finding::note("entry", text).by_root(text);
    let advised = Report::of(vec![finding], true)
        .json()
        .contains("run-as-root");
    assert_eq!(advised, !text.contains(tricky), "{text:?}");

    let findings = vec![
        Finding::note("entry", text),
        Finding::new("launch", State::Broken, text).edit(text.to_owned()),
    ];
    let report = Report::of(findings, true);
    let json = report.json();
    assert_eq!(json.find('\n'), Some(json.len() - 1), "{json:?}");
    let read: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let expected = serde_json::json!({
        "verdict": "broken",
        "summary": report.summary,
        "healthy": false,
        "checks": [
            {"check": "entry", "state": "note", "found": text, "mend": null},
            {"check": "launch", "state": "bad", "found": text,
                "mend": {"how": "edit", "what": text}},
        ],
    });
    assert_eq!(read, expected);

    let lines: Vec<String> = report.text(false).split('\n').map(str::to_owned).collect();
    assert_eq!(lines.len(), 6, "{lines:?}");
    assert!(lines.iter().all(|line| !line.contains(tricky)), "{lines:?}");
    let (on, off) = ("\x1b[36m", "\x1b[m");
    assert!(report
        .text(true)
        .contains(&format!("{on}note   {off}  entry")));
});

/// Controls, and what changes the direction of writing or cannot be seen.
fn tricky(c: char) -> bool {
    let ranges = [
        0..=0x1f,
        0x7f..=0x9f,
        0x200b..=0x200f,
        0x2028..=0x202e,
        0x2060..=0x2069,
        0xfeff..=0xfeff,
    ];
    ranges.iter().any(|range| range.contains(&u32::from(c)))
}

/// The one word that a POSIX shell makes of a text, as far as `word` makes use of its grammar.
fn shell(text: &str) -> Result<String, String> {
    let mut read = String::new();
    let mut left = text;
    if left.is_empty() {
        return Err("no word".to_owned());
    }
    while let Some(c) = left.chars().next() {
        if let Some(rest) = left.strip_prefix('\'') {
            let (literal, rest) = rest.split_once('\'').ok_or("open quote")?;
            read.push_str(literal);
            left = rest;
        } else if let Some(rest) = left.strip_prefix('\\') {
            let escaped = rest.chars().next().ok_or("open escape")?;
            read.push(escaped);
            left = &rest[escaped.len_utf8()..];
        } else if c.is_ascii_alphanumeric() || "/._:@+=-,".contains(c) {
            read.push(c);
            left = &left[1..];
        } else {
            return Err(format!("{c:?} means something to the shell"));
        }
    }
    Ok(read)
}
