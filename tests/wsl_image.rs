//! The image for WSL that `packaging/wsl/build-image` makes of Debian 13 with the Debian package:
//! what is in it, its first run, and whether Windows programs start in it under every WSL.

mod image;
#[allow(dead_code)] // Each user needs a part of it.
mod ours;
mod shell;

use anyhow::{ensure, Context};
use wsl_vm::Machine;

use ours::extent;
use shell::{have_programs, sh};

#[test]
fn the_image_is_as_wsl_wants_it_and_windows_programs_start_in_it() -> anyhow::Result<()> {
    if !extent::has("THE IMAGE FOR WSL IS")?
        || !Machine::is_had_for("THE IMAGE FOR WSL IS")?
        || !have_programs("gzip:gzip mmdebstrap:mmdebstrap tar:tar")?
    {
        return Ok(());
    }
    let run = |script: &str| sh("image", script);
    let image = image::make("image", "", &run)?;
    image::examine(&image, &run)?;
    image::first_run(&run)?;

    let table = run(
        r#"cd "$SOURCE"; exec "$CARGO" run --locked --quiet -p wsl-vm -- "$OLDPWD/debian.wsl""#,
    )
    .context("under every WSL")?;
    ensure!(table.ends_with("All of it holds.\n\n"), "{table}");
    Ok(())
}
