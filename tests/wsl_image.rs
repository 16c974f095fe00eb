//! The image for WSL that `packaging/wsl/build-image` makes of Debian 13 with the Debian package:
//! what is in it, its first run, and whether Windows programs start in it under every WSL.

#[allow(dead_code)] // Each user needs a part of it.
mod ours;
mod shell;

use std::fs;
use std::path::PathBuf;

use anyhow::{ensure, Context};
use wsl_vm::Machine;

use ours::debian_package::DebianPackage;
use shell::{have_programs, scratch, sh};

/// In bytes.
const LARGEST: u64 = 100_000_000;

/// Modes, owners and links of what WSL, and Microsoft's validator of images, look at.
const FILES: &str = "\
    -rw-r--r-- 0/0 ./etc/machine-id\n\
    -rw-r--r-- 0/0 ./etc/passwd\n\
    -rw-r----- 0/42 ./etc/shadow\n\
    -rw-r--r-- 0/0 ./etc/wsl-distribution.conf\n\
    -rw-r--r-- 0/0 ./etc/wsl.conf\n\
    -rwxr-xr-x 0/0 ./usr/lib/systemd/system-generators/wsl-binfmt-generator\n\
    drwxr-xr-x 0/0 ./usr/lib/wsl/\n\
    -rwxr-xr-x 0/0 ./usr/lib/wsl/first-run\n\
    -rw-r--r-- 0/0 ./usr/lib/wsl/icon.ico\n\
    -rw-r--r-- 0/0 ./usr/lib/wsl/terminal-profile.json\n\
    lrwxrwxrwx 0/0 ./usr/sbin/init\n";

/// Makes it once, or says loudly why it cannot be made here; in CI that is a failure.
fn image() -> anyhow::Result<Option<PathBuf>> {
    if !Machine::is_had_for("THE IMAGE FOR WSL IS")? {
        return Ok(None);
    }
    if !have_programs("gzip:gzip mmdebstrap:mmdebstrap tar:tar")? {
        return Ok(None);
    }
    let package = DebianPackage::built()?.directory.join("package");
    let link = scratch("image")?.join("package");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(package, link)?;
    // What it is made of; the rest is Debian's.
    sh(
        "image",
        r#"
        of=$( (cat package/*.deb; find "$SOURCE/packaging/wsl" -type f -print0 | sort -z |
            xargs -0 cat) | sha256sum)
        if [ "$of" != "$(cat made-of 2>/dev/null)" ]; then
            SOURCE_DATE_EPOCH=1700000000 "$SOURCE/packaging/wsl/build-image" \
                --package package/wsl-binfmt-generator_*.deb debian.wsl
            echo "$of" >made-of
        fi"#,
    )?;
    Ok(Some(scratch("image")?.join("debian.wsl")))
}

#[test]
fn the_image_is_as_wsl_wants_it_and_windows_programs_start_in_it() -> anyhow::Result<()> {
    let Some(image) = image()? else {
        return Ok(());
    };
    let size = image.metadata()?.len();
    ensure!(size < LARGEST, "{size} bytes");
    let sh = |script: &str| sh("image", script);

    let listed = sh(r"tar -tvzf debian.wsl --numeric-owner |
        sed -E 's,^([^ ]+ [^ ]+) .* (\./[^ ]*)( -> .*)?$,\1 \2,' >list
        grep -E ' \./(etc/(machine-id|passwd|shadow|wsl.*)|usr/lib/wsl/.*|usr/sbin/init|.*/wsl-binfmt-generator)$' list |
        grep -v -e /doc/ -e /lintian/ | sort -k 3")?;
    assert_eq!(listed, FILES);
    // Nothing of the machine that it was made on, and nothing that two distros must not share.
    let traces = sh(r#"
        grep -E ' \./(etc/(hostname|resolv.conf)|root/[^.]|home/.|tmp/.|var/log/.|var/lib/apt/lists/[^lp])' list || true
        rm -rf root; mkdir root; tar -xzf debian.wsl -C root --exclude './dev/*'
        cat root/etc/machine-id
        grep -rlF -e "$(hostname -f 2>/dev/null || hostname)." -e "$SOURCE" root/etc root/var || true"#)?;
    assert_eq!(traces, "");

    // Without a terminal a user is made, once; what fails is said, and leaves nothing behind.
    let first_run = |environment: &str| {
        sh(&format!(
            "status=0; env {environment} chroot root /usr/lib/wsl/first-run </dev/null || status=$?; echo status $status"
        ))
    };
    let said = first_run("WSL_USER='Not a name'")?;
    ensure!(said.ends_with("status 1\n"), "{said}");
    ensure!(
        said.contains("the user 'Not a name' could not be made"),
        "{said}"
    );
    let said = first_run("A=b")?;
    ensure!(said.ends_with("status 0\n"), "{said}");
    let user = sh("chroot root id user; stat -c %u root/home/user")?;
    ensure!(
        user.starts_with("uid=1000(user)") && user.contains("(sudo)"),
        "{user}"
    );
    ensure!(user.ends_with("\n1000\n"), "{user}");
    let said = first_run("A=b")?;
    ensure!(
        said == "The user user is there already.\nstatus 0\n",
        "{said}"
    );

    let table =
        sh(r#"cd "$SOURCE"; exec "$CARGO" run --locked --quiet -p wsl-vm -- "$OLDPWD/debian.wsl""#)
            .context("under every WSL")?;
    ensure!(table.ends_with("All of it holds.\n\n"), "{table}");
    Ok(())
}
