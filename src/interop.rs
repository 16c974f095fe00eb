//! The entry that starts Windows programs, and what gets in its way, judged from the table's
//! entries alone.

use crate::binfmt_misc::{is_name, Claim, Entry, Listed, Pattern};
use crate::host::INIT;

/// The entry's name, which other tools also look for.
pub const NAME: &str = "WSLInterop";
/// The stand-in for it while no other entry passes Windows programs to /init as it should. No other
/// program registers this name, so no registration can fail because of it.
pub const STAND_IN: &str = "WSLInterop-next";
/// Prefix of the stand-in for another entry while that is registered again.
const STAND_IN_OF: &str = "WSLInterop-next-";
/// The entry that WSL before 2.6.2 registers as well.
pub const LATE: &str = "WSLInterop-late";

/// The entry as WSL registers it for the VM. `P`: /init needs the program's name as it was called.
/// `F`: it also works in chroots and containers.
pub fn wanted() -> Entry {
    Entry {
        enabled: true,
        interpreter: INIT.to_owned(),
        flags: "PF".to_owned(),
        pattern: Pattern::Magic { offset: 0, magic: b"MZ".to_vec(), mask: None },
    }
}

/// Whether a name is reserved for Windows interop, so that no rule of a distro may have it.
pub fn is_reserved(name: &str) -> bool {
    [NAME, LATE, STAND_IN].contains(&name) || name.starts_with(STAND_IN_OF)
}

/// The name of the stand-in for the entry of that name.
pub fn stand_in_of(name: &str) -> String {
    format!("{STAND_IN_OF}{name}")
}

/// Says how somebody has changed the entry, if that makes it none of our business.
pub fn fault(entry: &Entry) -> Option<String> {
    let wanted = wanted();
    if entry.interpreter != wanted.interpreter {
        Some(format!("runs {}, not {INIT}", entry.interpreter))
    } else if entry.pattern != wanted.pattern {
        Some("has a pattern other than the magic MZ".to_owned())
    } else if !entry.enabled {
        Some("is disabled".to_owned())
    } else {
        None
    }
}

/// Whether an entry has the flags that it needs. `O` and `C` do not matter to /init.
pub fn has_flags(entry: &Entry) -> bool {
    wanted().flags.chars().all(|flag| entry.flags.contains(flag))
}

/// The entry of that name.
pub fn find<'a>(entries: &'a [Listed], name: &str) -> Option<&'a Entry> {
    let listed = entries.iter().find(|listed| listed.name == name)?;
    Some(&listed.entry)
}

/// The first entry that takes Windows programs, and so gets them.
pub fn first(entries: &[Listed]) -> Option<&Listed> {
    let takes = |listed: &&Listed| listed.entry.enabled && claims(listed);
    entries.iter().find(takes)
}

fn claims(listed: &Listed) -> bool {
    listed.entry.claim() == Claim::Ordinary
}

/// Whether Windows programs do not go to /init, or without `P`, so that not all of them start, although
/// nobody has changed our entry on purpose.
pub fn needs_stand_in(entries: &[Listed]) -> bool {
    let untouched = find(entries, NAME).is_none_or(|entry| fault(entry).is_none());
    untouched && !first(entries).is_some_and(|first| starts_programs(&first.entry))
}

/// Whether Windows programs that go to this entry start. Without `P`, /init ends without a word if a
/// program has no arguments, and loses the first one of others.
pub fn starts_programs(entry: &Entry) -> bool {
    entry.interpreter == INIT && entry.flags.contains('P')
}

/// The names of the entries that take Windows programs and are tried before ours.
pub fn rivals_ahead(entries: &[Listed]) -> Vec<String> {
    let ahead = entries.iter().take_while(|listed| listed.name != NAME);
    let rivals = ahead.filter(|listed| {
        let of_wsl = [LATE, STAND_IN].contains(&&*listed.name) && listed.entry.interpreter == INIT;
        listed.entry.enabled && claims(listed) && !of_wsl
    });
    rivals.map(|listed| listed.name.clone()).collect()
}

/// The entries with a longer magic that come after ours or its stand-in, and so get nothing. Last
/// first, so that they keep their order when each is put ahead.
pub fn misplaced(entries: &[Listed]) -> Vec<&Listed> {
    let behind = entries.iter().skip_while(|listed| ![NAME, STAND_IN].contains(&&*listed.name));
    let longer = behind.filter(|listed| {
        listed.entry.enabled
            && listed.entry.claim() == Claim::Longer
            && !listed.name.starts_with(STAND_IN_OF)
            && is_whole(listed)
    });
    let mut longer: Vec<_> = longer.collect();
    longer.reverse();
    longer
}

/// Whether an entry can be registered again unchanged: its name and interpreter are UTF-8.
fn is_whole(listed: &Listed) -> bool {
    is_name(&listed.name) && !listed.entry.interpreter.contains(char::REPLACEMENT_CHARACTER)
}

