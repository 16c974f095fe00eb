//! Inside the VM: its table of binary formats, and launching Windows programs.

use std::fs;
use std::io::{self, BufRead, ErrorKind, Write};
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use nix::sched::{unshare, CloneFlags};
use nix::sys::signal::Signal;
use nix::sys::stat::{umask, Mode};

use super::distro::Builder;
use super::machine::{Given, REQUEST};
use super::mount;

/// The table's mount point.
pub const TABLE: &str = "/proc/sys/fs/binfmt_misc";
/// What WSL's mini_init registers once for the VM.
pub const WSL_INTEROP: &str = ":WSLInterop:M::MZ::/init:FP";
/// A Windows program.
const EXE: &str = "/vm/hello.exe";
/// Another one, which rules for the extension `exe` do not take.
const NO_EXTENSION: &str = "/vm/hello";

/// The VM that this process runs in. It sees the machine's files where they are; in `/vm` is what it
/// has of its own, and in `/vm/NAME/upper` what a distro has beyond its tree, also before it boots.
pub struct Vm {
    pub(super) given: Given,
}

/// Becomes the VM's process and plays in it.
pub fn stage(play: impl FnOnce(&Vm) -> anyhow::Result<()>) -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .context("unsharing a user namespace")?;
    println!("unshared");
    io::stdin().lock().read_line(&mut String::new())?;
    // Not before: this process has only now been put into the VM's cgroup, which becomes the root.
    unshare(CloneFlags::CLONE_NEWCGROUP).context("unsharing a cgroup namespace")?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // Distros are for all their users, whatever this one's is.
    umask(Mode::from_bits_truncate(0o022));
    let vm = Vm::start()?;
    play(&vm)
}

impl Vm {
    /// A root of its own, since /init cannot be put into the machine's; in it, all that the
    /// machine has.
    fn start() -> anyhow::Result<Vm> {
        let given = Given::to_this_vm()?;
        let directory = given.directory.display();
        ensure!(!given.directory.starts_with("/vm"), "{directory}: /vm is the VM's own");
        mount("none", "/", "rprivate", "")?;
        let root = given.directory.join("root");
        let root = root.to_str().context("a path that is not UTF-8")?;
        mount("tmpfs", root, "tmpfs", "mode=755")?;
        for entry in fs::read_dir("/")? {
            let entry = entry?;
            let here = entry.path();
            let there = Path::new(root).join(entry.file_name());
            // Both are the VM's own.
            if ["vm", "init"].iter().any(|own| entry.file_name() == *own) {
                continue;
            }
            let kind = entry.file_type()?;
            if kind.is_symlink() {
                symlink(fs::read_link(&here)?, &there)?;
            } else if kind.is_dir() {
                fs::create_dir(&there)?;
                mount(&here.to_string_lossy(), &there.to_string_lossy(), "rbind", "")?;
            }
        }
        nix::unistd::chroot(root)?;
        std::env::set_current_dir("/")?;
        mount("binfmt_misc", TABLE, "binfmt_misc", "")?;
        // What programs write there is not the machine's, nor another VM's.
        mount("tmpfs", "/run", "tmpfs", "mode=755")?;

        fs::create_dir("/vm")?;
        for program in [&given.init()].into_iter().chain(&given.programs) {
            let name = program.file_name().context("a program has a name")?;
            let copy = Path::new("/vm").join(name);
            fs::copy(program, &copy).with_context(|| format!("copying {}", program.display()))?;
            // They were built with the umask of whoever built them.
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        }
        fs::write("/init", "")?;
        mount("/vm/init", "/init", "bind", "")?;
        for program in [EXE, NO_EXTENSION] {
            fs::write(program, b"MZ\x90\0hello")?;
            fs::set_permissions(program, fs::Permissions::from_mode(0o755))?;
        }

        let vm = Vm { given };
        vm.register(WSL_INTEROP)?;
        Ok(vm)
    }

