//! The doctor: states of a distro are brought about for real, and what `status` says of them is
//! compared with `status/NAME.txt` (UPDATE_GOLDEN=1 writes these anew), as far as it says anything
//! else of a healthy one. Then what it says is done, and all has to be well. What else it tells
//! apart are unit tests in `tests/doctor/states.rs`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use serde_json::Value;
use wsl_vm::{Builder, Distro, Generation, Vm};

use crate::ours::{extent, project, Install, Run};
use crate::promises::RULE;
use crate::verbs::Test;

/// A rule that any Debian may ship: of its own, and harmless.
const RULES: (&str, &str) = ("/etc/binfmt.d/test.conf", RULE);

const TABLE: &str = "/proc/sys/fs/binfmt_misc";

/// Where a session's programs are to find Windows.
const SOCKET: &str = "WSL_INTEROP=/run/WSL/8_interop";

/// Somebody who is not root.
const USER: &str =
    "WSL_INTEROP=/run/WSL/8_interop setpriv --reuid=65534 --regid=65534 --clear-groups";

/// A distro of WSL's, with the socket that WSL makes for programs to be started on Windows.
fn distro<'vm>(vm: &'vm Vm, suite: &str) -> Builder<'vm> {
    named(vm, "mine", suite)
}

fn named<'vm>(vm: &'vm Vm, name: &str, suite: &str) -> Builder<'vm> {
    let socket = "[Socket]\nListenStream=/run/WSL/8_interop\nSymlinks=/run/WSL/1_interop\n";
    let units = "/etc/systemd/system";
    vm.distro(name, suite)
        .generator(true)
        .file(RULES.0, &format!("{}\n", RULES.1))
        .file(&format!("{units}/interop.socket"), socket)
        .file(&format!("{units}/interop.service"), "[Service]\nExecStart=/bin/true\n")
        .file(&format!("{units}/sockets.target.d/interop.conf"), "[Unit]\nWants=interop.socket\n")
}

/// What a run of `status` in a distro says, and its exit status.
pub fn look(distro: &Distro, environment: &str, arguments: &str) -> String {
    distro.run(&format!("{environment} wsl-binfmt status {arguments}; echo \"exit status $?\""))
}

fn golden(name: &str) -> std::path::PathBuf {
    project().join(format!("tests/scenarios/status/{name}.txt"))
}

/// Without what is said of a healthy distro, too.
fn what_differs(said: &str) -> anyhow::Result<String> {
    let healthy = fs::read_to_string(golden("healthy"))?;
    let usual: Vec<_> = healthy.lines().skip(1).collect();
    // Debian 11 has a /lib of its own.
    let known = |line: &&str| !usual.contains(&line.replace("  /lib/", "  /usr/lib/").as_str());
    Ok(said.lines().filter(known).map(|line| format!("{line}\n")).collect())
}

/// Compares what is said with a file.
fn compare(name: &str, said: &str) -> anyhow::Result<()> {
    let said = match name {
        "healthy" => said.to_owned(),
        _ => what_differs(said)?,
    };
    let path = golden(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &said)?;
    }
    let expected = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    ensure!(said == expected, "says:\n{said}\nnot:\n{expected}");
    Ok(())
}

/// The JSON form: valid by the schema, and the same as the text.
fn check_json(name: &str, json: &str, text: &str) -> anyhow::Result<Value> {
    let (json, status) = json.split_once('\n').context("no line of JSON")?;
    let (text, status_of_text) = text.trim_end().rsplit_once('\n').unwrap_or_default();
    ensure!(status.trim_end() == status_of_text, "{status} for JSON");
    let path = Path::new("/vm").join(format!("{name}.json"));
    fs::write(&path, json)?;
    let schema = project().join("docs/status.schema.json");
    let verdict = Command::new("jsonschema").arg("-i").args([&path, &schema]).output()?;
    ensure!(verdict.status.success(), "{verdict:?}");

    let report: Value = serde_json::from_str(json)?;
    // What would play tricks on a terminal is masked in the text.
    let mask = |c: char| match c.is_control() || c == '\u{202e}' {
        true => '?',
        false => c,
    };
    let of = |value: &Value| -> String {
        let text = value.as_str().unwrap_or_default();
        text.chars().map(mask).collect()
    };
    let (mut lines, mut mends) = (text.lines(), Vec::new());
    ensure!(lines.next() == Some(&of(&report["summary"])), "{text}\n{json}");
    for finding in report["checks"].as_array().context("checks")? {
        let mend = &finding["mend"];
        for (object, key) in [(finding, "found"), (mend, "what")] {
            let said = of(&object[key]);
            let line = lines.find(|line| !line.is_empty());
            let line = line.with_context(|| said.clone())?;
            let again = key == "what" && mends.contains(&mend);
            let expected = if again { "  fix    as above" } else { &said };
            ensure!(line.ends_with(expected), "{line}\n{said}");
            if !mend.is_object() {
                break;
            }
        }
        mends.push(mend);
    }
    ensure!(lines.next().is_none(), "{text}\n{json}");
    Ok(report)
}

