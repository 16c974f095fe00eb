//! The packages of other distributions, as far as Debian has their tools: built, looked at, and
//! installed, upgraded and removed by their package managers. Debian's own is another test.

#[allow(dead_code)] // Each user needs a part of it.
#[path = "ours/extent.rs"]
mod extent;
mod shell;

use std::collections::BTreeSet;
use std::fs;
use std::sync::OnceLock;

use anyhow::{ensure, Context};

use shell::{have_programs, scratch};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// What the tests run, and the packages that it is in.
const PROGRAMS: &str = "bsdtar:libarchive-tools eu-strip:elfutils fakeroot:fakeroot file:file \
        makepkg:makepkg meson:meson ninja:ninja-build nix-instantiate:nix-bin \
        pacman:pacman-package-manager rpm:rpm rpmbuild:rpm rpmlint:rpmlint";
const SPEC: &str = include_str!("../packaging/rpm/wsl-binfmt-generator.spec");

/// rpmbuild and nix take no path with a blank or a quote in it, and a checkout may have one. So all
/// of it is reached by links.
fn sh(name: &str, script: &str) -> anyhow::Result<String> {
    let links = r#"
        links=$(mktemp -d)
        trap 'rm -r "$links"' EXIT
        trap 'exit 1' HUP INT TERM
        ln -s "$SOURCE" "$links/source"
        ln -s "$PWD" "$links/here"
        ln -s "$(dirname "$PWD")/sources" "$links/sources"
        export SOURCE="$links/source"
        sources=$links/sources
        cd "$links/here"
        "#;
    shell::sh(name, &format!("{links}{script}"))
}

/// What Debian's rpmlint is told. It has the policy of no distribution.
const RPMLINT: &str = r#"
CompressExtension = "gz"
ValidLicenses = ["MIT", "Apache-2.0"]
Filters = [
    # Their build services sign packages and name the packager; neither has groups any more.
    "no-signature", "no-packager-tag", "no-group-tag",
    # rpm chooses the build root itself since 4.6.
    "no-buildroot-tag",
    # It is made, by packaging/make-sources, not downloaded.
    "invalid-url Source1: wsl-binfmt-generator-.*-vendor.tar.gz",
    # Only of /run/wsl-binfmt, which no package owns.
    "dangerous-command-in-%postun rm",
    # rpmlint 2.4 takes the section of a page for its name.
    "no-manual-page-for-binary wsl-binfmt",
    # Its dictionary lacks the word.
    "spelling-error .'systemd'",
]
"#;

