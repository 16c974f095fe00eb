//! What a run of the generator costs, beside those that come with systemd and Debian, the same
//! files written by a shell script, and a C program that does nothing, which is the floor. In a
//! tree of Debian 13, each round runs all of them in turn, so that whatever else the machine does
//! hits all alike; times are medians over all rounds. `cargo bench --bench startup`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use wsl_vm::{enter_tree, DebianPackage, Machine};

const ROUNDS: usize = 1000;
const TOOLS: &str = "systemd,systemd-zram-generator,gcc,libc6-dev,strace,time,valgrind";
/// What systemd tells its generators, and where the few files are that are read.
const WSL: [(&str, &str); 3] = [
    ("SYSTEMD_SCOPE", "system"),
    ("SYSTEMD_VIRTUALIZATION", "container:wsl"),
    ("WSL_BINFMT_ROOT", "/mnt/wsl"),
];
const NATIVE: [(&str, &str); 3] = [
    ("SYSTEMD_SCOPE", "system"),
    ("SYSTEMD_VIRTUALIZATION", "vm:kvm"),
    ("WSL_BINFMT_ROOT", "/mnt/native"),
];
/// Where generators write.
const OUTPUT: &str = "/run/output";
const GENERATORS: &str = "/usr/lib/systemd/system-generators";

/// A program to be measured.
struct Subject {
    name: &'static str,
    path: String,
}

/// All of them lie side by side, on the same file system.
fn subjects() -> Vec<Subject> {
    let named = |(name, file)| Subject {
        name,
        path: format!("/mnt/{file}"),
    };
    let subjects = [
        (FLOOR, "floor"),
        (OURS, OURS),
        ("the same, linked static", "static"),
        ("the same in shell", "emit.sh"),
        (GETTY, GETTY),
        (DEBUG, DEBUG),
        (ZRAM, ZRAM),
    ];
    subjects.map(named).into()
}

const FLOOR: &str = "empty C program, static";
const OURS: &str = "wsl-binfmt-generator";
const GETTY: &str = "systemd-getty-generator";
const DEBUG: &str = "systemd-debug-generator";
const ZRAM: &str = "zram-generator";

/// What is wanted of ours: no more than so many times another's time.
const GOALS: [(&str, Setting, f64); 6] = [
    (FLOOR, Setting::Wsl, 2.0),
    (FLOOR, Setting::Native, 1.3),
    (GETTY, Setting::Wsl, 0.2),
    (GETTY, Setting::Native, 0.2),
    (ZRAM, Setting::Wsl, 1.0 / 6.0),
    (ZRAM, Setting::Native, 1.0 / 6.0),
];
/// Bytes.
const SIZE_GOAL: u64 = 500 << 10;

#[derive(Clone, Copy, PartialEq)]
enum Setting {
    Wsl,
    Native,
}

impl Setting {
    fn environment(self) -> [(&'static str, &'static str); 3] {
        match self {
            Setting::Wsl => WSL,
            Setting::Native => NATIVE,
        }
    }
}

/// What is brought into the tree.
fn lay_out(bench: &Path, package: &Path, of_the_vm: &Path) -> anyhow::Result<()> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::copy(project.join("benches/floor.c"), bench.join("floor.c"))?;
    fs::copy(of_the_vm, bench.join("static"))?;
    for (case, name) in [("01-wsl2", "wsl"), ("20-native-linux", "native")] {
        let from = project.join("tests/generate").join(case).join("root");
        run(Command::new("cp")
            .arg("-r")
            .args([&from, &bench.join(name)]))?;
    }
    for deb in fs::read_dir(package)? {
        let unpacked = bench.join("package");
        run(Command::new("dpkg-deb")
            .arg("-x")
            .args([&deb?.path(), &unpacked]))?;
        let program = unpacked.join(&GENERATORS[1..]).join(OURS);
        fs::copy(program, bench.join(OURS))?;
    }
    Ok(())
}

/// What is made or found in the tree.
fn finish() -> anyhow::Result<()> {
    run(Command::new("gcc").args(["-O2", "-static", "-o", "/mnt/floor", "/mnt/floor.c"]))?;
    run(Command::new("strip").args(["/mnt/floor", "/mnt/static"]))?;
    for name in [GETTY, DEBUG, ZRAM] {
        fs::copy(
            Path::new(GENERATORS).join(name),
            Path::new("/mnt").join(name),
        )?;
    }
    empty_output()?;
    let ours = Command::new(Path::new("/mnt").join(OURS));
    run(&mut arguments(ours, Setting::Wsl))?;
    fs::write("/mnt/emit.sh", script()?)?;
    run(Command::new("chmod").args(["755", "/mnt/emit.sh"]))?;
    run(Command::new("cp").args(["-a", OUTPUT, "/mnt/wanted"]))?;
    empty_output()?;
    let shell = Command::new("/mnt/emit.sh");
    run(&mut arguments(shell, Setting::Wsl))?;
    run(Command::new("diff").args(["-r", "--no-dereference", "/mnt/wanted", OUTPUT]))
}

