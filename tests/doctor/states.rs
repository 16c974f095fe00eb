//! States of a distro as plain facts, and what is said of each: `states.txt` has it all
//! (UPDATE_GOLDEN=1 writes it anew). Nothing of a machine is read.

use std::fs;
use std::io::ErrorKind;

use super::facts::*;
use super::report::State;
use super::*;
use crate::binfmt_d;
use crate::binfmt_misc::{Entry, Listed, Pattern};
use crate::interop::{self, LATE, NAME, STAND_IN};
use crate::plan::{self, OthersFiles};
use crate::units;

fn healthy() -> Facts {
    let conf = WslConf::default();
    let plan = plan::plan(&conf, &OthersFiles::default());
    let exe = camino::Utf8PathBuf::from("/usr/lib/wsl-binfmt-generator");
    let mut files = Files {
        generators: vec![(exe.clone(), exe.clone(), Fate::Runs)],
        executable: exe.clone(),
        rules: binfmt_d::parse(":py:M::x::/usr/bin/python:", "/usr/lib/binfmt.d/py.conf"),
        recorded: [vec!["py".to_owned()], Vec::new()],
        ..Files::default()
    };
    for output in &plan {
        let (path, text) = match output {
            plan::Output::File { path, template } => (path, units::fill(template, &exe)),
            plan::Output::Link { path, target, .. } => (path, format!("link to {target}")),
        };
        files.written.insert((*path).to_owned(), text);
    }
    let shown = services::UNITS.map(|unit| {
        let binds = "BindPaths=/dev/null:/proc/sys/fs/binfmt_misc/status:rbind";
        format!("Id={unit}\nLoadState=loaded\nActiveState=active\nConditionTimestampMonotonic=1\n{binds}\n\n")
    });
    let socket = |path: &str| Socket { path: path.to_owned(), exists: true, is_alive: true };
    Facts {
        place: Fact::Is(Place {
            verdict: Verdict::Wsl2,
            has_init: true,
            version: Ok(Some("2.6.3".to_owned())),
            has_systemd: true,
            command: "wsl-binfmt".to_owned(),
            has_own_mounts: false,
        }),
        conf: Fact::Is(Decision {
            conf,
            noted: None,
            unread: Some(ErrorKind::NotFound),
            warning: None,
            doubts: Vec::new(),
            plan,
        }),
        files: Fact::Is(files),
        table: Fact::Is(Table {
            mounted: Some("binfmt_misc".to_owned()),
            entries: Some(vec![listed(NAME, "/init", "PF"), listed("py", "/x", "")]),
            state: "enabled".to_owned(),
            cover: Some("/wsl-binfmt/status".to_owned()),
            probe: Probe::Taken,
        }),
        units: Fact::Is(systemctl::parse(&shown.concat())),
        session: Fact::Is(Session {
            variable: Some(socket("/run/WSL/8_interop")),
            inherited: Some(socket("/run/WSL/1_interop")),
            other: None,
        }),
    }
}

fn listed(name: &str, interpreter: &str, flags: &str) -> Listed {
    let mut entry =
        Entry { interpreter: interpreter.to_owned(), flags: flags.to_owned(), ..interop::wanted() };
    if name == "py" {
        entry.pattern = Pattern::Extension("py".to_owned());
    }
    Listed { name: name.to_owned(), inode: 1, entry }
}

fn is<T>(fact: &mut Fact<T>) -> &mut T {
    match fact {
        Fact::Is(value) => value,
        _ => panic!("not known"),
    }
}

fn place(facts: &mut Facts) -> &mut Place {
    is(&mut facts.place)
}

fn files(facts: &mut Facts) -> &mut Files {
    is(&mut facts.files)
}

fn table(facts: &mut Facts) -> &mut Table {
    is(&mut facts.table)
}

fn entries(facts: &mut Facts) -> &mut Vec<Listed> {
    is(&mut facts.table).entries.as_mut().unwrap()
}