/// Does what `status` says, as somebody would who knows nothing: runs each command that mends
/// something bad, in order. True if that was all that it said to do.
fn follow(distro: &Distro, report: &Value, environment: &mut String) -> anyhow::Result<bool> {
    let (mut followed, mut done) = (true, Vec::new());
    for finding in report["checks"].as_array().context("checks")? {
        let mend = &finding["mend"];
        let what = mend["what"].as_str().unwrap_or_default();
        match mend["how"].as_str() {
            _ if finding["state"] == "unknown" => followed = false,
            _ if finding["state"] != "bad" || done.contains(mend) => {}
            Some("run-as-root") => {
                let said = distro.run(&format!("{what} && echo done"));
                ensure!(said.ends_with("done\n"), "{what}: {said}");
            }
            Some("run-in-this-shell") => {
                let export = what.strip_prefix("export ").with_context(|| what.to_owned())?;
                export.clone_into(environment);
            }
            _ => followed = false,
        }
        done.push(mend.clone());
    }
    Ok(followed)
}

/// Looks at a distro, compares, and follows.
fn examine(distro: &Distro, name: &str, environment: &str) -> anyhow::Result<()> {
    let text = look(distro, environment, "");
    compare(name, &text)?;
    let report = check_json(name, &look(distro, environment, "--json"), &text)?;
    let mut environment = environment.to_owned();
    if follow(distro, &report, &mut environment)? {
        let text = look(distro, &environment, "");
        ensure!(text.ends_with("exit status 0\n"), "afterwards:\n{text}");
        let interop = ["healthy", "broken", "unprotected", "degraded"];
        if interop.iter().any(|verdict| report["verdict"] == *verdict) {
            ensure!(distro.launch() == "starts", "{}", distro.launch());
        }
    }
    Ok(())
}

/// A distro on which something has been done to bring a state about.
fn state(name: &str, builder: Builder, done: &str) -> anyhow::Result<()> {
    let distro = builder.boot()?;
    wait_until_settled(&distro);
    let said = distro.run(&format!("set -e; {done}"));
    ensure!(said.is_empty(), "{done}: {said}");
    wait_until_settled(&distro);
    examine(&distro, name, SOCKET)
}

/// The watcher waits until nobody writes to the table. Where it does not run, or may not touch what
/// it finds, nothing changes.
fn wait_until_settled(distro: &Distro) {
    let settled = format!(
        "cd {TABLE} && test ! -e WSLInterop-next -a ! -e WSLInterop-late && \
         grep -qs 'flags: PF' WSLInterop && \
         test \"$(systemctl is-active wsl-interop-restore)\" != activating && echo settled"
    );
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1500) && distro.run(&settled) != "settled\n" {
        thread::sleep(Duration::from_millis(20));
    }
}

/// Without what would mend it at once.
const UNWATCHED: &str = "systemctl stop wsl-interop-restore.service;";

fn unwatched(vm: &Vm, name: &str, done: &str) -> anyhow::Result<()> {
    state(name, distro(vm, "trixie"), &format!("{UNWATCHED} {done}"))
}

/// A distro in which something is done behind systemd's back.
fn done(vm: &Vm, name: &str, done: &str) -> anyhow::Result<()> {
    state(name, distro(vm, "trixie"), done)
}

