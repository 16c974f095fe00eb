//! The program `wsl-vm`: any image under every WSL.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::thread;

use anyhow::{bail, ensure, Context};
use clap::Parser;
use serde_json::{json, Value};

use super::debian::require;
use super::examine::{play, Case, Package, Seen, OCCASIONS};
use super::generation::Generation;
use super::image::{Image, LIMIT};
use super::machine::{directory, succeed, Machine, Needs};
use super::run_stage;

/// Boots images of distros as WSL would, in a simulated WSL VM, and says whether Windows programs
/// start whatever happens.
///
/// An image is not changed. It is run as root of this machine, in namespaces of its own: try only what
/// you would install. Exit status: 0 if Windows
/// programs start on all occasions, the system is running and no unit has failed; 1 if something of
/// that does not hold; 2 if something cannot be tried. With --with, it is the image with the
/// package that counts; as it is, it is for comparison.
#[derive(Parser)]
#[command(name = "wsl-vm")]
struct Arguments {
    /// A .wsl file, a tar archive, plain or compressed, or a directory
    #[arg(required = true)]
    image: Vec<PathBuf>,
    /// Only under the WSL of this version, such as 2.6.3; may be given again
    #[arg(long, value_name = "VERSION")]
    wsl: Vec<String>,
    /// Also with this Debian package's files put in, or this program as a systemd generator
    #[arg(long, value_name = "DEB|BINARY")]
    with: Option<PathBuf>,
    /// Print an array of objects instead of tables
    #[arg(long)]
    json: bool,
    /// Take an image for a bomb if more comes out of it
    #[arg(long, value_name = "BYTES", default_value_t = LIMIT)]
    limit: u64,
}

/// How it went: the worst counts.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
enum Verdict {
    Holds = 0,
    DoesNotHold = 1,
    CannotBeTried = 2,
}

/// The whole of the program.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let stage = run_stage(|vm, arguments| {
        let case = arguments.first().context("play what?")?;
        println!("{}", serde_json::to_string(&play(vm, &serde_json::from_str(case)?)?)?);
        Ok(())
    });
    if let Some(code) = stage {
        return code;
    }
    let verdict = run(&Arguments::parse_from(arguments)).unwrap_or_else(|error| {
        eprintln!("{error:#}");
        Verdict::CannotBeTried
    });
    ExitCode::from(verdict as u8)
}

/// WSL of a version.
#[derive(Clone)]
struct Wsl {
    generation: Generation,
    version: String,
    /// For people.
    name: String,
}

/// WSL of these versions, or of all generations.
fn wsls(versions: &[String]) -> anyhow::Result<Vec<Wsl>> {
    if versions.is_empty() {
        let all = Generation::ALL.map(|generation| Wsl {
            generation,
            version: generation.a_version().to_owned(),
            name: generation.versions().to_owned(),
        });
        return Ok(all.into());
    }
    let wsl = |version: &String| {
        Ok(Wsl {
            generation: Generation::of_version(version)?,
            version: version.clone(),
            name: version.clone(),
        })
    };
    versions.iter().map(wsl).collect()
}

fn run(arguments: &Arguments) -> anyhow::Result<Verdict> {
    let wsls = wsls(&arguments.wsl)?;
    if let Some(lack) = Machine::lacks() {
        bail!(lack);
    }
    let package = match &arguments.with {
        Some(path) => Some(open_package(path).with_context(|| path.display().to_string())?),
        None => None,
    };
    let machine = Machine::prepare(&Needs::default())?;
    let mut verdict = Verdict::Holds;
    let mut objects = Vec::new();
    for path in &arguments.image {
        let image = match Image::open(path, arguments.limit) {
            Ok(image) => image,
            Err(error) => {
                // For people the line is the answer; a program gets it in its place, too.
                eprintln!("{}: {error}", path.display());
                objects.push(json!({"image": path, "error": error.to_string()}));
                verdict = Verdict::CannotBeTried;
                continue;
            }
        };
        let tried = try_image(&machine, path, &image, &wsls, package.as_ref())?;
        for tried in &tried {
            if tried.package == package.is_some() && !tried.wrong().is_empty() {
                verdict = verdict.max(Verdict::DoesNotHold);
            }
        }
        if arguments.json {
            let with = arguments.with.as_deref();
            objects.extend(tried.iter().map(|tried| tried.object(path, &image, with)));
        } else {
            print_table(path, &image, &tried);
        }
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&Value::Array(objects))?);
    }
    Ok(verdict)
}

