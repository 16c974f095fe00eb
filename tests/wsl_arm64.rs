//! arm64, which more and more machines with WSL are, on one that is not: the Debian package that is
//! cross-built for it, and the image with that, run by qemu. It is the emulator of Debian 13, called
//! by its path, or registered in a binfmt_misc table that is not the machine's. There is no kernel
//! for arm64 here, so no systemd is booted on one.
#![cfg(not(target_arch = "aarch64"))] // There, all other tests are about it.

mod build_image;
#[allow(dead_code)] // Each user needs a part of it.
mod markdown;
#[allow(dead_code)] // Each user needs a part of it.
mod ours;
mod shell;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{ensure, Context};
use wsl_vm::Machine;

use markdown::InTheImage;
use ours::built_package::DebianPackage;
use ours::extent;
use shell::{have_programs, scratch, sh};

/// As Debian's qemu-user-binfmt has it, but for the interpreter: by a relative path, since that of
/// a checkout may have a colon in it.
const EMULATOR: &str = concat!(
    r":qemu-aarch64:M:",
    r":\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00",
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff",
    r":qemu-aarch64:PF"
);

/// `e_machine` of elf(5) for arm64.
const AARCH64: u16 = 183;

/// The package and what its program runs on, in the scratch directory `arm64`; or a loud word and
/// false where there can be none of it, and in CI an error.
fn is_ready() -> anyhow::Result<bool> {
    if !extent::has("ARM64 IS")?
        || !Machine::is_had_for("ARM64 IS")?
        || !have_programs("arch-test:arch-test gzip:gzip mmdebstrap:mmdebstrap tar:tar")?
    {
        return Ok(false);
    }
    static READY: OnceLock<Result<bool, String>> = OnceLock::new();
    let ready = READY.get_or_init(|| {
        let made = Machine::had_for("ARM64 IS", prepare());
        made.map(|made| made.is_some()).map_err(|error| format!("{error:#}"))
    });
    ready.clone().map_err(anyhow::Error::msg)
}

fn prepare() -> anyhow::Result<()> {
    let package = DebianPackage::built()?;
    let built = package.built_for_foreign()?;
    let directory = scratch("arm64")?;
    let native = env!("CARGO_BIN_EXE_wsl-binfmt-generator").into();
    for (name, to) in [("native", native), ("tree", package.tree), ("package", built)] {
        let link = directory.join(name);
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(to, link)?;
    }
    sh(
        "arm64",
        r#"
        rm -rf files
        dpkg-deb -x package/wsl-binfmt-generator_*.deb files
        cp files/usr/lib/systemd/system-generators/wsl-binfmt-generator program
        cp tree/usr/bin/qemu-aarch64 .
        ln -sfn tree/usr/aarch64-linux-gnu libraries
        cat >run <<'EOF'
#!/bin/sh
here=$(dirname "$0")
exec "$here/qemu-aarch64" -L "$here/libraries" "$@"
EOF
        chmod +x run"#,
    )?;
    Ok(())
}

/// Both outputs of a script that has a user namespace to itself, in which it is root of all users,
/// and with that a binfmt_misc table with no more in it than `entry`.
fn aside(name: &str, entry: &str, script: &str) -> anyhow::Result<String> {
    let inside = format!(
        "mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
        (cd ../arm64; printf %s '{entry}' >/proc/sys/fs/binfmt_misc/register)
        {script}"
    );
    fs::write(scratch(name)?.join("inside.sh"), inside)?;
    sh(
        name,
        r#"
        rm -f mapped
        mkfifo mapped
        unshare --user sh -euc 'read -r line <mapped
            exec unshare --mount --pid --fork --kill-child --mount-proc sh -eu inside.sh' &
        while [ /proc/$!/ns/user -ef /proc/self/ns/user ]; do sleep 0.01; done
        for map in uid_map gid_map; do echo 0 0 4294967295 >/proc/$!/$map; done
        echo >mapped
        wait $!"#,
    )
}

#[test]
fn the_generator_writes_the_golden_trees_under_emulation() -> anyhow::Result<()> {
    if !is_ready()? {
        return Ok(());
    }
    let said = sh(
        "arm64",
        r#"
        export GOLDEN_PROGRAM="$(realpath program)" GOLDEN_RUNNER="$PWD/run"
        cd "$SOURCE"
        "$CARGO" test --locked --quiet --test generate"#,
    )?;
    ensure!(said.contains("test result: ok. "), "{said}");
    ensure!(!said.contains(" 0 passed"), "{said}");
    Ok(())
}

