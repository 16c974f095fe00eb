//! The verbs by themselves, in a VM without a distro.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use anyhow::{bail, ensure};
use nix::poll::{poll, PollFd, PollFlags};
use wsl_vm::Vm;

use crate::ours::Run;
use crate::promises::RULE;

/// A test of a verb: what it shows, and how.
pub type Test = (&'static str, fn(&Vm) -> anyhow::Result<()>);

pub const VERBS: &[Test] = &[
    ("restore leaves an entry that is as it should be", |vm| {
        let before = vm.entry_identity("WSLInterop")?;
        expect(vm, &["restore"], 0, "")?;
        ensure!(vm.entry_identity("WSLInterop")? == before, "it was replaced");
        Ok(())
    }),
    ("restore registers a missing entry", |vm| {
        vm.write("WSLInterop", "-1")?;
        expect(
            vm,
            &["restore"],
            0,
            "WSLInterop was missing, registered it\n\
             wsl-binfmt-generator: removed WSLInterop-next, no longer needed beside WSLInterop",
        )?;
        ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
        let entry = vm.entry("WSLInterop");
        ensure!(entry == "enabled, interpreter /init, flags: PF", "{entry}");
        ensure!(vm.launch() == "starts", "{}", vm.launch());
        Ok(())
    }),
    ("restore leaves a disabled entry to the admin", |vm| {
        vm.write("WSLInterop", "0")?;
        expect(
            vm,
            &["restore"],
            1,
            "WSLInterop is disabled: somebody changed it, leaving it alone",
        )?;
        let entry = vm.entry("WSLInterop");
        ensure!(entry.starts_with("disabled, interpreter /init"), "{entry}");
        Ok(())
    }),
    ("restore leaves another interpreter alone", |vm| {
        vm.write("WSLInterop", "-1")?;
        vm.register(":WSLInterop:M::MZ::/bin/cat:P")?;
        expect(
            vm,
            &["restore"],
            1,
            "WSLInterop runs /bin/cat, not /init: somebody changed it, leaving it alone",
        )?;
        let entry = vm.entry("WSLInterop");
        ensure!(entry == "enabled, interpreter /bin/cat, flags: P", "{entry}");
        Ok(())
    }),
    ("restore needs an executable init", |vm| {
        vm.write("WSLInterop", "-1")?;
        vm.cover("/init", "/dev/null")?;
        expect(
            vm,
            &["restore"],
            1,
            "/init: not an executable file that WSL has mounted, so this is not a WSL2 distro",
        )?;
        ensure!(vm.entry("WSLInterop") == "missing");
        Ok(())
    }),
    ("restore says that binfmt_misc is not mounted", |vm| {
        vm.unmount("/proc/sys/fs/binfmt_misc")?;
        expect(vm, &["restore"], 1, "binfmt_misc is not mounted on /proc/sys/fs/binfmt_misc")
    }),
    ("guard makes the flush fail, and nothing else", |vm| {
        expect(vm, &["guard"], 0, "")?;
        let Err(error) = vm.write("status", "-1") else {
            bail!("the table was emptied: {:?}", vm.entries());
        };
        ensure!(format!("{error:#}").contains("Read-only file system"), "{error:#}");
        ensure!(vm.read("status")? == "enabled\n", "{}", vm.read("status")?);
        vm.register(RULE)?;
        ensure!(vm.entries() == ["WSLInterop", "testfmt"], "{:?}", vm.entries());
        Ok(())
    }),
    ("guard shows the state that the table has", |vm| {
        vm.write("status", "0")?;
        expect(vm, &["guard"], 0, "")?;
        ensure!(vm.read("status")? == "disabled\n", "{}", vm.read("status")?);
        Ok(())
    }),
    ("guard leaves a lock that is there already", |vm| {
        vm.cover("/proc/sys/fs/binfmt_misc/status", "/etc/hostname")?;
        expect(vm, &["guard"], 0, "")?;
        expect(vm, &["guard"], 0, "")?;
        ensure!(vm.mounts_on("/proc/sys/fs/binfmt_misc/status")? == 1);
        Ok(())
    }),
    ("guard twice mounts once", |vm| {
        expect(vm, &["guard"], 0, "")?;
        expect(vm, &["guard"], 0, "")?;
        ensure!(vm.mounts_on("/proc/sys/fs/binfmt_misc/status")? == 1);
        Ok(())
    }),
    ("guard changes the mounts once", |vm| {
        as_in_a_distro(vm)?;
        // Slowly, so that no two changes look like one.
        let mut guard = vm.generator_under_strace(&["inject=mount,umount2:delay_exit=50000"]);
        let changes = changes_of_mounts(guard.arg("guard"))?;
        ensure!(changes == 1, "{changes} changes");
        ensure!(vm.mounts_on("/proc/sys/fs/binfmt_misc/status")? == 1);
        ensure!(vm.mounts_on("/run/wsl-binfmt/status")? == 0);
        let written = vm.write("status", "-1");
        ensure!(written.is_err(), "the table was emptied: {:?}", vm.entries());
        Ok(())
    }),
    ("guard undoes its first steps if one fails", |vm| {
        let mounts = vm.mounts_on("/proc/sys/fs/binfmt_misc/status")?;
        ensure!(mounts == 0, "{mounts} mounts before");
        // Without a namespace aside it takes all steps here: the second mount(2) makes its file
        // read-only, and the third binds that over the table's.
        let confined = "inject=unshare:error=EPERM";
        let fails = |call| {
            let fault = format!("inject=mount:error=EPERM:when={call}");
            vm.generator_under_strace(&[confined, &fault])
        };
        expect_of(
            fails(2).arg("guard"),
            1,
            "making /run/wsl-binfmt/status read-only: EPERM: Operation not permitted",
        )?;
        expect_of(
            fails(3).arg("guard"),
            1,
            "binding /run/wsl-binfmt/status over /proc/sys/fs/binfmt_misc/status: \
             EPERM: Operation not permitted",
        )?;
        for path in ["/proc/sys/fs/binfmt_misc/status", "/run/wsl-binfmt/status"] {
            ensure!(vm.mounts_on(path)? == 0, "{path}");
        }
        vm.write("status", "-1")?;
        ensure!(vm.entries().is_empty(), "{:?}", vm.entries());
        Ok(())
    }),
    ("guard says that binfmt_misc is not mounted, and guards it later", |vm| {
        vm.unmount("/proc/sys/fs/binfmt_misc")?;
        expect(
            vm,
            &["guard"],
            0,
            "binfmt_misc is not mounted on /proc/sys/fs/binfmt_misc; \
             will guard it when this distro stops",
        )?;
        // As it then is.
        vm.mount_table("/proc/sys/fs/binfmt_misc")?;
        expect(vm, &["stopping"], 0, "")?;
        ensure!(vm.mounts_on("/proc/sys/fs/binfmt_misc/status")? == 1);
        ensure!(vm.write("status", "-1").is_err(), "the table was emptied");
        Ok(())
    }),
    ("a full disk leaves no half of a file", |vm| {
        let generate = |early: &str| vm.generator().arg(early).env("container", "wsl").output();
        fs::create_dir("/vm/whole")?;
        ensure!(generate("/vm/whole")?.status.success());
        fs::create_dir("/vm/full")?;
        vm.mount_tmpfs("/vm/full", "8k")?;
        let output = generate("/vm/full")?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1), "{}", output.status);
        ensure!(said.contains(".service: No space left on device (os error 28)"), "{said}");
        let files = |directory: &str| -> anyhow::Result<Vec<String>> {
            let find = ["-type", "f", "-printf", "%P\n"];
            let found = Command::new("find").arg(directory).args(find).output()?;
            Ok(String::from_utf8(found.stdout)?.lines().map(str::to_owned).collect())
        };
        let written = files("/vm/full")?;
        ensure!((1..4).contains(&written.len()), "{written:?}");
        for path in written {
            let text = |directory| fs::read_to_string(Path::new(directory).join(&path));
            ensure!(text("/vm/full")? == text("/vm/whole")?, "{path} differs");
        }
        Ok(())
    }),
];

