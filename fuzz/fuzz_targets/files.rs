//! Files of other people's, below a root of our own: what `release` does by its list, PID 1's
//! environment, the list of sockets, and units that look as if they registered the entry.

#![no_main]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use camino::{Utf8Path, Utf8PathBuf};
use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::host::{Host, REGISTERED};
use wsl_binfmt_generator_fuzz::report::State;
use wsl_binfmt_generator_fuzz::verbs::release::release;
use wsl_binfmt_generator_fuzz::{interop, leftovers, Wanted};

const TABLE: &str = "/proc/sys/fs/binfmt_misc";
const ENTRIES: [&str; 5] = ["a", "b c", "WSLInterop", "status", "register"];
const DROP_IN: &str = "/etc/systemd/system/a.service.d/a.conf";
const SOCKET: &str = "/run/WSL/8_interop";

static ROOT: OnceLock<Utf8PathBuf> = OnceLock::new();

fuzz_target!(init: { start(); }, |data: &[u8]| {
    let Some((which, data)) = data.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(data);
    match which % 4 {
        0 => remembered(&text),
        1 => environment(data),
        2 => sockets(&text),
        _ => drop_in(&text),
    }
});

fn start() {
    let directory = Utf8PathBuf::try_from(std::env::temp_dir()).unwrap();
    let root = directory.join(format!("wsl-binfmt-fuzz.{}", std::process::id()));
    for directory in [TABLE, "/run/wsl-binfmt", "/run/WSL", "/proc/1", "/proc/net"] {
        fs::create_dir_all(below(&root, directory)).unwrap();
    }
    fs::create_dir_all(below(&root, DROP_IN).parent().unwrap()).unwrap();
    fs::write(below(&root, SOCKET), "").unwrap();
    // Nobody else reads them, and no other thread is there yet.
    std::env::set_var("WSL_BINFMT_ROOT", &root);
    std::env::set_var("WSL_INTEROP", SOCKET);
    ROOT.set(root).unwrap();
}

fn below(root: &Utf8Path, path: &str) -> Utf8PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn host() -> (Host, &'static Utf8Path) {
    (Host::from_environment(), ROOT.get().unwrap())
}

/// `@a` stands for the inode of the entry `a`.
fn remembered(text: &str) {
    let (host, root) = host();
    let entry = |name: &str| below(root, TABLE).join(name);
    let outside = below(root, "/proc/sys/fs/outside");
    fs::write(&outside, "kept").unwrap();
    let mut list = text.replace("@.", &outside.metadata().unwrap().ino().to_string());
    for name in ENTRIES {
        fs::write(entry(name), "kept").unwrap();
        let inode = entry(name).metadata().unwrap().ino();
        list = list.replace(&format!("@{}", &name[..1]), &inode.to_string());
    }
    fs::write(below(root, REGISTERED), &list).unwrap();
    let result = release(&host);

    for name in ENTRIES {
        let inode = entry(name).metadata().unwrap().ino();
        let is_listed = |line: &str| {
            let mut parts = line.splitn(2, ' ');
            let number = parts.next().and_then(|n| n.parse().ok());
            number == Some(inode) && parts.next() == Some(name)
        };
        let expected = ["a", "b c"].contains(&name) && list.lines().any(is_listed);
        let done = fs::read_to_string(entry(name)).unwrap();
        assert_eq!(
            done,
            if expected { "-1pt" } else { "kept" },
            "{name}: {list:?}"
        );
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "kept", "{list:?}");
    // A list that makes no sense must not be there for ever.
    assert!(result.is_ok(), "{list:?}: {result:?}");
    assert!(!below(root, REGISTERED).exists());
}

fn environment(data: &[u8]) {
    let (host, root) = host();
    fs::write(below(root, "/proc/1/environ"), data).unwrap();
    let found = host.pid1_variable("container").unwrap();
    let expected = data.split(|b| *b == 0).find_map(|variable| {
        let at = variable.iter().position(|b| *b == b'=')?;
        let (name, value) = (&variable[..at], &variable[at + 1..]);
        (name == b"container").then(|| String::from_utf8_lossy(value).into_owned())
    });
    assert_eq!(found, expected);
}

/// `@` stands for the root.
fn sockets(text: &str) {
    let (host, root) = host();
    let text = text.replace('@', root.as_str());
    fs::write(below(root, "/proc/net/unix"), &text).unwrap();
    let found = interop::check(&host, &Wanted);
    let listened_on = text.lines().any(|line| {
        let path = line.find(" /").map(|at| &line[at + 1..]);
        let flags = line.split_ascii_whitespace().nth(3).unwrap_or_default();
        let flags = u32::from_str_radix(flags, 16).unwrap_or_default();
        path == Some(below(root, SOCKET).as_str()) && flags >> 16 & 1 == 1
    });
    let is_good = found.iter().all(|finding| finding.state == State::Good);
    assert_eq!(is_good, listened_on, "{text:?}");
}

fn drop_in(text: &str) {
    let (host, root) = host();
    fs::write(below(root, DROP_IN), text).unwrap();
    let found = leftovers::check(&host, "");
    let registers = |text: &str| {
        let names_it = text.contains("WSLInterop") || text.contains(":MZ:");
        names_it && text.contains("register")
    };
    // What systemd does not read is no setting, and one is not told by its comment.
    let mut settings = Vec::new();
    let mut begun = String::new();
    for line in text.split('\n') {
        match line.strip_suffix('\\') {
            Some(line) => begun += &format!("{line} "),
            None => settings.push(std::mem::take(&mut begun) + line),
        }
    }
    settings.push(begun);
    let is_setting = |line: &&String| {
        let line = line.trim();
        !line.starts_with(['#', ';']) && line.starts_with("Exec") && line.contains('=')
    };
    let expected = settings.iter().filter(is_setting).any(|line| {
        let (_, value) = line.split_once('=').unwrap();
        registers(value)
    });
    let is_good = found.iter().all(|finding| finding.state == State::Good);
    assert_eq!(is_good, !expected, "{text:?}: {found:?}");
    fs::remove_file(below(root, DROP_IN)).unwrap();
}
