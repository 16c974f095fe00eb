//! This project's own Debian package, built as distributions build it: in a tree of Debian 13, by
//! its tools and its Rust, from the source archives, without a network. Built once, and again after
//! a change.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Command;
use std::time::UNIX_EPOCH;

use anyhow::{ensure, Context};
use wsl_vm::debian::{require, tree, tree_has};

use super::{extent, project, succeed};

/// What Debian 13 needs for it.
const TOOLS: &str = "build-essential,cargo,debhelper,lintian,meson,pkgconf,rustc,systemd-dev";

/// The other architecture that WSL runs on.
pub const FOREIGN: &str = if cfg!(target_arch = "aarch64") { "amd64" } else { "arm64" };

/// The package, where it was built, and a later version of it.
pub struct DebianPackage {
    /// The tree, with the sources in `/build/wsl-binfmt-generator-VERSION`.
    pub tree: PathBuf,
    /// Holds the package in `package`, its files in `files`, and a later one in `upgrade`.
    pub directory: PathBuf,
}

fn trees() -> anyhow::Result<PathBuf> {
    Ok(wsl_vm::directory()?.join("debian"))
}

/// Where the built ones are.
pub fn directory() -> anyhow::Result<PathBuf> {
    Ok(trees()?.join("packages"))
}

impl DebianPackage {
    /// Builds it, or finds it built.
    pub fn built() -> anyhow::Result<DebianPackage> {
        let _lock = wsl_vm::lock()?;
        require("mmdebstrap", "mmdebstrap")?;
        let trees = trees()?;
        // The emulator runs what is built for the other architecture.
        let cross = format!(
            "{TOOLS},crossbuild-essential-{FOREIGN},libstd-rust-dev:{FOREIGN},pkgconf:{FOREIGN},\
             qemu-user"
        );
        let is_there = tree_has(&trees, "trixie", &cross);
        let (packages, foreign) =
            if is_there || extent::is_all() { (&*cross, Some(FOREIGN)) } else { (TOOLS, None) };
        let tree = tree(&trees, "trixie", packages, foreign)?;
        let directory = directory()?;
        let package = DebianPackage { tree, directory };
        let recipe = package.tree.join("build/recipe");
        let (product, tests) = sources()?;
        let product = format!("{packages}\n{}\n{product}", include_str!("built_package.rs"));
        // Where all is tested, the tests have been run as it was built.
        let wanted = if extent::is_all() { product + TESTED + &tests } else { product };
        let made_of = fs::read_to_string(&recipe).unwrap_or_default();
        if made_of == wanted || made_of.starts_with(&(wanted.clone() + TESTED)) {
            return Ok(package);
        }
        eprintln!("building the Debian package, about a minute ...");
        package.build()?;
        fs::write(recipe, wanted)?;
        Ok(package)
    }

