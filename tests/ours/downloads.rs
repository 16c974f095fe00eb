//! Real packages for distros, which have no network: downloaded once with all that they depend
//! on, kept, and put into a distro as files, below `/var/packages`:
//!
//! - `NAME/*.deb`: the package and what it needs in the tree of its suite
//! - `NAME/upgrade/*.deb`: of these, with a higher version, what has to do with binary formats
//! - `foreign/busybox`: a static program for another architecture

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{bail, ensure, Context};
use wsl_vm::{debian, Lack};

use super::succeed;

/// Packages to install, and of what comes with them, those to upgrade: their scripts and triggers
/// have to do with binary formats. Debian 13 has split qemu-user-static.
const PACKAGES: [(&str, &[&str]); 3] = [
    ("qemu-user-static", &["qemu-user-static", "qemu-user-binfmt"]),
    ("binfmt-support", &["binfmt-support"]),
    ("mono-runtime", &["mono-runtime"]),
];

/// An architecture that is not this machine's, in Debian's words and in qemu's.
const FOREIGN: (&str, &str) =
    if cfg!(target_arch = "aarch64") { ("amd64", "x86_64") } else { ("arm64", "aarch64") };

/// Where they are for the tree of that suite.
pub fn directory(suite: &str) -> anyhow::Result<PathBuf> {
    Ok(wsl_vm::directory()?.join("packages").join(suite))
}

/// Downloads the packages for the trees of these suites, unless they are there.
pub fn download_packages(suites: &[&str]) -> anyhow::Result<()> {
    let _lock = wsl_vm::lock()?;
    thread::scope(|scope| {
        let downloads: Vec<_> =
            suites.iter().map(|suite| scope.spawn(|| download(suite))).collect();
        for download in downloads {
            download.join().expect("downloading does not panic")?;
        }
        Ok(())
    })
}

fn download(suite: &str) -> anyhow::Result<()> {
    let tree = wsl_vm::directory()?.join("trees").join(suite);
    let packages = directory(suite)?;
    let recipe = packages.join("recipe");
    let status = tree.join("var/lib/dpkg/status");
    // Another tree may have other versions of what they depend on.
    let of_tree = fs::metadata(&status)?.modified()?;
    let wanted = format!("{PACKAGES:?} {FOREIGN:?} {of_tree:?}");
    if fs::read_to_string(&recipe).is_ok_and(|text| text == wanted) {
        return Ok(());
    }
    eprintln!("downloading packages of {suite}, 80 MB, once ...");
    if packages.exists() {
        fs::remove_dir_all(&packages)?;
    }
    let apt = Apt::new(&tree, &packages.join("apt"))?;
    apt.run(&packages, &["update"])?;
    for (name, upgrades) in PACKAGES {
        let set = packages.join(name);
        apt.install(&set, name)?;
        fs::create_dir(set.join("upgrade"))?;
        for package in debs(&set)? {
            let file = package.file_name().context("a package is a file")?;
            let of = |name: &&str| file.to_string_lossy().starts_with(&format!("{name}_"));
            if upgrades.iter().any(of) {
                repack(&package, &set.join("upgrade").join(file), "+upgrade")?;
            }
            if of(&"qemu-user") || of(&"qemu-user-static") {
                repack(&package, &package, "")?;
            }
        }
        ensure!(!debs(&set.join("upgrade"))?.is_empty(), "no {upgrades:?}");
    }

    download_foreign(&apt, &packages.join("foreign"))?;
    fs::remove_dir_all(packages.join("apt"))?;
    Ok(fs::write(recipe, wanted)?)
}

/// Downloads a program for another architecture.
fn download_foreign(apt: &Apt, foreign: &Path) -> anyhow::Result<()> {
    fs::create_dir(foreign)?;
    apt.run(foreign, &["download", &format!("busybox-static:{}", FOREIGN.0)])?;
    let package = debs(foreign)?.pop().context("no busybox")?;
    succeed(Command::new("dpkg-deb").args(["-x".as_ref(), package.as_path(), foreign]))?;
    // Debian 12's is in /bin.
    let program = ["bin", "usr/bin"].map(|bin| foreign.join(bin).join("busybox"));
    let program = program.iter().find(|p| p.exists()).context("no busybox")?;
    Ok(fs::rename(program, foreign.join("busybox"))?)
}

