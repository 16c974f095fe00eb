//! The stand-in for WSL's `/init`: prints what it was called with, as proof that the kernel
//! handed a Windows program to it.

use std::io::Write;

fn main() {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let _ = writeln!(std::io::stdout(), "INTEROP {arguments:?}");
}
