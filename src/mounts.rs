//! The mounts of a distro, from mountinfo, proc_pid_mountinfo(5). They tell what is mounted on a
//! path before it is touched: a dead file system would hang this program forever.

/// One mount.
#[derive(Debug, PartialEq)]
pub struct Mount<'a> {
    /// Its ID.
    pub id: &'a str,
    /// The ID of the mount that it is on.
    pub parent: &'a str,
    /// The part of its file system that is mounted; for a bind mount, the file. If that was
    /// deleted, it ends with `//deleted`.
    pub root: &'a str,
    /// The file system's type.
    pub kind: &'a str,
}

/// The visible mount on a path, which must not contain blanks.
pub fn on<'a>(mount_info: &'a str, path: &str) -> Option<Mount<'a>> {
    // Later mounts cover earlier ones.
    all_on(mount_info, path).last()
}

/// The visible mount on a path within another mount. A mount within one that `outer` covers is not
/// visible.
pub fn within<'a>(mount_info: &'a str, path: &str, outer: &Mount) -> Option<Mount<'a>> {
    let mut seen: Option<Mount> = None;
    for mount in all_on(mount_info, path) {
        let below = seen.as_ref().map_or(outer.id, |seen| seen.id);
        if mount.parent == below {
            seen = Some(mount);
        }
    }
    seen
}

fn all_on<'a, 'b>(
    mount_info: &'a str,
    path: &'b str,
) -> impl Iterator<Item = Mount<'a>> + use<'a, 'b> {
    let mount = move |line: &'a str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let (id, parent, _device) = (fields.next()?, fields.next()?, fields.next()?);
        let root = fields.next()?;
        (fields.next()? == path).then_some(())?;
        Some(Mount { id, parent, root, kind: file_system.split(' ').next()? })
    };
    mount_info.lines().filter_map(mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_mount_on_a_path_is_seen() {
        let text = "\
            24 1 0:22 / /proc rw,nosuid - proc proc rw\n\
            33 24 0:30 / /proc/sys/fs/binfmt_misc rw shared:1 master:2 - autofs systemd-1 rw\n\
            34 33 0:31 / /proc/sys/fs/binfmt_misc rw - binfmt_misc binfmt_misc rw\n\
            35 34 0:24 /wsl-binfmt/status//deleted /proc/sys/fs/binfmt_misc/status ro - tmpfs t rw\n\
            broken\n";
        let seen = |path: &str| on(text, path).map(|m| (m.id, m.parent, m.root, m.kind));
        let table = "/proc/sys/fs/binfmt_misc";
        assert_eq!(seen(table), Some(("34", "33", "/", "binfmt_misc")));
        let status = Some(("35", "34", "/wsl-binfmt/status//deleted", "tmpfs"));
        assert_eq!(seen(&format!("{table}/status")), status);
        assert_eq!(seen("/proc/sys"), None);
        assert_eq!(seen(""), None);
    }

    #[test]
    fn a_mount_within_a_hidden_one_is_not_seen() {
        let mut text = String::from("34 1 0:31 / /t rw - binfmt_misc b rw\n");
        let mut seen = |line: &str| {
            text.push_str(line);
            let outer = on(&text, "/t").unwrap();
            within(&text, "/t/s", &outer).map(|mount| mount.root.to_owned())
        };
        let some = |root: &str| Some(root.to_owned());
        assert_eq!(seen(""), None);
        assert_eq!(seen("35 34 0:24 /a /t/s ro - tmpfs t rw\n"), some("/a"));
        assert_eq!(seen("36 35 0:24 /b /t/s ro - tmpfs t rw\n"), some("/b"));
        assert_eq!(seen("37 34 0:31 / /t rw - binfmt_misc b rw\n"), None);
        assert_eq!(seen("38 37 0:24 /c /t/s ro - tmpfs t rw\n"), some("/c"));
    }
}
