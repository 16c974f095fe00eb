//! mountinfo against a reading of it from the end, and a tree of mounts as the kernel has them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::mounts::{on, within, Mount};

fuzz_target!(|data: &[u8]| {
    if let Some(steps) = data.strip_prefix(b"\0") {
        stacked(steps);
    } else {
        let text = String::from_utf8_lossy(data);
        for path in ["/t", "/t/s", "", "/"] {
            assert_eq!(on(&text, path), seen(&text, path), "{text:?} {path:?}");
        }
        if let (Some(outer), Some(inner)) = (on(&text, "/t"), on(&text, "/t/s")) {
            if let Some(found) = within(&text, "/t/s", &outer) {
                let is =
                    |line: &str| fields(line).is_some_and(|(m, path)| m == found && path == "/t/s");
                assert!(text.lines().any(is), "{text:?}");
            }
            // Where one mount on the path lies on the outer one, and it is the only one.
            let all = text.lines().filter_map(fields).filter(|(_, path)| *path == "/t/s");
            if all.count() == 1 {
                let expected = (inner.parent == outer.id).then_some(inner);
                assert_eq!(within(&text, "/t/s", &outer), expected);
            }
        }
    }
});

fn seen<'a>(text: &'a str, path: &str) -> Option<Mount<'a>> {
    let mut lines = text.lines().rev().filter_map(fields);
    lines.find(|(_, on)| *on == path).map(|(mount, _)| mount)
}

/// The mount that a line is about, and its path.
fn fields(line: &str) -> Option<(Mount<'_>, &str)> {
    let middle = line.find(" - ")?;
    let left: Vec<&str> = line[..middle].split(' ').collect();
    let right: Vec<&str> = line[middle + 3..].split(' ').collect();
    let [id, parent, _, root, path, ..] = left[..] else {
        return None;
    };
    let kind = right[0];
    Some((Mount { id, parent, root, kind }, path))
}

/// Mounts and unmounts on /t and /t/s, as the kernel stacks them, each step a byte.
fn stacked(steps: &[u8]) {
    // Each: its number, that of the one below it, and whether it is on /t/s.
    let mut mounts: Vec<(usize, usize, bool)> = Vec::new();
    let top = |mounts: &[(usize, usize, bool)], mut below: usize, inner: bool| {
        while let Some(next) = mounts.iter().find(|m| m.1 == below && m.2 == inner) {
            below = next.0;
        }
        below
    };
    for (i, step) in steps.iter().take(64).enumerate() {
        let outer = top(&mounts, 1, false);
        let inner = top(&mounts, outer, true);
        match step % 4 {
            0 => mounts.push((i + 2, outer, false)),
            1 | 2 => mounts.push((i + 2, inner, true)),
            _ if inner != outer => mounts.retain(|m| m.0 != inner),
            _ => mounts.retain(|m| m.0 != outer),
        }
    }
    let line = |(id, parent, inner): &(usize, usize, bool)| {
        let path = if *inner { "/t/s" } else { "/t" };
        format!("{id} {parent} 0:1 /{id} {path} rw shared:1 - tmpfs t rw\n")
    };
    let text: String = mounts.iter().map(line).collect();
    let outer = top(&mounts, 1, false);
    let inner = top(&mounts, outer, true);
    let id = |number: usize| (number != 1).then(|| number.to_string());
    let found = on(&text, "/t");
    assert_eq!(found.as_ref().map(|m| m.id.to_owned()), id(outer), "{text}");
    if let Some(found) = found {
        let within = within(&text, "/t/s", &found).map(|m| m.id.to_owned());
        assert_eq!(within, id(inner).filter(|_| inner != outer), "{text}");
    }
}
