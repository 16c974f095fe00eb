//! What WSL itself does for the interop of a distro that it boots, which has changed with its
//! versions. Texts and order of events are those of WSL's own init, but for wsl-mnt-guard.service, which
//! has nothing to do with interop; that of `Oneshot` is as users have quoted it.

use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{bail, Context};

use super::mount;
use super::vm::TABLE;

/// WSL, by what it does for interop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// Nothing.
    None,
    /// A unit registers a second entry, once, after systemd-binfmt.
    Oneshot,
    /// A generator's drop-ins make systemd-binfmt register a second entry at its end.
    DropinLate,
    /// The same with the entry itself, which is replaced.
    Dropin,
    /// The table's `status` file is made read-only before systemd starts.
    Lock,
}

impl Generation {
    /// All of them, the oldest first.
    pub const ALL: [Generation; 5] = [
        Generation::None,
        Generation::Oneshot,
        Generation::DropinLate,
        Generation::Dropin,
        Generation::Lock,
    ];

    /// Its name, for `named`.
    pub fn name(self) -> &'static str {
        match self {
            Generation::None => "none",
            Generation::Oneshot => "oneshot",
            Generation::DropinLate => "dropin-late",
            Generation::Dropin => "dropin",
            Generation::Lock => "lock",
        }
    }

    /// The generation of that name.
    pub fn named(name: &str) -> anyhow::Result<Generation> {
        let mut all = Generation::ALL.into_iter();
        all.find(|generation| generation.name() == name)
            .with_context(|| format!("no generation {name}"))
    }

    /// The versions of WSL that do so.
    pub fn versions(self) -> &'static str {
        match self {
            Generation::None => "before 2.0",
            Generation::Oneshot => "2.0 to 2.5.6",
            Generation::DropinLate => "2.5.7 to 2.6.1",
            Generation::Dropin => "2.6.2 to 2.8.8",
            Generation::Lock => "since 2.8.9",
        }
    }

    /// The generation that has this version.
    pub fn of_version(version: &str) -> anyhow::Result<Generation> {
        let Some(numbers) = numbers(version) else {
            bail!("{version} is no version of WSL; one is 2.6.3");
        };
        let version_is_before = |other| numbers < other;
        if version_is_before((0, 67, 6)) {
            bail!("WSL {version} starts no systemd; 0.67.6 is the first that does");
        }
        let ends = [(2, 0, 0), (2, 5, 7), (2, 6, 2), (2, 8, 9), (4, 0, 0)];
        let mut generations = Generation::ALL.into_iter().zip(ends);
        let found = generations.find(|(_, end)| version_is_before(*end));
        let newest = Generation::Lock.a_version();
        let unknown = || format!("WSL {version} is not known here; {newest} is the newest that is");
        Ok(found.with_context(unknown)?.0)
    }

    /// A version of it.
    pub fn a_version(self) -> &'static str {
        match self {
            Generation::None => "1.2.5",
            Generation::Oneshot => "2.4.13",
            Generation::DropinLate => "2.6.1",
            Generation::Dropin => "2.8.8",
            Generation::Lock => "3.0.1",
        }
    }

    /// PID 1's environment.
    pub(super) fn environment(self) -> Vec<String> {
        vec![
            "container=wsl".to_owned(),
            "container_host_id=windows".to_owned(),
            format!("{VERSION}{}.0", self.a_version()),
        ]
    }

    /// Does in the distro below `root` what WSL of the version in PID 1's environment does before it
    /// starts systemd. Of wsl.conf it understands what is plainly there.
    pub(super) fn prepare(self, root: &str, environment: &str) -> anyhow::Result<()> {
        let version = environment.lines().find_map(|line| line.strip_prefix(VERSION));
        let version = version.and_then(numbers).or(numbers(self.a_version())).unwrap_or_default();
        let conf = fs::read_to_string(format!("{root}/etc/wsl.conf")).unwrap_or_default();
        let protect = !says_false(&conf, "boot", "protectBinfmt");
        let interop = !says_false(&conf, "interop", "enabled");
        match self {
            Generation::None => Ok(()),
            Generation::Oneshot if interop && protect => write_unit(root),
            Generation::Oneshot => Ok(()),
            Generation::DropinLate | Generation::Dropin if interop && protect => {
                let name = match self {
                    Generation::DropinLate => "WSLInterop-late",
                    _ => "WSLInterop",
                };
                write_generator(root, &(unrelated(version) + &drop_ins(name, version)))
            }
            Generation::DropinLate | Generation::Dropin => {
                write_generator(root, &unrelated(version))
            }
            Generation::Lock => {
                if protect {
                    lock(root)?;
                }
                write_generator(root, &unrelated(version))
            }
        }
    }

    /// Whether all distros have the same cgroups. The version that stands for the last generation gives
    /// each its own; those up to 2.9.4 do not.
    pub(super) fn shares_cgroups(self) -> bool {
        self != Generation::Lock
    }

    /// How long it waits for a distro to power off before it kills it. Before 2.6.2 it does not
    /// wait at all, and says it is a reboot.
    pub(super) fn patience(self, conf: &str) -> Option<Duration> {
        match self {
            Generation::None | Generation::Oneshot | Generation::DropinLate => None,
            Generation::Dropin | Generation::Lock => {
                let time = setting(conf, "boot", "initTimeout");
                let time = time.and_then(|milliseconds| milliseconds.parse().ok());
                Some(Duration::from_millis(time.unwrap_or(10_000)))
            }
        }
    }
}

/// In PID 1's environment, what comes before the version of WSL.
const VERSION: &str = "container_host_version_id=";

