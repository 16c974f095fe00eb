//! Boots images of distros as WSL would, in the simulated VM: `cargo run -p wsl-vm -- --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    wsl_vm::images::main(std::env::args_os().collect())
}
