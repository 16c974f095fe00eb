//! Files of other people's, below a root of our own: what `release` does by a record, PID 1's
//! environment, the list of sockets, and units that look as if they registered the entry.

#![no_main]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use camino::{Utf8Path, Utf8PathBuf};
use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::doctor::facts::{Files, Session};
use wsl_binfmt_generator_fuzz::doctor::leftovers;
use wsl_binfmt_generator_fuzz::doctor::report::State;
use wsl_binfmt_generator_fuzz::host::Host;
use wsl_binfmt_generator_fuzz::verbs::unit::release;

const TABLE: &str = "/proc/sys/fs/binfmt_misc";
const RECORDS: [&str; 2] = ["systemd-binfmt.rules", "binfmt-support.rules"];
/// With `F`, and without.
const HOLDS: &str = "enabled\ninterpreter /x\nflags: PF\noffset 0\nmagic 41\n";
const PLAIN: &str = "enabled\ninterpreter /x\nflags: \nextension .b\n";
const ENTRIES: [(&str, &str); 6] = [
    ("a", HOLDS),
    ("b c", PLAIN),
    ("WSLInterop", HOLDS),
    ("Interop", "this makes no sense\n"),
    ("status", "kept"),
    ("register", "kept"),
];
const DROP_IN: &str = "/etc/systemd/system/a.service.d/a.conf";
const SOCKET: &str = "/run/WSL/8_interop";

static ROOT: OnceLock<Utf8PathBuf> = OnceLock::new();

fuzz_target!(init: { start(); }, |data: &[u8]| {
    let Some((which, data)) = data.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(data);
    match which % 4 {
        0 => recorded(&text),
        1 => environment(data),
        2 => listened(&text),
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

/// `@a` stands for the inode of the entry `a`. What follows an empty line is the second record.
fn recorded(text: &str) {
    let (host, root) = host();
    let entry = |name: &str| below(root, TABLE).join(name);
    let outside = below(root, "/proc/sys/fs/outside");
    fs::write(&outside, "kept").unwrap();
    let mut text = text.replace("@.", &outside.metadata().unwrap().ino().to_string());
    for (name, shown) in ENTRIES {
        fs::write(entry(name), shown).unwrap();
        let inode = entry(name).metadata().unwrap().ino();
        text = text.replace(&format!("@{}", &name[..1]), &inode.to_string());
    }
    let (first, second) = text.split_once("\n\n").unwrap_or((&text, ""));
    for (record, text) in RECORDS.iter().zip([first, second]) {
        fs::write(below(root, "/run/wsl-binfmt").join(record), text).unwrap();
    }
    let result = release(&host);

    // Whether a peer had it, of each line that is about the entry.
    let of = |name: &str| {
        let inode = entry(name).metadata().unwrap().ino().to_string();
        let about = |line: &&str| {
            let parts: Vec<&str> = line.splitn(3, ' ').collect();
            let &[number, _, rule] = parts.as_slice() else {
                return false;
            };
            let number = number.strip_prefix('+').unwrap_or(number);
            let named = rule.chars().next().is_some_and(|between| {
                let fields: Vec<&str> = rule.split(between).collect();
                fields.get(1) == Some(&name)
            });
            named && number.trim_start_matches('0') == inode
        };
        let lines = first.lines().chain(second.lines());
        let shared = lines
            .filter(about)
            .map(|line| line.split(' ').nth(1) == Some("shared"));
        shared.collect::<Vec<_>>()
    };
    let gone = |shown: &str| format!("-1{}", &shown[2..]);
    for (name, shown) in ENTRIES {
        let shared = of(name);
        let expected = match name {
            "a" | "Interop" if !shared.is_empty() => gone(shown),
            "b c" if shared.contains(&false) => gone(shown),
            // The peer's is as it was without us.
            "register" if of("a").first() == Some(&true) => r":a:M:0:\x41:://x:P".to_owned(),
            _ => shown.to_owned(),
        };
        // Whose text makes no sense, nobody can say that it holds no file.
        let done = fs::read_to_string(entry(name)).unwrap();
        assert_eq!(done, expected, "{name}: {text:?}");
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "kept", "{text:?}");
    // A record that makes no sense must not be there for ever.
    assert!(result.is_ok(), "{text:?}: {result:?}");
    for record in RECORDS {
        assert!(!below(root, "/run/wsl-binfmt").join(record).exists());
    }
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
fn listened(text: &str) {
    let (host, root) = host();
    let text = text.replace('@', root.as_str());
    fs::write(below(root, "/proc/net/unix"), &text).unwrap();
    let session = Session::read(&host).unwrap();
    let is_good = session.variable.is_some_and(|socket| socket.is_alive);
    let listened_on = text.lines().any(|line| {
        let path = line.find(" /").map(|at| &line[at + 1..]);
        let flags = line.split_ascii_whitespace().nth(3).unwrap_or_default();
        let flags = u32::from_str_radix(flags, 16).unwrap_or_default();
        path == Some(below(root, SOCKET).as_str()) && flags >> 16 & 1 == 1
    });
    assert_eq!(is_good, listened_on, "{text:?}");
}

fn drop_in(text: &str) {
    let (host, root) = host();
    fs::write(below(root, DROP_IN), text).unwrap();
    let found = leftovers::check(&Files::read(&host));
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
