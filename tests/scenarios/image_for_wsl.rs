//! The image for WSL that `packaging/wsl/build-image` makes, of Debian 13: what is in it, its first run,
//! and Windows programs in it under every WSL.

use std::fs;

use anyhow::{ensure, Context};

use crate::build_image;
use crate::debian_build::Check;
use crate::ours::built_package::DebianPackage;
use crate::ours::extent::{extent, Extent};
use crate::shell::{have_programs, scratch, sh};

pub const IMAGE_FOR_WSL: &[Check] =
    &[("the image for WSL is as WSL wants it, and Windows programs start in it", made)];

fn made(package: &DebianPackage) -> anyhow::Result<()> {
    if !have_programs("bsdtar:libarchive-tools gzip:gzip tar:tar")? {
        return Ok(());
    }
    let built = fs::read_dir(package.directory.join("package"))?.next().context("no package")??;
    fs::copy(built.path(), scratch("image")?.join("package.deb"))?;
    // A release is made as people make it: with a package of its own, which takes as long again.
    let arguments = match extent() {
        Extent::Release => "",
        Extent::All | Extent::Usual => "--package package.deb",
    };
    let run = |script: &str| sh("image", script);
    let image = build_image::make("image", arguments, &run)?;
    build_image::examine(&image, &run)?;
    build_image::first_run(&run)?;

    let image = r#"image=$PWD/debian.wsl; cd "$SOURCE"
        "$CARGO" run --locked --quiet -p wsl-vm -- "$image""#;
    let table = run(image).context("under every WSL")?;
    ensure!(table.ends_with("All of it holds.\n\n"), "{table}");
    Ok(())
}
