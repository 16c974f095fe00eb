//! The program `wsl-vm` with images that nobody here made: what it says of those that it cannot try, and
//! that it tries the others. The image that is made here is in `scenarios/image_for_wsl.rs`.

#[allow(dead_code)] // Each user needs a part of it.
mod ours;
mod shell;

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use wsl_vm::{Machine, Needs};

use ours::extent;
use shell::{have_programs, scratch, sh};

/// All at once, as two programs that install something disturb each other.
const PROGRAMS: &str =
    "bsdtar:libarchive-tools gzip:gzip mmdebstrap:mmdebstrap setfattr:attr tar:tar";

/// How each is made in an empty directory, and what is said of it, after its name.
const HOSTILE: &[(&str, &str)] = &[
    ("mkdir image", "there is no /sbin/init in it"),
    ("tar -cPf image --transform 's,^d,/outside/evil,' d", "there is no /sbin/init in it"),
    ("tar -cPf image --transform 's,^d,../../evil,' d", "it does not unpack: ../../evil/: Path contains '..'"),
    (
        "ln -s \"$PWD/outside\" out; tar -cf image out; rm out; mkdir out; cp d/file out; tar -rf image out/file",
        "it does not unpack: out/file: Cannot extract through symlink",
    ),
    ("head -c 100000 /dev/urandom >d/noise; tar -czf - d | head -c 90000 >image", "the archive is damaged"),
    ("echo garbage >image", "it is neither a directory nor a tar archive"),
    ("mkfifo image", "it is neither a file nor a directory"),
    ("truncate -s 300M zero; tar -cSf image zero; tar -cf - zero | gzip -1 >image", "unpacked it has more than 95 MiB"),
    (
        "mkdir -p tree/sbin; cp /bin/true tree/sbin/init; tar -cf image -C tree .",
        "systemd",
    ),
    ("true", "there is no such file"),
];

#[test]
fn what_cannot_be_tried_gets_one_clear_line_and_leads_nowhere_outside() -> anyhow::Result<()> {
    if !can_be_tried()? {
        return Ok(());
    }
    for (made, said) in HOSTILE {
        let output = sh(
            "hostile",
            &format!(
                r#"rm -rf image d out outside tree zero
                mkdir d outside; echo x >d/file
                {made}
                status=0; ../links/wsl-vm --limit 100000000 image >said 2>&1 || status=$?
                echo status $status
                grep -v -e 'unpacking it' -e 'waiting until' -e '^$' said
                ls -A outside"#
            ),
        )?;
        let lines: Vec<&str> = output.lines().collect();
        ensure!(lines.len() == 2, "{made}: {output}");
        ensure!(lines[0] == "status 2", "{made}: {output}");
        ensure!(lines[1].starts_with("image: ") && lines[1].contains(said), "{made}: {output}");
    }
    Ok(())
}

#[test]
fn debian_11_13_and_testing_are_tried_as_tars() -> anyhow::Result<()> {
    let suites = extent::of_long(&["bullseye", "trixie", "forky"]);
    if !has_trees(&suites)? || !can_be_tried()? {
        return Ok(());
    }
    // Stock, under a WSL that does nothing for interop.
    let tried = |suite: &str| {
        sh(
            "debian",
            &format!(
                r#"tar -cf {suite}.tar --exclude './dev/*' -C ../links/trees/{suite} .
                ../links/wsl-vm --wsl 1.2.5 {suite}.tar 2>/dev/null || echo status $?
                rm {suite}.tar"#
            ),
        )
    };
    // Side by side: for minutes after files were removed, ext4 without a journal is slow to make others.
    let outputs: Vec<_> = thread::scope(|scope| {
        let tried = &tried;
        let running: Vec<_> =
            suites.into_iter().map(|suite| scope.spawn(move || tried(suite))).collect();
        running.into_iter().map(|tried| tried.join().expect("it does not panic")).collect()
    });
    for output in outputs {
        let output = output?;
        ensure!(output.contains("Exec") || output.contains("do not start"), "{output}");
        ensure!(output.ends_with("status 1\n"), "{output}");
    }
    Ok(())
}