/// What ours has just written, as a shell script that writes the same.
fn script() -> anyhow::Result<String> {
    let mut script = String::from(
        "#!/bin/sh\n\
         case $SYSTEMD_VIRTUALIZATION in vm:* | container:[!w]*) exit ;; esac\n\
         read -r release <\"$WSL_BINFMT_ROOT/proc/sys/kernel/osrelease\"\n\
         case $release in *WSL2*) ;; *) exit ;; esac\n",
    );
    for path in written()? {
        let below = path.strip_prefix(format!("{OUTPUT}/early"))?.display();
        if path.is_dir() {
            script += &format!("mkdir -p \"$2/{below}\"\n");
        } else if path.is_symlink() {
            let target = fs::read_link(&path)?;
            script += &format!("ln -s {} \"$2/{below}\"\n", target.display());
        } else {
            let text = fs::read_to_string(&path)?;
            script += &format!("cat >\"$2/{below}\" <<'END'\n{text}END\n");
        }
    }
    Ok(script)
}

/// All that stands in the middle one of the output directories, directories first.
fn written() -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::from(OUTPUT).join("early")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path.clone());
            }
            found.push(path);
        }
    }
    Ok(found)
}

fn empty_output() -> anyhow::Result<()> {
    // The first time there is none.
    let _ = fs::remove_dir_all(OUTPUT);
    for name in ["normal", "early", "late"] {
        fs::create_dir_all(Path::new(OUTPUT).join(name))?;
    }
    Ok(())
}

/// Called as systemd calls generators.
fn arguments(mut command: Command, setting: Setting) -> Command {
    command
        .args(["normal", "early", "late"].map(|name| format!("{OUTPUT}/{name}")))
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .envs(setting.environment())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// The median time of each.
fn times(subjects: &[Subject], setting: Setting) -> anyhow::Result<Vec<Duration>> {
    let mut times = vec![Vec::new(); subjects.len()];
    for _ in 0..ROUNDS {
        for (subject, times) in subjects.iter().zip(&mut times) {
            empty_output()?;
            let mut command = arguments(Command::new(&subject.path), setting);
            let start = Instant::now();
            let status = command.status()?;
            times.push(start.elapsed());
            ensure!(status.success(), "{}: {status}", subject.name);
        }
    }
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[ROUNDS / 2]
    };
    Ok(times.into_iter().map(median).collect())
}

/// Instructions, by callgrind; none for a script, which is not one program.
fn instructions(subject: &Subject, setting: Setting) -> anyhow::Result<Option<u64>> {
    if subject.path.ends_with(".sh") {
        return Ok(None);
    }
    empty_output()?;
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    valgrind.args(["--log-file=/mnt/log", &subject.path]);
    run(&mut arguments(valgrind, setting))?;
    let log = fs::read_to_string("/mnt/log")?;
    let count = log.lines().find_map(|line| line.split("refs:").nth(1));
    let count = count.with_context(|| format!("what did callgrind say? {log}"))?;
    Ok(Some(count.trim().replace(',', "").parse()?))
}

/// System calls, of all processes.
fn system_calls(subject: &Subject, setting: Setting) -> anyhow::Result<u64> {
    empty_output()?;
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "-c",
        "-U",
        "calls,name",
        "-o",
        "/mnt/log",
        &subject.path,
    ]);
    run(&mut arguments(strace, setting))?;
    let log = fs::read_to_string("/mnt/log")?;
    let total = log.lines().find(|line| line.ends_with(" total"));
    let total = total.with_context(|| format!("what did strace say? {log}"))?;
    Ok(total
        .split_whitespace()
        .next()
        .context("no count")?
        .parse()?)
}

