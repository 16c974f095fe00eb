//! What systemd says of some of its units, asked over D-Bus as org.freedesktop.systemd1(5) has it.
//! Written out, since these few calls are less than any library for them.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure, Context};
use camino::Utf8Path;

/// One unit, as systemd has it loaded. What only services have is empty for others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Unit {
    /// `loaded`, `not-found`, `masked`, `bad-setting`, `error` and the like.
    pub load_state: String,
    /// `active`, `inactive`, `failed` and the like.
    pub active_state: String,
    /// How the service ended last: `success`, `exit-code` and the like.
    pub result: String,
    /// What a running service says of itself.
    pub status_text: String,
    /// Its file, empty if it has none. What masks it may be shown as `/dev/null`.
    pub fragment_path: String,
    /// Its drop-ins.
    pub drop_in_paths: Vec<String>,
    /// Whether these files have changed since.
    pub need_daemon_reload: bool,
    /// Whether its conditions have been tested, when it was to be started.
    pub tested: bool,
    /// Whether all of them held then.
    pub conditions_held: bool,
    /// Its conditions. systemd tests them from the end, and lists them so.
    pub conditions: Vec<Condition>,
    /// The destinations of its `BindPaths=`.
    pub binds_over: Vec<String>,
}

/// A condition of a unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// As it is spelled in a unit file.
    pub text: String,
    /// Whether it kept the unit from starting, as far as systemd remembers: a daemon-reload makes
    /// it forget.
    pub failed: bool,
}

const SYSTEMD: &str = "org.freedesktop.systemd1";
const BUS: &str = "org.freedesktop.DBus";
const INTERFACES: &str = "org.freedesktop.DBus.Properties";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const PROPERTIES: [(&str, &str); 11] = [
    (UNIT, "LoadState"),
    (UNIT, "ActiveState"),
    (UNIT, "FragmentPath"),
    (UNIT, "DropInPaths"),
    (UNIT, "NeedDaemonReload"),
    (UNIT, "ConditionResult"),
    (UNIT, "ConditionTimestamp"),
    (UNIT, "Conditions"),
    (SERVICE, "Result"),
    (SERVICE, "BindPaths"),
    (SERVICE, "StatusText"),
];

/// No line, and no part of a message, that is read here is longer than this, in bytes.
const LIMIT: u32 = 1 << 20;

/// Asks systemd for these units, which it loads if need be. `socket` is its own, or that of a bus.
/// On a bus, ask for a dozen at most: dbus-daemon allows 128 calls without a reply.
///
/// # Errors
/// Nobody listens there, or refuses, or speaks something else, or says nothing until `deadline`.
/// Only connecting may take longer, where more wait for it than the kernel lets stand in line.
pub fn units(
    socket: &Utf8Path,
    on_a_bus: bool,
    names: &[&str],
    deadline: Instant,
) -> anyhow::Result<Vec<Unit>> {
    UnixStream::connect(socket)
        .map_err(anyhow::Error::from)
        .and_then(|stream| ask(Timed(&stream, deadline), on_a_bus, names))
        .map_err(|error| match error.downcast_ref().map(io::Error::kind) {
            Some(ErrorKind::WouldBlock) => anyhow!("it did not answer in time"),
            Some(ErrorKind::UnexpectedEof) => anyhow!("it hung up"),
            _ => error,
        })
        .with_context(|| format!("asking systemd at {socket}"))
}