/// Debian 13 with what images of other distributions have, and without what they may lack.
const UNUSUAL: &str = r#"
    rm -rf tree; cp -a ../links/trees/trixie/. tree
    cd tree
    rm -f bin/bash usr/bin/python3*
    # SELinux labels, systemd by an absolute link, a user of a domain, device nodes, odd names.
    setfattr -n security.selinux -v system_u:object_r:init_exec_t:s0 usr/lib/systemd/systemd
    setfattr -n user.note -v "a blank" etc/os-release
    rm -f sbin/init usr/sbin/init; ln -s /nix/store/system/init usr/sbin/init
    mkdir -p nix/store/system; ln -s /usr/lib/systemd/systemd nix/store/system/init
    mkdir home/far; chown 1234567890:1234567890 home/far
    mknod dev/sda b 8 0; mknod dev/mem c 1 1; mkfifo run/fifo
    ln -s /nowhere etc/dangling; touch "etc/a name
in two lines" etc/$(printf 'b\374cher')
    cd ..
    bsdtar --xattrs --options gzip:compression-level=1 -czf image.tar.gz -C tree .
    rm -r tree
    # A run that was killed has left another one, which nothing but the lock tells from one in use.
    images="$(realpath ../links/trees)/../images"
    mkdir -p "$images/killed/etc" "$images/killed.unfinished" "$images/used"
    touch "$images/killed.lock" "$images/used.lock"
    # Two at once, of which the last takes away what was unpacked, with the umask of somebody careful.
    umask 077
    exec 9<"$images/used.lock"
    flock --shared 9
    ../links/wsl-vm --wsl 1.2.5 image.tar.gz >beside 2>&1 &
    ../links/wsl-vm --wsl 1.2.5 image.tar.gz 2>said || echo status $?
    wait $! || echo beside it status $?
    cat said
    unpacked=$(sha256sum image.tar.gz | cut -c 1-16)
    ls -d "$images/$unpacked" || echo nothing is left
    [ ! -e "$images/killed" ]
    [ ! -e "$images/killed.unfinished" ]
    ls -d "$images/used" >/dev/null
    exec 9<&-
    rm -r image.tar.gz "$images/used" "$images/used.lock" "$images/killed.lock"
"#;

#[test]
fn an_image_with_labels_nodes_far_users_and_absolute_links_is_tried() -> anyhow::Result<()> {
    if !extent::has("AN IMAGE WITH LABELS, NODES AND FAR USERS IS")?
        || !has_trees(&["trixie"])?
        || !can_be_tried()?
    {
        return Ok(());
    }
    let output = sh("unusual", UNUSUAL)?;
    ensure!(output.contains("do not start"), "{output}");
    ensure!(output.contains("running"), "{output}");
    for line in ["status 1", "beside it status 1", "nothing is left"] {
        ensure!(output.contains(&format!("\n{line}\n")), "{output}");
    }
    Ok(())
}

