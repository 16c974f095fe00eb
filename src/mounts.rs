//! The mounts of a distro, from the text of mountinfo: proc_pid_mountinfo(5). What lies on a path
//! is learned here before it is touched: a file system that nobody serves would hold us for good.

/// One mount.
#[derive(Debug, PartialEq)]
pub struct Mount<'a> {
    /// What of its file system is mounted; for a bind mount, the file. A deleted one ends with
    /// `//deleted`.
    pub root: &'a str,
    /// The file system's type.
    pub kind: &'a str,
}

/// The mount that is seen on a path, which must not have blanks in it.
pub fn on<'a>(mount_info: &'a str, path: &str) -> Option<Mount<'a>> {
    let mount = |line: &'a str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let root = fields.next()?;
        (fields.next()? == path).then_some(())?;
        Some(Mount {
            root,
            kind: file_system.split(' ').next()?,
        })
    };
    // Later ones lie on earlier ones.
    mount_info.lines().rev().find_map(mount)
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
        let seen = |path: &str| on(text, path).map(|m| (m.root, m.kind));
        let table = "/proc/sys/fs/binfmt_misc";
        assert_eq!(seen(table), Some(("/", "binfmt_misc")));
        let status = Some(("/wsl-binfmt/status//deleted", "tmpfs"));
        assert_eq!(seen(&format!("{table}/status")), status);
        assert_eq!(seen("/proc/sys"), None);
        assert_eq!(seen(""), None);
    }
}
