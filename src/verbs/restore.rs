//! `restore`: make the interop entry stand.

use anyhow::bail;

use crate::host::{Host, INIT};
use crate::log::Log;
use crate::registry::{self, Entry};

/// The entry's name, which other tools look for, too.
const NAME: &str = "WSLInterop";
/// As WSL registers it. `P`: /init needs the program as it was called; `F`: it works in chroots and containers, too.
const RULE: &str = ":WSLInterop:M::MZ::/init:FP";
/// The rule's flags, in the order in which the kernel shows them.
const FLAGS: &str = "PF";

/// Registers the entry if it is missing.
///
/// # Errors
/// /init is missing; the entry is disabled or not WSL's, and so not ours to touch; or the kernel
/// does not show what was registered.
pub fn restore(host: &Host, log: &Log) -> anyhow::Result<()> {
    if let Some(entry) = registry::read(host, NAME)? {
        return check(&entry);
    }
    if !host.is_executable(INIT) {
        bail!(
            "{}: not an executable file, so this is no WSL2 distro",
            host.path(INIT)
        );
    }
    let registered = registry::register(host, RULE);
    // The table is shared: a peer that was quicker is no failure, and so what counts is what
    // stands there now.
    match (registry::read(host, NAME)?, registered) {
        (None, Err(error)) => Err(error),
        (None, Ok(())) => bail!("{NAME}: registered, but gone when read back"),
        (Some(entry), Err(_)) => check(&entry),
        (Some(entry), Ok(())) => {
            check(&entry)?;
            if entry.flags != FLAGS {
                bail!("{NAME}: registered, but has the flags '{}'", entry.flags);
            }
            log.info(&format!("{NAME} was missing, registered it"));
            Ok(())
        }
    }
}

/// Whether an entry of our name is WSL's, and in use.
fn check(entry: &Entry) -> anyhow::Result<()> {
    let fault = if entry.interpreter != INIT {
        format!("runs {}, not {INIT}", entry.interpreter)
    } else if entry.matches != ["offset 0", "magic 4d5a"] {
        format!("matches {}, not the magic MZ", entry.matches.join(", "))
    } else if !entry.flags.contains('P') {
        format!("has the flags '{}', without P", entry.flags)
    } else if !entry.enabled {
        "is disabled".to_owned()
    } else {
        return Ok(());
    };
    bail!("{NAME} {fault}: somebody made it so, left alone")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_wsls_own_entry_in_use_passes() {
        let magic = "offset 0\nmagic 4d5a\n";
        for (text, passes) in [
            (
                format!("enabled\ninterpreter /init\nflags: PF\n{magic}"),
                true,
            ),
            (
                format!("enabled\ninterpreter /init\nflags: P\n{magic}"),
                true,
            ),
            (
                format!("disabled\ninterpreter /init\nflags: PF\n{magic}"),
                false,
            ),
            (
                format!("enabled\ninterpreter /usr/bin/wine\nflags: PF\n{magic}"),
                false,
            ),
            (
                "enabled\ninterpreter /init\nflags: PF\nextension .exe\n".to_owned(),
                false,
            ),
            (
                format!("enabled\ninterpreter /init\nflags: PF\n{magic}mask ff00\n"),
                false,
            ),
        ] {
            let entry = Entry::parse(&text).unwrap();
            assert_eq!(check(&entry).is_ok(), passes, "{text}");
        }
    }
}