fn entry(facts: &mut Facts) -> &mut Entry {
    &mut entries(facts)[0].entry
}

/// Properties of the unit that `at` names: 0 systemd-binfmt, 1 binfmt-support, 2 guard, 3 watcher.
fn unit(facts: &mut Facts, at: usize, properties: &str) {
    let changed = properties.split(' ').filter_map(|one| one.split_once('='));
    let changed = changed.map(|(name, value)| (name.to_owned(), value.replace('_', " ")));
    is(&mut facts.units)[at].0.extend(changed);
}

fn conf(facts: &mut Facts, text: &str) {
    let decision = is(&mut facts.conf);
    decision.conf = crate::wsl_conf::parse(text.as_bytes());
    decision.unread = None;
    decision.plan = plan::plan(&decision.conf, &OthersFiles::default());
}

fn generator(facts: &mut Facts, fate: Fate) {
    files(facts).generators[0].2 = fate;
}

type Change = fn(&mut Facts);
const STATES: &[(&str, Change)] = &[
    ("root hangs", |f| f.place = Fact::Silent),
    ("everything else hangs", |f| {
        let Facts { place, .. } = std::mem::take(f);
        f.place = place;
    }),
    ("initrd", |f| place(f).verdict = Verdict::Initrd),
    ("version not told", |f| place(f).version = Ok(None)),
    ("PID 1 not readable", |f| place(f).version = Err(ErrorKind::Other)),
    ("protection off, but noted as on", |f| {
        is(&mut f.conf).noted = Some(WslConf::default());
        conf(f, "[boot]\nprotectBinfmt=false\n");
    }),
    ("wsl.conf denied, entry disabled", |f| {
        is(&mut f.conf).unread = Some(ErrorKind::PermissionDenied);
        entry(f).enabled = false;
        table(f).probe = Probe::Refused;
    }),
    ("wsl.conf cannot be read", |f| {
        is(&mut f.conf).unread = Some(ErrorKind::IsADirectory);
        is(&mut f.conf).warning = Some("/etc/wsl.conf: not a regular file, ignoring".to_owned());
    }),
    ("interop off, watcher gone, entry missing", |f| {
        conf(f, "[interop]\nenabled=false\n");
        unit(f, 3, "LoadState=not-found");
        entries(f).remove(0);
        table(f).probe = Probe::Refused;
    }),
    ("interop off, status open", |f| {
        conf(f, "[interop]\nenabled=false\n");
        table(f).cover = None;
    }),
    ("generator not executable", |f| generator(f, Fate::NotExecutable)),
    ("generator writable", |f| generator(f, Fate::WritableByAll)),
    ("a generator is passed over", |f| {
        let path = "/etc/wsl-binfmt-generator";
        let passed = (path.into(), path.into(), Fate::NotExecutable);
        files(f).generators.insert(0, passed);
    }),
    ("generator was upgraded", |f| {
        files(f).written.remove("wsl-binfmt-guard.service");
        files(f).written.remove("sysinit.target.wants/wsl-binfmt-guard.service");
    }),
    ("mounts denied", |f| f.table = Fact::Failed("reading the list of mounts: x".to_owned())),
    ("table there, but not for this shell", |f| table(f).entries = None),
    ("table disabled", |f| {
        table(f).cover = None;
        table(f).state = "disabled".to_owned();
        table(f).probe = Probe::Refused;
    }),
    ("no entry, cover", |f| {
        entries(f).clear();
        table(f).probe = Probe::Refused;
    }),
    ("kernel does not tell", |f| table(f).probe = Probe::Unknown),
    ("status file makes no sense", |f| {
        table(f).cover = None;
        table(f).state = "x".to_owned();
    }),
    ("entry for something else, disabled", |f| {
        entry(f).pattern = Pattern::Extension("exe".to_owned());
        entry(f).enabled = false;
    }),
    ("entry without P and F", |f| entry(f).flags.clear()),
    ("entry without P behind the stand-in", |f| {
        entry(f).flags = "F".to_owned();
        entries(f).insert(0, listed(STAND_IN, "/init", "PF"));
    }),
    ("somebody's entry for /init without P", |f| {
        entries(f).insert(0, listed("wsl", "/init", ""));
    }),
    ("second entry doubles", |f| entries(f).push(listed(LATE, "/init", "P"))),
    ("only the second entry", |f| entries(f)[0].name = LATE.to_owned()),
    ("a rival that is switched off", |f| {
        let mut rival = listed("wine", "/wine", "");
        rival.entry.enabled = false;
        entries(f).insert(0, rival);
    }),
    ("covered by somebody", |f| table(f).cover = Some("/x".to_owned())),
    ("guarded by WSL", |f| table(f).cover = Some("/wsl/binfmt-status-lock".to_owned())),
    ("guard's file written to", |f| table(f).state = "1".to_owned()),
    ("mounts of one's own", |f| {
        place(f).has_own_mounts = true;
        table(f).cover = None;
    }),
    ("no systemctl", |f| f.units = Fact::Failed("running systemctl: ENOENT".to_owned())),
    ("not installed", |f| unit(f, 1, "LoadState=not-found")),
    ("masked for good", |f| {
        unit(f, 0, "LoadState=masked FragmentPath=/etc/x ActiveState=inactive")
    }),
    ("rules never registered", |f| {
        entries(f).remove(1);
        files(f).recorded = Default::default();
    }),
    ("stopped", |f| {
        entries(f).remove(1);
        unit(f, 0, "ActiveState=inactive");
    }),
    ("skipped, and nothing to do", |f| {
        files(f).rules.clear();
        unit(f, 0, "ActiveState=inactive ConditionResult=no");
    }),
    ("program of a service is gone", |f| {
        entries(f).remove(1);
        unit(f, 0, "ActiveState=failed Result=exit-code ExecMainStatus=203");
        unit(f, 3, "ActiveState=failed Result=exit-code ExecMainStatus=226");
    }),
    ("BindPaths= emptied", |f| {
        let path = "/etc/systemd/system/systemd-binfmt.service.d/zz.conf";
        let text = "[Service]\nBindPaths =\n".to_owned();
        files(f).drop_ins.push((path.to_owned(), text));
        unit(f, 0, &format!("BindPaths= DropInPaths={path}"));
    }),
    ("drop-in not loaded", |f| unit(f, 0, "BindPaths=")),
    ("our files changed", |f| unit(f, 2, "NeedDaemonReload=yes")),
    ("watcher changed, and says something", |f| {
        unit(f, 3, "DropInPaths=/etc/x.conf StatusText=no_table");
    }),
    ("watcher is being started", |f| unit(f, 3, "ActiveState=activating")),
    ("old rule beside others, and a drop-in", |f| {
        let rules = ":WSLInterop:M::MZ::/init:P\n:other:M::x::/x:\n";
        files(f).rules = binfmt_d::parse(rules, "/etc/binfmt.d/all.conf");
        let register = "[Service]\nExecStartPost=sh -c 'echo :x:M::MZ::/init: >/x/register'\n";
        let path = "/etc/systemd/system/a.service.d/a.conf".to_owned();
        files(f).drop_ins.push((path, register.to_owned()));
        entries(f).push(listed("other", "/x", ""));
    }),
    ("stale socket", |f| {
        let session = is(&mut f.session);
        session.variable.as_mut().unwrap().is_alive = false;
        session.other = Some("/run/WSL/9_interop".to_owned());
    }),
    ("no systemd", |f| place(f).has_systemd = false),
    ("no way to Windows", |f| {
        let session = is(&mut f.session);
        session.variable = None;
        session.inherited.as_mut().unwrap().is_alive = false;
    }),
];