/// What is to be put in, in a directory that is taken away at the end.
struct Opened {
    package: Package,
    _scratch: Scratch,
}

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left is found and taken away by hand.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn open_package(path: &Path) -> anyhow::Result<Opened> {
    let mut start = [0; 8];
    File::open(path)?
        .read_exact(&mut start)
        .context("it is neither a Debian package nor a program")?;
    let directory = directory()?.join(format!("package-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let scratch = Scratch(directory.clone());
    let package = if start.starts_with(b"\x7fELF") {
        let name = path.file_name().context("a program has a name")?;
        let program = directory.join(name);
        fs::copy(path, &program)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        Package::Generator(program)
    } else {
        ensure!(start == *b"!<arch>\n", "it is neither a Debian package nor a program");
        require("dpkg-deb", "dpkg")?;
        succeed(Command::new("dpkg-deb").arg("-x").args([path, &directory]))?;
        Package::Files(directory)
    };
    Ok(Opened { package, _scratch: scratch })
}

/// An image that was tried under one WSL.
struct Tried {
    wsl: Wsl,
    package: bool,
    /// What was seen, or why it did not get that far.
    seen: Result<Seen, String>,
}

impl Tried {
    fn wrong(&self) -> Vec<String> {
        match &self.seen {
            Ok(seen) => seen.wrong(),
            Err(error) => vec![error.clone()],
        }
    }

    fn object(&self, path: &Path, image: &Image, with: Option<&Path>) -> Value {
        let mut object = json!({
            "image": path,
            "name": image.name,
            "notes": image.notes,
            "wsl": self.wsl.name,
            "generation": self.wsl.generation.name(),
            "version": self.wsl.version,
            "package": with.filter(|_| self.package),
            "holds": self.wrong().is_empty(),
            "wrong": self.wrong(),
        });
        match &self.seen {
            Ok(seen) => object["seen"] = json!(seen),
            Err(error) => object["error"] = json!(error),
        }
        object
    }
}

fn whose(package: bool) -> &'static str {
    if package {
        "with the package"
    } else {
        "as it is"
    }
}

fn try_once(machine: &Machine, image: &Image, wsl: &Wsl, package: Option<Package>) -> Tried {
    let with = package.is_some();
    let case = Case {
        tree: image.tree.clone(),
        systemd: image.systemd.clone(),
        generation: wsl.generation.name().to_owned(),
        version: wsl.version.clone(),
        package,
    };
    let seen = serde_json::to_string(&case).map_err(anyhow::Error::from);
    let seen = seen.and_then(|case| machine.in_vm(&[&case]));
    let seen = seen.and_then(|printed| Ok(serde_json::from_str(&printed)?));
    Tried { wsl: wsl.clone(), package: with, seen: seen.map_err(|error| format!("{error:#}")) }
}

/// Tries it under each WSL, as many at a time as there are processors.
fn try_image(
    machine: &Machine,
    path: &Path,
    image: &Image,
    wsls: &[Wsl],
    package: Option<&Opened>,
) -> anyhow::Result<Vec<Tried>> {
    let mut cases = VecDeque::new();
    for wsl in wsls {
        cases.push_back((wsl, None));
        if let Some(opened) = package {
            cases.push_back((wsl, Some(opened.package.clone())));
        }
    }
    let all = cases.len();
    let left = Mutex::new(cases.into_iter().enumerate());
    let tried = Mutex::new(Vec::new());
    let work = || loop {
        let next = left.lock().expect("no worker panics").next();
        let Some((number, (wsl, package))) = next else {
            return;
        };
        eprintln!(
            "{}: {} of {all}, under WSL {}, {} ...",
            path.display(),
            number + 1,
            wsl.name,
            whose(package.is_some())
        );
        let one = try_once(machine, image, wsl, package);
        let mut tried = tried.lock().expect("no worker panics");
        tried.push((number, one));
    };
    thread::scope(|scope| {
        // More VMs would not fit on a machine with many processors: root has 128 instances of inotify,
        // and a distro needs about seven.
        let workers = thread::available_parallelism()?.get().min(2);
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().expect("no worker panics");
        }
        anyhow::Ok(())
    })?;
    let mut tried = tried.into_inner().expect("no worker panics");
    tried.sort_by_key(|(number, _)| *number);
    Ok(tried.into_iter().map(|(_, tried)| tried).collect())
}

