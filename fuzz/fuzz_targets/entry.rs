//! An entry of the kernel's table: the rule made of it against a reading of rules as
//! fs/binfmt_misc.c has it, and what it is said to take against trying it out.

#![no_main]

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::registry::{Claim, Entry, Pattern};

fuzz_target!(|data: &[u8]| {
    if let Some(data) = data.strip_prefix(b"\0") {
        let _ = made(&mut Unstructured::new(data));
    } else if let Ok(text) = std::str::from_utf8(data) {
        if let Ok(entry) = Entry::parse(text) {
            check(&entry, "WSLInterop");
        }
    }
});

/// An entry that a kernel may have, shown as it shows it.
fn made(data: &mut Unstructured) -> Result<()> {
    let pattern = if data.arbitrary()? {
        Pattern::Extension(data.arbitrary()?)
    } else {
        let mut magic: Vec<u8> = data.arbitrary()?;
        if data.arbitrary()? {
            magic.splice(..0, *b"MZ");
        }
        let mask = match data.arbitrary()? {
            true => {
                let bits = |_: &u8| data.arbitrary().unwrap_or(0xff);
                Some(magic.iter().map(bits).collect())
            }
            false => None,
        };
        let offset = data.int_in_range(0..=3)?;
        Pattern::Magic {
            offset,
            magic,
            mask,
        }
    };
    let mut flags = String::new();
    for flag in ['P', 'O', 'C', 'F'] {
        if data.arbitrary()? {
            flags.push(flag);
        }
    }
    let entry = Entry {
        enabled: data.arbitrary()?,
        interpreter: data.arbitrary()?,
        flags,
        pattern,
    };
    let name: String = data.arbitrary()?;
    let line_by_line = !entry.interpreter.contains(['\n', '\r'])
        && !matches!(&entry.pattern, Pattern::Extension(e) if e.contains(['\n', '\r']));
    if line_by_line {
        assert_eq!(Entry::parse(&shown(&entry)).unwrap(), entry);
    }
    check(&entry, &name);
    Ok(())
}

fn shown(entry: &Entry) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let state = if entry.enabled { "enabled" } else { "disabled" };
    let pattern = match &entry.pattern {
        Pattern::Extension(extension) => format!("extension .{extension}\n"),
        Pattern::Magic {
            offset,
            magic,
            mask,
        } => {
            let mask = mask.as_ref().map(|mask| format!("mask {}\n", hex(mask)));
            let mask = mask.unwrap_or_default();
            format!("offset {offset}\nmagic {}\n{mask}", hex(magic))
        }
    };
    let (interpreter, flags) = (&entry.interpreter, &entry.flags);
    format!("{state}\ninterpreter {interpreter}\nflags: {flags}\n{pattern}")
}

fn check(entry: &Entry, name: &str) {
    let claim = entry.claim();
    if let Pattern::Magic { mask, magic, .. } = &entry.pattern {
        let same_length = mask.as_ref().is_none_or(|mask| mask.len() == magic.len());
        if !magic.is_empty() && same_length {
            let tried = tried(entry);
            assert_eq!(claim, tried, "{entry:?}");
            let head_will_do = entry.enabled && tried == Claim::Equal;
            assert_eq!(entry.takes("", b"MZ"), head_will_do, "{entry:?}");
        }
    } else if entry.takes("exe", b"MZ") {
        assert_eq!(claim, Claim::Equal);
    }

    let rule = entry.rule(name);
    let flags_are_flags = entry.flags.chars().all(|c| "POCF".contains(c));
    let mut text = [name, &entry.interpreter].concat();
    if let Pattern::Extension(extension) = &entry.pattern {
        text.push_str(extension);
    }
    let any_separator = "!$%&*+<=>?@^_~".chars().any(|c| !text.contains(c));
    let kernel_has_it = is_name(name)
        && !entry.interpreter.is_empty()
        && !text.contains('\0')
        && flags_are_flags
        && any_separator
        && match &entry.pattern {
            Pattern::Extension(e) => !e.is_empty() && !e.contains(['/', '\0']),
            Pattern::Magic {
                offset,
                magic,
                mask,
            } => {
                !magic.is_empty()
                    && mask.as_ref().is_none_or(|mask| mask.len() == magic.len())
                    && offset
                        .checked_add(magic.len())
                        .is_some_and(|end| end <= 256)
            }
        };
    if kernel_has_it {
        let enabled = Entry {
            enabled: true,
            ..entry.clone()
        };
        let registered = registered(rule.as_bytes());
        assert_eq!(registered, Some((name.into(), enabled)), "{rule:?}");
    }
}

fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

/// Tries it on Windows programs: one that holds all that it asks for, one that holds nothing of it.
fn tried(entry: &Entry) -> Claim {
    let Pattern::Magic {
        offset,
        magic,
        mask,
    } = &entry.pattern
    else {
        unreachable!()
    };
    let places = |i: usize| offset.saturating_add(i);
    let program = |flip: u8| {
        let mut bytes = vec![0; 512];
        for (i, byte) in magic.iter().enumerate() {
            if let Some(place) = bytes.get_mut(places(i)) {
                *place = byte ^ flip;
            }
        }
        bytes[..2].copy_from_slice(b"MZ");
        bytes
    };
    let bits = |i: usize| mask.as_ref().map_or(0xff, |mask| mask[i]);
    let takes = |program: Vec<u8>| {
        (0..magic.len()).all(|i| {
            let there = program.get(places(i)).copied().unwrap_or(!magic[i]);
            there & bits(i) == magic[i] & bits(i)
        })
    };
    let knows_mz = *offset == 0 && magic.starts_with(b"MZ") && bits(0) != 0 && bits(1) != 0;
    match (takes(program(0)), takes(program(0xff))) {
        (_, true) => Claim::Equal,
        (true, false) if knows_mz => Claim::Longer,
        _ => Claim::None,
    }
}

/// What the kernel makes of a rule: create_entry() of fs/binfmt_misc.c.
fn registered(rule: &[u8]) -> Option<(String, Entry)> {
    let (between, rest) = rule.split_first()?;
    let fields: Vec<&[u8]> = rest.split(|b| b == between).collect();
    let [name, kind, offset, magic, mask, interpreter, flags] = fields.as_slice() else {
        return None;
    };
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    let pattern = match *kind {
        b"E" => Pattern::Extension(text(magic)?),
        b"M" => Pattern::Magic {
            offset: text(offset)?.parse().ok()?,
            magic: unescaped(magic)?,
            mask: match *mask {
                b"" => None,
                mask => Some(unescaped(mask)?),
            },
        },
        _ => return None,
    };
    let entry = Entry {
        enabled: true,
        interpreter: text(interpreter)?,
        flags: text(flags)?,
        pattern,
    };
    Some((text(name)?, entry))
}

fn unescaped(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut read = Vec::new();
    while let Some((first, rest)) = bytes.split_first() {
        bytes = rest;
        if let (b'\\', [b'x', high, low, rest @ ..]) = (first, rest) {
            let digit = |b: &u8| char::from(*b).to_digit(16);
            read.push((digit(high)? * 16 + digit(low)?) as u8);
            bytes = rest;
        } else {
            read.push(*first);
        }
    }
    Some(read)
}
