//! What can go wrong with EARLY, the directory that the generator writes into, and with each system
//! call that it makes. Whatever happens: it does not panic; a file is there whole or not at all;
//! nothing is enabled, and nothing of WSL's masked, without the unit or drop-in that this is for;
//! nothing outside is touched; a line says what failed; and the next run is right.

#[path = "generate/golden.rs"]
mod golden;
mod shell;
mod strace;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};

use anyhow::{ensure, Context};

use golden::{cases, tree, GENERATOR};

type Tree = BTreeMap<String, String>;

/// A distro, EARLY, and what is outside of it.
struct Sandbox {
    directory: PathBuf,
    /// What comes out where nothing is wrong.
    golden: Tree,
}

impl Sandbox {
    /// With everything about the distro that makes the generator write something.
    fn new(name: &str) -> anyhow::Result<Sandbox> {
        let mut directory = shell::scratch(name)?;
        fs::remove_dir_all(&directory)?;
        directory = shell::scratch(name)?;
        let sandbox = Sandbox { golden: Tree::new(), directory };
        sandbox.shell("mkdir -p root/dev golden early")?;
        for case in ["56-wsls-own-generator", "58-ubuntus-condition"] {
            for (from, to) in [("root", "root"), ("expected", "golden")] {
                let from = cases().join(case).join(from);
                let from = from.display().to_string().replace('\'', r"'\''");
                sandbox.shell(&format!("cp -a '{from}/.' {to}"))?;
            }
        }
        // The admin's own, which must not be masked.
        sandbox.shell(
            "mkdir -p root/etc/systemd/system/binfmt-support.service.d
            echo >root/etc/systemd/system/binfmt-support.service.d/override.conf
            rm golden/binfmt-support.service.d/override.conf",
        )?;
        // A checkout has the modes that its umask gives it.
        sandbox.shell("chmod -R u=rwX,go=rX golden")?;
        let golden = tree(&sandbox.path("golden"))?;
        ensure!(golden.len() > 10, "{} files", golden.len());
        sandbox.reset()?;
        Ok(Sandbox { golden, ..sandbox })
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.join(path)
    }

    /// A new EARLY and a new outside.
    fn reset(&self) -> anyhow::Result<()> {
        for name in ["early", "outside", "seen"] {
            let path = self.path(name);
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&path)?,
                Ok(_) => fs::remove_file(&path)?,
                Err(_) => {}
            }
        }
        for name in ["early", "outside", "outside/directory", "seen"] {
            fs::create_dir(self.path(name))?;
        }
        fs::write(self.path("outside/file"), "theirs\n")?;
        Ok(fs::write(self.path("root/dev/kmsg"), "")?)
    }

    /// A shell command with that directory as its own.
    fn shell(&self, script: &str) -> anyhow::Result<Output> {
        let mut command = Command::new("sh");
        command.args(["-euc", &format!("umask 022; {script}")]);
        let output = command.current_dir(&self.directory).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{script}: {}: {said}", output.status);
        Ok(output)
    }

    /// The generator, as systemd calls it in a distro of WSL2.
    fn generator(&self) -> Command {
        let mut command = Command::new(GENERATOR);
        command.args(["normal", "early", "late"].map(|d| self.path(d)));
        command.env_clear();
        command.env("WSL_BINFMT_ROOT", self.path("root"));
        command.env("container", "wsl");
        command
    }

    /// All that was promised of a run, however it went.
    fn judge(&self, status: ExitStatus, stderr: &[u8], seen: &Tree) -> anyhow::Result<()> {
        let said = String::from_utf8_lossy(stderr);
        let kmsg = fs::read_to_string(self.path("root/dev/kmsg"))?;
        let said = format!("{said}{kmsg}");
        let list = || list(seen);
        ensure!(!said.contains("panicked"), "it panicked: {said}");
        for (path, what) in seen {
            let golden = self.golden.get(path);
            let hidden = path.rsplit('/').next().is_some_and(|n| n.starts_with('.'));
            ensure!(golden == Some(what) || hidden, "{path} is {what}");
            let needed = match path.split_once('/') {
                Some((wants, unit)) if wants.ends_with(".wants") => unit.to_owned(),
                Some((directory, "override.conf" | "wsl.conf")) => {
                    format!("{directory}/10-wsl-interop.conf")
                }
                _ => continue,
            };
            ensure!(seen.contains_key(&needed) || hidden, "{path} without {needed}: {}", list());
        }
        match status.code() {
            Some(0) if *seen == self.golden => {}
            // Then a warning may be enough.
            Some(0) => ensure!(says_why(&said), "'{said}', and exit status 0, with {}", list()),
            Some(1) => ensure!(says_why(&said), "'{said}', and exit status 1"),
            _ => ensure!(status.signal() == Some(9), "{status}: {said}"),
        }
        Ok(())
    }
}

