//! The Debian package is built by Debian 13 alone: its tools, its Rust (which is the `rust-version`
//! of Cargo.toml), its lintian, no network. What it does when it is installed and removed is
//! played in `debian_package.rs`.

use std::fs;
use std::process::Command;

use anyhow::{ensure, Context};

use crate::ours::built_package::{DebianPackage, FOREIGN};
use crate::ours::{extent, project};

/// What is seen of the package where it was built.
pub const DEBIAN_BUILD: &[Check] = &[
    ("the Debian package is built offline, with the oldest supported Rust", built_offline),
    ("the Debian package is one that lintian has nothing to say of", |package| {
        assert_eq!(package.run("cat /build/lintian")?, "");
        Ok(())
    }),
    ("the Debian package is put into an image, as its maintainer tries it", tried_in_an_image),
    // Last, as it keeps others from Debian's trees meanwhile.
    ("the Debian package is cross-built for the other architecture of WSL", cross_built),
];

/// A name, and what to look at.
pub type Check = (&'static str, fn(&DebianPackage) -> anyhow::Result<()>);

fn built_offline(package: &DebianPackage) -> anyhow::Result<()> {
    let manifest = fs::read_to_string(project().join("Cargo.toml"))?;
    let claimed = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = "))
        .context("Cargo.toml has no rust-version")?
        .trim_matches('"');
    let version = package.run("rustc --version")?;
    ensure!(version.starts_with(&format!("rustc {claimed}.")), "{version}");
    let control = fs::read_to_string(project().join("packaging/debian/control"))?;
    ensure!(control.contains(&format!(" rustc:native (>= {claimed}),\n")), "{control}");
    let changelog = fs::read_to_string(project().join("packaging/debian/changelog"))?;
    let expected = concat!("wsl-binfmt-generator (", env!("CARGO_PKG_VERSION"), "-1) ");
    ensure!(changelog.starts_with(expected), "{changelog}");

    let contents = package.run(
        "cd /build; dpkg-deb -c wsl-binfmt-generator_*.deb | grep -v '/$' | \
         sed -E 's/^(.{10}) root\\/root .* \\.(\\/.*)$/\\1 \\2/' | grep -v -e /usr/share/doc/ -e /lintian/",
    )?;
    let expected = "\
        -rwxr-xr-x /usr/lib/systemd/system-generators/wsl-binfmt-generator\n\
        -rw-r--r-- /usr/share/man/man8/wsl-binfmt-generator.8.gz\n\
        lrwxrwxrwx /usr/bin/wsl-binfmt -> ../lib/systemd/system-generators/wsl-binfmt-generator\n\
        lrwxrwxrwx /usr/share/man/man8/wsl-binfmt.8.gz -> wsl-binfmt-generator.8.gz\n";
    assert_eq!(contents, expected);
    Ok(())
}

fn cross_built(package: &DebianPackage) -> anyhow::Result<()> {
    if !extent::has("CROSS-BUILDING IS")? {
        return Ok(());
    }
    package.built_for_foreign()?;
    let said = package.run(
        "cd /build/foreign
        dpkg-deb -f wsl-binfmt-generator_*.deb Architecture
        dpkg-deb -x wsl-binfmt-generator_*.deb /tmp/foreign
        readelf -h /tmp/foreign/usr/lib/systemd/system-generators/wsl-binfmt-generator |
            sed -n 's/^  Machine: *//p'
        rm -r /tmp/foreign
        lintian --allow-root --fail-on error,warning *.changes",
    )?;
    let machine = match FOREIGN {
        "arm64" => "AArch64",
        _ => "Advanced Micro Devices X86-64",
    };
    assert_eq!(said, format!("{FOREIGN}\n{machine}\n"));
    Ok(())
}

/// Under a WSL that does nothing for interop.
fn tried_in_an_image(package: &DebianPackage) -> anyhow::Result<()> {
    let built = fs::read_dir(package.directory.join("package"))?.next().context("no package")??;
    let output = Command::new(env!("CARGO"))
        .args(["run", "--locked", "--quiet", "-p", "wsl-vm", "--"])
        .arg(wsl_vm::directory()?.join("trees/trixie"))
        .args(["--wsl", "1.2.5", "--with"])
        .arg(built.path())
        .current_dir(project())
        .output()?;
    let table = String::from_utf8_lossy(&output.stdout);
    // Each on five occasions.
    for (row, word) in [("1.2.5  as it is ", "no"), ("1.2.5  with the package ", "yes")] {
        let row = table.lines().find(|line| line.starts_with(row)).unwrap_or_default();
        let occasions = row.split_whitespace().filter(|seen| *seen == word).count();
        ensure!(occasions == 5, "{row}: {output:?}");
    }
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}
