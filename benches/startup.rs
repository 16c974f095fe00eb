//! What a run of the generator costs, beside those that come with systemd and Debian, the same
//! files written by a shell script, and a Rust program that does nothing, which is the floor: built,
//! linked and stripped as the Debian package has ours. In a tree of Debian 13, each round runs all
//! of them, twice in a row, of which the second counts; times are what they use of a processor,
//! medians over all rounds. `cargo bench --bench startup`.

#[allow(dead_code)] // Each user needs a part of it.
#[path = "../tests/ours/mod.rs"]
mod ours;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{ensure, Context};
use nix::sys::resource::{getrusage, UsageWho};
use nix::sys::time::TimeValLike;
use wsl_vm::{enter_tree, Machine};

use ours::built_package::DebianPackage;

const PROJECT: &str = env!("CARGO_MANIFEST_DIR");
const ROUNDS: usize = 500;
const TOOLS: &str = "binutils,systemd,systemd-zram-generator,strace,time,valgrind";
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
    let named = |(name, file)| Subject { name, path: format!("/mnt/{file}") };
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

const FLOOR: &str = "empty Rust program";
const OURS: &str = "wsl-binfmt-generator";
const GETTY: &str = "systemd-getty-generator";
const DEBUG: &str = "systemd-debug-generator";
const ZRAM: &str = "zram-generator";

/// What is wanted of ours: no more than so many times another's time.
const GOALS: [(&str, Setting, f64); 2] =
    [(FLOOR, Setting::Native, 1.05), (FLOOR, Setting::Wsl, 1.4)];
/// And so many times the floor's size.
const SIZE_GOAL: f64 = 2.0;

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

/// Builds the floor where the package was built, by the same script, with the same profile and
/// what `debian/rules` adds to it; strips it as debhelper does.
fn build_floor(package: &DebianPackage) -> anyhow::Result<PathBuf> {
    let manifest = fs::read_to_string(Path::new(PROJECT).join("Cargo.toml"))?;
    let (_, profile) = manifest
        .split_once("[profile.release]\n")
        .context("no profile of releases in Cargo.toml")?;
    let (profile, _) = profile.split_once("\n\n").unwrap_or((profile, ""));
    let floor = package.tree.join("build/floor");
    fs::create_dir_all(floor.join("src"))?;
    // The script looks for a program of this name.
    let manifest = format!(
        "[package]\nname = \"{OURS}\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n\
         [profile.release]\n{profile}\n"
    );
    fs::write(floor.join("Cargo.toml"), manifest)?;
    fs::write(floor.join("src/main.rs"), "fn main() {}\n")?;
    package.run(
        r#"
        project=$(echo /build/wsl-binfmt-generator-*/)
        eval "$(dpkg-buildflags --export=sh)"
        eval "$(sed -n 's/^export \(CARGO_PROFILE[A-Z_]*\) = /export \1=/p' "$project/debian/rules")"
        export CARGO_HOME=$project/debian/cargo
        cd /build/floor
        cargo generate-lockfile --offline
        sh "$project/build-aux/cargo-build.sh" cargo release . "$PWD/target" floor.full floor.d
        strip --remove-section=.comment --remove-section=.note -o floor floor.full"#,
    )?;
    Ok(floor.join("floor"))
}

/// What is brought into the tree.
fn lay_out(bench: &Path, package: &Path, floor: &Path, of_the_vm: &Path) -> anyhow::Result<()> {
    fs::copy(floor, bench.join("floor"))?;
    fs::copy(of_the_vm, bench.join("static"))?;
    for (case, name) in [("01-wsl2", "wsl"), ("20-native-linux", "native")] {
        let from = Path::new(PROJECT).join("tests/generate").join(case).join("root");
        run(Command::new("cp").arg("-r").args([&from, &bench.join(name)]))?;
    }
    for deb in fs::read_dir(package)? {
        let unpacked = bench.join("package");
        run(Command::new("dpkg-deb").arg("-x").args([&deb?.path(), &unpacked]))?;
        let program = unpacked.join(&GENERATORS[1..]).join(OURS);
        fs::copy(program, bench.join(OURS))?;
    }
    Ok(())
}