#[test]
fn each_state_is_told_as_it_was() {
    let usual = judge(&healthy(), place(&mut healthy()));
    let good = |report: &Report| report.findings.iter().all(|f| f.state == State::Good);
    assert!(good(&usual), "{}", usual.text(false));
    let usual = usual.text(false);
    let mut said = String::new();
    for (name, change) in STATES {
        let mut facts = healthy();
        change(&mut facts);
        let text = match facts.place.known("platform", "the root file system") {
            Ok(place) => judge(&facts, place),
            Err(unknown) => Report::of(vec![unknown], true),
        };
        let text = text.text(false);
        let known = |line: &&str| usual.lines().skip(1).all(|usual| usual != *line);
        let lines = text.lines().filter(known).map(|line| format!("{line}\n"));
        said += &format!("# {name}\n{}\n", lines.collect::<String>());
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doctor/states.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(path, &said).unwrap();
    }
    let expected = fs::read_to_string(path).unwrap();
    for (said, expected) in said.split("\n\n").zip(expected.split("\n\n")) {
        assert_eq!(said, expected);
    }
    assert_eq!(said, expected);
}

#[test]
fn all_that_the_schema_has_is_told() {
    let schema: serde_json::Value =
        serde_json::from_str(include_str!("../../docs/status.schema.json")).unwrap();
    let finding = &schema["properties"]["checks"]["items"]["properties"];
    let how = &finding["mend"]["oneOf"][1]["properties"]["how"]["enum"];
    let names = |names: &serde_json::Value| -> Vec<String> {
        let names = names.as_array().unwrap().iter();
        names.map(|name| name.as_str().unwrap().to_owned()).collect()
    };
    let how = names(how).into_iter().map(|how| how.trim_start_matches("run-").replace('-', " "));
    let said = judge(&healthy(), place(&mut healthy())).text(false) + include_str!("states.txt");
    for name in names(&finding["check"]["enum"]).into_iter().chain(how) {
        assert!(said.contains(&format!("  {name} ")), "{name} is never told");
    }
}

