//! What a distro's first processes do before systemd runs.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use nix::mount::{umount2, MntFlags, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::sys::signal::Signal;

use super::generation::Generation;
use super::vm::TABLE;
use super::{mount, PID1_STAGE};

/// Becomes the distro's keeper on the VM's side: makes the namespaces, and waits for its PID 1.
pub fn distro(directory: &str) -> anyhow::Result<()> {
    let directory = Path::new(directory);
    let procs = directory.join("cgroup/cgroup.procs");
    fs::write(&procs, std::process::id().to_string())?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    let mut namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    if directory.join("cgroup-namespace").exists() {
        namespaces |= CloneFlags::CLONE_NEWCGROUP;
    }
    unshare(namespaces).context("unsharing a distro's namespaces")?;
    let mut child = Command::new("/proc/self/exe")
        .arg(PID1_STAGE)
        .arg(directory)
        .stdout(Stdio::null())
        .spawn()?;
    println!("{}", child.id());
    child.wait()?;
    Ok(())
}

/// Becomes the distro's PID 1: mounts what WSL mounts, then runs systemd.
pub fn pid1(directory: &str) -> anyhow::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    let directory = Path::new(directory);
    let outside = |name: &str| directory.join(name).to_string_lossy().into_owned();
    let root = outside("root");
    let inside = |path: &str| format!("{root}{path}");

    mount_tree(directory, &root)?;
    keep_sysctls(&root)?;
    let image = fs::read_to_string(directory.join("image")).ok();
    if image.is_some() {
        keep_devices(&root)?;
    }
    // So that what is mounted below is seen in a second mount namespace of the distro, too. Not before:
    // it would also be seen below what is bound over itself here.
    mount("none", &inside("/proc"), "rshared", "")?;
    mount("cgroup2", &inside("/sys/fs/cgroup"), "cgroup2", "")?;
    mount_devices(&root)?;
    mount_run(&root)?;
    if let Some(units) = image {
        mask(units.lines(), &inside("/run/systemd/system.control"))?;
    }
    mount("binfmt_misc", &inside(TABLE), "binfmt_misc", "")?;
    let osrelease = inside("/proc/sys/kernel/osrelease");
    mount(&outside("osrelease"), &osrelease, "bind", "")?;
    if directory.join("init").exists() {
        make_file(&inside("/init"))?;
        mount(&outside("init"), &inside("/init"), "bind", "")?;
    }
    let generation = Generation::named(&fs::read_to_string(outside("generation"))?)?;
    let environment = fs::read_to_string(outside("environment"))?;
    let console = fs::File::create(outside("console"))?;
    let read_only = directory.join("read-only").exists();
    std::env::set_current_dir(&root)?;
    // The old root comes to lie on the new one, and is taken off: no directory is needed for it.
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    std::env::set_current_dir("/")?;
    // Not before: links in the distro's files lead to what is in the distro now.
    generation.prepare("", &environment)?;
    if read_only {
        let none: Option<&str> = None;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        nix::mount::mount(none, "/", none, flags, none)?;
    }
    let error = Command::new("/sbin/init")
        // Three variables, and no PATH.
        .env_clear()
        .envs(environment.lines().filter_map(|line| line.split_once('=')))
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console)
        .exec();
    Err(error).context("running /sbin/init")
}

/// Mounts the distro's own files, /proc and /sys.
fn mount_tree(directory: &Path, root: &str) -> anyhow::Result<()> {
    mount("none", "/", "rprivate", "")?;
    // userxattr: overlayfs in a user namespace could not remove or rename directories otherwise.
    let layers = format!(
        "lowerdir={},upperdir={},workdir={},userxattr",
        fs::read_link(directory.join("tree"))?.display(),
        directory.join("upper").display(),
        directory.join("work").display()
    );
    mount("overlay", root, "overlay", &layers)?;
    for name in ["proc", "sys", "dev", "run"] {
        make_directory(&format!("{root}/{name}"))?;
    }
    mount("proc", &format!("{root}/proc"), "proc", "")?;
    mount("sysfs", &format!("{root}/sys"), "sysfs", "")
}

fn mount_devices(root: &str) -> anyhow::Result<()> {
    let inside = |name: &str| format!("{root}/dev{name}");
    mount("tmpfs", &inside(""), "tmpfs", "mode=755")?;
    for device in ["null", "zero", "full", "random", "urandom", "tty", "kmsg"] {
        let node = inside(&format!("/{device}"));
        fs::write(&node, "")?;
        mount(&format!("/dev/{device}"), &node, "bind", "")?;
    }
    fs::create_dir(inside("/pts"))?;
    let options = "newinstance,ptmxmode=666";
    mount("devpts", &inside("/pts"), "devpts", options)?;
    symlink("pts/ptmx", inside("/ptmx"))?;
    fs::create_dir(inside("/shm"))?;
    mount("tmpfs", &inside("/shm"), "tmpfs", "")
}

fn mount_run(root: &str) -> anyhow::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_STRICTATIME;
    let run = format!("{root}/run");
    nix::mount::mount(Some("tmpfs"), &*run, Some("tmpfs"), flags, Some("mode=755"))
        .with_context(|| format!("mounting {run}"))?;
    mount("none", &run, "shared", "")
}

/// Makes a directory to mount on, in place of a link or whatever else is there.
fn make_directory(path: &str) -> anyhow::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => return Ok(()),
        Ok(_) => fs::remove_file(path)?,
        Err(_) => {}
    }
    fs::create_dir(path).with_context(|| format!("creating {path}"))
}

/// Makes a file to mount on, in the same way.
fn make_file(path: &str) -> anyhow::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => return Ok(()),
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path)?,
        Ok(_) => fs::remove_file(path)?,
        Err(_) => {}
    }
    let file = fs::OpenOptions::new().write(true).create_new(true).open(path);
    file.map(drop).with_context(|| format!("creating {path}"))
}

/// Makes read-only what root may write to in any user namespace, and what is the machine's: its
/// sysctls. The network's and the user namespace's are the VM's own. /proc/sys itself stays as it is,
/// for units that ask whether it can be written to.
fn keep_sysctls(root: &str) -> anyhow::Result<()> {
    keep(&format!("{root}/proc/sysrq-trigger"))?;
    for entry in fs::read_dir(format!("{root}/proc/sys"))? {
        let entry = entry?;
        if !["net", "user"].iter().any(|own| entry.file_name() == *own) {
            keep(&entry.path().to_string_lossy())?;
        }
    }
    Ok(())
}

/// The same with its devices.
fn keep_devices(root: &str) -> anyhow::Result<()> {
    mount("none", &format!("{root}/sys"), "read-only", "")?;
    ["bus", "fs", "irq"].iter().try_for_each(|name| keep(&format!("{root}/proc/{name}")))
}

fn keep(path: &str) -> anyhow::Result<()> {
    if Path::new(path).exists() {
        mount(path, path, "bind", "")?;
        mount(path, path, "read-only", "")?;
    }
    Ok(())
}

/// Masks units where no file of the distro's does any other thing.
fn mask<'a>(units: impl Iterator<Item = &'a str>, directory: &str) -> anyhow::Result<()> {
    fs::create_dir_all(directory)?;
    for unit in units {
        symlink("/dev/null", format!("{directory}/{unit}"))?;
    }
    Ok(())
}
