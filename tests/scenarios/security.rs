//! What each unit may do, and that nobody gains anything by this project who is not root already.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::ensure;
use wsl_vm::Distro;

use crate::ours::{Install, Run};
use crate::promises::{state, Expect, Scenario, Setting};
use crate::verbs::Test;

/// What `systemd-analyze security` gives the units at most, from 0 to 10.
const CEILINGS: [(&str, f32); 4] = [
    ("wsl-interop-restore.service", 0.9),
    // It mounts in the namespace of the distro, as root, for some milliseconds.
    ("wsl-binfmt-guard.service", 9.6),
    ("wsl-binfmt-release.service", 9.6),
    // systemd's own, which it does not lock down, and neither do we.
    ("systemd-binfmt.service", 9.5),
];

/// For every systemd: what is locked on one may hide the table on another.
pub const UNITS: &[Scenario] = &[
    Scenario {
        name: "security: units are locked down, and work",
        play: units_are_locked_down,
        expect: Expect::Differs {
            stock: &[
                "wsl-interop-restore.service: not there",
                "wsl-binfmt-guard.service: not there",
                "wsl-binfmt-release.service: not there",
                "systemd-binfmt.service: at most 9.5",
                "the watcher may write to: ",
                "WSLInterop after a wipe: missing",
                "complaints: ",
            ],
            ours: &[
                "wsl-interop-restore.service: at most 0.9",
                "wsl-binfmt-guard.service: at most 9.6",
                "wsl-binfmt-release.service: at most 9.6",
                "systemd-binfmt.service: at most 9.5",
                "the watcher may write to: /run/wsl-binfmt /proc/sys/fs/binfmt_misc",
                "WSLInterop after a wipe: enabled, interpreter /init, flags: PF",
                "complaints: ",
            ],
        },
    },
    Scenario {
        name: "security: a program whose path means something in units",
        play: |setting| {
            let mine = setting.mine().boot()?;
            // Quotes and backslashes systemd takes in no program's path.
            let path = "/etc/systemd/system-generators/a %n %% $HOME ${PATH} ; #b é";
            let seen = mine.run(&format!(
                "mkdir -p /etc/systemd/system-generators
                mv \"$(readlink -f /usr/bin/wsl-binfmt)\" '{path}' 2>/dev/null
                umount {STATUS} 2>/dev/null
                systemctl daemon-reload
                for unit in wsl-binfmt-guard wsl-interop-restore systemd-binfmt; do
                    systemctl restart $unit 2>/dev/null
                    echo $unit: $(systemctl is-active $unit)
                done
                systemctl show --property=SourcePath --value wsl-binfmt-guard
                grep -o {STATUS} /proc/self/mountinfo"
            ));
            Ok(seen.lines().map(str::to_owned).collect())
        },
        expect: Expect::Differs {
            stock: &[
                "wsl-binfmt-guard: inactive",
                "wsl-interop-restore: inactive",
                "systemd-binfmt: active",
                "",
            ],
            ours: &[
                "wsl-binfmt-guard: active",
                "wsl-interop-restore: active",
                "systemd-binfmt: active",
                "/etc/systemd/system-generators/a %n %% $HOME ${PATH} ; #b é",
                STATUS,
            ],
        },
    },
];

