//! What says it is systemd: any bytes, in any order, and no memory without bounds; and replies
//! marshalled here, which must come out as they went in.

#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{sync_channel, SyncSender};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::{SigSet, Signal};
use wsl_binfmt_generator_fuzz::systemd::{units, Condition, Unit};

const GREETING: &[u8] = b"DATA\r\nOK 0123\r\n";
/// Much more than a message may have, and much less than a length may say.
const MEMORY: u64 = 1 << 30;

fuzz_target!(init: { start(); }, |data: &[u8]| {
    if let Some(data) = data.strip_prefix(b"\0") {
        let _ = well_formed(&mut Unstructured::new(data));
    } else {
        let _ = asked(data.to_vec());
    }
});

static SOCKET: OnceLock<(Utf8PathBuf, SyncSender<Vec<u8>>)> = OnceLock::new();

/// Answers whoever asks at a socket with what it is told.
fn start() {
    setrlimit(Resource::RLIMIT_AS, MEMORY, MEMORY).unwrap();
    // Some hang up before all is said.
    SigSet::from_iter([Signal::SIGPIPE]).thread_block().unwrap();
    let directory = Utf8PathBuf::try_from(std::env::temp_dir()).unwrap();
    let path = directory.join(format!("wsl-binfmt-fuzz.{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let (say, said) = sync_channel::<Vec<u8>>(1);
    thread::spawn(move || {
        for said in said {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(&said);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    SOCKET.set((path, say)).unwrap();
}

fn asked(said: Vec<u8>) -> anyhow::Result<Vec<Unit>> {
    let (path, say) = SOCKET.get().unwrap();
    say.send(said).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    let result = units(Utf8Path::new(path), false, &["a.service"], deadline);
    // Whatever is said, it is over when nothing more is.
    let late = |error: &anyhow::Error| format!("{error:#}").contains("in time");
    assert!(!result.as_ref().is_err_and(late), "{result:?}");
    result
}

/// Marshals values, as the D-Bus Specification has it.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn align(&mut self, to: usize) -> &mut Self {
        while self.0.len() % to != 0 {
            self.0.push(0);
        }
        self
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn number(&mut self, number: u32) -> &mut Self {
        self.align(4).bytes(&number.to_le_bytes())
    }

    fn string(&mut self, text: &str) -> &mut Self {
        self.number(text.len() as u32)
            .bytes(text.as_bytes())
            .bytes(b"\0")
    }

    fn signature(&mut self, text: &str) -> &mut Self {
        self.bytes(&[text.len() as u8])
            .bytes(text.as_bytes())
            .bytes(b"\0")
    }

    fn array(&mut self, align: usize, length: usize, mut item: impl FnMut(&mut Self, usize)) {
        let place = self.number(0).0.len() - 4;
        let start = self.align(align).0.len();
        for i in 0..length {
            self.align(align);
            item(self, i);
        }
        let length = (self.0.len() - start) as u32;
        self.0[place..place + 4].copy_from_slice(&length.to_le_bytes());
    }
}

/// A message of that type with a variant in it.
fn message(kind: u8, reply_to: u32, sender: &str, body: &[u8]) -> Vec<u8> {
    let mut message = Message(vec![b'l', kind, 1, 1]);
    message.number(body.len() as u32).number(77);
    let reply_to = |m: &mut Message| {
        m.bytes(&[5]).signature("u").number(reply_to);
    };
    let sender = |m: &mut Message| {
        m.bytes(&[7]).signature("s").string(sender);
    };
    let variant = |m: &mut Message| {
        m.bytes(&[8]).signature("g").signature("v");
    };
    message.array(8, 3, |m, i| match i {
        0 => reply_to(m),
        1 => sender(m),
        _ => variant(m),
    });
    message.align(8).bytes(body);
    message.0
}

fn well_formed(data: &mut Unstructured) -> Result<()> {
    let mut unit = Unit {
        load_state: data.arbitrary()?,
        active_state: data.arbitrary()?,
        result: data.arbitrary()?,
        fragment_path: data.arbitrary()?,
        drop_in_paths: data.arbitrary()?,
        need_daemon_reload: data.arbitrary()?,
        tested: data.arbitrary()?,
        conditions_held: data.arbitrary()?,
        binds_over: data.arbitrary()?,
        status_text: data.arbitrary()?,
        ..Unit::default()
    };
    type Tested = (String, bool, bool, String, i32);
    let conditions: Vec<Tested> = data.arbitrary()?;
    let one_held = conditions.iter().any(|c| c.1 && c.4 > 0);
    for (kind, one_of, negated, argument, state) in &conditions {
        let signs = format!(
            "{}{}",
            if *one_of { "|" } else { "" },
            if *negated { "!" } else { "" }
        );
        unit.conditions.push(Condition {
            text: format!("{kind}={signs}{argument}"),
            failed: *state < 0 && !(*one_of && one_held),
        });
    }

    // In the order in which it asks for them.
    let strings = |m: &mut Message, texts: &[String]| {
        m.signature("as").array(4, texts.len(), |m, i| {
            m.string(&texts[i]);
        });
    };
    let mut replies = Vec::new();
    let sender: String = data.arbitrary()?;
    for property in 0..11 {
        let mut body = Message::default();
        match property {
            0 => drop(body.signature("s").string(&unit.load_state)),
            1 => drop(body.signature("s").string(&unit.active_state)),
            2 => drop(body.signature("s").string(&unit.fragment_path)),
            3 => strings(&mut body, &unit.drop_in_paths),
            4 => drop(body.signature("b").number(unit.need_daemon_reload.into())),
            5 => drop(body.signature("b").number(unit.conditions_held.into())),
            6 => drop(
                body.signature("t")
                    .align(8)
                    .bytes(&(u64::from(unit.tested) << 40).to_le_bytes()),
            ),
            7 => body
                .signature("a(sbbsi)")
                .array(8, conditions.len(), |m, i| {
                    let (kind, one_of, negated, argument, state) = &conditions[i];
                    m.string(kind)
                        .number((*one_of).into())
                        .number((*negated).into());
                    m.string(argument).number(*state as u32);
                }),
            8 => drop(body.signature("s").string(&unit.result)),
            9 => body
                .signature("a(ssbt)")
                .array(8, unit.binds_over.len(), |m, i| {
                    m.string("/dev/null").string(&unit.binds_over[i]);
                    m.number(1).align(8).bytes(&[0; 8]);
                }),
            _ => drop(body.signature("s").string(&unit.status_text)),
        }
        replies.push(message(2, property + 2, &sender, &body.0));
    }
    // They may come in any order, and with something between them.
    let mut wrong = replies.clone();
    let mut said = GREETING.to_vec();
    let mut needed = 0;
    while !replies.is_empty() {
        let next = data.int_in_range(0..=replies.len() - 1)?;
        said.extend(replies.remove(next));
        needed = said.len();
        if data.arbitrary()? {
            said.extend(message(4, data.int_in_range(90..=99)?, "x", b"a signal"));
        }
    }
    assert_eq!(asked(said.clone()).unwrap(), [unit.clone()]);
    if data.arbitrary()? {
        said.truncate(data.int_in_range(0..=needed - 1)?);
        assert!(asked(said).is_err());
    }
    // An array that ends within its last item.
    if !unit.drop_in_paths.is_empty() {
        let mut body = Message::default();
        strings(&mut body, &unit.drop_in_paths);
        let length = u32::from_le_bytes(body.0[4..8].try_into().unwrap()) - 1;
        body.0[4..8].copy_from_slice(&length.to_le_bytes());
        wrong[3] = message(2, 5, &sender, &body.0);
        assert!(asked([GREETING, &wrong.concat()].concat()).is_err());
    }
    Ok(())
}