/// apt(8) of this machine, working for a tree without changing it: the tree's sources and keys,
/// and lists of its own.
struct Apt {
    config: PathBuf,
}

impl Apt {
    fn new(tree: &Path, directory: &Path) -> anyhow::Result<Apt> {
        for part in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let (tree, own) = (tree.display(), directory.display());
        let mut text = format!(
            "Dir::Etc \"{tree}/etc/apt\";\n\
             Dir::State \"{own}/state\";\n\
             Dir::State::status \"{tree}/var/lib/dpkg/status\";\n\
             Dir::Cache \"{own}/cache\";\n\
             APT::Architectures:: \"{}\";\n\
             APT::Architectures:: \"{}\";\n\
             APT::Install-Recommends \"false\";\n\
             APT::Sandbox::User \"root\";\n\
             Acquire::Languages \"none\";\n",
            succeed(Command::new("dpkg").arg("--print-architecture"))?.trim(),
            FOREIGN.0
        );
        // The machine's way to the network, if it has one of its own.
        let machine = succeed(Command::new("apt-config").arg("dump"))?;
        for line in machine.lines().filter(|l| l.starts_with("Acquire::http")) {
            text.extend([line, "\n"]);
        }
        let config = directory.join("apt.conf");
        fs::write(&config, text)?;
        Ok(Apt { config })
    }

    fn run(&self, directory: &Path, arguments: &[&str]) -> anyhow::Result<()> {
        let apt = Command::new("apt-get")
            .current_dir(directory)
            .env("APT_CONFIG", &self.config)
            .args(["-q", "-y"])
            .args(arguments)
            .stdin(Stdio::null())
            .output()?;
        if !apt.status.success() {
            let why = debian::first_error(&apt.stderr);
            bail!(Lack::FromDebian(format!("packages for distros cannot be downloaded: {why}")));
        }
        Ok(())
    }

    /// Downloads a package and all that it needs; itself also where the tree has it.
    fn install(&self, to: &Path, package: &str) -> anyhow::Result<()> {
        fs::create_dir_all(to.join("partial"))?;
        let archives = format!("Dir::Cache::archives={}", to.display());
        let install = ["install", "--download-only", "--reinstall", package];
        self.run(to, &[&["-o", &archives], &install[..]].concat())
    }
}

/// Repacks a package with another end of its version. Emulators become links to the one that is
/// used, and 400 MB become 10: not what they do is tested, but what scripts and triggers do.
fn repack(package: &Path, to: &Path, version_end: &str) -> anyhow::Result<()> {
    let unpacked = to.with_extension("unpacked");
    let dpkg_deb = |arguments: &[&OsStr]| succeed(Command::new("dpkg-deb").args(arguments));
    dpkg_deb(&["-R".as_ref(), package.as_ref(), unpacked.as_ref()])?;

    let control = unpacked.join("DEBIAN/control");
    let text = fs::read_to_string(&control)?;
    let version = text.lines().find(|line| line.starts_with("Version: "));
    let version = version.context("a package has a version")?;
    let text = text.replace(version, &format!("{version}{version_end}"));
    fs::write(&control, text)?;

    let programs = unpacked.join("usr/bin");
    let used = ["", "-static"].map(|end| programs.join(format!("qemu-{}{end}", FOREIGN.1)));
    if let Some(used) = used.iter().find(|used| used.is_file()) {
        for program in fs::read_dir(&programs)? {
            let program = program?;
            if program.metadata()?.is_file() && program.path() != *used {
                fs::remove_file(program.path())?;
                fs::hard_link(used, program.path())?;
            }
        }
    }

    // To compress them would take longer than all installations of what is compressed.
    dpkg_deb(&["-Znone".as_ref(), "-b".as_ref(), unpacked.as_ref(), to.as_ref()])?;
    Ok(fs::remove_dir_all(unpacked)?)
}

fn debs(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let paths: Result<Vec<_>, _> =
        fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path())).collect();
    let is_deb = |path: &PathBuf| path.extension() == Some(OsStr::new("deb"));
    Ok(paths?.into_iter().filter(is_deb).collect())
}
