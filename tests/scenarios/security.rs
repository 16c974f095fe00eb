//! That nobody gains anything by this project who is not root already.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::ensure;

use crate::verbs::Test;

/// What empties the table when `-1` is written to it.
const STATUS: &str = "/proc/sys/fs/binfmt_misc/status";

/// What nobody of the distro gets, and what root keeps.
pub const SECURITY: &[Test] = &[
    (
        "security: what is written below /run is root's, whatever the umask",
        |vm| {
            let program = vm.generator().get_program().to_string_lossy().into_owned();
            for umask in ["000", "022", "077"] {
                let script = format!(
                    "umask {umask}; {program} guard && {program} release --remember &&
                stat --format='%a %n' /run/wsl-binfmt /run/wsl-binfmt/*
                umount {STATUS}; rm -r /run/wsl-binfmt"
                );
                let output = Command::new("sh").args(["-c", &script]).output()?;
                let modes = String::from_utf8(output.stdout)?;
                let expected = "755 /run/wsl-binfmt\n\
                    644 /run/wsl-binfmt/registered\n644 /run/wsl-binfmt/status\n";
                ensure!(modes == expected, "umask {umask}: {modes}");
            }
            // Nor whatever was there.
            fs::create_dir("/run/wsl-binfmt")?;
            for path in ["/run/wsl-binfmt", "/run/wsl-binfmt/status"] {
                let _ = fs::File::create_new(path);
                fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
            }
            ensure!(vm.generator().arg("guard").status()?.success());
            for (path, expected) in [
                ("/run/wsl-binfmt", 0o755),
                ("/run/wsl-binfmt/status", 0o644),
            ] {
                let mode = fs::metadata(path)?.permissions().mode() & 0o7777;
                ensure!(mode == expected, "{path}: {mode:o}");
            }
            Ok(())
        },
    ),
    ("security: release removes nothing but entries", |vm| {
        fs::write("/vm/outside", "outside\n")?;
        fs::create_dir("/run/wsl-binfmt")?;
        for name in [
            "../../../../../vm/outside",
            "/vm/outside",
            "./WSLInterop",
            "WSLInterop",
            "status",
            "./status",
            "register",
            "",
            ".",
            "..",
            "a\0b",
        ] {
            let inode = vm.entry_identity(name);
            let inode = inode.map_or("x".to_owned(), |inode| inode.to_string());
            for inode in [&inode, "x", "", "-1"] {
                fs::write(
                    "/run/wsl-binfmt/registered",
                    format!("{inode} {name}\n{name}\n \n"),
                )?;
                let output = vm.generator().arg("release").output()?;
                ensure!(output.status.success(), "{name}: {output:?}");
                ensure!(
                    vm.entry("WSLInterop").contains("PF"),
                    "{inode} {name} removed WSLInterop"
                );
                ensure!(
                    fs::read_to_string("/vm/outside")? == "outside\n",
                    "{name} was written to"
                );
            }
        }
        // It is not blind.
        vm.register(crate::promises::RULE)?;
        let inode = vm.entry_identity("testfmt")?;
        fs::write(
            "/run/wsl-binfmt/registered",
            format!("{inode} ../x\n{inode} testfmt\n"),
        )?;
        ensure!(vm.generator().arg("release").status()?.success());
        ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
        Ok(())
    }),
];
