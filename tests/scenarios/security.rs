//! What each unit may do, and that nobody gains anything by this project who is not root already.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::ensure;

use crate::promises::{Expect, Scenario, Setting};
use crate::verbs::Test;

/// What `systemd-analyze security` gives the units at most, from 0 to 10.
const CEILINGS: [(&str, f32); 3] = [
    ("wsl-interop-restore.service", 0.9),
    // It makes a mount that is to stay, so it has no mount namespace of its own.
    ("wsl-binfmt-guard.service", 3.5),
    // systemd's own, which it does not lock down, and neither do we.
    ("systemd-binfmt.service", 9.5),
];

/// For every systemd: what is locked on one may hide the table on another.
pub const UNITS: &[Scenario] = &[Scenario {
    name: "security: units are locked down, and work",
    play: units_are_locked_down,
    expect: Expect::Differs {
        stock: &[
            "wsl-interop-restore.service: not there",
            "wsl-binfmt-guard.service: not there",
            "systemd-binfmt.service: at most 9.5",
            "the watcher may write to: ",
            "WSLInterop after a wipe: missing",
            "complaints: ",
        ],
        ours: &[
            "wsl-interop-restore.service: at most 0.9",
            "wsl-binfmt-guard.service: at most 3.5",
            "systemd-binfmt.service: at most 9.5",
            "the watcher may write to: /var/tmp /tmp /proc/sys/fs/binfmt_misc",
            "WSLInterop after a wipe: enabled, interpreter /init, flags: PF",
            "complaints: ",
        ],
    },
}];

/// What empties the table when `-1` is written to it.
const STATUS: &str = "/proc/sys/fs/binfmt_misc/status";

fn units_are_locked_down(setting: &Setting) -> anyhow::Result<Vec<String>> {
    let mine = setting.mine().boot()?;
    let mut seen = Vec::new();
    for (unit, ceiling) in CEILINGS {
        let report = mine.run(&format!("systemd-analyze security --no-pager {unit}"));
        let exposure = report.split(&format!("{unit}: ")).nth(1);
        let exposure = exposure.and_then(|rest| rest.split(' ').next()?.parse::<f32>().ok());
        seen.push(match exposure {
            Some(exposure) if exposure <= ceiling => format!("{unit}: at most {ceiling:.1}"),
            Some(exposure) => format!("{unit}: {exposure}"),
            None => format!("{unit}: not there"),
        });
    }
    let writable = mine.run(
        "pid=$(systemctl show --property=MainPID --value wsl-interop-restore)
        [ \"$pid\" = 0 ] || nsenter -t \"$pid\" -m -r -w sh -c '
            for path in / /etc /usr /root /var /var/tmp /run /tmp /dev /dev/shm /sys \
                /sys/fs/cgroup /proc/sys /proc/sys/kernel /proc/sys/fs/binfmt_misc; do
                [ -w $path ] && printf \" %s\" $path
            done'",
    );
    seen.push(format!("the watcher may write to: {}", writable.trim()));
    setting.vm.renew_interop()?;
    setting.vm.write("status", "-1")?;
    mine.run(
        "for i in $(seq 20); do
            [ -e /proc/sys/fs/binfmt_misc/WSLInterop ] && break
            sleep 0.1
        done",
    );
    seen.push(format!(
        "WSLInterop after a wipe: {}",
        setting.vm.entry("WSLInterop")
    ));
    // In a user namespace systemd 262 misses a file of each cgroup.
    let complaints = mine.run(
        "journalctl --no-pager --quiet --output=cat --priority=warning \
         --unit=wsl-interop-restore --unit=wsl-binfmt-guard | grep -v 'Failed to read pids.max'",
    );
    seen.push(format!("complaints: {}", complaints.trim()));
    Ok(seen)
}

/// What nobody of the distro gets, and what root keeps.
pub const SECURITY: &[Test] = &[
    (
        "security: what is written below /run is root's, whatever the umask",
        |vm| {
            let program = vm.generator().get_program().to_string_lossy().into_owned();
            for umask in ["000", "022", "077"] {
                let script = format!(
                    "umask {umask}; {program} guard && {program} release --remember &&
                stat --format='%a %n' /run/wsl-binfmt /run/wsl-binfmt/*
                umount {STATUS}; rm -r /run/wsl-binfmt"
                );
                let output = Command::new("sh").args(["-c", &script]).output()?;
                let modes = String::from_utf8(output.stdout)?;
                let expected = "755 /run/wsl-binfmt\n\
                    644 /run/wsl-binfmt/registered\n644 /run/wsl-binfmt/status\n";
                ensure!(modes == expected, "umask {umask}: {modes}");
            }
            // Nor whatever was there.
            fs::create_dir("/run/wsl-binfmt")?;
            for path in ["/run/wsl-binfmt", "/run/wsl-binfmt/status"] {
                let _ = fs::File::create_new(path);
                fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
            }
            ensure!(vm.generator().arg("guard").status()?.success());
            for (path, expected) in [
                ("/run/wsl-binfmt", 0o755),
                ("/run/wsl-binfmt/status", 0o644),
            ] {
                let mode = fs::metadata(path)?.permissions().mode() & 0o7777;
                ensure!(mode == expected, "{path}: {mode:o}");
            }
            Ok(())
        },
    ),
    ("security: release removes nothing but entries", |vm| {
        fs::write("/vm/outside", "outside\n")?;
        fs::create_dir("/run/wsl-binfmt")?;
        for name in [
            "../../../../../vm/outside",
            "/vm/outside",
            "./WSLInterop",
            "WSLInterop",
            "status",
            "./status",
            "register",
            "",
            ".",
            "..",
            "a\0b",
        ] {
            let inode = vm.entry_identity(name);
            let inode = inode.map_or("x".to_owned(), |inode| inode.to_string());
            for inode in [&inode, "x", "", "-1"] {
                fs::write(
                    "/run/wsl-binfmt/registered",
                    format!("{inode} {name}\n{name}\n \n"),
                )?;
                let output = vm.generator().arg("release").output()?;
                ensure!(output.status.success(), "{name}: {output:?}");
                ensure!(
                    vm.entry("WSLInterop").contains("PF"),
                    "{inode} {name} removed WSLInterop"
                );
                ensure!(
                    fs::read_to_string("/vm/outside")? == "outside\n",
                    "{name} was written to"
                );
            }
        }
        // It is not blind.
        vm.register(crate::promises::RULE)?;
        let inode = vm.entry_identity("testfmt")?;
        fs::write(
            "/run/wsl-binfmt/registered",
            format!("{inode} ../x\n{inode} testfmt\n"),
        )?;
        ensure!(vm.generator().arg("release").status()?.success());
        ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
        Ok(())
    }),
];