/// Whether a line names something and the cause.
fn says_why(said: &str) -> bool {
    said.lines()
        .any(|line| line.contains('/') && (line.contains("(os error ") || line.contains(": E")))
}

/// Something that is wrong with EARLY.
struct Case {
    name: &'static str,
    /// What makes it so, in shell.
    prepare: &'static str,
    /// It takes a mount.
    mounts: bool,
    /// What is said of it; nothing, if it is dealt with.
    says: &'static str,
    /// Of what should be written, what is not: paths that begin so.
    lacks: &'static [&'static str],
}

const fn survived(name: &'static str, prepare: &'static str) -> Case {
    Case { name, prepare, mounts: false, says: "", lacks: &[] }
}

const fn fails(
    name: &'static str,
    prepare: &'static str,
    says: &'static str,
    lacks: &'static [&'static str],
) -> Case {
    Case { name, prepare, mounts: false, says, lacks }
}

/// What depends on the drop-in for systemd-binfmt.
const BINFMT: &[&str] = &["systemd-binfmt.service.d/"];
const WANTS: &[&str] = &["sysinit.target.wants/"];
const GUARD: &[&str] = &[
    "wsl-binfmt-guard.service",
    "sysinit.target.wants/wsl-binfmt-guard",
    "proc-sys-fs-binfmt_misc.mount.wants/",
];

const CASES: &[Case] = &[
    survived("missing", "rmdir early"),
    fails("not a directory", "rmdir early; echo x >early", "early, which must be a real directory, not a link: Not a directory", &[""]),
    fails("a fifo", "rmdir early; mkfifo early", "early, which must be a real directory, not a link: Not a directory", &[""]),
    fails("a link to elsewhere", "rmdir early; ln -s outside early", "early, which must be a real directory, not a link: Not a directory", &[""]),
    fails("a link to nowhere", "rmdir early; ln -s outside/new early", "early, which must be a real directory, not a link: Not a directory", &[""]),
    Case {
        mounts: true,
        ..fails(
            "read-only",
            "mount --bind early early; mount -o remount,bind,ro early",
            "Read-only file system",
            &[""],
        )
    },
    survived(
        "what a killed run left",
        "mkdir early/systemd-binfmt.service.d early/sysinit.target.wants
        echo half >early/systemd-binfmt.service.d/.10-wsl-interop.conf.unfinished
        echo half >early/.wsl-binfmt-guard.service.unfinished
        ln -s ../wsl-binfmt-guard.service early/sysinit.target.wants",
    ),
    survived("all there already, as it should be", "\"$GENERATOR\" \"$PWD/normal\" \"$PWD/early\" \"$PWD/late\""),
    fails(
        "somebody else's unit",
        "echo theirs >early/wsl-binfmt-guard.service",
        "wsl-binfmt-guard.service: File exists",
        GUARD,
    ),
    fails(
        "somebody else's drop-in",
        "mkdir early/systemd-binfmt.service.d; echo theirs >early/systemd-binfmt.service.d/10-wsl-interop.conf",
        "10-wsl-interop.conf: File exists",
        BINFMT,
    ),
    fails(
        "somebody else's link",
        "mkdir early/sysinit.target.wants; ln -s other early/sysinit.target.wants/wsl-binfmt-guard.service",
        "wants/wsl-binfmt-guard.service: File exists",
        &["sysinit.target.wants/wsl-binfmt-guard"],
    ),
    fails(
        "a unit that is a link to elsewhere",
        "ln -s ../outside/file early/wsl-binfmt-guard.service",
        "wsl-binfmt-guard.service: File exists",
        GUARD,
    ),
    fails(
        "a unit that is a link to nowhere",
        "ln -s ../outside/new early/wsl-binfmt-guard.service",
        "wsl-binfmt-guard.service: File exists",
        GUARD,
    ),
    fails(
        "a unit that is a fifo",
        "mkfifo early/wsl-binfmt-guard.service",
        "wsl-binfmt-guard.service: File exists",
        GUARD,
    ),
    fails(
        "a unit that is a directory",
        "mkdir early/wsl-binfmt-guard.service",
        "wsl-binfmt-guard.service: File exists",
        GUARD,
    ),
    fails(
        "drop-ins that are a link to elsewhere",
        "ln -s ../outside/directory early/systemd-binfmt.service.d",
        "systemd-binfmt.service.d: Not a directory",
        BINFMT,
    ),
    fails(
        "drop-ins that are a link to nowhere",
        "ln -s ../outside/new early/systemd-binfmt.service.d",
        "systemd-binfmt.service.d: Not a directory",
        BINFMT,
    ),
    fails(
        "drop-ins that are a fifo",
        "mkfifo early/systemd-binfmt.service.d",
        "systemd-binfmt.service.d: Not a directory",
        BINFMT,
    ),
    fails(
        "drop-ins that are a file",
        "echo theirs >early/systemd-binfmt.service.d",
        "systemd-binfmt.service.d: Not a directory",
        BINFMT,
    ),
    fails(
        "wants that are a link to elsewhere",
        "ln -s ../outside/directory early/sysinit.target.wants",
        "sysinit.target.wants: Not a directory",
        WANTS,
    ),
    fails(
        "wants that are a link to nowhere",
        "ln -s ../outside/new early/sysinit.target.wants",
        "sysinit.target.wants: Not a directory",
        WANTS,
    ),
    fails(
        "wants that are a fifo",
        "mkfifo early/sysinit.target.wants",
        "sysinit.target.wants: Not a directory",
        WANTS,
    ),
    fails(
        "wants that are a file",
        "echo theirs >early/sysinit.target.wants",
        "sysinit.target.wants: Not a directory",
        WANTS,
    ),
    survived(
        "an unfinished file that is a link to elsewhere",
        "ln -s ../outside/file early/.wsl-binfmt-guard.service.unfinished",
    ),
    survived(
        "an unfinished file that is a link to nowhere",
        "ln -s ../outside/new early/.wsl-binfmt-guard.service.unfinished",
    ),
    survived(
        "an unfinished file that is a fifo",
        "mkfifo early/.wsl-binfmt-guard.service.unfinished",
    ),
    survived(
        "an unfinished file that is the outside's by another name",
        "ln outside/file early/.wsl-binfmt-guard.service.unfinished",
    ),
    fails(
        "an unfinished file that is a directory",
        "mkdir early/.wsl-binfmt-guard.service.unfinished",
        ".wsl-binfmt-guard.service.unfinished: Is a directory",
        GUARD,
    ),
];