/// Of a version the three numbers that count, of which the last may be missing.
type Numbers = (u32, u32, u32);

fn numbers(version: &str) -> Option<Numbers> {
    let numbers: Result<Vec<u32>, _> = version.split('.').map(str::parse).collect();
    match numbers.as_deref() {
        Ok(&[major, minor]) => Some((major, minor, 0)),
        Ok(&[major, minor, patch] | &[major, minor, patch, _]) => Some((major, minor, patch)),
        _ => None,
    }
}

/// What has nothing to do with interop that the generator masks, and since when.
const MASKED: [(Numbers, &str); 3] = [
    ((2, 7, 0), "systemd-networkd-wait-online"),
    ((2, 7, 1), "NetworkManager-wait-online"),
    ((2, 7, 2), "console-getty"),
];

/// What else the generator writes.
fn unrelated(version: Numbers) -> String {
    let masked = MASKED.iter().filter(|(since, _)| version >= *since);
    let mut script: String =
        masked.map(|(_, unit)| format!("ln -s /dev/null \"$1/{unit}.service\"\n")).collect();
    if version >= (2, 9, 8) {
        script += MNT_GUARD;
    }
    script
}

/// Whether wsl.conf has this key in this section, and says false.
fn says_false(conf: &str, section: &str, key: &str) -> bool {
    setting(conf, section, key).is_some_and(|value| value.eq_ignore_ascii_case("false"))
}

/// What wsl.conf has for this key in this section.
pub(super) fn setting<'c>(conf: &'c str, section: &str, key: &str) -> Option<&'c str> {
    let mut current = "";
    for line in conf.lines().map(str::trim) {
        match (line.strip_prefix('['), line.split_once('=')) {
            (Some(header), _) => current = header.trim_end_matches(']').trim(),
            (None, Some((name, value))) if current == section && name.trim() == key => {
                return Some(value.trim());
            }
            _ => {}
        }
    }
    None
}

/// Links to wanted units are absolute.
const MNT_GUARD: &str = r#"
cat >"$1/wsl-mnt-guard.service" <<'END'
[Unit]
Description=Detach /mnt/wsl from the other distros before it is unmounted
ConditionPathIsMountPoint=/mnt/wsl
DefaultDependencies=no
Conflicts=umount.target
Before=umount.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=-/bin/mount --make-rslave /mnt/wsl
END
mkdir -p "$1/local-fs.target.wants"
ln -s "$1/wsl-mnt-guard.service" "$1/local-fs.target.wants"
"#;

fn rule(name: &str) -> String {
    format!(":{name}:M::MZ::/init:P")
}

fn write_unit(root: &str) -> anyhow::Result<()> {
    let directory = "/run/systemd/generator.early";
    let name = "WSLInterop-late";
    let rule = rule(name);
    let unit = format!(
        "# Note: This file is generated by WSL to prevent binfmt.d from overriding WSL's binfmt interpretor.\n\
         # To disable this unit, add the following to /etc/wsl.conf:\n\
         # [boot]\n\
         # protectBinfmt=false\n\n\
         [Unit]\n\
         Description=WSL binfmt restore\n\
         After=systemd-binfmt.service\n\n\
         [Service]\n\
         Type=oneshot\n\
         ExecStart=/bin/sh -c '(echo -1 > {TABLE}/{name}) ; (echo {rule} > {TABLE}/register)'\n"
    );
    let path = format!("{directory}/wsl-binfmt.service");
    let wants = format!("{root}{directory}/default.target.wants");
    fs::create_dir_all(&wants)?;
    fs::write(format!("{root}{path}"), unit)?;
    symlink(&path, format!("{wants}/wsl-binfmt.service"))?;
    Ok(())
}

/// The generator is a link to /init in reality, and obeys nothing but wsl.conf.
fn write_generator(root: &str, script: &str) -> anyhow::Result<()> {
    let directory = format!("{root}/run/systemd/system-generators");
    fs::create_dir_all(&directory)?;
    let path = Path::new(&directory).join("wsl-generator");
    fs::write(&path, format!("#!/bin/sh\n{script}"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn drop_ins(name: &str, version: Numbers) -> String {
    let rule = rule(name);
    let units =
        if version < (2, 5, 8) { "systemd-binfmt" } else { "systemd-binfmt binfmt-support" };
    // No newline at the end.
    format!(
        "for unit in {units}; do\n\
         mkdir -p \"$1/$unit.service.d\"\n\
         text=$(cat <<'END'\n\
         # Note: This file is generated by WSL to prevent binfmt.d from overriding WSL's binfmt interpreter.\n\
         # To disable this unit, add the following to /etc/wsl.conf:\n\
         # [boot]\n\
         # protectBinfmt=false\n\n\
         [Service]\n\
         ExecStop=\n\
         ExecStart=/bin/sh -c '(echo -1 > {TABLE}/{name}) ; (echo \"{rule}\" > {TABLE}/register)' \n\
         END\n\
         )\n\
         printf '%s' \"$text\" >\"$1/$unit.service.d/override.conf\"\n\
         chmod 644 \"$1/$unit.service.d/override.conf\"\n\
         done\n"
    )
}

fn lock(root: &str) -> anyhow::Result<()> {
    let file = format!("{root}/run/wsl/binfmt-status-lock");
    let status = format!("{root}{TABLE}/status");
    fs::create_dir(format!("{root}/run/wsl"))?;
    fs::write(&file, "enabled\n")?;
    mount(&file, &status, "bind", "")?;
    mount(&file, &status, "read-only", "")
}