/// Runs the program under test: its exit status, and what it says.
fn expect(vm: &Vm, arguments: &[&str], status: i32, says: &str) -> anyhow::Result<()> {
    expect_of(vm.generator().args(arguments), status, says)
}

fn expect_of(command: &mut Command, status: i32, says: &str) -> anyhow::Result<()> {
    let output = command.output()?;
    let said = String::from_utf8(output.stderr)?;
    let says = match says {
        "" => String::new(),
        says => format!("wsl-binfmt-generator: {says}\n"),
    };
    ensure!(
        (output.status.code(), &said) == (Some(status), &says),
        "{command:?}: {}, says {said:?}, not {status}, {says:?}",
        output.status
    );
    Ok(())
}

/// WSL shares these mounts with a second namespace.
pub fn as_in_a_distro(vm: &Vm) -> anyhow::Result<()> {
    vm.mount_tmpfs("/run", "1m")?;
    ["/run", "/proc/sys/fs/binfmt_misc"].iter().try_for_each(|path| vm.share(path))
}

/// How often the kernel reports a change of the mounts, as systemd waits for it, while this runs.
fn changes_of_mounts(command: &mut Command) -> anyhow::Result<u32> {
    let mounts = fs::File::open("/proc/self/mountinfo")?;
    let has_changed = |wait: u16| -> anyhow::Result<bool> {
        let mut polled = [PollFd::new(mounts.as_fd(), PollFlags::POLLPRI)];
        Ok(poll(&mut polled, wait)? > 0)
    };
    let mut running = command.spawn()?;
    let mut changes = 0;
    loop {
        let has_ended = running.try_wait()?;
        changes += u32::from(has_changed(10)?);
        if let Some(status) = has_ended {
            ensure!(status.success(), "{status}");
            return Ok(changes);
        }
    }
}