fn ask(timed: Timed, on_a_bus: bool, names: &[&str]) -> anyhow::Result<Vec<Unit>> {
    let mut output = timed.0;
    output.set_write_timeout(timed.left()?)?;
    let mut input = BufReader::new(timed);
    // Who we are, the other side sees by the socket.
    output.write_all(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")?;
    for expected in ["DATA", "OK "] {
        let mut line = Vec::new();
        let mut limited = (&mut input).take(LIMIT.into());
        limited.read_until(b'\n', &mut line)?;
        let line = String::from_utf8_lossy(&line);
        ensure!(line.starts_with(expected), "refused: {:?}", line.trim_end());
    }

    let mut calls = Vec::new();
    if on_a_bus {
        calls = call(1, ["/org/freedesktop/DBus", BUS, "Hello", BUS], &[]);
    }
    let mut waiting = Vec::new();
    for (unit, name) in names.iter().enumerate() {
        for (interface, property) in PROPERTIES {
            if interface == SERVICE && !name.ends_with(".service") {
                continue;
            }
            let serial = waiting.len() as u32 + 2;
            waiting.push((serial, unit, property));
            let target = [&object_path(name), INTERFACES, "Get", SYSTEMD];
            calls.extend(call(serial, target, &[interface, property]));
        }
    }
    output.write_all(&calls)?;

    let mut units = vec![Unit::default(); names.len()];
    while !waiting.is_empty() {
        let message = receive(&mut input)?;
        let (serial, reply) = parse(&message).context("malformed message")?;
        let value = reply?;
        // Others are signals, and the reply to Hello. Every error is about a call of ours.
        if let Some(at) = waiting.iter().position(|call| call.0 == serial) {
            let (_, unit, property) = waiting.swap_remove(at);
            units
                .get_mut(unit)
                .and_then(|unit| unit.set(property, value))
                .with_context(|| format!("malformed {property}"))?;
        }
    }
    Ok(units)
}

impl Unit {
    /// Takes in a property, as the variant that it comes in.
    fn set(&mut self, property: &str, mut value: Reader) -> Option<()> {
        match (property, value.signature()?) {
            ("LoadState", "s") => self.load_state = value.string()?,
            ("ActiveState", "s") => self.active_state = value.string()?,
            ("Result", "s") => self.result = value.string()?,
            ("StatusText", "s") => self.status_text = value.string()?,
            ("FragmentPath", "s") => self.fragment_path = value.string()?,
            ("DropInPaths", "as") => self.drop_in_paths = value.array(4, Reader::string)?,
            ("NeedDaemonReload", "b") => self.need_daemon_reload = value.number()? != 0,
            ("ConditionResult", "b") => self.conditions_held = value.number()? != 0,
            ("ConditionTimestamp", "t") => self.tested = value.take(8, 8)? != [0; 8],
            ("BindPaths", "a(ssbt)") => {
                self.binds_over = value.array(8, |bind| {
                    let (_source, destination) = (bind.string()?, bind.string()?);
                    let (_optional, _flags) = (bind.number()?, bind.take(8, 8)?);
                    Some(destination)
                })?;
            }
            ("Conditions", "a(sbbsi)") => {
                let conditions = value.array(8, |condition| {
                    let kind = condition.string()?;
                    let one_of = condition.number()? != 0;
                    let pipe = if one_of { "|" } else { "" };
                    let not = if condition.number()? != 0 { "!" } else { "" };
                    let text = format!("{kind}={pipe}{not}{}", condition.string()?);
                    Some((one_of, condition.number()? as i32, text))
                })?;
                let one_held = conditions.iter().any(|c| c.0 && c.1 > 0);
                let condition = |(one_of, state, text): (bool, i32, String)| Condition {
                    text,
                    failed: state < 0 && !(one_of && one_held),
                };
                self.conditions = conditions.into_iter().map(condition).collect();
            }
            _ => return None,
        }
        Some(())
    }
}

/// The path of a unit's object, escaped as sd_bus_path_encode(3) has it.
fn object_path(name: &str) -> String {
    let mut path = "/org/freedesktop/systemd1/unit/".to_owned();
    for (i, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (i > 0 && byte.is_ascii_digit()) {
            path.push(byte.into());
        } else {
            path.push_str(&format!("_{byte:02x}"));
        }
    }
    path
}

/// A method call with strings for arguments, as the D-Bus Specification has messages. `target` is
/// the object's path, the interface, the method and the destination.
fn call(serial: u32, target: [&str; 4], arguments: &[&str]) -> Vec<u8> {
    fn pad(to: &mut Vec<u8>, align: usize) {
        to.resize(to.len().next_multiple_of(align), 0);
    }
    fn string(to: &mut Vec<u8>, text: &str) {
        pad(to, 4);
        to.extend((text.len() as u32).to_le_bytes());
        to.extend(text.bytes().chain([0]));
    }
    let mut body = Vec::new();
    arguments.iter().for_each(|text| string(&mut body, text));
    let signature = "s".repeat(arguments.len());
    let mut fields = vec![8, 1, b'g', 0, signature.len() as u8];
    fields.extend(signature.bytes().chain([0]));
    for (code, text) in [1, 2, 3, 6].into_iter().zip(target) {
        pad(&mut fields, 8);
        fields.extend([code, 1, if code == 1 { b'o' } else { b's' }, 0]);
        string(&mut fields, text);
    }
    let mut message = vec![b'l', 1, 0, 1];
    for number in [body.len() as u32, serial, fields.len() as u32] {
        message.extend(number.to_le_bytes());
    }
    message.extend(fields);
    pad(&mut message, 8);
    message.extend(body);
    message
}

/// Reads a whole message.
fn receive(input: &mut impl Read) -> anyhow::Result<Vec<u8>> {
    let mut head = [0; 16];
    input.read_exact(&mut head)?;
    let [order, _, _, version, b0, b1, b2, b3, _, _, _, _, f0, f1, f2, f3] = head;
    ensure!((order, version) == (b'l', 1), "not D-Bus, little endian");
    let body = u32::from_le_bytes([b0, b1, b2, b3]);
    let fields = u32::from_le_bytes([f0, f1, f2, f3]);
    ensure!(body.max(fields) <= LIMIT, "message of more than 1 MiB");
    let mut rest = vec![0; (fields.next_multiple_of(8) + body) as usize];
    input.read_exact(&mut rest)?;
    Ok([head.as_slice(), &rest].concat())
}

/// The serial that a message replies to, 0 if none, and what it holds or the error that it is.
fn parse(bytes: &[u8]) -> Option<(u32, anyhow::Result<Reader<'_>>)> {
    let (mut serial, mut error) = (0, String::new());
    let mut body = Reader { bytes, at: 12 };
    body.array(8, |field| {
        match (field.take(1, 1)?, field.signature()?) {
            ([4], "s") => error = field.string()?,
            ([5], "u") => serial = field.number()?,
            (_, "u") => drop(field.number()?),
            (_, "s" | "o") => drop(field.string()?),
            (_, "g") => drop(field.signature()?),
            _ => return None,
        }
        Some(())
    })?;
    body.take(8, 0)?;
    if bytes.get(1) != Some(&3) {
        return Some((serial, Ok(body)));
    }
    let text = body.string().unwrap_or_default();
    Some((serial, Err(anyhow!("{error}: {text}"))))
}

/// Reads values out of a message, each aligned as its type is.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, align: usize, length: usize) -> Option<&'a [u8]> {
        let start = self.at.next_multiple_of(align);
        self.at = start.checked_add(length)?;
        self.bytes.get(start..self.at)
    }

    fn number(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4, 4)?.try_into().ok()?))
    }

    fn text(&mut self, length: usize) -> Option<&'a str> {
        let text = self.take(1, length)?;
        self.take(1, 1)?;
        std::str::from_utf8(text).ok()
    }

    fn string(&mut self) -> Option<String> {
        let length = self.number()? as usize;
        self.text(length).map(str::to_owned)
    }

    fn signature(&mut self) -> Option<&'a str> {
        let length = *self.take(1, 1)?.first()?;
        self.text(length.into())
    }

    fn array<T>(
        &mut self,
        align: usize,
        mut item: impl FnMut(&mut Self) -> Option<T>,
    ) -> Option<Vec<T>> {
        let length = self.number()? as usize;
        self.take(align, 0)?;
        let end = self.at.checked_add(length)?;
        let mut items = Vec::new();
        while self.at < end {
            self.take(align, 0)?;
            items.push(item(self)?);
        }
        (self.at == end).then_some(items)
    }
}

