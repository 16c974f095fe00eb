//! What `packaging/wsl/build-image` makes, and what is looked at in it, for whatever architecture.
//! `run` runs a shell script in a directory that is kept, as root of a system that can run the
//! image's programs.

use std::path::{Path, PathBuf};

use anyhow::ensure;

use super::shell::scratch;

/// In bytes.
const LARGEST: u64 = 100_000_000;

/// Modes, owners and links of what WSL, and Microsoft's validator of images, look at.
const FILES: &str = "\
    drwxr-xr-x 0/0 ./\n\
    drwxr-xr-x 0/0 ./etc/\n\
    -rw-r--r-- 0/0 ./etc/machine-id\n\
    -rw-r--r-- 0/0 ./etc/passwd\n\
    -rw-r----- 0/42 ./etc/shadow\n\
    -rw-r--r-- 0/0 ./etc/wsl-distribution.conf\n\
    -rw-r--r-- 0/0 ./etc/wsl.conf\n\
    drwxr-xr-x 0/0 ./usr/\n\
    drwxr-xr-x 0/0 ./usr/lib/\n\
    -rwxr-xr-x 0/0 ./usr/lib/systemd/system-generators/wsl-binfmt-generator\n\
    drwxr-xr-x 0/0 ./usr/lib/wsl/\n\
    -rwxr-xr-x 0/0 ./usr/lib/wsl/first-run\n\
    -rw-r--r-- 0/0 ./usr/lib/wsl/icon.ico\n\
    -rw-r--r-- 0/0 ./usr/lib/wsl/terminal-profile.json\n\
    lrwxrwxrwx 0/0 ./usr/sbin/init\n";

type Run<'a> = &'a dyn Fn(&str) -> anyhow::Result<String>;

/// Makes `debian.wsl` in the scratch directory of that name, where `run` works; once, and again when
/// something of ours in it has changed.
pub fn make(name: &str, arguments: &str, run: Run) -> anyhow::Result<PathBuf> {
    let directory = scratch(name)?;
    run(&format!(
        r#"
        of=$(cd "$SOURCE"; find Cargo.* build-aux man meson* packaging src units -type f -print0 |
            sort -z | xargs -0 cat | sha256sum)
        of="$of {arguments}"
        if [ "$of" != "$(cat made-of 2>/dev/null)" ]; then
            # It does not depend on the umask, nor on what the folder for what is temporary is called.
            mkdir -p "tmp folder"
            (umask 077; TMPDIR="$PWD/tmp folder" SOURCE_DATE_EPOCH=1700000000 \
                "$SOURCE/packaging/wsl/build-image" {arguments} debian.wsl)
            echo "$of" >made-of
        fi"#
    ))?;
    Ok(directory.join("debian.wsl"))
}

/// Its size, its files, and what must not be in it. Unpacks it, into `root` beside it.
pub fn examine(image: &Path, run: Run) -> anyhow::Result<()> {
    let size = image.metadata()?.len();
    ensure!(size < LARGEST, "{size} bytes");

    let listed = run(r"tar -tvzf debian.wsl --numeric-owner |
        sed -E 's,^([^ ]+ [^ ]+) .* (\./[^ ]*)( -> .*)?$,\1 \2,' >list
        grep -E ' \./(|etc/|usr/|usr/lib/|etc/(machine-id|passwd|shadow|wsl.*)|usr/lib/wsl/.*|usr/sbin/init|.*/wsl-binfmt-generator)$' list |
        grep -v -e /doc/ -e /lintian/ | sort -k 3")?;
    assert_eq!(listed, FILES);
    // Nothing of the machine that it was made on, and nothing that two distros must not share.
    let traces = run(r#"
        grep -E ' \./(etc/(hostname|resolv.conf)|root/[^.]|home/.|tmp/.|var/log/.|var/lib/apt/lists/[^lp])' list || true
        rm -rf root; mkdir root; tar -xzf debian.wsl -C root --exclude './dev/*'
        cat root/etc/machine-id
        grep -rlF -e "$(hostname -f 2>/dev/null || hostname)." -e "$SOURCE" root/etc root/var || true"#)?;
    assert_eq!(traces, "");
    Ok(())
}

/// Without a terminal a user is made in `root`, once; what fails is said and leaves nothing behind.
pub fn first_run(run: Run) -> anyhow::Result<()> {
    let first_run = |environment: &str| {
        run(&format!(
            "status=0; env {environment} chroot root /usr/lib/wsl/first-run </dev/null || status=$?; echo status $status"
        ))
    };
    let said = first_run("WSL_USER='Not a name'")?;
    ensure!(said.ends_with("status 1\n"), "{said}");
    ensure!(said.contains("the user 'Not a name' could not be made"), "{said}");
    let said = first_run("A=b")?;
    ensure!(said.ends_with("status 0\n"), "{said}");
    let user = run("chroot root id user; stat -c %u root/home/user")?;
    ensure!(user.starts_with("uid=1000(user)") && user.contains("(sudo)"), "{user}");
    ensure!(user.ends_with("\n1000\n"), "{user}");
    let said = first_run("A=b")?;
    ensure!(said == "The user user is there already.\nstatus 0\n", "{said}");
    Ok(())
}
