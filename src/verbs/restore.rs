//! `restore`: make the interop entry stand, and come first among those that claim as much.

use anyhow::{bail, Context};

use crate::host::{Host, INIT};
use crate::log::Log;
use crate::registry::{is_name, Claim, Entry, Pattern, Table};

/// The entry's name, which other tools look for, too.
pub const NAME: &str = "WSLInterop";
/// Holds the place while `WSLInterop` is registered anew.
const PLACEHOLDER: &str = "WSLInterop-next";
/// Begins the name of what holds another entry's place meanwhile, before that entry's own.
const PLACEHOLDER_OF: &str = "WSLInterop-next-";
/// What WSL before 2.6.2 registers beside it.
pub const LATE: &str = "WSLInterop-late";

/// The entry as WSL registers it for the VM. `P`: /init needs the program as it was called; `F`:
/// it works in chroots and containers, too.
pub fn wanted() -> Entry {
    Entry {
        enabled: true,
        interpreter: INIT.to_owned(),
        flags: "PF".to_owned(),
        pattern: Pattern::Magic {
            offset: 0,
            magic: b"MZ".to_vec(),
            mask: None,
        },
    }
}

/// Mends the entry where it has to be, and says what was done.
///
/// # Errors
/// See `mend`.
pub fn restore(host: &Host, log: &Log) -> anyhow::Result<()> {
    for deed in mend(host)? {
        log.info(&deed);
    }
    Ok(())
}

/// Makes the entry stand as WSL registered it, ahead of all that claim Windows programs as much as
/// it does, and behind those with a longer magic. At no instant is there no entry. Returns what was
/// done for that, in words; nothing, mostly.
///
/// # Errors
/// binfmt_misc is not mounted; /init is missing; the entry is disabled or not WSL's, and so not
/// ours to touch; or the kernel does not do as it is told.
pub fn mend(host: &Host) -> anyhow::Result<Vec<String>> {
    let table = Table::open(host)?;
    let _lock = table.lock();
    let mut deeds = Vec::new();

    let entry = match table.read(NAME)? {
        Some(entry) => entry,
        None => {
            require_init(host)?;
            let registered = table.register(&wanted().rule(NAME));
            // A peer without our lock may have been quicker: what counts is what stands there now.
            match (table.read(NAME)?, registered) {
                (Some(entry), Ok(())) => {
                    deeds.push(format!("{NAME} was missing, registered it"));
                    entry
                }
                (Some(entry), Err(_)) => entry,
                (None, Err(error)) => return Err(error),
                (None, Ok(())) => bail!("{NAME}: registered, but gone when read back"),
            }
        }
    };
    require_ours(&entry)?;

    let others = Others::of(&table, host)?;
    let lost = entry.flags != wanted().flags;
    if lost || !others.shadows.is_empty() {
        require_init(host)?;
        replace(&table, NAME, PLACEHOLDER, &wanted())?;
        deeds.push(if lost {
            format!("{NAME} had the flags '{}', registered it anew", entry.flags)
        } else {
            format!(
                "{} took Windows programs, put {NAME} first",
                others.shadows.join(", ")
            )
        });
    }
    for name in [LATE, PLACEHOLDER] {
        if table.read(name)?.is_some_and(|e| e.interpreter == INIT) {
            table.unregister(name)?;
            deeds.push(format!("removed {name}, which {NAME} makes superfluous"));
        }
    }
    for (name, entry) in others.unfinished {
        let placeholder = format!("{PLACEHOLDER_OF}{name}");
        if table.read(&name)?.is_none() {
            table.register(&entry.rule(&name))?;
        }
        table.unregister(&placeholder)?;
        deeds.push(format!(
            "removed {placeholder}, which {name} makes superfluous"
        ));
    }
    for (name, entry) in Others::of(&table, host)?.shadowed {
        replace(&table, &name, &format!("{PLACEHOLDER_OF}{name}"), &entry)
            .with_context(|| format!("putting {name} ahead of {NAME}, which is less specific"))?;
        deeds.push(format!(
            "put {name} ahead of {NAME}, which is less specific"
        ));
    }
    if !deeds.is_empty() && table.read(NAME)?.as_ref() != Some(&wanted()) {
        bail!("{NAME}: registered, but not as it was when read back");
    }
    Ok(deeds)
}

/// Registers an entry anew, which makes it the first that the kernel tries. Meanwhile another one
/// holds its place, so that it is never missing.
fn replace(table: &Table, name: &str, placeholder: &str, entry: &Entry) -> anyhow::Result<()> {
    table.unregister(placeholder)?;
    table.register(&entry.rule(placeholder))?;
    table.unregister(name)?;
    table.register(&entry.rule(name))?;
    table.unregister(placeholder)
}