#[test]
fn rpm_builds_without_a_network_and_rpmlint_has_nothing_to_say() -> anyhow::Result<()> {
    if !extent::has("THE RPM IS")? || !have_programs(PROGRAMS)? {
        return Ok(());
    }
    sources()?;
    let sh = |script: &str| sh("rpm", script);
    // --nodeps: what it needs to build is here, but not as rpms. --nocheck: the build of Debian's
    // package runs the same tests. %debug_package is put in by Fedora, by openSUSE and since rpm
    // 4.20, not by Debian 12. Debian's brp-compress is written for bash, and called with dash.
    sh(r#"
        rm -rf top
        cp "$SOURCE/packaging/rpm/wsl-binfmt-generator.spec" .
        [ "$(rpm --eval '%{?_enable_debug_packages}')" ] ||
            sed -i 's/^%description$/%debug_package\n\n&/' wsl-binfmt-generator.spec
        unshare --map-root-user --net rpmbuild -ba --nodeps --nocheck \
            --define "_topdir $PWD/top" --define "_sourcedir $sources" \
            --define '__brp_compress bash /usr/lib/rpm/brp-compress /usr' \
            wsl-binfmt-generator.spec
        ln -sfn top/RPMS/*/wsl-binfmt-generator-[0-9]*.rpm package.rpm"#)?;

    fs::write(scratch("rpm")?.join("rpmlint.toml"), RPMLINT)?;
    let lint = sh(r#"
        rpmlint --config rpmlint.toml "$(readlink package.rpm)" top/SRPMS/*.rpm \
            "$SOURCE/packaging/rpm/wsl-binfmt-generator.spec" || true"#)?;
    ensure!(lint.contains(" 0 errors, 0 warnings"), "{lint}");

    let contents = sh(&format!(
        r"rpm -qp --qf '[%{{FILEMODES:perms}} %{{FILENAMES}} %{{FILELINKTOS}}\n]' package.rpm |
        grep -v -e '^d' -e /.build-id/ -e /usr/share/doc/ | sed 's/-{VERSION}//; s/ $//'",
    ))?;
    let expected = "\
        lrwxrwxrwx /usr/bin/wsl-binfmt ../lib/systemd/system-generators/wsl-binfmt-generator\n\
        -rwxr-xr-x /usr/lib/systemd/system-generators/wsl-binfmt-generator\n\
        -rw-r--r-- /usr/share/licenses/wsl-binfmt-generator/LICENSE\n\
        -rw-r--r-- /usr/share/man/man8/wsl-binfmt-generator.8.gz\n\
        -rw-r--r-- /usr/share/man/man8/wsl-binfmt.8.gz\n";
    assert_eq!(contents, expected);
    let documents = sh("rpm -qp --docfiles package.rpm")?;
    ensure!(documents.contains("/README.md\n"), "{documents}");

    for tag in ["POSTIN", "PREUN", "POSTUN"] {
        sh(&format!("rpm -qp --qf '%{{{tag}}}' package.rpm | sh -n"))?;
    }
    let rpm =
        "rpm --root $PWD/root --dbpath /db --nodeps --define '_install_script_path /stub:/bin'";
    lives_of_the_package(
        "rpm",
        &format!("{rpm} --upgrade package.rpm"),
        &format!("{rpm} --upgrade --replacepkgs package.rpm"),
        &format!("{rpm} --erase wsl-binfmt-generator"),
    )
}

#[test]
fn the_spec_tells_the_version_and_the_crates_that_are_in_the_program() -> anyhow::Result<()> {
    let line = format!("\nVersion:        {VERSION}\n");
    ensure!(SPEC.contains(&line), "{line}");
    let line = format!(" - {VERSION}-1\n");
    ensure!(SPEC.contains(&line), "{line}");

    let tree = sh(
        "crates",
        r#"
        cd "$SOURCE"
        "$CARGO" tree --quiet --locked --edges no-build,no-dev,no-proc-macro --prefix none \
            --no-dedupe --format '{p}|{l}' | sort -u"#,
    )?;
    let mut licenses = BTreeSet::new();
    let mut provides = String::new();
    for line in tree.lines() {
        let (package, license) = line.split_once('|').context("no license")?;
        let (name, version) = package.split_once(" v").context("no version")?;
        // As the spec's comment on the license has it.
        let list = SPEC.lines().find(|l| l.starts_with(&format!("# {license}: ")));
        let named = match name {
            "wsl-binfmt-generator" => "this project",
            name => name,
        };
        let names = list.unwrap_or_default().split([':', ',']).map(str::trim);
        ensure!(names.skip(1).any(|n| n == named), "# {license}: {named}");
        licenses.insert(match license.contains(" OR ") {
            true => format!("({license})"),
            false => license.to_owned(),
        });
        if name == named {
            provides += &format!("Provides:       bundled(crate({name})) = {version}\n");
        }
    }
    // What is simple comes first.
    let licenses: Vec<String> = licenses.into_iter().rev().collect();
    let line = format!("\nLicense:        {}\n", licenses.join(" AND "));
    ensure!(SPEC.contains(&line), "{line}");
    let told: Vec<&str> = SPEC.lines().filter(|l| l.starts_with("Provides:")).collect();
    assert_eq!(told.join("\n") + "\n", provides);
    Ok(())
}

/// Debian has no namcap, which would look for more.
#[test]
fn makepkg_builds_the_package_of_arch() -> anyhow::Result<()> {
    if !extent::has("THE PACKAGE OF ARCH IS")? || !have_programs(PROGRAMS)? {
        return Ok(());
    }
    sources()?;
    let sh = |script: &str| {
        // makepkg refuses to work for root.
        let user = "if [ $(id -u) = 0 ]; then
                user='unshare --map-user=1000 --map-group=1000'; else user=; fi";
        sh("arch", &format!("{user}; {script}"))
    };
    // --nodeps: pacman knows nothing of what is installed here. --nocheck as for the rpm.
    sh(&format!(
        r#"
        rm -rf pkg src *.pkg.tar.gz
        cp "$SOURCE"/packaging/arch/* "$sources/wsl-binfmt-generator-{VERSION}.tar.gz" .
        bash -n PKGBUILD
        bash -n wsl-binfmt-generator.install
        PKGEXT=.pkg.tar.gz $user makepkg --nodeps --nocheck
        ln -sfn wsl-binfmt-generator-{VERSION}-1-*.pkg.tar.gz package"#
    ))?;
    let information = sh("$user makepkg --printsrcinfo")?;
    for line in [
        format!("pkgver = {VERSION}"),
        "install = wsl-binfmt-generator.install".to_owned(),
        "depends = systemd>=247".to_owned(),
    ] {
        ensure!(information.contains(&format!("\t{line}\n")), "{line}");
    }

    let contents = sh("tar -tvf package | grep usr/ | grep -v -e '^d' -e ' usr/share/doc/' |
            sed -E 's,^(.{10}) root/root .* (usr/.*),\\1 \\2,' | sort -k 2")?;
    let expected = "\
        lrwxrwxrwx usr/bin/wsl-binfmt -> /usr/lib/systemd/system-generators/wsl-binfmt-generator\n\
        -rwxr-xr-x usr/lib/systemd/system-generators/wsl-binfmt-generator\n\
        -rw-r--r-- usr/share/licenses/wsl-binfmt-generator/LICENSE\n\
        -rw-r--r-- usr/share/man/man8/wsl-binfmt-generator.8.gz\n\
        -rw-r--r-- usr/share/man/man8/wsl-binfmt.8.gz\n";
    assert_eq!(contents, expected);

    let configuration = "[options]\nArchitecture = auto\nSigLevel = Never\n";
    fs::write(scratch("arch")?.join("pacman.conf"), configuration)?;
    let pacman = "PATH=/stub:/bin pacman --config pacman.conf --root $PWD/root \
        --dbpath $PWD/root/db --cachedir $PWD/root/db --logfile $PWD/root/pacman.log \
        --hookdir $PWD/root/db --gpgdir $PWD/root/db --noconfirm";
    lives_of_the_package(
        "arch",
        &format!("{pacman} -U --nodeps --nodeps package"),
        &format!("{pacman} -U --nodeps --nodeps package"),
        &format!("{pacman} -R --nodeps --nodeps wsl-binfmt-generator"),
    )
}

/// Plays the life of a package that was built in the scratch directory of that name: on WSL2,
/// elsewhere, and where systemd does not run, or is another system's.
///
/// The programs are this machine's, in a tree of their own, and PID 1 is a shell. systemctl only
/// writes down how it is called, has the generator run as systemd would, and fails: no package
/// operation may.
fn lives_of_the_package(
    name: &str,
    install: &str,
    upgrade: &str,
    remove: &str,
) -> anyhow::Result<()> {
    let systemctl = r#"#!/bin/sh
        [ "$1" != show ] || { echo LoadState=loaded; exit 0; }
        echo "systemctl $*" >>/calls
        generator=/usr/lib/systemd/system-generators/wsl-binfmt-generator
        if [ "$*" = daemon-reload ]; then
            rm -rf /run/systemd/generator.early
            mkdir /run/systemd/generator.early
            [ ! -e $generator ] || env -i SYSTEMD_SCOPE=system SYSTEMD_IN_INITRD=0 \
                SYSTEMD_VIRTUALIZATION="$(cat /virtualization)" WSL_BINFMT_ROOT=/wsl \
                $generator /run/systemd/generator.early 2>>/calls
        fi
        exit 1"#;
    let directory = scratch(name)?;
    fs::write(directory.join("systemctl"), systemctl)?;
    let life = |virtualization: &str, systemd: &str, guard: &str, environment: &str, pid1: &str| {
        let mut script = format!(
            r#"
            rm -rf root
            for i in bin sbin lib lib64; do
                [ ! -d /usr/$i ] || {{ mkdir -p root/$i; mount --bind /usr/$i root/$i; }}
            done
            mkdir -p root/dev root/proc root/stub root/usr root/db {systemd} root/run/wsl-binfmt
            mount --rbind /dev root/dev
            mount --rbind /proc root/proc
            cp -r "$SOURCE/tests/generate/01-wsl2/root" root/wsl
            install systemctl root/stub
            cp /bin/sh root/stub/systemd
            mkfifo root/done
            echo {virtualization} >root/virtualization
            mount -t tmpfs none root/proc/sys/fs
            mkdir root/proc/sys/fs/binfmt_misc
            status=root/proc/sys/fs/binfmt_misc/status
            echo ours >root/run/wsl-binfmt/status
            echo "WSL's" >root/run/status
            echo "the kernel's" >$status
            mount --bind root/run/{guard} $status
            live() {{
            until [ -e root/started ]; do sleep 0.01; done
            "#
        );
        for (done, command) in [("installed", install), ("upgraded", upgrade), ("removed", remove)]
        {
            script += &format!("echo {done} >>root/calls\n");
            script += &format!("{environment} {command} >log 2>&1 || {{ cat log; exit 1; }}\n");
        }
        script += &format!(
            r#"
            cat root/calls $status
            (cd root; mkdir -p usr; find run usr -type l -o -type f | sort)
            }}
            ( (live); echo $? >root/done ) &
            cd root
            exec {pid1} -c ': >started; read status <done; exit $status'"#
        );
        let file = directory.join("life.sh");
        fs::write(file, script)?;
        sh(
            name,
            "unshare --map-root-user --mount --pid --fork --kill-child --mount-proc sh -eu life.sh",
        )
    };
    let (systemd, own) = ("root/run/systemd/system", "chroot . /stub/systemd");
    assert_eq!(
        life("container:wsl", systemd, "wsl-binfmt/status", "", own)?,
        "installed\n\
         systemctl daemon-reload\n\
         systemctl restart wsl-binfmt-guard.service\n\
         systemctl restart systemd-binfmt.service\n\
         systemctl restart wsl-interop-restore.service\n\
         upgraded\n\
         systemctl daemon-reload\n\
         systemctl restart wsl-binfmt-guard.service\n\
         systemctl restart systemd-binfmt.service\n\
         systemctl restart wsl-interop-restore.service\n\
         removed\n\
         systemctl daemon-reload\n\
         systemctl stop wsl-interop-restore.service* wsl-binfmt-guard.service*\n\
         the kernel's\n\
         run/status\n"
    );
    assert_eq!(
        life("none", systemd, "status", "", own)?,
        "installed\n\
         systemctl daemon-reload\n\
         upgraded\n\
         systemctl daemon-reload\n\
         removed\n\
         systemctl daemon-reload\n\
         systemctl stop wsl-interop-restore.service* wsl-binfmt-guard.service*\n\
         WSL's\n\
         run/status\n"
    );
    for (place, systemd, environment, pid1) in [
        ("no systemd", "", "", own),
        ("a chroot with the host's /run", systemd, "", "stub/systemd"),
        ("a container with it", systemd, "", "chroot . /bin/sh"),
        ("an image being made", systemd, "SYSTEMD_OFFLINE=1", own),
    ] {
        let seen = life("container:wsl", systemd, "wsl-binfmt/status", environment, pid1)?;
        let untouched = "installed\nupgraded\nremoved\nours\nrun/status\nrun/wsl-binfmt/status\n";
        assert_eq!(seen, untouched, "{place}");
    }
    Ok(())
}

/// Against stand-ins for nixpkgs, which Debian does not have: that the package builds, and that
/// NixOS takes the module, is not tested.
#[test]
fn nix_evaluates_the_package_and_the_module() -> anyhow::Result<()> {
    if !extent::has("THE PACKAGE OF NIX IS")? || !have_programs(PROGRAMS)? {
        return Ok(());
    }
    let nix = r#"
        directory:
        let
          lib = {
            fileset.difference = all: without: builtins.deepSeq without all;
            fileset.maybeMissing = path: path;
            fileset.unions = paths: paths;
            fileset.toSource = { root, fileset }: builtins.seq fileset root;
            licenses.mit = "MIT";
            literalExpression = text: text;
            mkEnableOption = text: { default = false; };
            mkIf = condition: content: if condition then content else { };
            mkOption = option: option;
            platforms.linux = [ "x86_64-linux" ];
            types.package = "package";
          };
          pkgs = {
            inherit lib;
            cargo = "cargo";
            meson = "meson";
            ninja = "ninja";
            rustc = "rustc";
            rustPlatform.cargoSetupHook = "hook";
            rustPlatform.importCargoLock = { lockFile }: (fromTOML (builtins.readFile lockFile)).package;
            stdenv.mkDerivation = attributes: attributes // { outPath = "/store"; };
            callPackage = file: overrides:
              let package = import file;
              in package (builtins.intersectAttrs (builtins.functionArgs package) pkgs // overrides);
          };
          package = pkgs.callPackage (directory + "/package.nix") { };
          module = enable:
            let
              self = import (directory + "/module.nix") {
                inherit lib pkgs;
                config.programs.wsl-binfmt-generator = {
                  inherit enable;
                  package = self.options.programs.wsl-binfmt-generator.package.default;
                };
              };
            in self.config;
        in {
          inherit (package) version mesonFlags;
          root = builtins.pathExists (package.src + "/meson.build");
          # importCargoLock has no other way to check a crate.
          unchecked = map (p: p.name) (builtins.filter (p: p ? source && !(p ? checksum)) package.cargoDeps);
          on = module true;
          off = module false;
        }"#;
    fs::write(scratch("nix")?.join("check.nix"), nix)?;
    let json = sh(
        "nix",
        r#"
        HOME=$(pwd -P)
        export HOME NIX_STATE_DIR="$HOME/state" NIX_STORE_DIR="$HOME/store"
        nix-instantiate --parse "$SOURCE"/packaging/nix/*.nix >/dev/null
        nix-instantiate --eval --strict --json --store dummy:// \
            --expr "import ./check.nix $SOURCE/packaging/nix""#,
    )?;
    let generator = "lib/systemd/system-generators";
    // Warnings about the machine come first.
    let json = json.lines().last().unwrap_or_default();
    let found: serde_json::Value = serde_json::from_str(json).context(json.to_owned())?;
    let expected = serde_json::json!({
        "version": VERSION,
        "mesonFlags": [format!("-Dsystemdsystemgeneratordir={generator}")],
        "root": true,
        "unchecked": [],
        "on": {
            "environment": { "systemPackages": ["/store"] },
            "systemd": { "generators": {
                "wsl-binfmt-generator": format!("/store/{generator}/wsl-binfmt-generator"),
            } },
        },
        "off": {},
    });
    assert_eq!(found, expected);
    Ok(())
}

/// The directory with the archives that packages are built from.
fn sources() -> anyhow::Result<()> {
    static MADE: OnceLock<Result<(), String>> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        sh("sources", r#""$SOURCE/packaging/make-sources" ."#)
            .map(drop)
            .map_err(|e| format!("{e:#}"))
    });
    made.clone().map_err(anyhow::Error::msg)
}
