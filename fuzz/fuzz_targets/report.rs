//! What `status` prints: words as a shell reads them back, JSON as serde_json does, and text in
//! which nothing reaches the terminal.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::report::{word, Finding, Harm, Mend, Report};

fuzz_target!(|text: &str| {
    // No name has NUL in it.
    if !text.contains('\0') {
        let word = word(text);
        assert_eq!(shell(&word).as_deref(), Ok(text.as_bytes()), "{word:?}");
        assert!(!word.contains(tricky), "{word:?}");
        let again = wsl_binfmt_generator_fuzz::report::word(&word);
        assert_eq!(shell(&again).as_deref(), Ok(word.as_bytes()), "{again:?}");
    }

    let mend = Mend::AsRoot(text.to_owned());
    let findings = vec![
        Finding::note("entry", text),
        Finding::bad("launch", Harm::Broken, text, mend),
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
                "mend": {"how": "run-as-root", "what": text}},
        ],
    });
    assert_eq!(read, expected);

    let lines: Vec<String> = report.text(false).split('\n').map(str::to_owned).collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
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
fn shell(text: &str) -> Result<Vec<u8>, String> {
    let mut read = Vec::new();
    let mut left = text;
    if left.is_empty() {
        return Err("no word".to_owned());
    }
    while let Some(c) = left.chars().next() {
        if let Some(rest) = left.strip_prefix("\"$(printf '") {
            let (format, rest) = rest.split_once("')\"").ok_or("open substitution")?;
            let mut output = printf(format)?;
            while output.ends_with(b"\n") {
                output.pop();
            }
            read.extend(output);
            left = rest;
        } else if let Some(rest) = left.strip_prefix("$'") {
            let (escapes, rest) = rest.split_once('\'').ok_or("open quote")?;
            read.extend(printf(escapes)?);
            left = rest;
        } else if let Some(rest) = left.strip_prefix('\'') {
            let (literal, rest) = rest.split_once('\'').ok_or("open quote")?;
            read.extend(literal.bytes());
            left = rest;
        } else if let Some(rest) = left.strip_prefix('\\') {
            let escaped = rest.chars().next().ok_or("open escape")?;
            read.extend(escaped.to_string().bytes());
            left = &rest[escaped.len_utf8()..];
        } else if c.is_ascii_alphanumeric() || "/._:@+=-,".contains(c) {
            read.push(c as u8);
            left = &left[1..];
        } else {
            return Err(format!("{c:?} means something to the shell"));
        }
    }
    Ok(read)
}

/// printf(1) with nothing but a format.
fn printf(format: &str) -> Result<Vec<u8>, String> {
    let mut output = Vec::new();
    let mut bytes = format.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' | b'\'' => return Err("a conversion, or a quote".to_owned()),
            b'\\' => {
                let mut code = 0;
                for _ in 0..3 {
                    let digit = bytes.next().filter(|b| (b'0'..b'8').contains(b));
                    code = code * 8 + u32::from(digit.ok_or("no octal digit")? - b'0');
                }
                output.push(u8::try_from(code).map_err(|e| e.to_string())?);
            }
            byte => output.push(byte),
        }
    }
    // Else it is an option.
    match output.first() {
        Some(b'-') if format.starts_with('-') => Err("an option".to_owned()),
        _ => Ok(output),
    }
}