fn run_case(sandbox: &Sandbox, case: &Case) -> anyhow::Result<()> {
    sandbox.reset()?;
    // In a mount namespace of its own, so what is to be seen is copied there.
    let script = format!(
        "set -eu; umask 022; exec 3>&2 2>prepared; {}
        cp -a early before 2>/dev/null || :
        set +e; timeout 10 \"$@\" 2>&3; status=$?; set -e
        ! test -d early || cp -a early/. seen
        exit $status",
        case.prepare
    );
    let _ = fs::remove_dir_all(sandbox.path("before"));
    let _ = fs::remove_file(sandbox.path("before"));
    let generator = sandbox.generator();
    let mut command = Command::new(if case.mounts { "unshare" } else { "sh" });
    if case.mounts {
        command.args(["--mount", "sh"]);
    }
    command.args(["-c", &script, "sh", GENERATOR]).args(generator.get_args());
    command.env("WSL_BINFMT_ROOT", sandbox.path("root")).env("container", "wsl");
    command.env("GENERATOR", GENERATOR).current_dir(&sandbox.directory);
    let outside = tree(&sandbox.path("outside"))?;
    let output = command.output()?;
    let said = String::from_utf8(output.stderr)?;
    let is_link = sandbox.path("early").is_symlink();
    let before = if is_link { Tree::new() } else { tree_of_files(&sandbox.path("before"))? };

    let mut expected = sandbox.golden.clone();
    expected.retain(|path, _| !case.lacks.iter().any(|l| path.starts_with(l)));
    for (path, what) in before {
        if !path.contains("unfinished") || what.starts_with("directory") {
            expected.insert(path, what);
        }
    }
    let mut seen = if is_link { Tree::new() } else { tree_of_files(&sandbox.path("seen"))? };
    // A directory in which nothing could be written may be there or not.
    let empty = |path: &String, of: &Tree| !of.keys().any(|p| p.starts_with(&format!("{path}/")));
    for of in [&mut seen, &mut expected] {
        let all = of.clone();
        of.retain(|path, what| {
            !(what.starts_with("directory") && empty(path, &all) && !path.contains("service"))
        });
    }
    ensure!(seen == expected, "seen: {}; expected: {}; {said}", list(&seen), list(&expected));
    ensure!(tree(&sandbox.path("outside"))? == outside, "the outside was touched");
    match case.says {
        "" => ensure!(output.status.success() && said.is_empty(), "{}: {said}", output.status),
        says => {
            ensure!(output.status.code() == Some(1), "{}: {said}", output.status);
            ensure!(said.contains(says), "says '{said}', not '{says}'");
            ensure!(says_why(&said), "'{said}'");
        }
    }
    Ok(())
}

