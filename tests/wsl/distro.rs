//! A distro in the VM: Debian's own systemd as PID 1 of its own namespaces, on the VM's table.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::generation::Generation;
use super::image::{outside, resolve};
use super::vm::{Vm, TABLE};
use super::{mount, DISTRO_STAGE};

/// Longer than this no boot, command or poweroff takes.
const TIMEOUT: Duration = Duration::from_secs(120);

/// What a user namespace may not do, or would do to the machine, and WSL2 may: mount these, load
/// modules, read the audit log, set sysctls.
const FORBIDDEN: [&str; 7] = [
    "dev-hugepages.mount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-journald-audit.socket",
    "systemd-modules-load.service",
    "systemd-sysctl.service",
];

/// The last is where NixOS has its programs.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin";

/// Makes an image the lower layer of a distro, under a path that overlayfs understands.
fn bind_image(image: &Path, directory: &Path) -> anyhow::Result<PathBuf> {
    let lower = directory.join("lower");
    fs::create_dir(&lower)?;
    let image = image.to_str().context("a path that is not UTF-8")?;
    mount(image, &lower.to_string_lossy(), "bind", "")?;
    Ok(lower)
}

/// A distro to be booted: a directory with everything that its first process needs.
pub struct Builder<'vm> {
    vm: &'vm Vm,
    name: String,
    suite: String,
    image: Option<PathBuf>,
    generation: Generation,
    osrelease: String,
    environment: Vec<String>,
    init: bool,
    read_only: bool,
    nested_cgroup: bool,
    shared_cgroup: bool,
    masked: Vec<String>,
    copies: Vec<(PathBuf, String)>,
    links: Vec<(String, String)>,
    files: Vec<(String, String)>,
    programs: Vec<(String, String)>,
}