/// The stand-ins left by a process that was stopped while it put an entry ahead, each with the name
/// of that entry.
pub fn unfinished(entries: &[Listed]) -> Vec<(&str, &Listed)> {
    entries
        .iter()
        .filter_map(|listed| {
            let name = listed.name.strip_prefix(STAND_IN_OF)?;
            let longer = listed.entry.enabled && listed.entry.claim() == Claim::Longer;
            (longer && is_name(name) && is_whole(listed)).then_some((name, listed))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(interpreter: &str, magic: &[u8]) -> Entry {
        Entry {
            interpreter: interpreter.to_owned(),
            flags: String::new(),
            pattern: Pattern::Magic { offset: 0, magic: magic.to_owned(), mask: None },
            ..wanted()
        }
    }

    fn listed(entries: &[(&str, Entry)]) -> Vec<Listed> {
        let listed = |(name, entry): &(&str, Entry)| Listed {
            name: (*name).to_owned(),
            inode: 1,
            entry: entry.clone(),
        };
        entries.iter().map(listed).collect()
    }

    #[test]
    fn only_wsls_own_entry_in_use_is_ours_to_touch() {
        let ours = |change: fn(&mut Entry)| {
            let mut entry = wanted();
            change(&mut entry);
            fault(&entry).is_none()
        };
        assert!(ours(|_| {}));
        assert!(ours(|e| e.flags = "P".to_owned()));
        assert!(!ours(|e| e.enabled = false));
        assert!(!ours(|e| e.interpreter = "/usr/bin/wine".to_owned()));
        assert!(!ours(|e| e.pattern = Pattern::Extension("exe".to_owned())));
    }

    #[test]
    fn both_flags_are_needed_and_others_do_no_harm() {
        for (flags, enough) in [("PF", true), ("POCF", true), ("P", false), ("F", false)] {
            let entry = Entry { flags: flags.to_owned(), ..wanted() };
            assert_eq!(has_flags(&entry), enough, "{flags}");
        }
    }

    #[test]
    fn a_stand_in_is_needed_where_windows_programs_go_astray() {
        let disabled = Entry { enabled: false, ..wanted() };
        let (wine, ape) = (entry("/wine", b"MZ"), entry("/ape", b"MZqFpD"));
        for (entries, needed) in [
            (&[][..], true),
            (&[(NAME, wanted())], false),
            (&[(STAND_IN, wanted())], false),
            (&[(LATE, wanted())], false),
            (&[("wine", wine.clone()), (NAME, wanted())], true),
            (&[(NAME, wanted()), ("wine", wine.clone())], false),
            (&[("ape", ape), (NAME, wanted())], false),
            (&[(NAME, Entry { flags: "P".to_owned(), ..wanted() })], false),
            (&[(NAME, Entry { flags: "F".to_owned(), ..wanted() })], true),
            (&[("old", entry(INIT, b"MZ")), (NAME, wanted())], true),
            (&[(NAME, disabled)], false),
            (&[(NAME, wine)], false),
        ] {
            assert_eq!(needs_stand_in(&listed(entries)), needed, "{entries:?}");
        }
    }

    #[test]
    fn those_in_the_wrong_place_are_found_on_either_side() {
        let ape = entry("/ape", b"MZqFpD");
        let entries = listed(&[
            ("mine", entry("/wine", b"MZ\x90")),
            ("ahead", ape.clone()),
            (LATE, wanted()),
            (NAME, wanted()),
            ("newer", ape.clone()),
            ("behind", entry("/wine", b"MZ")),
            ("older", ape),
        ]);
        assert_eq!(rivals_ahead(&entries), ["mine"]);
        let names: Vec<_> = misplaced(&entries).iter().map(|l| &l.name).collect();
        assert_eq!(names, ["older", "newer"]);
        let (_, rest) = entries.split_at(4);
        let covered = [&listed(&[(STAND_IN, wanted())]), rest].concat();
        let names: Vec<_> = misplaced(&covered).iter().map(|l| &l.name).collect();
        assert_eq!(names, ["older", "newer"]);
    }

    #[test]
    fn only_what_stands_in_for_a_longer_magic_is_taken_for_unfinished() {
        let ape = entry("/ape", b"MZqFpD");
        let entries = listed(&[
            ("WSLInterop-next-", ape.clone()),
            ("WSLInterop-next-status", ape.clone()),
            ("WSLInterop-next-a", ape.clone()),
            ("WSLInterop-next-b", entry("/wine", b"MZ")),
            ("WSLInterop-next-c", entry(INIT, b"MZ")),
            (STAND_IN, wanted()),
            (NAME, wanted()),
        ]);
        let found = unfinished(&entries);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0, "a");
        assert_eq!(rivals_ahead(&entries), ["WSLInterop-next-b", "WSLInterop-next-c"]);
    }
}
