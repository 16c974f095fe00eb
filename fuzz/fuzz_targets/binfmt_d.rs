//! Rules of binfmt.d against a reading of bytes, as systemd and the kernel read them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::binfmt_d::{parse, Rule};

fuzz_target!(|text: &str| {
    let rules = parse(text, "/etc/binfmt.d/a.conf");
    for rule in &rules {
        assert!(!rule.name.contains('/'), "{rule:?}");
        let no_name = ["", ".", "..", "register", "status"];
        assert!(!no_name.contains(&&*rule.name), "{rule:?}");
        assert_eq!(rule.path, "/etc/binfmt.d/a.conf");
    }
    assert_eq!(rules, read(text.as_bytes()), "{text:?}");
});

/// systemd ends a line at CR and NUL, too, and cuts these blanks; the kernel separates by a byte.
fn read(text: &[u8]) -> Vec<Rule> {
    let mut rules = Vec::new();
    for line in text.split(|b| b"\n\r\0".contains(b)) {
        let mut line = line.to_vec();
        while line.first().is_some_and(|b| b" \t".contains(b)) {
            line.remove(0);
        }
        while line.last().is_some_and(|b| b" \t".contains(b)) {
            line.pop();
        }
        if line.is_empty() || line[0] == b'#' || line[0] == b';' {
            continue;
        }
        let between = line[0];
        let mut fields = vec![Vec::new()];
        for byte in &line[1..] {
            match *byte == between {
                true => fields.push(Vec::new()),
                false => fields.last_mut().unwrap().push(*byte),
            }
        }
        fields.resize(7.max(fields.len()), Vec::new());
        // A field that is no text is none that anybody asks for.
        let Ok(fields) = fields.into_iter().map(String::from_utf8).collect::<Result<Vec<_>, _>>()
        else {
            continue;
        };
        let name = &fields[0];
        if matches!(&**name, "" | "." | ".." | "register" | "status") || name.contains('/') {
            continue;
        }
        rules.push(Rule {
            name: name.clone(),
            interpreter: fields[5].clone(),
            flags: fields[6].clone(),
            text: String::from_utf8(line).unwrap(),
            path: "/etc/binfmt.d/a.conf".into(),
        });
    }
    rules
}
