//! `$WSL_INTEROP`: the socket through which /init has a program started on Windows. As WSL has it
//! (UtilConnectToInteropServer), that of the variable, or if there is none, of the nearest ancestor.

use std::os::unix::fs::MetadataExt;

use camino::Utf8Path;

use super::report::{word, Finding, Harm, Mend};
use super::Wanted;
use crate::host::{variable, Host, INTEROP_SOCKETS};

const CHECK: &str = "WSL_INTEROP";

/// Looks for the socket that /init would take in the shell that asks.
pub fn check(host: &Host, wanted: &Wanted) -> Vec<Finding> {
    let Ok(sockets) = host.unix_sockets() else {
        return vec![Finding::unknown(
            CHECK,
            "the list of sockets cannot be read",
        )];
    };
    let alive = |path: &str| listens(host, &sockets, path);
    let fault = |found: String| {
        let names = host.names(INTEROP_SOCKETS).into_iter();
        let mut paths = names.filter(|name| is_wsls(host, name)).map(of_wsl);
        let mend = match paths.find(|path| alive(path)) {
            Some(path) => Mend::InShell(format!("export WSL_INTEROP={}", word(path))),
            None => Mend::ByHand("open a new terminal of this distro".to_owned()),
        };
        wanted.interop(CHECK, Harm::Broken, found, mend)
    };
    let value = variable("WSL_INTEROP");
    if let Some(path) = &value {
        if alive(path) {
            return vec![Finding::good(CHECK, format!("{path} is listened on"))];
        }
        if host.path(path).exists() {
            return vec![fault(format!("{path} is dead: nobody listens on it"))];
        }
    }
    let how = match &value {
        Some(path) => format!("stale: there is no {path}"),
        None => "not set".to_owned(),
    };
    let ancestors = host.ancestors().into_iter();
    let inherited = ancestors
        .map(|pid| of_wsl(format!("{pid}_interop")))
        .find(|path| host.path(path).exists());
    vec![match inherited {
        Some(path) if alive(&path) => Finding::note(CHECK, format!("{how}; {path} serves instead")),
        Some(path) => fault(format!("{how}, and nobody listens on {path}")),
        None => fault(format!("{how}, and no ancestor of this shell has a socket")),
    }]
}

fn of_wsl(name: String) -> String {
    format!("{INTEROP_SOCKETS}/{name}")
}

/// Everybody may make files there. WSL's own are root's, and called `PID_interop`.
fn is_wsls(host: &Host, name: &str) -> bool {
    let number = name.strip_suffix("_interop").unwrap_or_default();
    let path = host.path(&of_wsl(name.to_owned()));
    number.parse::<u32>().is_ok() && path.metadata().is_ok_and(|m| m.uid() == 0)
}

/// Whether somebody listens on a socket. Connecting would tell too, but also reach WSL, and could
/// hold us up.
fn listens(host: &Host, sockets: &str, path: &str) -> bool {
    let path = host.path(path);
    let real = path.canonicalize_utf8().unwrap_or(path);
    sockets.lines().any(|line| has(line, &real))
}

/// A line of /proc/net/unix: Num, RefCount, Protocol, Flags, Type, St, Inode, Path. In the flags
/// `__SO_ACCEPTCON` says that it listens.
fn has(line: &str, path: &Utf8Path) -> bool {
    let mut fields = line.split_ascii_whitespace().skip(3);
    let flags = fields.next().and_then(|f| u32::from_str_radix(f, 16).ok());
    let listening = flags.is_some_and(|flags| flags & 0x10000 != 0);
    let own = line.split_once(" /").map(|(_, rest)| format!("/{rest}"));
    listening && own.is_some_and(|own| own == path.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_that_is_listened_on_counts() {
        let listening = "ffff8: 00000002 00000000 00010000 0001 01 12345 /run/WSL/8_interop";
        let connected = "ffff8: 00000003 00000000 00000000 0001 03 12345 /run/WSL/8_interop";
        let path = Utf8Path::new("/run/WSL/8_interop");
        assert!(has(listening, path));
        assert!(!has(connected, path));
        assert!(!has(listening, Utf8Path::new("/run/WSL/8")));
        assert!(!has("", path));
        assert!(!has(
            "Num       RefCount Protocol Flags    Type St Inode Path",
            path
        ));
    }
}