    fn build(&self) -> anyhow::Result<()> {
        let build = self.tree.join("build");
        // First, or after an interrupted run it would tell of what is half gone.
        if let Err(error) = fs::remove_file(build.join("recipe")) {
            ensure!(error.kind() == ErrorKind::NotFound, "{error}");
        }
        for old in [&build, &self.directory] {
            if old.exists() {
                fs::remove_dir_all(old)?;
            }
            fs::create_dir_all(old)?;
        }
        succeed(
            Command::new(project().join("packaging/make-sources"))
                .arg(&build)
                .env("CARGO", std::env::var_os("CARGO").unwrap_or("cargo".into())),
        )?;
        // As Debian has its sources: two archives under names of its own, unpacked, and debian/.
        let unpack = r#"
            cd /build
            for archive in *-vendor.tar.gz; do
                name=${archive%-vendor.tar.gz} version=${archive#wsl-binfmt-generator-}
                version=${version%-vendor.tar.gz}
            done
            tar -xf "$name.tar.gz"
            tar -xf "$name-vendor.tar.gz" -C "$name"
            mv "$name.tar.gz" "wsl-binfmt-generator_$version.orig.tar.gz"
            mv "$name-vendor.tar.gz" "wsl-binfmt-generator_$version.orig-vendor.tar.gz"
            cp -r "$name/packaging/debian" "$name"
            cd "$name"
            export DEB_BUILD_OPTIONS=OPTIONS
            dpkg-buildpackage --unsigned-source --unsigned-changes
            rm -r obj-*
            cd ..
            lintian --allow-root *.changes >lintian 2>&1 || echo "exit status $?" >>lintian"#;
        // With them it runs the tests that have been run before this.
        let options = if extent::is_all() { "" } else { "nocheck" };
        self.run(&unpack.replace("OPTIONS", options))?;
        let parts = r#"
            cd /build
            mkdir package upgrade
            cp wsl-binfmt-generator_*.deb package
            dpkg-deb -x package/*.deb files
            dpkg-deb -R package/*.deb later
            sed -i 's/^Version: .*/&+later/' later/DEBIAN/control
            dpkg-deb -b later upgrade"#;
        self.run(parts)?;
        succeed(
            Command::new("cp")
                .arg("-a")
                .args(["package", "files", "upgrade"].map(|part| build.join(part)))
                .arg(&self.directory),
        )?;
        Ok(())
    }

    /// Builds it for the other architecture, too, unless that is done, and returns the directory in
    /// the tree that holds it. Only where all is played the tree has what that needs.
    pub fn built_for_foreign(&self) -> anyhow::Result<PathBuf> {
        let _lock = wsl_vm::lock()?;
        let directory = self.tree.join("build/foreign");
        if !directory.exists() {
            self.run(&format!(
                "cd /build
                rm -rf unfinished
                mkdir unfinished
                dpkg-source -x wsl-binfmt-generator_*.dsc unfinished/source
                cd unfinished/source
                dpkg-buildpackage --host-arch {FOREIGN} --build=any --no-sign
                rm -r /build/unfinished/source
                mv /build/unfinished /build/foreign"
            ))?;
        }
        Ok(directory)
    }

    /// What a shell script in the tree prints, errors included. No network, no home of this
    /// machine.
    pub fn run(&self, script: &str) -> anyhow::Result<String> {
        let output = Command::new("unshare")
            .args(["--net", "--mount", "--pid", "--fork", "chroot"])
            .arg(&self.tree)
            .args(["sh", "-euc"])
            .arg(format!("exec 2>&1; mount -t proc proc /proc; {script}"))
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/nonexistent")
            .env("LC_ALL", "C.UTF-8")
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{script}\nfailed:\n{text}");
        Ok(text)
    }
}

/// What packaging/make-sources leaves out, besides obj-* and cargo's target directories.
const MADE: [&str; 5] = [".git", "build", "debian", "target", "vendor"];
/// Comes before the files of tests, in the recipe of a package that was built where all is tested.
const TESTED: &str = "\nand its tests:\n";

/// All files that the package is made of, and when they were changed; and the same of the Rust files
/// of tests, which make no difference to it, but are run as it is built.
fn sources() -> anyhow::Result<(String, String)> {
    let (mut product, mut tests) = (Vec::new(), Vec::new());
    let mut directories = vec![project().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let (name, metadata) = (entry.file_name(), entry.metadata()?);
            let is_made =
                MADE.iter().any(|made| name == *made) || name.to_string_lossy().starts_with("obj-");
            let is_made = is_made && directory == project();
            if is_made || entry.path().join("CACHEDIR.TAG").exists() {
                continue;
            }
            if metadata.is_dir() {
                directories.push(entry.path());
                continue;
            }
            let changed = metadata.modified()?.duration_since(UNIX_EPOCH);
            let changed = changed.context("a file from before 1970")?.as_nanos();
            let path = entry.path();
            let path = path.strip_prefix(project())?;
            let is_product = path.starts_with("src") || path.extension() != Some("rs".as_ref());
            let list = if is_product { &mut product } else { &mut tests };
            list.push(format!("{} {changed}", path.display()));
        }
    }
    product.sort_unstable();
    tests.sort_unstable();
    Ok((product.join("\n"), tests.join("\n")))
}