/// What a machine may lack: how to run a program so, and what is then said.
const LACKS: [(&str, &str); 6] = [
    ("unshare --user --map-user=1000", "the simulated WSL VM needs root"),
    ("setpriv --bounding-set -sys_admin", "the simulated WSL VM needs CAP_SYS_ADMIN"),
    (
        r#"unshare --mount sh -c 'for i in /sys/fs/cgroup/unified /sys/fs/cgroup; do
            [ ! -e $i/cgroup.procs ] || mount -o remount,bind,ro $i
        done; exec "$0" "$@"'"#,
        "needs a cgroup2 file system that can be written to",
    ),
    (
        r#"unshare --mount sh -c 'mount --bind release /proc/sys/kernel/osrelease; exec "$0" "$@"'"#,
        "newer; this is 6.6.0",
    ),
    ("unshare --net", "could not be made, for which a network is needed: "),
    (r#"env "PATH=$PWD/bin""#, "SKIPPED: packages are missing: mmdebstrap"),
];

#[test]
fn what_the_machine_lacks_is_said_in_one_line_and_is_a_failure_in_ci() -> anyhow::Result<()> {
    if !Machine::is_had_for("WHAT A MACHINE MAY LACK IS")? || !have_programs(PROGRAMS)? {
        return Ok(());
    }
    let program = std::env::current_exe()?;
    let program = program.to_str().context("a path that is not UTF-8")?.replace('\'', r"'\''");
    for (lacking, said) in LACKS {
        let output = sh(
            "lacks",
            &format!(
                r#"rm -rf bin nothing; mkdir bin; echo 6.6.0 >release
                IFS=:; for directory in $PATH; do
                    ln -s "$directory"/* bin 2>/dev/null || true
                done
                rm -f bin/apt* bin/dpkg* bin/mmdebstrap
                unset IFS WSL_TESTS CI RUST_TEST_NOCAPTURE
                export WSL_VM_DIRECTORY="$PWD/nothing"
                set -- '{program}' --exact debian_11_13_and_testing_are_tried_as_tars
                {lacking} "$@" 2>&1 >/dev/null | sed '/^$/d'
                export CI=true
                {lacking} "$@" >/dev/null 2>&1 || echo "a failure in CI""#
            ),
        )?;
        let lines: Vec<&str> = output.lines().collect();
        ensure!(lines.len() == 2 && lines[0].contains(said), "{lacking}: {output}");
        ensure!(lines[1] == "a failure in CI", "{lacking}: {output}");
    }
    Ok(())
}

/// Whoever removes what a killed mmdebstrap leaves must not find the machine's /dev and /sys in it.
#[test]
fn making_a_tree_mounts_nothing_on_the_machine_even_if_it_is_killed() -> anyhow::Result<()> {
    if !extent::has("KILLED MAKING OF A TREE IS")? || !has_trees(&["trixie"])? {
        return Ok(());
    }
    let directory = scratch("killed")?;
    let tree = directory.join("trixie.unfinished").to_string_lossy().into_owned();
    // Made whole, it would not be made again.
    let _ = fs::remove_file(directory.join("trixie.packages"));
    let has_mounts = |process: &str| {
        let mounts = fs::read_to_string(format!("/proc/{process}/mountinfo"));
        mounts.is_ok_and(|mounts| mounts.contains("killed/trixie.unfinished"))
    };
    let making = thread::spawn(move || wsl_vm::debian::tree(&directory, "trixie", "systemd", None));
    let mut killed = 0;
    while !making.is_finished() {
        ensure!(!has_mounts("self"), "the machine has mounts in {tree}");
        for process in fs::read_dir("/proc")? {
            let process = process?.file_name().to_string_lossy().into_owned();
            let Ok(pid) = process.parse() else { continue };
            let command = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&command).contains(&tree) && has_mounts(&process) {
                // It may have ended meanwhile.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                killed += 1;
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
    let made = making.join().expect("making a tree does not panic");
    ensure!(killed > 0 && made.is_err(), "{killed} killed: {made:?}");
    ensure!(!has_mounts("self"), "the machine has mounts in {tree}");
    Ok(())
}

/// Whether these Debian trees are there, or can be made.
fn has_trees(suites: &[&str]) -> anyhow::Result<bool> {
    let what = "IMAGES OF DEBIAN ARE";
    let needs = Needs { suites, packages: ours::PACKAGES, ..Needs::default() };
    Ok(Machine::is_had_for(what)?
        && have_programs(PROGRAMS)?
        && Machine::is_prepared_for(what, &needs)?)
}

/// Builds the program, once, or says loudly where it cannot run; in CI that is a failure.
fn can_be_tried() -> anyhow::Result<bool> {
    static BUILT: Mutex<bool> = Mutex::new(false);
    if !Machine::is_had_for("IMAGES ARE")? || !have_programs(PROGRAMS)? {
        return Ok(false);
    }
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if *built {
        return Ok(true);
    }
    sh("links", r#"cd "$SOURCE"; "$CARGO" build --locked --quiet -p wsl-vm"#)?;
    // Beside the test's own directory, `deps`; a shell may not like the way there.
    let program = std::env::current_exe()?;
    let profile = program.ancestors().nth(2).context("no directory")?;
    let target = profile.parent().context("no directory")?;
    for (name, to) in [("wsl-vm", profile.join("wsl-vm")), ("trees", target.join("wsl-vm/trees"))] {
        let link = scratch("links")?.join(name);
        let _ = fs::remove_file(&link);
        symlink(to, link)?;
    }
    *built = true;
    Ok(true)
}