/// What a distro is for them: a root directory with this machine's programs, a table, and WSL's
/// interop in it. $program is how ours is called.
const VERBS: &str = r#"
    table=/proc/sys/fs/binfmt_misc
    run() {
        echo "\$ $*"
        status=0
        $program "$@" || status=$?
        echo "exit status $status"
    }
    entries() {
        for i in $(ls $table | grep -v -e '^register$' -e '^status$' -e ^qemu); do
            echo "$i" $(grep -e ^interpreter -e ^flags $table/$i)
        done
    }
    run --version
    run --help
    run nothing
    (
        export WSL_BINFMT_ROOT=/tree
        for verb in restore guard release status; do run $verb; done
    )
    find /tree | sort

    run status
    run guard
    grep -c ' /proc/sys/fs/binfmt_misc/status ' /proc/self/mountinfo
    sh -c "echo -1 >$table/status" || echo "the table is guarded"
    ls run/wsl-binfmt
    run status --json

    mkdir etc/binfmt.d run/wsl-binfmt/systemd-binfmt
    for i in one two; do
        echo ":$i:E::$i::/init:" >etc/binfmt.d/$i.conf
        cat etc/binfmt.d/$i.conf >$table/register
    done
    run started systemd-binfmt
    entries
    for i in WSLInterop two; do echo -1 >$table/$i; done
    run restore
    entries

    $program restore --watch 2>/dev/null &
    await() { for i in $(seq 400); do ! "$@" || return 0; sleep 0.05; done; echo "not: $*"; }
    watches() { grep -qs ^inotify /proc/$!/fdinfo/*; }
    is_whole() { [ -e $table/WSLInterop ] && [ ! -e $table/WSLInterop-next ]; }
    await watches
    for i in WSLInterop two; do echo -1 >$table/$i; done
    await is_whole
    kill $!
    entries
    run release
    run stopping
    entries
"#;

#[test]
fn the_verbs_do_under_emulation_what_the_native_program_does() -> anyhow::Result<()> {
    if !is_ready()? {
        return Ok(());
    }
    let play = |program: &str, call: &str| {
        fs::write(scratch("verbs")?.join("verbs.sh"), VERBS)?;
        let script = format!(
            r#"
            mkdir -p root
            mount -t tmpfs -o mode=755 none root
            (cd root; mkdir dev etc libraries proc run tmp usr
            ln -s usr/bin usr/sbin usr/lib usr/lib64 .)
            for i in dev proc usr; do mount --rbind /$i root/$i; done
            [ ! -d /usr/lib/binfmt.d ] || mount -t tmpfs none root/usr/lib/binfmt.d
            cp -r "$SOURCE/tests/generate/01-wsl2/root" root/tree
            cp root/tree/proc/sys/kernel/osrelease root/osrelease
            mount --bind root/osrelease root/proc/sys/kernel/osrelease
            mount --bind ../arm64/libraries/. root/libraries
            cp ../arm64/qemu-aarch64 verbs.sh root
            cp ../arm64/{program} root/program
            install -m 755 /dev/null root/init
            mount --bind root/init root/init
            cd root
            exec chroot . env -i PATH=/sbin:/bin container=wsl program="{call}" sh -euc '
                cd /
                echo :WSLInterop:M::MZ::/init:FP >/proc/sys/fs/binfmt_misc/register
                . /verbs.sh'"#
        );
        aside("verbs", EMULATOR, &script)
    };
    let table = Machine::table()?;
    let native = play("native", "/program")?;
    let emulated = play("program", "/qemu-aarch64 -L /libraries /program")?;
    ensure!(emulated == native, "{emulated}\nbut the native program:\n{native}");
    for step in [
        "\n$ guard\nexit status 0\n1\n",
        "\nthe table is guarded\n",
        "\nwsl-binfmt-generator: WSLInterop was missing, registered it\n",
        "\nWSLInterop interpreter /init flags: PF\n\
         one interpreter /init flags:\n\
         two interpreter /init flags:\n\
         $ release\n\
         exit status 0\n\
         $ stopping\n\
         exit status 0\n\
         WSLInterop interpreter /init flags: PF\n",
    ] {
        ensure!(native.contains(step), "{native}");
    }
    assert_eq!(Machine::table()?, table);
    Ok(())
}

#[test]
fn build_image_says_so_where_programs_for_arm64_do_not_run() -> anyhow::Result<()> {
    if !is_ready()? {
        return Ok(());
    }
    let nothing_of_use = ":other:E::other::/bin/true:";
    let said = aside(
        "no-emulator",
        nothing_of_use,
        r#"
        status=0
        "$SOURCE/packaging/wsl/build-image" --arch arm64 debian.wsl || status=$?
        echo "exit status $status""#,
    )?;
    assert_eq!(
        said,
        "build-image: programs for arm64 do not run here: apt-get install qemu-user-static\n\
         exit status 1\n"
    );
    Ok(())
}

#[test]
fn the_image_for_arm64_is_as_wsl_wants_it_and_the_program_runs_in_it() -> anyhow::Result<()> {
    if !extent::has_for_release("THE IMAGE FOR ARM64 IS")? || !is_ready()? {
        return Ok(());
    }
    let run = |script: &str| aside("image", EMULATOR, script);
    let image = build_image::make(
        "image",
        "--arch arm64 --package ../arm64/package/wsl-binfmt-generator_*.deb",
        &run,
    )?;
    build_image::examine(&image, &run)?;
    let (programs, foreign) = programs(&scratch("image")?.join("root"))?;
    ensure!(programs > 500, "{programs} programs and libraries");
    ensure!(foreign.is_empty(), "not for arm64: {foreign:?}");

    build_image::first_run(&run)?;
    for document in ["README.md", "docs/image-maintainers.md"] {
        let document = InTheImage::of(document)?;
        fs::write(scratch("image")?.join("typed.sh"), &document.script)?;
        let typed = "mount -t proc proc root/proc
            mount --rbind /dev root/dev
            exec chroot root env -i PATH=/usr/sbin:/usr/bin sh <typed.sh";
        document.compare(&run(typed)?)?;
    }
    Ok(())
}

/// How many ELF files there are in a tree, and which of them are for something else than arm64.
fn programs(tree: &Path) -> anyhow::Result<(usize, Vec<String>)> {
    let (mut count, mut foreign) = (0, Vec::new());
    let mut directories = vec![tree.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let (kind, path) = (entry.file_type()?, entry.path());
            if kind.is_dir() {
                directories.push(path);
                continue;
            }
            let mut start = Vec::new();
            if kind.is_file() {
                let file = File::open(&path).with_context(|| path.display().to_string())?;
                file.take(20).read_to_end(&mut start)?;
            }
            let [0x7f, b'E', b'L', b'F', .., low, high] = start[..] else {
                continue;
            };
            count += 1;
            if start.len() < 20 || u16::from_le_bytes([low, high]) != AARCH64 {
                foreign.push(path.display().to_string());
            }
        }
    }
    Ok((count, foreign))
}