    /// A distro of that name, to be booted from the tree of a Debian suite.
    pub fn distro(&self, name: &str, suite: &str) -> Builder<'_> {
        Builder::new(self, name, suite)
    }

    /// A distro of that name, to be booted from an image's root directory.
    pub fn image(&self, name: &str, tree: &Path) -> Builder<'_> {
        Builder::of_image(self, name, tree)
    }

    /// One of the programs that the VM needs, in an empty environment. It is in `/vm`, which no shell
    /// needs quoted.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(Path::new("/vm").join(program));
        command.env_clear();
        command
    }

    /// What a shell command prints that the machine runs in the VM's mount namespace: a user
    /// namespace may not mount a disk.
    pub fn as_machine(&self, command: &str) -> anyhow::Result<String> {
        println!("{REQUEST}{command}");
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        Ok(answer.trim_end().to_owned())
    }

    /// Registers a rule.
    pub fn register(&self, rule: &str) -> anyhow::Result<()> {
        self.write("register", rule)
    }

    /// Writes to the table as somebody else would, through no mount of a distro.
    pub fn write(&self, file: &str, text: &str) -> anyhow::Result<()> {
        let path = Path::new(TABLE).join(file);
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut f| f.write_all(text.as_bytes()))
            .with_context(|| format!("writing {text} to {}", path.display()))
    }

    /// Makes interop as WSL made it when the VM started, unless it still is.
    pub fn renew_interop(&self) -> anyhow::Result<()> {
        let entry = self.entry("WSLInterop");
        if entry == "enabled, interpreter /init, flags: PF" {
            return Ok(());
        }
        if entry != "missing" {
            self.write("WSLInterop", "-1")?;
        }
        self.register(WSL_INTEROP)
    }

    /// The text of a file of the table.
    pub fn read(&self, file: &str) -> anyhow::Result<String> {
        let path = Path::new(TABLE).join(file);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Tells an entry from another one of its name, registered later.
    pub fn entry_identity(&self, name: &str) -> anyhow::Result<u64> {
        Ok(fs::metadata(Path::new(TABLE).join(name))?.ino())
    }

    /// Binds one file over another.
    pub fn cover(&self, path: &str, with: &str) -> anyhow::Result<()> {
        mount(with, path, "bind", "")
    }

    /// Mounts a file system of so many bytes.
    pub fn mount_tmpfs(&self, path: &str, size: &str) -> anyhow::Result<()> {
        mount("tmpfs", path, "tmpfs", &format!("size={size}"))
    }

    /// Lets what is mounted below this mount propagate to copies of it, as in a distro.
    pub fn share(&self, path: &str) -> anyhow::Result<()> {
        mount("none", path, "shared", "")
    }

    /// Takes away what is mounted on a path.
    pub fn unmount(&self, path: &str) -> anyhow::Result<()> {
        nix::mount::umount(path).with_context(|| format!("unmounting {path}"))
    }

    /// How many mounts lie on a path.
    pub fn mounts_on(&self, path: &str) -> anyhow::Result<usize> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let on = |line: &&str| line.split(' ').nth(4) == Some(path);
        Ok(mounts.lines().filter(on).count())
    }

    /// Mounts the table, at its own place or at another.
    pub fn mount_table(&self, path: &str) -> anyhow::Result<()> {
        mount("binfmt_misc", path, "binfmt_misc", "")
    }

    /// The names of all entries, sorted.
    pub fn entries(&self) -> Vec<String> {
        let mut names = self.entries_in_order();
        names.sort();
        names
    }

    /// The names of all entries, the newest first.
    pub fn entries_in_order(&self) -> Vec<String> {
        fs::read_dir(TABLE)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name != "register" && name != "status")
            .collect()
    }

    /// An entry's state, interpreter and flags in one line.
    pub fn entry(&self, name: &str) -> String {
        match fs::read_to_string(Path::new(TABLE).join(name)) {
            Ok(text) => text.lines().take(3).collect::<Vec<_>>().join(", "),
            Err(error) if error.kind() == ErrorKind::NotFound => "missing".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    /// What comes of launching a Windows program now.
    pub fn launch(&self) -> String {
        match Command::new(EXE).arg("a b").output() {
            Ok(output) => {
                let printed = String::from_utf8_lossy(&output.stdout).into_owned();
                // /init gets the program's path, argv[0] because of `P`, and the arguments.
                if output.status.success()
                    && printed == format!("INTEROP [{EXE:?}, {EXE:?}, \"a b\"]\n")
                {
                    "starts".to_owned()
                } else {
                    format!("{}: {printed:?}", output.status)
                }
            }
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOEXEC) => {
                "Exec format error".to_owned()
            }
            Err(error) => error.to_string(),
        }
    }

    /// Launches a Windows program again and again, until told to stop.
    pub fn hammer(&self) -> Hammer {
        self.launch_on(Duration::ZERO)
    }

    /// The same, with a pause of 4 ms after each launch, which leaves a processor to others, where it is
    /// not about instants. What stock distros lose lasts longer.
    pub fn hammer_with_pauses(&self) -> Hammer {
        self.launch_on(Duration::from_millis(4))
    }

    fn launch_on(&self, pause: Duration) -> Hammer {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut launches = Launches::default();
            let mut last = Instant::now();
            loop {
                // Told to stop, it launches once more, and so sees how things were left.
                let stop = told.load(Ordering::Relaxed);
                // Some other interpreter may end well, too.
                let printed = Command::new(NO_EXTENSION).stdin(Stdio::null()).output();
                if printed.is_ok_and(|o| o.stdout.starts_with(b"INTEROP")) {
                    launches.started += 1;
                    launches.longest_gap = launches.longest_gap.max(last.elapsed());
                    last = Instant::now();
                } else {
                    launches.failed += 1;
                    launches.longest_outage = launches.longest_outage.max(last.elapsed());
                }
                if stop {
                    return launches;
                }
                thread::sleep(pause);
            }
        });
        Hammer { stop, thread }
    }
}

/// A running hammer.
pub struct Hammer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Launches>,
}

impl Hammer {
    /// Stops it, and says how it went.
    pub fn stop(self) -> Launches {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the hammer does not panic")
    }
}

/// How a hammer's launches went.
#[derive(Debug, Default)]
pub struct Launches {
    /// Those for which WSL's `/init` was started.
    pub started: u32,
    /// All others.
    pub failed: u32,
    /// The longest time from one launch that started to the next.
    pub longest_gap: Duration,
    /// The longest time since a launch that started after which one failed. Those that fail can be
    /// much quicker than those that start, so their number says little.
    pub longest_outage: Duration,
}

impl Launches {
    /// How many there were.
    pub fn all(&self) -> u32 {
        self.started + self.failed
    }
}