/// Reads until a deadline, however little comes at a time.
struct Timed<'a>(&'a UnixStream, Instant);

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.1.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(ErrorKind::WouldBlock.into()),
            left => Ok(Some(left)),
        }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.set_read_timeout(self.left()?)?;
        self.0.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// As systemd 262 answers on its own socket.
    const CONDITIONS: &[u8] = b"l\x02\x01\x01\x78\0\0\0\x06\0\0\0\x37\0\0\0\x05\x01u\0\x09\0\0\0\
        \x07\x01s\0\x18\0\0\0org.freedesktop.systemd1\0\0\0\0\0\0\0\0\x08\x01g\0\x01v\0\0\
        \x08a(sbbsi)\0\0\0\x68\0\0\0\
        \x13\0\0\0ConditionPathExists\0\x01\0\0\0\x01\0\0\0\x04\0\0\0/etc\0\0\0\0\xff\xff\xff\xff\
        \x13\0\0\0ConditionPathExists\0\x01\0\0\0\0\0\0\0\x0c\0\0\0/nonexistent\0\0\0\0\xff\xff\xff\xff";

    /// What comes of asking one who lets us in and then says this, again and again.
    fn asked(said: Vec<u8>) -> anyhow::Result<Vec<Unit>> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            theirs.write_all(b"DATA\r\nOK 0123\r\n").unwrap();
            while !said.is_empty() && theirs.write_all(&said).is_ok() {}
            theirs.read_to_end(&mut Vec::new())
        });
        let deadline = Instant::now() + Duration::from_millis(200);
        ask(Timed(&ours, deadline), true, &["a.target"])
    }

    fn message(kind: u8, reply_to: u8, body: &[u8]) -> Vec<u8> {
        let sizes = [body.len() as u8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0];
        let fields = [5, 1, b'u', 0, reply_to, 0, 0, 0];
        [b"l", [kind, 0, 1].as_slice(), &sizes, &fields, body].concat()
    }

    #[test]
    fn names_become_paths_as_systemd_escapes_them() {
        let path = |name| object_path(name).split_off("/org/freedesktop/systemd1/unit/".len());
        assert_eq!(path("a-B9.service"), "a_2dB9_2eservice");
        assert_eq!(path("9@\u{e9}_"), "_39_40_c3_a9_5f");
    }

    #[test]
    fn a_call_is_marshalled() {
        let expected = b"l\x01\0\x01\x0f\0\0\0\x07\0\0\0\x42\0\0\0\
            \x08\x01g\0\x02ss\0\x01\x01o\0\x02\0\0\0/p\0\0\0\0\0\0\x02\x01s\0\x03\0\0\0i.f\0\0\0\0\0\
            \x03\x01s\0\x01\0\0\0M\0\0\0\0\0\0\0\x06\x01s\0\x01\0\0\0d\0\0\0\0\0\0\0\
            \x02\0\0\0ab\0\0\x02\0\0\0cd\0";
        assert_eq!(call(7, ["/p", "i.f", "M", "d"], &["ab", "cd"]), expected);
    }

    #[test]
    fn replies_count_by_their_serial() {
        let said = [
            message(4, 0, b"a signal"),
            message(2, 6, b"\x01b\0\0\x01\0\0\0"),
            message(2, 8, b"\x01t\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"),
            message(2, 7, b"\x01b\0\0\0\0\0\0"),
            message(2, 5, b"\x02as\0\x07\0\0\0\x02\0\0\0/d\0"),
            message(2, 4, b"\x01s\0\0\x02\0\0\0/f\0"),
            message(2, 3, b"\x01s\0\0\x06\0\0\0active\0"),
            message(2, 2, b"\x01s\0\0\x06\0\0\0loaded\0"),
            CONDITIONS.to_vec(),
        ];
        let unit = Unit {
            load_state: "loaded".into(),
            active_state: "active".into(),
            fragment_path: "/f".into(),
            drop_in_paths: vec!["/d".into()],
            need_daemon_reload: true,
            tested: true,
            conditions: [
                "ConditionPathExists=|!/etc",
                "ConditionPathExists=|/nonexistent",
            ]
            .map(|text| Condition {
                text: text.to_owned(),
                failed: true,
            })
            .to_vec(),
            ..Unit::default()
        };
        assert_eq!(asked(said.concat()).unwrap(), [unit]);
        let refusal = asked(message(3, 1, b"\x02\0\0\0no\0")).unwrap_err();
        assert_eq!(refusal.to_string(), ": no");
    }

    #[test]
    fn silence_and_endless_talk_end_at_the_deadline() {
        for said in [Vec::new(), message(4, 0, b"a signal")] {
            let error = asked(said).unwrap_err().downcast::<io::Error>().unwrap();
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn malformed_messages_are_errors() {
        let read = |mut bytes: &[u8]| {
            let message = receive(&mut bytes)?;
            let (_, value) = parse(&message).context("message")?;
            let mut unit = Unit::default();
            unit.set("Conditions", value?).context("value")
        };
        assert!(read(CONDITIONS).is_ok());
        for end in 0..CONDITIONS.len() {
            assert!(read(&CONDITIONS[..end]).is_err(), "{end} bytes");
        }
        assert!(read(&[b"B", &CONDITIONS[1..]].concat()).is_err());
        let mut random = 1u64;
        for _ in 0..20_000 {
            let mut bytes = CONDITIONS.to_vec();
            for _ in 0..2 {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let place = (random >> 40) as usize % bytes.len();
                bytes[place] ^= (random >> 32) as u8;
            }
            // Some are well-formed still; none may panic.
            let _ = read(&bytes);
        }
    }
}