/// What is made or found in the tree.
fn finish() -> anyhow::Result<()> {
    run(Command::new("strip").arg("/mnt/static"))?;
    for name in [GETTY, DEBUG, ZRAM] {
        fs::copy(Path::new(GENERATORS).join(name), Path::new("/mnt").join(name))?;
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

/// What all children so far, and theirs, have used of a processor, in or for them: the time they
/// take on a machine that does nothing else, whatever this one does.
fn processor_time() -> anyhow::Result<Duration> {
    let used = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let times = [used.user_time(), used.system_time()];
    let micros = times.map(|time| time.num_microseconds().unsigned_abs());
    Ok(Duration::from_micros(micros.iter().sum()))
}

/// The median time of each.
fn times(subjects: &[Subject], setting: Setting) -> anyhow::Result<Vec<Duration>> {
    let mut times = vec![Vec::new(); subjects.len()];
    for _ in 0..ROUNDS {
        for (subject, times) in subjects.iter().zip(&mut times) {
            // Not the first, which finds the processor's caches as another one has left them.
            for is_timed in [false, true] {
                empty_output()?;
                let mut command = arguments(Command::new(&subject.path), setting);
                let before = processor_time()?;
                let status = command.status()?;
                let used = processor_time()? - before;
                times.extend(is_timed.then_some(used));
                ensure!(status.success(), "{}: {status}", subject.name);
            }
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
    strace.args(["-f", "-c", "-U", "calls,name", "-o", "/mnt/log", &subject.path]);
    run(&mut arguments(strace, setting))?;
    let log = fs::read_to_string("/mnt/log")?;
    let total = log.lines().find(|line| line.ends_with(" total"));
    let total = total.with_context(|| format!("what did strace say? {log}"))?;
    Ok(total.split_whitespace().next().context("no count")?.parse()?)
}

/// Resident at most, in KiB, and page faults. What is less than time(1) itself needs is not seen.
fn memory(subject: &Subject, setting: Setting) -> anyhow::Result<(u64, u64)> {
    empty_output()?;
    let mut time = Command::new("time");
    time.args(["-f", "%M %R", "-o", "/mnt/log", &subject.path]);
    run(&mut arguments(time, setting))?;
    let log = fs::read_to_string("/mnt/log")?;
    let (memory, faults) = log.trim().split_once(' ').context("two numbers")?;
    Ok((memory.parse()?, faults.parse()?))
}

/// Places that the loader fills in before it starts, and those for which it looks up a name.
fn relocations(program: &str) -> anyhow::Result<(usize, usize)> {
    let listed = Command::new("readelf").args(["-rW", program]).output()?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let count = |kinds: &[&str]| {
        let is_one = |line: &&str| kinds.iter().any(|kind| line.contains(kind));
        listed.lines().filter(is_one).count()
    };
    Ok((count(&["_RELATIVE"]), count(&["_GLOB_DAT", "_JUMP_SLO", "_64 ", "_ABS64 "])))
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
    let symbols = Command::new("nm").args(["-S", "-t", "d", program]).output()?;
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
        ("rust-ini", &["3ini", "ordered_multimap", "dlv_list", "hashbrown"]),
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
        "Processor time, medians of {ROUNDS} runs, as multiples of the first line, which takes \
         {:.0?}; the rest in a WSL2 distro.\n",
        native[0]
    );
    println!(
        "| | in WSL2 | elsewhere | instructions | system calls | page faults | peak memory | size |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let ratio = |times: &[Duration], at: usize| times[at].as_secs_f64() / times[0].as_secs_f64();
    for (at, subject) in subjects.iter().enumerate() {
        let (wsl, native) = (ratio(&wsl, at), ratio(&native, at));
        let instructions = match instructions(subject, Setting::Wsl)? {
            Some(count) => format!("{} k", count / 1000),
            None => "-".to_owned(),
        };
        let (memory, faults) = memory(subject, Setting::Wsl)?;
        println!(
            "| {} | {wsl:.2} | {native:.2} | {instructions} | {} | {faults} | {:.1} MB | {} kB |",
            subject.name,
            system_calls(subject, Setting::Wsl)?,
            memory as f64 * 1.024 / 1000.0,
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
    let size = |at: usize| fs::metadata(&subjects[at].path).map(|file| file.len());
    let (size, floor) = (size(ours)?, size(0)?);
    let is = size as f64 / floor as f64;
    let verdict = if is <= SIZE_GOAL { "met" } else { "missed" };
    println!("{verdict:6}  {is:5.2} x its size: {size} of {floor} bytes; wanted {SIZE_GOAL:.2}");

    println!("\nFor the loader to fill in, and of these to look up by name:");
    for subject in [&subjects[0], &subjects[ours]] {
        let (relative, named) = relocations(&subject.path)?;
        println!("{:25}{:5} {named:5}", subject.name, relative + named);
    }
    Ok(())
}

fn bench() -> anyhow::Result<()> {
    if let Some(lack) = Machine::lacks() {
        anyhow::bail!(lack);
    }
    let shares = shares()?;
    ours::prepare(&["trixie"], &[])?;
    let package = DebianPackage::built()?;
    let floor = build_floor(&package)?;
    let package = package.directory.join("package");
    enter_tree("trixie", TOOLS, |root| lay_out(root, &package, &floor, &ours::program()?))?;
    finish()?;
    print()?;

    let code: u64 = shares.iter().map(|(_, size)| size).sum();
    let share = |(name, size): &(String, u64)| format!("{name} {} %", size * 100 / code);
    let shares: Vec<_> = shares.iter().map(share).collect();
    println!("\nIts machine code, {} kB: {}", code / 1000, shares.join(", "));
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