pub const STATUS: &[Test] = &[
    ("status: healthy on each systemd, and under each WSL", |vm| {
        examine(&distro(vm, "trixie").boot()?, "healthy", SOCKET)?;
        for suite in extent::of(&["bullseye", "bookworm", "forky"]) {
            let said = look(&named(vm, suite, suite).boot()?, SOCKET, "");
            let differs = what_differs(&said)?;
            ensure!(differs.lines().count() == 1, "{suite}: {said}");
        }
        for generation in Generation::ALL {
            let distro = named(vm, generation.name(), "trixie").generation(generation);
            let said = look(&distro.boot()?, SOCKET, "");
            ensure!(said.ends_with("exit status 0\n"), "{generation:?}: {said}");
        }
        Ok(())
    }),
    ("status: not WSL, WSL1 or a container", |vm| {
        let native = named(vm, "native", "trixie").osrelease("6.1.0-13-amd64");
        let wsl1 = named(vm, "wsl1", "trixie").osrelease("4.4.0-19041-Microsoft");
        let container = named(vm, "docker", "trixie");
        for (distro, environment, said) in [
            (native.without_init(), &[][..], "This is not WSL: nothing to do."),
            (
                wsl1,
                &[],
                "This is WSL1, which neither runs systemd nor shares its table: nothing to do.",
            ),
            (
                container.without_init(),
                &["container=docker"],
                "This is a container on WSL's kernel: nothing to do.",
            ),
        ] {
            let distro = distro.environment(environment).boot()?;
            let expected = format!("{said}\nexit status 0\n");
            ensure!(look(&distro, SOCKET, "") == expected, "{expected}");
        }
        Ok(())
    }),
    ("status: without /init", |vm| {
        let without = named(vm, "without", "trixie").environment(&[]).without_init();
        examine(&without.boot()?, "no-init", SOCKET)?;
        // As a soft-reboot leaves it.
        let distro = distro(vm, "trixie").boot()?;
        wait_until_settled(&distro);
        let said = distro.run("umount --lazy /init && rm /init");
        ensure!(said.is_empty(), "{said}");
        examine(&distro, "init-gone", SOCKET)
    }),
    ("status: without systemd", |vm| {
        // A distro's PID 1 is then WSL's own, here a shell.
        fs::write("/vm/osrelease", "6.6.87.2-microsoft-standard-WSL2\n")?;
        let program = vm.generator().get_program().to_string_lossy().into_owned();
        let boot = format!(
            "mount -t proc proc /proc; mount -t binfmt_misc binfmt_misc {TABLE}; \
             mount --bind /vm/osrelease /proc/sys/kernel/osrelease; \
             {program} status || echo \"exit status $?\""
        );
        let output = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "sh", "-euc", &boot])
            .env("container_host_version_id", "2.6.3")
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        compare("no-systemd", &text.replace(&program, "wsl-binfmt"))
    }),
    ("status: an ordinary user", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        examine(&distro, "user", USER)?;
        distro
            .run("chmod 600 /etc/binfmt.d/test.conf; echo >/etc/wsl.conf; chmod 600 /etc/wsl.conf");
        examine(&distro, "user-denied", USER)?;
        distro.run("systemctl stop dbus.socket dbus.service");
        let said = look(&distro, USER, "");
        ensure!(
            said.contains("\nunknown  systemd          systemctl show: Failed to connect"),
            "{said}"
        );
        Ok(())
    }),
    // The table.
    ("status: binfmt_misc is not mounted", |vm| {
        done(vm, "not-mounted", &format!("umount {TABLE}/status; umount {TABLE}"))
    }),
    ("status: something else is mounted over binfmt_misc", |vm| {
        // A watcher that sleeps does not see it.
        let over = format!(
            "mount -t tmpfs tmpfs {TABLE}; systemctl restart wsl-interop-restore; for i in $(seq 100); do \
             test -z \"$(systemctl show -P StatusText wsl-interop-restore)\" || break; sleep .1; \
             done"
        );
        done(vm, "mounted-over", &over)
    }),
    ("status: the table is disabled under the guard's mount", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        vm.write("status", "0")?;
        examine(&distro, "table-disabled", SOCKET)
    }),
    ("status: the entry is missing", |vm| {
        unwatched(vm, "entry-missing", &format!("echo -1 >{TABLE}/WSLInterop"))
    }),
    ("status: the entry is disabled", |vm| {
        // Once the table is quiet, the watcher says so, too.
        let told = "systemctl show --property=StatusText --value wsl-interop-restore | grep -q .";
        let off = format!("echo 0 >{TABLE}/WSLInterop; until {told}; do sleep 0.05; done");
        done(vm, "entry-disabled", &off)
    }),
    ("status: the entry has another interpreter, and rivals", |vm| {
        let rules = [":cli:M::MZ::/usr/bin/cli:", ":ape:M::MZqFpD::/bin/echo:"].map(register);
        let renewed = registered_as("M::MZ::/bin/cat:PF");
        unwatched(vm, "entry-interpreter", &format!("{}; {renewed}", rules.join(";")))
    }),
    ("status: the entry has no F, and Mono is ahead", |vm| {
        let mono = register(":cli:M::MZ::/usr/bin/cli:");
        let lost = registered_as("M::MZ::/init:P");
        unwatched(vm, "entry-no-f", &format!("{lost}; {mono}"))
    }),
    ("status: a table of 10,000 entries", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        for i in 0..10_000 {
            vm.register(&format!(":many{i}:M::many{i}::/bin/cat:"))?;
        }
        thread::sleep(Duration::from_secs(1));
        let said = look(&distro, SOCKET, "");
        ensure!(what_differs(&said)?.lines().count() == 1, "{said}");
        Ok(())
    }),
    // The status file.
    ("status: the status file is open, in a shell with mounts of its own", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        distro.run(&format!("umount {TABLE}/status"));
        // What mends it is run where it was found.
        let own = "unshare --mount --propagation private env WSL_INTEROP=/run/WSL/8_interop";
        examine(&distro, "status-open", own)
    }),
    ("status: the guard's file was deleted", |vm| {
        let restart = "systemctl restart systemd-binfmt 2>/dev/null || true";
        done(vm, "status-deleted", &format!("rm /run/wsl-binfmt/status; {restart}"))
    }),
    // The services that write to the table.
    ("status: systemd-binfmt has failed at a rule", |vm| {
        let broken = ":broken:M::BROKEN::/missing:F\n";
        let distro = distro(vm, "trixie").file("/etc/binfmt.d/broken.conf", broken);
        state("binfmt-failed", distro, "")
    }),
    ("status: systemd-binfmt was started too often", |vm| {
        let limit = "/etc/systemd/system/systemd-binfmt.service.d/limit.conf";
        let distro = distro(vm, "trixie").file(limit, "[Unit]\nStartLimitIntervalSec=1h\n");
        let often =
            "for i in 1 2 3 4 5 6 7; do systemctl restart systemd-binfmt; done 2>/dev/null \
                     || true";
        state("binfmt-start-limit", distro, often)
    }),
    ("status: systemd-binfmt is skipped or masked", |vm| {
        let drop_in = "/etc/systemd/system/systemd-binfmt.service.d/wsl.conf";
        let text = "[Unit]\nConditionVirtualization=!container\n";
        let distro = distro(vm, "trixie").file(drop_in, text).boot()?;
        examine(&distro, "binfmt-skipped", SOCKET)?;
        distro.run("systemctl mask --quiet --runtime systemd-binfmt");
        let said = look(&distro, SOCKET, "");
        let hint = "as root          systemctl unmask --runtime systemd-binfmt.service";
        ensure!(said.contains(hint), "{said}");
        Ok(())
    }),
    ("status: own rules are gone", |vm| {
        unwatched(vm, "rules-gone", &format!("echo -1 >{TABLE}/testfmt"))
    }),
    ("status: own rules that nobody would release", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        distro.run(&format!("{UNWATCHED} rm /run/wsl-binfmt/systemd-binfmt.rules"));
        examine(&distro, "rules-unrecorded", SOCKET)?;
        distro.run("systemctl restart systemd-binfmt");
        ensure!(!look(&distro, SOCKET, "").contains("may stay"));
        Ok(())
    }),
    ("status: binfmt-support has failed", |vm| {
        let drop_in = "/etc/systemd/system/binfmt-support.service.d/x.conf";
        let text = "[Service]\nExecStart=\nExecStart=/bin/sh -c 'test ! -e /run/x && \
                    update-binfmts --enable'\n";
        let distro = distro(vm, "trixie").binfmt_support().file(drop_in, text);
        // The watcher takes a while to believe that the rule was removed on purpose.
        let fail = format!(
            "systemctl stop binfmt-support; touch /run/x; echo -1 >{TABLE}/python3.13; \
             systemctl start binfmt-support 2>/dev/null || true; rm /run/x; \
             while grep -q python3.13 /run/wsl-binfmt/systemd-binfmt.rules; do sleep .05; done"
        );
        state("support-failed", distro, &fail)
    }),
    ("status: our drop-in is replaced", |vm| {
        let directory = "/etc/systemd/system.control/systemd-binfmt.service.d";
        let replace = format!(
            "mkdir -p {directory}; printf '[Service]\\nNice=1\\n' >{directory}/10-wsl-interop.conf; \
             systemctl daemon-reload"
        );
        done(vm, "drop-in-replaced", &replace)
    }),
    // Our services.
    ("status: the guard is stopped, and the watcher has failed", |vm| {
        // Otherwise it comes back, whatever becomes of it.
        let drop_in = "/run/systemd/system/wsl-interop-restore.service.d";
        let kill = format!(
            "systemctl stop wsl-binfmt-guard; umount {TABLE}/status; \
             mkdir -p {drop_in}; printf '[Service]\\nRestart=no\\n' >{drop_in}/x.conf; \
             systemctl daemon-reload; systemctl kill -s KILL wsl-interop-restore; sleep .3; \
             rm -r {drop_in}; systemctl daemon-reload; \
             systemctl is-failed --quiet wsl-interop-restore"
        );
        done(vm, "guard-stopped", &kill)
    }),
    ("status: the watcher is masked", |vm| {
        let mask = "mkdir -p /etc/systemd/system.control; \
                    ln -s /dev/null /etc/systemd/system.control/wsl-interop-restore.service; \
                    systemctl daemon-reload; systemctl stop wsl-interop-restore.service";
        // The old one shows masks as /dev/null.
        state("watcher-masked", distro(vm, "bullseye"), mask)
    }),
    // The generator.
    ("status: the generator is not installed", |vm| {
        // As somebody does who has built it and not installed it.
        let elsewhere = "mkdir -p /usr/local/sbin; mv /usr/lib/systemd/system-generators/wsl-binfmt-generator \
                         /usr/local/sbin; ln -sf /usr/local/sbin/wsl-binfmt-generator /usr/bin/wsl-binfmt; \
                         systemctl daemon-reload";
        done(vm, "generator-missing", elsewhere)
    }),
    ("status: the generator is masked", |vm| {
        let mask = "mkdir -p /etc/systemd/system-generators; \
                    ln -s /dev/null /etc/systemd/system-generators/wsl-binfmt-generator; \
                    systemctl daemon-reload";
        done(vm, "generator-masked", mask)
    }),
    ("status: another copy of the generator is used", |vm| {
        let copy = "install -D /bin/true /etc/systemd/system-generators/wsl-binfmt-generator; \
                    systemctl daemon-reload";
        done(vm, "generator-copy", copy)
    }),
    // wsl.conf, and leftovers.
    ("status: wsl.conf switches protection or interop off", |vm| {
        for (name, conf) in [
            ("conf-unprotected", "[boot]\nprotectBinfmt=false\n"),
            ("conf-off", "[interop]\nenabled=false\n; x\n"),
        ] {
            let distro = named(vm, name, "trixie").file("/etc/wsl.conf", conf);
            examine(&distro.boot()?, name, SOCKET)?;
        }
        Ok(())
    }),
    ("status: old workarounds", |vm| {
        let units = "/etc/systemd/system";
        let rule = ":WSLInterop:M::MZ::/init:P\n";
        let register = "echo :WSLInterop:M::MZ::/init:P >/proc/sys/fs/binfmt_misc/register";
        let service = format!("[Service]\nExecStart=-/bin/sh -c '{register}'\n");
        let timer = "[Timer]\nOnCalendar=monthly\n[Install]\nWantedBy=timers.target\n";
        let distro = distro(vm, "trixie")
            .file("/etc/binfmt.d/WSLInterop.conf", rule)
            .file("/usr/lib/binfmt.d/late.conf", ":WSLInterop-late:M::MZ::/init:PF\n")
            // Names that mean something to a shell, or to a terminal.
            .file("/etc/binfmt.d/a $(touch pwned).conf", rule)
            .file("/etc/binfmt.d/b\n\u{202e}.conf", rule)
            .file(&format!("{units}/fix.service"), &service)
            .file(&format!("{units}/fix.timer"), timer)
            .file(&format!("{units}/unused.service"), &service);
        let enable = "systemctl enable --quiet fix.timer; cd /etc/systemd/system; \
                      mkdir -p default.target.wants; \
                      ln -s /run/systemd/generator.early/wsl-binfmt.service default.target.wants";
        state("leftovers", distro, enable)
    }),
    // The socket.
    ("status: $WSL_INTEROP is not set, stale or dead", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        let listen = "perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); \
                      bind(S, sockaddr_un(\"/run/WSL/\\$(id)_interop\")); listen(S, 1); \
                      sleep 100' &";
        distro.run(&format!("({listen}) >/dev/null 2>&1; sleep 1; ls /run/WSL"));
        examine(&distro, "socket-unset", "")?;
        // A service has PID 1's.
        let service = "systemd-run --quiet --pipe --wait -E WSL_INTEROP=/run/WSL/7_interop";
        examine(&distro, "socket-inherited", service)?;
        let dead = "perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); \
                    bind(S, sockaddr_un(\"/run/WSL/9_interop\"))'";
        distro.run(dead);
        examine(&distro, "socket-dead", "WSL_INTEROP=/run/WSL/9_interop")
    }),
    // What somebody goes through who has read the wrong forum.
    ("a new user needs nothing but what status says", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        let ways = [
            // Somebody masks all that has to do with it, and restarts.
            "ln -s /dev/null /etc/systemd/system-generators/wsl-binfmt-generator; \
             systemctl stop wsl-interop-restore wsl-binfmt-guard; \
             rm -r /run/systemd/system/*.service.d; systemctl daemon-reload; \
             umount /proc/sys/fs/binfmt_misc/status; systemctl restart systemd-binfmt",
            // Switches the entry off.
            "echo 0 >/proc/sys/fs/binfmt_misc/WSLInterop",
            // Switches all of it off, where nobody is on guard.
            "umount /proc/sys/fs/binfmt_misc/status; echo 0 >/proc/sys/fs/binfmt_misc/status",
            // Puts another program in its place.
            "echo -1 >/proc/sys/fs/binfmt_misc/WSLInterop; systemctl stop wsl-interop-restore; \
             echo -1 >/proc/sys/fs/binfmt_misc/WSLInterop; \
             echo :WSLInterop:M::MZ::/bin/cat:F >/proc/sys/fs/binfmt_misc/register",
            // Installs Mono while nobody watches.
            "systemctl stop wsl-interop-restore; \
             echo :cli:M::MZ::/bin/cat: >/proc/sys/fs/binfmt_misc/register",
        ];
        for way in ways {
            distro.run(&format!("mkdir -p /etc/systemd/system-generators; {way}"));
            ensure!(distro.launch() != "starts", "this breaks nothing: {way}");
            let json = look(&distro, SOCKET, "--json");
            let report = serde_json::from_str(json.lines().next().unwrap_or_default())?;
            ensure!(json.ends_with("exit status 1\n"), "{way}: {json}");
            let all = follow(&distro, &report, &mut String::new())?;
            ensure!(all, "{way}: {report:#}");
            ensure!(distro.launch() == "starts", "{way}: {report:#}");
            let after = look(&distro, SOCKET, "");
            ensure!(after.ends_with("exit status 0\n"), "{way}: {after}");
            // And it is not only so for now.
            let again = distro.run(
                "systemctl daemon-reload; systemctl reset-failed systemd-binfmt; \
                 systemctl restart systemd-binfmt",
            );
            ensure!(again.is_empty() && distro.launch() == "starts", "{way}: {again}");
        }
        Ok(())
    }),
    // It waits for what answers, and says what does not.
    ("status: the table's place is a dead automount", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        // Whoever is in there already keeps it from being unmounted.
        thread::sleep(Duration::from_secs(1));
        distro.dead_automount(vm, TABLE)?;
        examine(&distro, "dead-automount", SOCKET)
    }),
    ("status: wsl.conf is on a dead automount", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        distro.run("mkdir /dead; ln -s /dead/wsl.conf /etc/wsl.conf");
        distro.dead_automount(vm, "/dead")?;
        hangs(&distro, "conf-hangs")
    }),
    ("status: systemd does not answer", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        distro.freeze()?;
        hangs(&distro, "systemd-hangs")?;
        // Nobody is left behind.
        let left = distro.run("cat /proc/[0-9]*/comm | grep -c systemctl");
        ensure!(left == "0\n", "{left}");
        Ok(())
    }),
    ("status: as quick as it can be", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        // What it does is little, and it waits for nothing; all else is the machine's load.
        let run = "i=0; start=$(date +%s%N); while [ $i -lt 10 ]; do i=$((i + 1)); \
                   wsl-binfmt status >/dev/null; done; end=$(date +%s%N); \
                   awk '{print ($16 + $17) / 10}' /proc/$$/stat; echo $(((end - start) / 10000000))";
        for what in [
            "true",
            "mkfifo /etc/wsl.conf",
            "rm /etc/wsl.conf; (echo '[boot]'; yes a=b | head -n 1000000) >/etc/wsl.conf; \
             truncate -s 1G /etc/wsl.conf",
        ] {
            let said = distro.run(&format!("{what}; {run}"));
            let taken: Vec<f32> = said.lines().map_while(|line| line.parse().ok()).collect();
            // In hundredths of a second, and in milliseconds.
            ensure!(taken.len() == 2 && taken[0] < 10.0 && taken[1] < 1000.0, "{what}: {said}");
        }
        Ok(())
    }),
    ("status: says the same on a busy machine", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        let rounds = extent::rounds() / 10;
        let idle = look(&distro, SOCKET, "");
        ensure!(idle.ends_with("exit status 0\n"), "{idle}");
        let busy = (0..8).map(|_| Command::new("sh").args(["-c", "while :; do :; done"]).spawn());
        let mut busy = busy.collect::<Result<Vec<_>, _>>()?;
        let differs = (0..rounds).map(|_| look(&distro, SOCKET, ""));
        let differs: Vec<_> = differs.filter(|said| *said != idle).collect();
        for process in &mut busy {
            process.kill()?;
            process.wait()?;
        }
        let number = differs.len();
        ensure!(number == 0, "{number} of {rounds} differ:\n{}", differs.concat());
        Ok(())
    }),
    ("status: colours only on a terminal that wants them", |vm| {
        let distro = distro(vm, "trixie").boot()?;
        let shown = |before: &str| {
            let command = format!("{SOCKET} {before} wsl-binfmt status");
            distro.run(&format!("TERM=xterm script -qec '{command}' /dev/null"))
        };
        let coloured = shown("");
        ensure!(coloured.contains("\x1b[32mok     \x1b[m  platform "), "{coloured}");
        for before in ["NO_COLOR=1", "TERM=dumb", "env -u TERM"] {
            let plain = shown(before);
            ensure!(plain.contains("\nok       platform "), "{before}: {plain}");
            ensure!(!plain.contains('\x1b'), "{before}: {plain}");
        }
        let wanted = shown("NO_COLOR=");
        ensure!(wanted == coloured, "{wanted}");
        Ok(())
    }),
];

/// Something hangs: that is told, and all else; and it is over after two seconds.
fn hangs(distro: &Distro, name: &str) -> anyhow::Result<()> {
    let start = Instant::now();
    let said = look(distro, SOCKET, "");
    let taken = start.elapsed();
    compare(name, &said)?;
    ensure!(taken < Duration::from_secs(4), "{taken:?}");
    Ok(())
}

fn register(rule: &str) -> String {
    format!("echo '{rule}' >{TABLE}/register")
}

/// The entry, registered otherwise than it should be.
fn registered_as(how: &str) -> String {
    let rule = format!(":WSLInterop:{how}");
    format!("echo -1 >{TABLE}/WSLInterop; {}", register(&rule))
}
