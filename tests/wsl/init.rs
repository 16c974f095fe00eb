//! The stand-in for WSL's `/init`: prints what it was called with, as proof that the kernel
//! handed a Windows program to it. Like that, it fails without a word if it gets no more than the
//! program's path, as from an entry without `P` for a program without arguments. A copy with
//! `\nNAME ` and a word at its end prints that word, which shows what file an entry with `F` runs.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

fn main() {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let word = word();
    if word.is_none() && arguments.len() < 2 {
        std::process::exit(1);
    }
    let word = word.unwrap_or("INTEROP".to_owned());
    let _ = writeln!(std::io::stdout(), "{word} {arguments:?}");
}

/// The word at the end of this program's file.
fn word() -> Option<String> {
    let mut file = File::open("/proc/self/exe").ok()?;
    file.seek(SeekFrom::End(-32)).ok()?;
    let mut end = Vec::new();
    file.read_to_end(&mut end).ok()?;
    let end = String::from_utf8_lossy(&end);
    Some(end.rsplit_once("\nNAME ")?.1.to_owned())
}