/// Resident at most, in KiB. What is less than time(1) itself needs is not seen.
fn memory(subject: &Subject, setting: Setting) -> anyhow::Result<u64> {
    empty_output()?;
    let mut time = Command::new("time");
    time.args(["-f", "%M", "-o", "/mnt/log", &subject.path]);
    run(&mut arguments(time, setting))?;
    Ok(fs::read_to_string("/mnt/log")?.trim().parse()?)
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// How much of the machine code comes from which crate, largest first: the release build has the
/// names of its functions. What is generic counts for the crate that uses it.
fn shares() -> anyhow::Result<Vec<(String, u64)>> {
    let program = env!("CARGO_BIN_EXE_wsl-binfmt-generator");
    let symbols = Command::new("nm")
        .args(["-S", "-t", "d", program])
        .output()?;
    let mut shares = BTreeMap::new();
    for line in String::from_utf8(symbols.stdout)?.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if let [_, size, "t" | "T", name] = fields[..] {
            let size: u64 = size.parse()?;
            *shares.entry(crate_of(name).to_owned()).or_default() += size;
        }
    }
    let mut shares: Vec<_> = shares.into_iter().collect();
    shares.sort_by_key(|(_, size)| std::cmp::Reverse(*size));
    Ok(shares)
}

fn crate_of(symbol: &str) -> &'static str {
    const CRATES: [(&str, &[&str]); 5] = [
        ("this project", &["wsl_binfmt_generator"]),
        (
            "rust-ini",
            &["3ini", "ordered_multimap", "dlv_list", "hashbrown"],
        ),
        ("anyhow", &["6anyhow"]),
        ("camino", &["6camino"]),
        ("nix", &["3nix"]),
    ];
    let uses = |(_, parts): &&(_, &[&str])| parts.iter().any(|part| symbol.contains(part));
    CRATES.iter().find(uses).map_or("std", |(name, _)| name)
}

fn print() -> anyhow::Result<()> {
    let subjects = subjects();
    let wsl = times(&subjects, Setting::Wsl)?;
    let native = times(&subjects, Setting::Native)?;
    println!(
        "Medians of {ROUNDS} runs, as multiples of the first line, which takes {:.0?}; the rest in \
         a WSL2 distro.\n",
        native[0]
    );
    println!("| | in WSL2 | elsewhere | instructions | system calls | peak memory | size |");
    println!("|---|---|---|---|---|---|---|");
    let ratio = |times: &[Duration], at: usize| times[at].as_secs_f64() / times[0].as_secs_f64();
    for (at, subject) in subjects.iter().enumerate() {
        let (wsl, native) = (ratio(&wsl, at), ratio(&native, at));
        let instructions = match instructions(subject, Setting::Wsl)? {
            Some(count) => format!("{} k", count / 1000),
            None => "-".to_owned(),
        };
        println!(
            "| {} | {wsl:.1} | {native:.1} | {instructions} | {} | {:.1} MB | {} kB |",
            subject.name,
            system_calls(subject, Setting::Wsl)?,
            memory(subject, Setting::Wsl)? as f64 * 1.024 / 1000.0,
            fs::metadata(&subject.path)?.len() / 1000,
        );
    }
    println!();
    for (at, subject) in subjects.iter().enumerate() {
        let bar = "=".repeat((ratio(&wsl, at) * 3.0).round() as usize);
        println!("    {:25}{bar} {:.1}", subject.name, ratio(&wsl, at));
    }

    println!("\nGoals:");
    let at = |name| subjects.iter().position(|s| s.name == name).context(name);
    let ours = at(OURS)?;
    for (name, setting, goal) in GOALS {
        let (times, place) = match setting {
            Setting::Wsl => (&wsl, "in WSL2"),
            Setting::Native => (&native, "elsewhere"),
        };
        let is = times[ours].as_secs_f64() / times[at(name)?].as_secs_f64();
        let verdict = if is <= goal { "met" } else { "missed" };
        println!("{verdict:6}  {is:5.2} x {name}, {place}; wanted {goal:.2}");
    }
    let size = fs::metadata(&subjects[ours].path)?.len();
    let verdict = if size <= SIZE_GOAL { "met" } else { "missed" };
    println!("{verdict:6}  {size} bytes installed; wanted {SIZE_GOAL}");
    Ok(())
}

fn bench() -> anyhow::Result<()> {
    if let Some(lack) = Machine::lacks() {
        anyhow::bail!(lack);
    }
    let shares = shares()?;
    let machine = Machine::prepare(&["trixie"])?;
    let package = DebianPackage::built()?.directory.join("package");
    enter_tree("trixie", TOOLS, |root| {
        lay_out(root, &package, &machine.generator())
    })?;
    finish()?;
    print()?;

    let code: u64 = shares.iter().map(|(_, size)| size).sum();
    let share = |(name, size): &(String, u64)| format!("{name} {} %", size * 100 / code);
    let shares: Vec<_> = shares.iter().map(share).collect();
    println!(
        "\nIts machine code, {} kB: {}",
        code / 1000,
        shares.join(", ")
    );
    Ok(())
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