/// What there is, without the texts.
fn list(tree: &Tree) -> String {
    let line = |(path, what): (&String, &String)| {
        format!("{path} ({})", what.lines().next().unwrap_or_default())
    };
    tree.iter().map(line).collect::<Vec<_>>().join(", ")
}

/// The same as `tree`, for fifos and where there is no directory.
fn tree_of_files(directory: &Path) -> anyhow::Result<Tree> {
    if directory.is_dir() {
        tree(directory)
    } else {
        Ok(Tree::new())
    }
}

fn is_root() -> anyhow::Result<bool> {
    let root = Command::new("id").arg("-u").output()?.stdout == b"0\n";
    if !root {
        let message = "EARLY can be made read-only and full by root only";
        ensure!(std::env::var_os("CI").is_none(), message);
        // Not eprintln, which the harness swallows when a test passes.
        writeln!(std::io::stderr(), "SKIPPED: {message}")?;
    }
    Ok(root)
}

#[test]
fn whatever_early_is_nothing_leads_outside() -> anyhow::Result<()> {
    let sandbox = Sandbox::new("early")?;
    let root = is_root()?;
    let mut wrong = Vec::new();
    for case in CASES.iter().filter(|case| root || !case.mounts) {
        if let Err(error) = run_case(&sandbox, case) {
            wrong.push(format!("{}: {error:#}", case.name));
        }
    }
    ensure!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), CASES.len(), wrong.join("\n"));
    Ok(())
}

/// A few KiB, so that each write in turn is the first that finds no space; the same with inodes.
#[test]
fn a_full_early_has_whole_files_and_the_next_run_is_right() -> anyhow::Result<()> {
    if !is_root()? {
        return Ok(());
    }
    let sandbox = Sandbox::new("full")?;
    let limits = (0..8).map(|n| format!("size={}k", 4 + 4 * n));
    let limits = limits.chain((1..20).map(|n| format!("nr_inodes={n}")));
    let mut failed = 0;
    for limit in limits {
        sandbox.reset()?;
        fs::create_dir(sandbox.path("seen/full"))?;
        fs::create_dir(sandbox.path("seen/next"))?;
        let script = format!(
            "set -e; umask 022; mount -t tmpfs -o mode=755,{limit} none early
            set +e; \"$@\"; status=$?; set -e; cp -a early/. seen/full
            mount -o remount,size=1m,nr_inodes=100 early
            \"$@\" 2>seen/said; cp -a early/. seen/next
            exit $status"
        );
        let generator = sandbox.generator();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh", GENERATOR]);
        command.args(generator.get_args()).current_dir(&sandbox.directory);
        command.env("WSL_BINFMT_ROOT", sandbox.path("root")).env("container", "wsl");
        let output = command.output()?;
        let seen = tree(&sandbox.path("seen/full"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        sandbox.judge(output.status, &output.stderr, &seen).context(limit.clone())?;
        if !output.status.success() {
            failed += 1;
            ensure!(said.contains("No space left on device (os error 28)"), "{limit}: {said}");
        }
        ensure!(tree(&sandbox.path("seen/next"))? == sandbox.golden, "{limit}: {said}");
        ensure!(fs::read_to_string(sandbox.path("seen/said"))?.is_empty(), "{limit}");
    }
    ensure!(failed > 15, "only {failed} were full");
    Ok(())
}

#[test]
fn whichever_system_call_fails_or_is_the_last_the_next_run_is_right() -> anyhow::Result<()> {
    if !shell::have_programs("strace:strace")? {
        return Ok(());
    }
    let places = [Sandbox::new("calls-0")?, Sandbox::new("calls-1")?];
    let [first, _] = &places;
    let faults = strace::faults(&first.generator(), &first.path("strace"))?;
    strace::try_all(&faults, places, |place, fault| {
        place.reset()?;
        let output = fault.put_into(&place.generator()).output()?;
        let seen = tree(&place.path("early"))?;
        ensure!(fault.kills == (output.status.signal() == Some(9)), "{}", output.status);
        place.judge(output.status, &output.stderr, &seen)?;

        let output = place.generator().output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && said.is_empty(), "the next run: {said}");
        let next = tree(&place.path("early"))?;
        ensure!(next == place.golden, "the next run leaves {}", list(&next));
        Ok(())
    })
}