/// The columns for the occasions, in few words.
const COLUMNS: [&str; OCCASIONS.len()] = ["boot", "restart", "reload", "peer on", "peer off"];

fn print_table(path: &Path, image: &Image, tried: &[Tried]) {
    let systemd = tried.iter().find_map(|tried| tried.seen.as_ref().ok());
    let systemd = systemd.map_or(String::new(), |seen| format!(", systemd {}", seen.systemd));
    println!("{}: {}{systemd}\n", path.display(), image.name);

    let mut rows = vec![["WSL", "image"]
        .iter()
        .chain(&COLUMNS)
        .chain(&["failed", "longest gap", "system", "failed units", "boot time"])
        .map(|name| (*name).to_owned())
        .collect::<Vec<_>>()];
    rows.extend(tried.iter().map(row));
    print_columns(&rows);
    println!(
        "\nWhether Windows programs start after boot, a restart of systemd-binfmt, a \
         daemon-reload with\nsuch a restart, and the start and poweroff of another distro of the \
         image as it is. They were\nlaunched again and again: how many failed, and the longest time \
         without one.\n"
    );

    let mut said = Vec::new();
    for line in tried.iter().flat_map(lines).chain(image.notes.clone()) {
        if !said.contains(&line) {
            println!("{line}");
            said.push(line);
        }
    }
    let wrong = tried.iter().filter(|tried| !tried.wrong().is_empty());
    let wrong: Vec<_> = wrong.collect();
    if wrong.is_empty() {
        println!("All of it holds.");
    }
    for tried in wrong {
        let wrong = tried.wrong().join("; ");
        println!("WSL {}, {}: {wrong}.", tried.wsl.name, whose(tried.package));
    }
    println!();
}

fn print_columns(rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    for row in rows {
        let cells = row.iter().enumerate();
        let cells: Vec<_> =
            cells.map(|(column, cell)| format!("{cell:width$}", width = width(column))).collect();
        println!("{}", cells.join("  ").trim_end());
    }
}

fn row(tried: &Tried) -> Vec<String> {
    let mut row = vec![tried.wsl.name.clone(), whose(tried.package).to_owned()];
    let Ok(seen) = &tried.seen else {
        row.push("not tried to the end".to_owned());
        return row;
    };
    let start = |start| if start { "yes" } else { "no" };
    row.extend(seen.occasions.iter().map(|o| start(o.start).to_owned()));
    let (mut failed, mut all, mut gap) = (0, 0, 0);
    for occasion in &seen.occasions {
        failed += occasion.failed;
        all += occasion.launches;
        gap = gap.max(occasion.longest_gap_ms);
    }
    row.push(format!("{failed} of {all}"));
    let lost = seen.occasions.iter().any(|occasion| !occasion.start);
    row.push(if lost { "for good".to_owned() } else { format!("{gap} ms") });
    row.push(seen.state.clone());
    let (ours, its): (Vec<_>, Vec<_>) =
        seen.failed_units.iter().partition(|failed| failed.because_of_the_simulation);
    row.push(match (its.len(), ours.len()) {
        (0, 0) => "none".to_owned(),
        (its, 0) => its.to_string(),
        (its, ours) => format!("{its}, and {ours} of the VM"),
    });
    row.push(match seen.boot_seconds {
        Some(seconds) => format!("{seconds:.1} s"),
        None => "unknown".to_owned(),
    });
    row
}

/// What does not go into the table.
fn lines(tried: &Tried) -> Vec<String> {
    let Ok(seen) = &tried.seen else {
        return Vec::new();
    };
    let mut lines = vec![match seen.registered.join(", ") {
        none if none.is_empty() => "systemd-binfmt registered nothing at boot.".to_owned(),
        some => format!("systemd-binfmt registered {some} at boot."),
    }];
    let excused = seen.failed_units.iter();
    for failed in excused.filter(|failed| failed.because_of_the_simulation) {
        lines.push(format!(
            "{} failed ({}), which is the simulation's doing: the VM has no devices, kernel or \
             disks of its own.",
            failed.unit, failed.why
        ));
    }
    lines.extend(seen.notes.clone());
    lines
}