#[test]
fn what_registers_the_entry_is_told_from_what_only_looks_at_it() {
    let register = "/bin/sh -c 'echo :WSLInterop:M::MZ::/init:PF >/x/register'";
    for (unit, registers) in [
        (&*format!("[Service]\nExecStart=\n ExecStart={register}\n"), true),
        ("ExecStart=sh -c 'echo :x:M::MZ::/init: \\\n>/x/register'", true),
        (&format!("# ExecStart={register}\n"), false),
        ("ConditionPathExists=/proc/sys/fs/binfmt_misc/WSLInterop", false),
        ("ExecStart=cat /proc/sys/fs/binfmt_misc/WSLInterop", false),
        ("ExecStart=sh -c 'echo :q:M::ELF::/q: >/x/register'", false),
    ] {
        assert_eq!(leftovers::registers(unit), registers, "{unit}");
    }
}

#[test]
fn units_are_read_as_systemctl_shows_them() {
    // As systemd 247 has it; newer ones order it otherwise.
    let said = "StatusText=a=b\nBindPaths=/dev/null:/s:rbind -/x:/y\nId=a.service\n\
                DropInPaths=/a.conf /b.conf\n\nId=b.service\nDropInPaths=\n";
    let units = systemctl::parse(said);
    assert_eq!(units.len(), 2);
    assert_eq!(units[0].get("StatusText"), "a=b");
    assert_eq!(units[0].drop_ins(), ["/a.conf", "/b.conf"]);
    assert!(units[0].binds_over("/s") && units[0].binds_over("/y"));
    assert!(!units[0].binds_over("/dev/null") && !units[1].binds_over("/s"));
    assert_eq!((units[1].drop_ins().len(), units[1].get("Result")), (0, ""));
    assert!(systemctl::parse("Failed to connect to bus: Connection refused\n").is_empty());
}
