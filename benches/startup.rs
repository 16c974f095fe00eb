//! What the generator costs at boot and at every daemon-reload, as a multiple of starting
//! true(1): `cargo bench`. Each round runs all of them in turn, so that whatever else the machine
//! does hits all alike; the medians over all rounds are compared.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 1000;
const GENERATOR: &str = env!("CARGO_BIN_EXE_wsl-binfmt-generator");

struct Subject {
    name: &'static str,
    command: Command,
    times: Vec<Duration>,
}

/// The generator on the machine of a golden tree, with its output below `early`.
fn generator(name: &'static str, case: &str, virtualization: &str, early: &Path) -> Subject {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/generate")
        .join(case)
        .join("root");
    let mut command = Command::new(GENERATOR);
    command.arg(early).env_clear().env("WSL_BINFMT_ROOT", root);
    if !virtualization.is_empty() {
        command.env("SYSTEMD_VIRTUALIZATION", virtualization);
    }
    Subject {
        name,
        command,
        times: Vec::new(),
    }
}

fn main() {
    let early = PathBuf::from("/dev/shm").join(format!("wsl-binfmt-bench-{}", std::process::id()));
    let mut subjects = [
        Subject {
            name: "true(1)",
            command: Command::new("true"),
            times: Vec::new(),
        },
        generator(
            "not WSL, systemd says so",
            "20-native-linux",
            "vm:kvm",
            &early,
        ),
        generator("not WSL, systemd is silent", "20-native-linux", "", &early),
        generator(
            "WSL2, everything written",
            "01-wsl2",
            "container:wsl",
            &early,
        ),
    ];
    for _ in 0..ROUNDS {
        for subject in &mut subjects {
            // Without this, what was written stands in the way of what is to be.
            let _ = fs::remove_dir_all(&early);
            let start = Instant::now();
            let status = subject
                .command
                .stdin(Stdio::null())
                .status()
                .expect("it starts");
            subject.times.push(start.elapsed());
            assert!(status.success(), "{}: {status}", subject.name);
        }
    }
    fs::remove_dir_all(&early).expect("the last one wrote its files");

    let medians = subjects.each_mut().map(|subject| {
        subject.times.sort();
        subject.times[ROUNDS / 2]
    });
    println!("{ROUNDS} rounds, medians:");
    for (subject, median) in subjects.iter().zip(medians) {
        let ratio = median.as_secs_f64() / medians[0].as_secs_f64();
        println!("{:28}{ratio:5.2} x true(1)  ({median:.0?})", subject.name);
    }
}