fn require_init(host: &Host) -> anyhow::Result<()> {
    if !host.is_executable(INIT) {
        let init = host.path(INIT);
        bail!("{init}: not an executable file, so this is no WSL2 distro");
    }
    Ok(())
}

/// Refuses an entry of our name that somebody has made something else.
fn require_ours(entry: &Entry) -> anyhow::Result<()> {
    match fault(entry) {
        Some(fault) => bail!("{NAME} {fault}: somebody made it so, left alone"),
        None => Ok(()),
    }
}

/// What somebody has made of our entry, in words, if it is not ours to touch.
pub fn fault(entry: &Entry) -> Option<String> {
    let wanted = wanted();
    if entry.interpreter != wanted.interpreter {
        Some(format!("runs {}, not {INIT}", entry.interpreter))
    } else if entry.pattern != wanted.pattern {
        Some("is not for the magic MZ".to_owned())
    } else if !entry.enabled {
        Some("is disabled".to_owned())
    } else {
        None
    }
}

/// The other entries that have to do with Windows programs and stand in the wrong place.
pub struct Others {
    /// Ahead of ours, and claiming as much.
    pub shadows: Vec<String>,
    /// Behind ours, and claiming more; the one that is to come first is the last.
    pub shadowed: Vec<(String, Entry)>,
    /// Left by somebody who was stopped while putting such a one, of this name, ahead.
    unfinished: Vec<(String, Entry)>,
}

impl Others {
    fn of(table: &Table, host: &Host) -> anyhow::Result<Others> {
        Ok(Others::among(table.entries()?, host))
    }

    /// Finds them among all entries, the newest first.
    pub fn among(entries: Vec<(String, Entry)>, host: &Host) -> Others {
        let mut others = Others {
            shadows: Vec::new(),
            shadowed: Vec::new(),
            unfinished: Vec::new(),
        };
        let mut ahead = true;
        for (name, entry) in entries {
            if name == NAME {
                ahead = false;
                continue;
            }
            let superfluous =
                [LATE, PLACEHOLDER].contains(&name.as_str()) && entry.interpreter == INIT;
            // With `F` the kernel opens the interpreter, and a peer's may not be there for us.
            let can_register = !entry.flags.contains('F') || host.is_executable(&entry.interpreter);
            match entry.claim() {
                _ if !entry.enabled || superfluous => {}
                Claim::Equal if ahead => others.shadows.push(name),
                Claim::Longer if can_register => match name.strip_prefix(PLACEHOLDER_OF) {
                    Some(of) if is_name(of) => others.unfinished.push((of.to_owned(), entry)),
                    _ if !ahead => others.shadowed.insert(0, (name, entry)),
                    _ => {}
                },
                _ => {}
            }
        }
        others
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_wsls_own_entry_in_use_passes() {
        let ours = |change: fn(&mut Entry)| {
            let mut entry = wanted();
            change(&mut entry);
            require_ours(&entry).is_ok()
        };
        assert!(ours(|_| {}));
        assert!(ours(|e| e.flags = "P".to_owned()));
        assert!(!ours(|e| e.enabled = false));
        assert!(!ours(|e| e.interpreter = "/usr/bin/wine".to_owned()));
        assert!(!ours(|e| e.pattern = Pattern::Extension("exe".to_owned())));
    }

    #[test]
    fn only_what_holds_the_place_of_a_longer_magic_is_taken_for_unfinished() {
        let entry = |magic: &[u8]| Entry {
            interpreter: "/bin/ape".to_owned(),
            flags: String::new(),
            pattern: Pattern::Magic {
                offset: 0,
                magic: magic.to_owned(),
                mask: None,
            },
            ..wanted()
        };
        let entries = [
            ("WSLInterop-next-", entry(b"MZqFpD")),
            ("WSLInterop-next-status", entry(b"MZqFpD")),
            ("WSLInterop-next-a", entry(b"MZqFpD")),
            ("WSLInterop-next-b", entry(b"MZ")),
            (NAME, wanted()),
        ];
        let entries = entries.map(|(name, entry)| (name.to_owned(), entry));
        let others = Others::among(entries.into(), &Host::from_environment());
        assert_eq!(others.unfinished, [("a".to_owned(), entry(b"MZqFpD"))]);
        assert_eq!(others.shadows, ["WSLInterop-next-b"]);
        assert!(others.shadowed.is_empty());
    }
}
