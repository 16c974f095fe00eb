//! An entry of the kernel's table: the rule made of it against a reading of rules as
//! fs/binfmt_misc.c has it, and what it is said to take against trying it out.

#![no_main]

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::binfmt_misc::{Claim, Entry, Pattern};

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
        match data.int_in_range(0..=2)? {
            0 => Pattern::Extension(data.arbitrary()?),
            1 => Pattern::Extension("exe".to_owned()),
            _ => Pattern::Extension("EXE".to_owned()),
        }
    } else {
        let mut magic: Vec<u8> = data.arbitrary()?;
        let kind = data.int_in_range(0..=2)?;
        let offset = data.int_in_range(0..=140)?;
        match kind {
            0 => {}
            1 => drop(magic.splice(..0, *b"MZ")),
            // What an ordinary program has there, but for a bit here and there.
            _ => {
                let program = ordinary_program(0).into_iter().skip(offset);
                magic.iter_mut().zip(program).for_each(|(m, p)| *m ^= p);
            }
        }
        let mask = match data.arbitrary()? {
            true => {
                let bits = |_: &u8| data.arbitrary().unwrap_or(0xff);
                Some(magic.iter().map(bits).collect())
            }
            false => None,
        };
        Pattern::Magic { offset, magic, mask }
    };
    let mut flags = String::new();
    for flag in ['P', 'O', 'C', 'F'] {
        if data.arbitrary()? {
            flags.push(flag);
        }
    }
    let entry =
        Entry { enabled: data.arbitrary()?, interpreter: data.arbitrary()?, flags, pattern };
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
        Pattern::Magic { offset, magic, mask } => {
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
            let takes = entry.enabled && tried == Claim::Ordinary;
            assert_eq!(entry.takes_windows_programs(), takes, "{entry:?}");
        }
    } else if let Pattern::Extension(extension) = &entry.pattern {
        // A program may be called `A.EXE`, but `hello.exe` is what they are called here.
        let is_for_programs = extension.to_lowercase() == "exe";
        assert_eq!(claim == Claim::Ordinary, is_for_programs, "{entry:?}");
        assert_eq!(claim == Claim::None, !is_for_programs, "{entry:?}");
        let takes = entry.enabled && extension == "exe";
        assert_eq!(entry.takes_windows_programs(), takes, "{entry:?}");
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
            Pattern::Magic { offset, magic, mask } => {
                !magic.is_empty()
                    && mask.as_ref().is_none_or(|mask| mask.len() == magic.len())
                    && offset.checked_add(magic.len()).is_some_and(|end| end <= 256)
            }
        };
    if kernel_has_it {
        let enabled = Entry { enabled: true, ..entry.clone() };
        let registered = registered(rule.as_bytes());
        assert_eq!(registered, Some((name.into(), enabled)), "{rule:?}");
    }
}

fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

/// Tries it on Windows programs: on ordinary ones, of which only the beginning is the same in all,
/// and on one that holds all that it asks for.
fn tried(entry: &Entry) -> Claim {
    let Pattern::Magic { offset, magic, mask } = &entry.pattern else { unreachable!() };
    let bits = |i: usize| mask.as_ref().map_or(0xff, |mask| mask[i]);
    let takes = |program: &[u8]| {
        (0..magic.len()).all(|i| {
            let place = offset.saturating_add(i);
            let there = program.get(place).copied().unwrap_or(!magic[i]);
            there & bits(i) == magic[i] & bits(i)
        })
    };
    // Whatever follows, one of these has it otherwise.
    if takes(&ordinary_program(0)) && takes(&ordinary_program(0xff)) {
        return Claim::Ordinary;
    }
    let knows_mz = *offset == 0 && magic.starts_with(b"MZ") && bits(0) != 0 && bits(1) != 0;
    if knows_mz {
        Claim::Longer
    } else {
        Claim::None
    }
}

/// What the kernel looks at of a program: the DOS header's fields as GNU's linker fills them, its
/// stub, the signature of the PE header, and something after that.
fn ordinary_program(then: u8) -> Vec<u8> {
    let mut program = vec![0; 64];
    let fields: [(usize, u16); 9] = [
        (0, u16::from_le_bytes(*b"MZ")),
        (2, 144),  // bytes on the last page
        (4, 3),    // pages
        (8, 4),    // paragraphs of the header
        (12, !0),  // paragraphs at most
        (16, 184), // SP
        (24, 64),  // relocations
        (60, 128), // the PE header, low
        (62, 0),   // and high
    ];
    for (place, value) in fields {
        program[place..place + 2].copy_from_slice(&value.to_le_bytes());
    }
    // push cs; pop ds; mov dx, 14; mov ah, 9; int 33; mov ax, 0x4c01; int 33
    program.extend([14, 31, 186, 14, 0, 180, 9, 205, 33, 184, 1, 76, 205, 33]);
    program.extend(b"This program cannot be run in DOS mode.\r\r\n$");
    program.resize(128, 0);
    program.extend(b"PE\0\0");
    program.resize(256, then);
    program
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
    let entry =
        Entry { enabled: true, interpreter: text(interpreter)?, flags: text(flags)?, pattern };
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
