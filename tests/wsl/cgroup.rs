//! A cgroup for each VM, and distros' cgroups in it. It is also how nothing of a VM is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use nix::sys::statvfs::{statvfs, FsFlags};

/// A cgroup for everything in one VM; dropped, nothing of it is left.
pub struct Cgroup {
    pub path: PathBuf,
}

impl Cgroup {
    pub fn new() -> anyhow::Result<Cgroup> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("wsl-vm-{}-{number}", std::process::id());
        let path = hierarchy()?.join(name);
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Cgroup { path })
    }

    pub fn add(&self, child: &Child) -> anyhow::Result<()> {
        fs::write(self.path.join("cgroup.procs"), child.id().to_string())
            .with_context(|| format!("moving the VM to {}", self.path.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("removing {}: {error:#}", self.path.display());
        }
    }
}

/// Where cgroups of version 2 are: on a hybrid machine not at the top.
fn hierarchy() -> anyhow::Result<&'static Path> {
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(Path::new)
        .into_iter()
        .find(|path| path.join("cgroup.procs").exists())
        .context("no cgroup2 file system below /sys/fs/cgroup")
}

/// Whether there is one, and it can be written to.
pub fn may_be_made() -> bool {
    let flags = hierarchy().and_then(|path| Ok(statvfs(path)?.flags()));
    flags.is_ok_and(|flags| !flags.contains(FsFlags::ST_RDONLY))
}

/// Kills what is in a cgroup and below, and removes it.
fn remove(path: &Path) -> anyhow::Result<()> {
    fs::write(path.join("cgroup.kill"), "1").context("killing what is in it")?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Err(error) = remove_directories(path) {
        // The dead leave a moment later.
        ensure!(Instant::now() < deadline, "{error}");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn remove_directories(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_directories(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// Takes away what a run that was killed has left.
pub fn remove_those_of_the_dead() -> anyhow::Result<()> {
    for entry in fs::read_dir(hierarchy()?)? {
        let entry = entry?;
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix("wsl-vm-")?.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}
