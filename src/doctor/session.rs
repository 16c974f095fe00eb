//! Whether a program that this shell starts can reach Windows.

use super::facts::{Session, Socket};
use super::report::{word, Finding, State};

/// Judges the socket that /init would use in the calling shell.
pub fn check(session: &Session) -> Finding {
    let check = "WSL_INTEROP";
    let gone = |socket: &Socket| match socket.exists {
        true => format!("nothing listens on {}", socket.path),
        false => format!("{} no longer exists", socket.path),
    };
    let found = match (&session.variable, &session.inherited) {
        (Some(socket), _) if socket.is_alive => {
            return Finding::good(check, format!("{} connects to Windows", socket.path));
        }
        (Some(socket), _) if socket.exists => gone(socket),
        (variable, inherited) => {
            let how = variable.as_ref().map_or("not set".to_owned(), gone);
            match inherited {
                Some(socket) if socket.is_alive => {
                    let found = format!("{how}; {} is used instead", socket.path);
                    return Finding::note(check, found);
                }
                Some(socket) => format!("{how}, and {}", gone(socket)),
                None => format!("{how}, and no parent process has a socket"),
            }
        }
    };
    let found = format!("{found}: this shell cannot reach Windows");
    let finding = Finding::new(check, State::Broken, found);
    match &session.other {
        Some(path) => finding.in_shell(format!("export WSL_INTEROP={}", word(path))),
        None => finding.by_hand("open a new terminal in this distro"),
    }
}