/// What empties the table when `-1` is written to it.
const STATUS: &str = "/proc/sys/fs/binfmt_misc/status";
const RECORD: &str = "/run/wsl-binfmt/systemd-binfmt.rules";

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
            for path in / /etc /usr /root /var /var/tmp /run /run/wsl-binfmt /tmp /home /dev /dev/shm /sys \
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
    seen.push(format!("WSLInterop after a wipe: {}", setting.vm.entry("WSLInterop")));
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
    ("security: a distro of these tests sets nothing of the machine's", |vm| {
        let mine = vm.distro("mine", "trixie").boot()?;
        // Root of a user namespace may do so, if it has the number of the machine's.
        let settable = "for i in $(find /proc/sys -type f) /proc/sysrq-trigger; do
            case $i in /proc/sys/net/* | /proc/sys/user/* | */osrelease | /proc/sys/fs/binfmt_misc/*) continue ;; esac
            ! [ -w $i ] || echo $i
        done";
        let settable = mine.run(settable);
        ensure!(settable.is_empty(), "{settable}");
        let state = state(&mine);
        ensure!(state == "systemd-binfmt active, system running", "{state}");
        Ok(())
    }),
    ("security: an unprivileged user gains nothing", |vm| {
        let mine = vm.distro("mine", "trixie").generator(true).boot()?;
        let modes = mine.run(
            "program=$(readlink -f /usr/bin/wsl-binfmt)
            stat --format='%a %U %G' \"$program\" /run/wsl-binfmt
            cd /run && stat --format='%a %U %G %n' wsl-binfmt/*
            python3 -c 'import os, sys; print(os.listxattr(sys.argv[1]))' \"$program\"",
        );
        ensure!(
            modes
                == "755 root root\n755 root root\n\
                644 root root wsl-binfmt/before\n\
                644 root root wsl-binfmt/interop\n\
                644 root root wsl-binfmt/status\n\
                755 root root wsl-binfmt/systemd-binfmt\n\
                644 root root wsl-binfmt/systemd-binfmt.rules\n\
                644 root root wsl-binfmt/wsl.conf\n[]\n",
            "{modes}"
        );
        // So that every verb has something to do.
        mine.run(&format!(
            "systemctl stop wsl-interop-restore; umount {STATUS}
            echo -1 >/proc/sys/fs/binfmt_misc/WSLInterop"
        ));
        let before = roots_own(&mine);
        ensure!(before.contains("/run/wsl-binfmt/status"), "{before}");
        let said = mine.run(AS_NOBODY);
        ensure!(roots_own(&mine) == before, "{before}\nthen:\n{}", roots_own(&mine));
        // What it did below a directory of its own, it did as nobody.
        let expected = "\
            restore: 1\nrestore --watch: 124\nguard: 1\nrelease: 1\n\
            started systemd-binfmt: 1\nstopped systemd-binfmt: 1\n\
            stopping: 1\ngenerator: 1\n\
            in an own root:\n\
            restore: 1\nrestore --watch: 124\nguard: 1\nrelease: 1\n\
            started systemd-binfmt: 1\nstopped systemd-binfmt: 1\n\
            stopping: 1\ngenerator: 0\nnobody\n\
            set-environment: refused\nmkdir: refused\n";
        ensure!(said == expected, "{said}");
        Ok(())
    }),
    ("security: what is written below /run is root's, whatever the umask", |vm| {
        vm.mount_tmpfs("/run", "1m")?;
        let drop_in = "/run/systemd/generator.early/systemd-binfmt.service.d";
        fs::create_dir_all(drop_in)?;
        fs::write(format!("{drop_in}/10-wsl-interop.conf"), "[Service]\n")?;
        let program = vm.generator().get_program().to_string_lossy().into_owned();
        for umask in ["000", "022", "077"] {
            let script = format!(
                    "umask {umask}; {program} guard && mkdir /run/wsl-binfmt/systemd-binfmt &&
                {program} started systemd-binfmt && rmdir /run/wsl-binfmt/systemd-binfmt &&
                find /run -mindepth 1 -path '*/generator.early*' -o -path /run/mount -o -printf '%m %p\\n' | sort -k 2
                umount {STATUS}; rm -r /run/wsl-binfmt /run/systemd/system/*"
                );
            let output = Command::new("sh").args(["-c", &script]).output()?;
            let modes = String::from_utf8(output.stdout)?;
            let expected = "755 /run/systemd\n\
                    755 /run/systemd/system\n\
                    755 /run/systemd/system/systemd-binfmt.service.d\n\
                    644 /run/systemd/system/systemd-binfmt.service.d/10-wsl-interop.conf\n\
                    755 /run/wsl-binfmt\n\
                    644 /run/wsl-binfmt/before\n\
                    644 /run/wsl-binfmt/interop\n\
                    644 /run/wsl-binfmt/status\n\
                    644 /run/wsl-binfmt/systemd-binfmt.rules\n\
                    644 /run/wsl-binfmt/wsl.conf\n";
            ensure!(modes == expected, "umask {umask}: {modes}");
        }
        // Nor whatever was there.
        fs::create_dir("/run/wsl-binfmt")?;
        for path in ["/run/wsl-binfmt", "/run/wsl-binfmt/status"] {
            let _ = fs::File::create_new(path);
            fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
        }
        ensure!(vm.generator().arg("guard").status()?.success());
        for (path, expected) in [("/run/wsl-binfmt", 0o755), ("/run/wsl-binfmt/status", 0o644)] {
            let mode = fs::metadata(path)?.permissions().mode() & 0o7777;
            ensure!(mode == expected, "{path}: {mode:o}");
        }
        Ok(())
    }),
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
            &"n".repeat(245),
            &"n".repeat(300),
        ] {
            let inode = vm.entry_identity(name);
            let inode = inode.map_or("x".to_owned(), |inode| inode.to_string());
            for inode in [&inode, "x", "", "-1"] {
                fs::write(
                    RECORD,
                    format!(
                        "{inode} - :{name}:M::MZ::/init:PF\n{inode} shared |{name}|\n\
                         {inode} {name}\n{inode} - {name}\n{name}\n \n"
                    ),
                )?;
                let output = vm.generator().arg("release").output()?;
                ensure!(output.status.success(), "{name}: {output:?}");
                ensure!(vm.entry("WSLInterop").contains("PF"), "{inode} {name} removed WSLInterop");
                ensure!(fs::read_to_string("/vm/outside")? == "outside\n", "{name} was written to");
            }
        }
        // It is not blind.
        vm.register(crate::promises::RULE)?;
        let inode = vm.entry_identity("testfmt")?;
        fs::write(RECORD, format!("{inode} - :../x:\n{inode} - :testfmt:\n"))?;
        ensure!(vm.generator().arg("release").status()?.success());
        ensure!(vm.entries() == ["WSLInterop"], "{:?}", vm.entries());
        Ok(())
    }),
];

/// All that root has made here, and the table.
fn roots_own(distro: &Distro) -> String {
    distro.run(
        "cd /run/systemd
        find /run/wsl-binfmt generator* system transient system.control /etc \
            /proc/sys/fs/binfmt_misc -printf '%p %i %M %u %s %T@ %l\\n' 2>/dev/null
        grep . /proc/sys/fs/binfmt_misc/W* /run/wsl-binfmt/*; grep binfmt_misc /proc/self/mountinfo
        systemctl show-environment",
    )
}

/// Every verb, with an environment that would be of use if it got anywhere: first on the distro,
/// then below a directory of its own that looks like one.
const AS_NOBODY: &str = r#"
    cat >/tmp/script <<'END'
    export LD_PRELOAD=/tmp/own/x.so LD_LIBRARY_PATH=/tmp/own RUST_BACKTRACE=full JOURNAL_STREAM=1:1
    export NOTIFY_SOCKET=/run/systemd/notify SERVICE_RESULT=x SYSTEMD_SCOPE=system container=wsl
    all() {
        for verb in "restore" "restore --watch" "guard" "release" "started systemd-binfmt" \
            "stopped systemd-binfmt" "stopping"; do
            timeout 5 wsl-binfmt $verb >/dev/null 2>&1
            echo "$verb: $?"
        done
        $(readlink -f /usr/bin/wsl-binfmt) "$1" >/dev/null 2>&1
        echo "generator: $?"
    }
    all /run/systemd/generator.early
    mkdir -p /tmp/own/proc/sys/fs/binfmt_misc /tmp/own/proc/sys/kernel /tmp/own/proc/self \
        /tmp/own/run/wsl-binfmt /tmp/own/out
    cp /proc/sys/kernel/osrelease /tmp/own/proc/sys/kernel
    ln -s /proc/self/mounts /tmp/own/proc/self
    cp /init /tmp/own
    cd /tmp/own/proc/sys/fs/binfmt_misc
    ln -s /proc/sys/fs/binfmt_misc/* .
    rm status
    echo enabled >status
    stat --format='%i - :%n:' -L python* >/tmp/own/run/wsl-binfmt/systemd-binfmt.rules
    export WSL_BINFMT_ROOT=/tmp/own
    echo "in an own root:"
    all /tmp/own/out
    stat --format=%U /tmp/own/out/wsl-binfmt-guard.service
    systemctl set-environment WSL_BINFMT_ROOT=/tmp/own 2>/dev/null ||
        echo "set-environment: refused"
    mkdir /run/wsl-binfmt-2 2>/dev/null || echo "mkdir: refused"
END
    setpriv --reuid=nobody --regid=nogroup --clear-groups sh /tmp/script 2>/dev/null"#;