impl<'vm> Builder<'vm> {
    pub(super) fn new(vm: &'vm Vm, name: &str, suite: &str) -> Builder<'vm> {
        Builder {
            vm,
            name: name.to_owned(),
            suite: suite.to_owned(),
            image: None,
            generation: Generation::None,
            osrelease: "6.6.87.2-microsoft-standard-WSL2".to_owned(),
            environment: Generation::None.environment(),
            init: true,
            read_only: false,
            nested_cgroup: false,
            shared_cgroup: false,
            masked: vm.given.masked.clone(),
            copies: Vec::new(),
            links: Vec::new(),
            files: Vec::new(),
            programs: Vec::new(),
        }
    }

    /// From somebody's image. Nothing is masked in it but what a user namespace may not do, and it is
    /// kept from what belongs to the machine.
    pub(super) fn of_image(vm: &'vm Vm, name: &str, tree: &Path) -> Builder<'vm> {
        let mut builder = Builder::new(vm, name, "");
        builder.image = Some(tree.to_owned());
        builder.masked.clear();
        builder
    }

    /// Booted by a WSL of this generation; without a word, by one that does nothing for interop.
    pub fn generation(mut self, generation: Generation) -> Self {
        self.generation = generation;
        self.environment = generation.environment();
        self
    }

    /// With a unit masked, or, unless it is somebody's image, a generator.
    pub fn masked(mut self, unit: &str) -> Self {
        self.masked.push(unit.to_owned());
        self
    }

    /// With a unit in use that is masked otherwise.
    pub fn unmasked(mut self, unit: &str) -> Self {
        self.masked.retain(|masked| masked != unit);
        self
    }

    /// With a copy of a file or a link of the machine's, or of all of them below a directory.
    pub fn copy(mut self, from: impl AsRef<Path>, to: &str) -> Self {
        self.copies.push((from.as_ref().to_owned(), to.to_owned()));
        self
    }

    /// With a link that leads to `target`.
    pub fn link(mut self, path: &str, target: &str) -> Self {
        self.links.push((path.to_owned(), target.to_owned()));
        self
    }

    /// With a file of these contents.
    pub fn file(mut self, path: &str, text: &str) -> Self {
        self.files.push((path.to_owned(), text.to_owned()));
        self
    }

    /// With a static program that prints this word and what it was called with.
    pub fn program(mut self, path: &str, word: &str) -> Self {
        self.programs.push((path.to_owned(), word.to_owned()));
        self
    }

    /// On a kernel of another name.
    pub fn osrelease(mut self, osrelease: &str) -> Self {
        osrelease.clone_into(&mut self.osrelease);
        self
    }

    /// With another environment for PID 1.
    pub fn environment(mut self, variables: &[&str]) -> Self {
        self.environment = variables.iter().map(|v| v.to_string()).collect();
        self
    }

    /// Without WSL's /init.
    pub fn without_init(mut self) -> Self {
        self.init = false;
        self
    }

    /// With a root that cannot be written to.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// With systemd in `/wsl-user/distro-NAME/systemd` of the VM's cgroups, all of which it sees, as
    /// WSL 2.9.5 to 2.9.12 have it.
    pub fn nested_cgroup(mut self) -> Self {
        self.nested_cgroup = true;
        self
    }

    /// With systemd at the root of the VM's cgroups, if its WSL has it there: up to 2.9.4. It uses the
    /// same cgroups as the systemd of any other distro, for units of the same name. So now and then
    /// one of two that start or stop the same unit at the same instant fails, whatever the unit.
    pub fn shared_cgroup(mut self) -> Self {
        self.shared_cgroup = true;
        self
    }

    /// Its place among the VM's cgroups, and whether that is all that it sees of them, as is usual here,
    /// and in WSL since 2.9.13. There NAME is a number, `/wsl-user` may use less memory and processor
    /// time than the VM, and what WSL itself starts in the distro is in another cgroup. Here no cgroup
    /// has controllers.
    fn cgroup(&self) -> (PathBuf, bool) {
        let of_vm = &self.vm.given.cgroup;
        let own = of_vm.join("wsl-user").join(format!("distro-{}", self.name));
        if self.nested_cgroup {
            (own.join("systemd"), false)
        } else if self.shared_cgroup && self.generation.shares_cgroups() {
            (of_vm.clone(), false)
        } else {
            (own, true)
        }
    }

    /// Boots it, and waits until systemd has started what it was to start.
    pub fn boot(self) -> anyhow::Result<Distro> {
        let directory = PathBuf::from("/vm").join(&self.name);
        self.lay_out(&directory).with_context(|| format!("laying out the distro {}", self.name))?;

        let mut child = Command::new("/proc/self/exe")
            .arg(DISTRO_STAGE)
            .arg(&directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut pid = String::new();
        BufReader::new(child.stdout.take().context("stdout")?).read_line(&mut pid)?;
        let pid = pid.trim().to_owned();
        let mut distro = Distro { name: self.name, pid, child, patience: None };
        let deadline = Instant::now() + TIMEOUT;
        let socket = format!("/proc/{}/root/run/systemd/private", distro.pid);
        loop {
            // Until systemd listens, systemctl has no answer, and takes as long as with one.
            let answer = match Path::new(&socket).exists() {
                true => distro.systemctl(&["is-system-running", "--wait"]),
                false => String::new(),
            };
            if ["running", "degraded", "maintenance"].contains(&answer.trim()) {
                // Changes apply to the next boot, as in WSL.
                let conf = format!("/proc/{}/root/etc/wsl.conf", distro.pid);
                let conf = fs::read_to_string(conf).unwrap_or_default();
                distro.patience = self.generation.patience(&conf);
                return Ok(distro);
            }
            if distro.child.try_wait()?.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(directory.join("console")).unwrap_or_default();
                bail!("{} did not boot: {answer}\n{log}", distro.name);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn lay_out(&self, directory: &Path) -> anyhow::Result<()> {
        for name in ["upper", "work", "root"] {
            fs::create_dir_all(directory.join(name))?;
        }
        fs::write(directory.join("osrelease"), format!("{}\n", self.osrelease))?;
        fs::write(directory.join("environment"), self.environment.join("\n"))?;
        fs::write(directory.join("generation"), self.generation.name())?;
        let tree = match &self.image {
            Some(image) => bind_image(image, directory)?,
            None => self.vm.given.tree(&self.suite),
        };
        symlink(&tree, directory.join("tree"))?;
        let (cgroup, is_all) = self.cgroup();
        fs::create_dir_all(&cgroup)?;
        symlink(cgroup, directory.join("cgroup"))?;
        if is_all {
            fs::write(directory.join("cgroup-namespace"), "")?;
        }
        if self.read_only {
            fs::write(directory.join("read-only"), "")?;
        }
        if self.init {
            symlink("/vm/init", directory.join("init"))?;
        }
        let masked = self.masked.iter().map(String::as_str);
        let masked: Vec<_> = FORBIDDEN.into_iter().chain(masked).collect();
        let layer = Layer { tree, upper: directory.join("upper") };
        if self.image.is_some() {
            fs::write(directory.join("image"), masked.join("\n"))?;
        } else {
            for name in masked {
                let is_generator = name.ends_with("-generator");
                let kind = if is_generator { "system-generators" } else { "system" };
                layer.link(&format!("/etc/systemd/{kind}/{name}"), "/dev/null")?;
            }
        }
        self.fill(&layer)?;
        if self.image.is_none() {
            // This is not its first boot since an update, after which systemd has more to do.
            for place in ["/etc/.updated", "/var/.updated"] {
                fs::write(layer.place(Path::new(place))?, "")?;
            }
        }
        Ok(())
    }

    /// Brings into the distro what it was built with.
    fn fill(&self, layer: &Layer) -> anyhow::Result<()> {
        for (from, to) in &self.copies {
            layer
                .copy(from, Path::new(to))
                .with_context(|| format!("copying {} to {to}", from.display()))?;
        }
        for (path, target) in &self.links {
            layer.link(path, target)?;
        }
        for (path, text) in &self.files {
            fs::write(layer.place(Path::new(path))?, text)?;
        }
        for (path, word) in &self.programs {
            let program = layer.place(Path::new(path))?;
            fs::copy("/vm/init", &program)?;
            let mut file = fs::OpenOptions::new().append(true).open(&program)?;
            write!(file, "\nNAME {word}")?;
        }
        Ok(())
    }
}

/// What a distro has of its own, over the tree that it boots from.
struct Layer {
    tree: PathBuf,
    upper: PathBuf,
}

impl Layer {
    /// Where a file is to be written, which then takes the place of any other: through the tree's
    /// links to directories, and not over them.
    fn place(&self, path: &Path) -> anyhow::Result<PathBuf> {
        let name = path.file_name().context("a file needs a name")?;
        let directory = path.parent().context("a file needs a directory")?;
        let directory = outside(&self.upper, &resolve(&self.tree, directory)?);
        fs::create_dir_all(&directory)?;
        let place = directory.join(name);
        match fs::remove_file(&place) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(place),
        }
    }

    fn link(&self, path: &str, target: &str) -> anyhow::Result<()> {
        Ok(symlink(target, self.place(Path::new(path))?)?)
    }

    fn copy(&self, from: &Path, to: &Path) -> anyhow::Result<()> {
        let kind = fs::symlink_metadata(from)?.file_type();
        if kind.is_dir() {
            for entry in fs::read_dir(from)? {
                let entry = entry?;
                self.copy(&entry.path(), &to.join(entry.file_name()))?;
            }
        } else if kind.is_symlink() {
            symlink(fs::read_link(from)?, self.place(to)?)?;
        } else {
            fs::copy(from, self.place(to)?)?;
        }
        Ok(())
    }
}

/// A running distro.
pub struct Distro {
    name: String,
    pid: String,
    child: Child,
    /// How long WSL lets it power off.
    patience: Option<Duration>,
}

impl Distro {
    /// What enters the distro, for so many seconds; with 0, until the VM ends.
    fn enter_within(&self, seconds: u64) -> Command {
        let mut command = Command::new("timeout");
        command
            .arg(seconds.to_string())
            // Not --all: it would enter the user namespace that it is already in.
            .args(["nsenter", "-t", &self.pid, "-m", "-p", "-u", "-i", "-C", "-r", "-w"])
            .env_clear()
            .env("PATH", PATH)
            .env("LANG", "C.UTF-8");
        command
    }

    /// A shell that enters the distro and runs a command in another one, whose errors go to its
    /// output. It would be nsenter that waits otherwise: that stops when its child is stopped, as
    /// systemd does with all processes at soft-reboot and poweroff, and nobody has it continue.
    fn shell_within(&self, seconds: u64, command: &str) -> Command {
        let mut shell = self.enter_within(seconds);
        shell.args(["--no-fork", "sh", "-c", "sh -c \"$0\" 2>&1; exit", command]);
        shell
    }

    /// A command to be run in the distro, which does not shut down meanwhile.
    pub fn command(&self) -> Command {
        let mut command = self.enter_within(TIMEOUT.as_secs());
        command.stdin(Stdio::null());
        command
    }

    /// A shell in the distro, yet to be started, that runs a command; errors go to its output.
    pub fn shell(&self, command: &str) -> Command {
        self.shell_within(0, command)
    }

    /// What systemctl prints, errors included. There need be no shell, and the distro does not shut down
    /// meanwhile.
    pub fn systemctl(&self, arguments: &[&str]) -> String {
        let mut command = self.command();
        command.arg("systemctl").args(arguments);
        match command.output() {
            Ok(output) => {
                String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
            }
            Err(error) => error.to_string(),
        }
    }

    /// What a shell command in the distro prints, errors included.
    pub fn run(&self, command: &str) -> String {
        let mut shell = self.shell_within(TIMEOUT.as_secs(), command);
        shell.stdin(Stdio::null());
        match shell.output() {
            Ok(output) => {
                String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
            }
            Err(error) => error.to_string(),
        }
    }

    /// Stops its systemd from doing anything.
    pub fn freeze(&self) -> anyhow::Result<()> {
        let pid = Pid::from_raw(self.pid.parse()?);
        kill(pid, Signal::SIGSTOP).with_context(|| format!("stopping the PID 1 of {}", self.name))
    }

    /// Mounts an automount point on a path, of which whoever made it serves none that comes.
    pub fn dead_automount(&self, vm: &Vm, path: &str) -> anyhow::Result<()> {
        let mount = format!(
            "nsenter -t {pid} -m -r mount -i -t autofs dead {path} \
             -o fd=1,pgrp=1,minproto=5,maxproto=5,direct",
            pid = self.pid
        );
        // What asks for something is written to the pipe, and never read.
        vm.as_machine(&format!("({mount} | sleep 60) </dev/null >/dev/null 2>&1 &"))?;
        let mounts = format!("/proc/{}/mountinfo", self.pid);
        let deadline = Instant::now() + TIMEOUT;
        while !fs::read_to_string(&mounts)?.contains(" - autofs dead ") {
            ensure!(Instant::now() < deadline, "no automount on {path}");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Registers a rule, through the distro's own mount.
    pub fn register(&self, rule: &str) {
        self.run(&format!("printf '%s' '{rule}' >{TABLE}/register"));
    }

    /// What comes of launching a Windows program from inside.
    pub fn launch(&self) -> &'static str {
        // A shell takes what the kernel refuses for a script of its own.
        let printed =
            self.run("printf 'MZ\\220\\000' >/run/a.exe; chmod +x /run/a.exe; /run/a.exe");
        if printed.starts_with("INTEROP") {
            "starts"
        } else {
            "does not start"
        }
    }

    /// Its end as WSL makes it, at `wsl --terminate` and when it is idle: systemd is asked to shut
    /// down, and what then still runs is killed, after a while or at once. Returns whether it had
    /// ended by itself. WSL kills by reboot(2) in the distro, which ends PID 1 and all others with
    /// it; here that comes from outside, and some milliseconds later. Up to 2.9.1 WSL kills at once
    /// if systemctl fails, which is not so here.
    pub fn terminate(mut self) -> anyhow::Result<bool> {
        let Some(patience) = self.patience else {
            self.run("systemctl reboot");
            self.kill();
            return Ok(false);
        };
        self.run("systemctl poweroff");
        self.is_gone_within(patience)
    }

    /// `systemctl poweroff`, which may take as long as it does.
    pub fn poweroff(mut self) -> anyhow::Result<()> {
        let said = self.run("systemctl --no-block poweroff");
        if !self.is_gone_within(TIMEOUT)? {
            let jobs = self.systemctl(&["list-jobs"]);
            let journal = self.run("journalctl --no-pager --lines=50");
            let processes = format!(
                "ps -o pid,ppid,stat,wchan:24,args -p $(pgrep --ns {} --nslist pid -d ,)",
                self.pid
            );
            let processes = Command::new("sh").args(["-c", &processes]).output()?;
            let processes = String::from_utf8_lossy(&processes.stdout).into_owned();
            bail!(
                "{} does not power off; systemctl: {said}\njobs: {jobs}\n{journal}\n{processes}",
                self.name
            );
        }
        Ok(())
    }

    fn is_gone_within(&mut self, time: Duration) -> anyhow::Result<bool> {
        let deadline = Instant::now() + time;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(true)
    }

    /// Kills all that runs in it, as reboot(2) does there.
    pub fn kill(self) {
        drop(self);
    }
}

impl Drop for Distro {
    fn drop(&mut self) {
        // Its PID 1 is there for as long as what waits for it, and takes all others with it.
        if let (Ok(None), Ok(pid)) = (self.child.try_wait(), self.pid.parse()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }
}
