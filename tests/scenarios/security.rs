//! That nobody gains anything by this project who is not root already.

use std::fs;

use anyhow::ensure;

use crate::verbs::Test;

/// What nobody of the distro gets, and what root keeps.
pub const SECURITY: &[Test] = &[("security: release removes nothing but entries", |vm| {
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
})];
