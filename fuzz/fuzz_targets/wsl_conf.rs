//! wsl.conf against a second reading of it, by a table of states, and against what must not change
//! what it says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::wsl_conf::{parse, WslConf};

/// What a text is made of if it begins with NUL, a byte each: more of those mean something.
const TOKENS: [&str; 32] = [
    "[boot]",
    "[interop]",
    "[BOOT]",
    "[",
    "]",
    "protectBinfmt",
    "PROTECTBINFMT",
    "enabled",
    "command",
    "=",
    " = ",
    "true",
    "false",
    "False",
    "1",
    "0",
    "no",
    "\n",
    "\r\n",
    "\r",
    " ",
    "\t",
    "#",
    ";",
    "\"",
    "'",
    "\\",
    "\\\n",
    "\\n",
    "\\\"",
    "\u{e4}",
    "\n[boot]\nprotectBinfmt=false\n",
];

fuzz_target!(|data: &[u8]| {
    match data {
        [0, tokens @ ..] => {
            let text: String = tokens.iter().map(|t| TOKENS[*t as usize % 32]).collect();
            check(text.as_bytes());
        }
        text => check(text),
    }
});

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn check(text: &[u8]) {
    let conf = parse(text);
    let read = read(text);
    assert_eq!(conf, read.conf(), "{}", text.escape_ascii());

    // One of these each time, or it would take too long.
    match (sum(text) % 3, conf.refused_line) {
        // Neither comments and blank lines between statements count,
        (0, _) => {
            let Some(at) = read.between.get(text.len() % read.between.len().max(1)) else {
                return;
            };
            let (before, after) = text.split_at(*at);
            let more: &[u8] = b"\t# [x\" \\\n \r\n";
            assert_same(&conf, &[before, more, after].concat(), 2);
        }
        // nor the case of names,
        (1, _) => {
            let mut changed = text.to_owned();
            for at in &read.names {
                changed[*at] ^= 0x20 * u8::from(changed[*at].is_ascii_alphabetic());
            }
            assert_same(&conf, &changed, 0);
        }
        // nor what follows a refused line,
        (_, Some(line)) => {
            let up_to_it = text.split_inclusive(|b| *b == b'\n').take(line);
            let up_to_it = up_to_it.collect::<Vec<_>>().concat();
            if up_to_it.ends_with(b"\n") {
                let more = b"[boot]\nprotectBinfmt=false\n[interop]\nenabled=0\n";
                assert_same(&conf, &[up_to_it.as_slice(), more].concat(), 0);
            }
        }
        // nor a setting that was there before.
        (_, None) => {
            let more = b"\n[Boot]\nprotectbinfmt=False\n[Interop]\nEnabled=\"0\"\n";
            let mut expected = conf;
            expected.protect_binfmt &= read.value("boot", "protectbinfmt").is_some();
            expected.interop_enabled &= read.value("interop", "enabled").is_some();
            assert_same(&expected, &[text, more].concat(), 0);
        }
    }
}

fn assert_same(conf: &WslConf, text: &[u8], more_lines: usize) {
    let mut read = parse(text);
    read.refused_line = read.refused_line.map(|line| line - more_lines);
    assert_eq!(*conf, read, "{}", text.escape_ascii());
}

/// Where in a statement a character is.
#[derive(Clone, Copy, PartialEq)]
enum State {
    Between,
    Comment,
    SectionStart,
    Section,
    SectionEnd,
    Key,
    KeyEnd,
    ValueStart,
    Value,
    Quoted,
    Escape { quoted: bool },
}

#[derive(Default)]
struct Read {
    /// Section, key and value of each setting.
    settings: Vec<[Vec<u8>; 3]>,
    refused_line: Option<usize>,
    /// The places between statements at which a line begins.
    between: Vec<usize>,
    /// The places of the characters of names.
    names: Vec<usize>,
}

