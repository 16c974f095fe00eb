//! This project in the simulated VM of `wsl-vm`, which knows nothing of it: its program, built and
//! put into distros; packages; and lives that distros lead with it and without it.

pub mod built_package;
pub mod downloads;
pub mod extent;
pub mod life;
pub mod life_beside;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, thread};

use anyhow::{ensure, Context};
use wsl_vm::{debian, Builder, Machine, Needs, Vm};

/// What a distro of WSL has, as far as it matters here: python3-minimal ships a file for binfmt.d,
/// as on almost every machine; man-db lets `systemd-analyze verify` look for man pages.
pub const PACKAGES: &[&str] = &["python3-minimal", "binfmt-support", "man-db"];

const BINFMT_SUPPORT: &str = "binfmt-support.service";
const NAME: &str = "wsl-binfmt-generator";

/// The top of this project.
pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The program under test, once it is prepared: the release build, static, so that it runs in every
/// distro.
pub fn program() -> anyhow::Result<PathBuf> {
    Ok(wsl_vm::directory()?.join(NAME))
}

/// Makes what VMs with the program and with distros of these suites need, or finds it made. There,
/// these units and generators are masked.
pub fn prepare(suites: &[&str], masked: &[&str]) -> anyhow::Result<Machine> {
    debian::require("strace", "strace")?;
    let program = program()?;
    thread::scope(|scope| {
        let building = scope.spawn(|| build(&program));
        let machine = Machine::prepare(&Needs {
            suites,
            packages: PACKAGES,
            masked: &[&[BINFMT_SUPPORT], masked].concat(),
            programs: &[&program],
        });
        let built = building.join().expect("building does not panic");
        // What the machine lacks is why it could not be built, if both failed.
        let machine = machine?;
        built.map(|()| machine)
    })
}

/// What distros may have of this project, and of what it is tested with.
pub trait Install: Sized {
    /// With the generator and its man page installed, or without.
    fn generator(self, installed: bool) -> Self;

    /// With binfmt-support in use. It is in the tree, but masked otherwise.
    fn binfmt_support(self) -> Self;

    /// With the Debian package as `/var/package`, and a later one as `/var/upgrade`.
    fn bring_debian_package(self) -> anyhow::Result<Self>;

    /// With the packages that were downloaded for the tree of that suite.
    fn bring_packages(self, suite: &str) -> anyhow::Result<Self>;
}

impl Install for Builder<'_> {
    fn generator(self, installed: bool) -> Self {
        if !installed {
            return self;
        }
        // Debian 11 has a /lib of its own, and there its systemd looks.
        let generator = format!("/lib/systemd/system-generators/{NAME}");
        let page = format!("{NAME}.8");
        self.copy(Path::new("/vm").join(NAME), &generator)
            .link("/usr/bin/wsl-binfmt", &generator)
            .copy(project().join("man").join(&page), &format!("/usr/share/man/man8/{page}"))
    }

    fn binfmt_support(self) -> Self {
        self.unmasked(BINFMT_SUPPORT)
    }

    fn bring_debian_package(self) -> anyhow::Result<Self> {
        let packages = built_package::directory()?;
        Ok(self
            .copy(packages.join("package"), "/var/package")
            .copy(packages.join("upgrade"), "/var/upgrade"))
    }

    fn bring_packages(self, suite: &str) -> anyhow::Result<Self> {
        Ok(self.copy(downloads::directory(suite)?, "/var/packages"))
    }
}

/// What is run or booted in a VM of this project.
pub trait Run {
    /// The program under test, outside of any distro.
    fn generator(&self) -> Command;

    /// The same, with faults that strace(1) puts into its system calls.
    fn generator_under_strace(&self, faults: &[&str]) -> Command;

    /// A distro with the files of the Debian package.
    fn packaged(&self, distro: &str) -> anyhow::Result<Builder<'_>>;
}

impl Run for Vm {
    fn generator(&self) -> Command {
        self.command(NAME)
    }

    fn generator_under_strace(&self, faults: &[&str]) -> Command {
        let mut command = Command::new("strace");
        command
            .arg("--output=/dev/null")
            .args(faults.iter().flat_map(|fault| ["-e", fault]))
            .arg(self.generator().get_program())
            .env_clear();
        command
    }

    fn packaged(&self, distro: &str) -> anyhow::Result<Builder<'_>> {
        let files = built_package::directory()?.join("files");
        Ok(self.distro(distro, "trixie").copy(files, "/"))
    }
}

/// Builds the program.
fn build(program: &Path) -> anyhow::Result<()> {
    let version = succeed(Command::new("rustc").arg("-vV"))?;
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("rustc does not say for what it builds")?;
    let target = wsl_vm::directory()?.join("build");
    succeed(
        Command::new(env!("CARGO"))
            .args(["build", "--release", "--locked", "--quiet"])
            // Named, so that what runs while building is not built static.
            .args(["--target", host])
            .arg("--manifest-path")
            .arg(project().join("Cargo.toml"))
            .arg("--target-dir")
            .arg(&target)
            .env("RUSTFLAGS", "-C target-feature=+crt-static"),
    )?;
    // It may be running, and others may be at the same.
    let unfinished = program.with_extension(std::process::id().to_string());
    fs::copy(target.join(host).join("release").join(NAME), &unfinished)?;
    Ok(fs::rename(unfinished, program)?)
}

/// What a command prints that must succeed; all of its output is in the error if it does not.
fn succeed(command: &mut Command) -> anyhow::Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{command:?} ended with {}\n{printed}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(printed.into_owned())
}