fn read(text: &[u8]) -> Read {
    use State::*;
    let mut read = Read::default();
    let (mut section, mut key, mut value) = (Vec::new(), Vec::new(), Vec::new());
    // How much of the value stays when blanks are cut.
    let mut kept = 0;
    let mut state = Between;
    let mut lines = 1;
    // A text ends as a line does, but for what goes on over the end of a line.
    for (at, byte) in text.iter().copied().map(Some).chain([None]).enumerate() {
        if at == 0 || text[at - 1] == b'\n' {
            lines += usize::from(at > 0);
            if state == Between {
                read.between.push(at);
            }
        }
        let ends_line = matches!(byte, None | Some(b'\n' | b'\r'));
        if [Between, SectionEnd].contains(&state) && byte == Some(b'#') {
            state = Comment;
            continue;
        }
        if state == Value && (ends_line || byte == Some(b'#'))
            || state == ValueStart && (ends_line || byte == Some(b'#'))
        {
            value.truncate(kept);
            let value = value.split(|b| *b == 0).next().unwrap().to_vec();
            read.settings.push([section.clone(), key.clone(), value]);
            state = match byte {
                Some(b'#') => Comment,
                _ => Between,
            };
            continue;
        }
        let next = match (state, byte) {
            (Between, Some(b' ' | b'\t' | b'\r' | b'\n') | None) => Some(Between),
            (Between, Some(b'[')) => {
                section.clear();
                Some(SectionStart)
            }
            (Between, Some(b)) if b.is_ascii_alphabetic() => {
                key = vec![b];
                read.names.push(at);
                Some(Key)
            }
            (Comment, Some(b'\n') | None) => Some(Between),
            (Comment, Some(_)) => Some(Comment),
            (SectionStart, Some(b)) if b.is_ascii_alphabetic() => {
                section.push(b);
                read.names.push(at);
                Some(Section)
            }
            (Section, Some(b)) if b.is_ascii_alphanumeric() => {
                section.push(b);
                read.names.push(at);
                Some(Section)
            }
            (Section, Some(b']')) => Some(SectionEnd),
            (SectionEnd, Some(b' ' | b'\t')) => Some(SectionEnd),
            (SectionEnd, _) if ends_line => Some(Between),
            (Key, Some(b)) if b.is_ascii_alphanumeric() => {
                key.push(b);
                read.names.push(at);
                Some(Key)
            }
            (Key | KeyEnd, Some(b' ' | b'\t')) => Some(KeyEnd),
            (Key | KeyEnd, Some(b'=')) => {
                (value, kept) = (Vec::new(), 0);
                Some(ValueStart)
            }
            (ValueStart, Some(b' ' | b'\t')) => Some(ValueStart),
            (ValueStart | Value, Some(b'"')) => {
                kept = value.len();
                Some(Quoted)
            }
            (Quoted, Some(b'"')) => {
                kept = value.len();
                Some(Value)
            }
            (ValueStart | Value, Some(b'\\')) => Some(Escape { quoted: false }),
            (Quoted, Some(b'\\')) => Some(Escape { quoted: true }),
            (Quoted, _) if ends_line => None,
            (ValueStart | Value | Quoted, Some(b)) => {
                value.push(b);
                if b != b' ' && b != b'\t' {
                    kept = value.len();
                }
                Some(if state == Quoted { Quoted } else { Value })
            }
            (Escape { quoted }, Some(b @ (b'\\' | b'"' | b'b' | b'n' | b't' | b'\r' | b'\n'))) => {
                let means: &[u8] = match b {
                    b'\\' | b'"' => &[b],
                    b'b' => b"\x08",
                    b'n' => b"\n",
                    b't' => b"\t",
                    _ => b"",
                };
                value.extend(means);
                kept = value.len();
                Some(if quoted { Quoted } else { Value })
            }
            _ => None,
        };
        match next {
            Some(next) => state = next,
            None => {
                read.refused_line = Some(lines);
                break;
            }
        }
    }
    read
}

impl Read {
    fn value(&self, section: &str, key: &str) -> Option<&[u8]> {
        let is = |setting: &&[Vec<u8>; 3]| {
            setting[0].to_ascii_lowercase() == section.as_bytes()
                && setting[1].to_ascii_lowercase() == key.as_bytes()
        };
        self.settings.iter().find(is).map(|setting| &*setting[2])
    }

    fn conf(&self) -> WslConf {
        let on = |section, key| {
            let value = self.value(section, key).unwrap_or_default();
            !["false", "0"].contains(&&*String::from_utf8_lossy(value).to_ascii_lowercase())
        };
        WslConf {
            protect_binfmt: on("boot", "protectbinfmt"),
            interop_enabled: on("interop", "enabled"),
            refused_line: self.refused_line,
        }
    }
}
