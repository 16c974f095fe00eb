//! What to emit for a WSL2 distro: configuration in, list of files and links out, no I/O. The texts
//! are the templates in `units/`, which have the names of the files that they become.

use crate::wsl_conf::WslConf;

/// A file or link to emit.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// A unit or drop-in, from its template.
    File {
        /// Its path below the output directory.
        path: &'static str,
        /// The template's text.
        template: &'static str,
    },
    /// A symbolic link.
    Link {
        /// Its path below the output directory.
        path: &'static str,
        /// The target of the link.
        target: &'static str,
        /// The file, earlier in the plan, without which the link would do harm: the unit that it
        /// enables, or the drop-in that replaces the masked one.
        needs: &'static str,
    },
}

/// The files of others that affect our output.
#[derive(Debug, Default)]
pub struct OthersFiles {
    /// Whether WSL's own generator exists. In WSL 2.5.7 to 2.8.8 it emits drop-ins `override.conf`,
    /// which register the entry again, without `F` and with a gap.
    pub wsl_generator: bool,
    /// Whether the admin or the vendor has an `override.conf` for systemd-binfmt.service.
    pub systemd_binfmt_override: bool,
    /// The same for binfmt-support.service.
    pub binfmt_support_override: bool,
    /// The vendor's `wsl.conf` for systemd-binfmt.service; empty if there is none.
    pub vendor_wsl_conf: String,
    /// Whether the admin has a file of that name.
    pub local_wsl_conf: bool,
}

macro_rules! file {
    ($path:literal) => {
        Output::File { path: $path, template: include_str!(concat!("../units/", $path)) }
    };
}

/// The link that makes one unit want another.
macro_rules! wanted {
    ($by:literal, $unit:literal) => {
        Output::Link {
            path: concat!($by, ".wants/", $unit),
            target: concat!("../", $unit),
            needs: $unit,
        }
    };
}

/// Decides what to emit for a WSL2 distro with this wsl.conf. `interop.enabled=false` leaves out
/// what restores the entry, but not what protects it, since all distros of the VM share the table.
/// Drop-ins that would undo the output are masked, except those of the admin.
pub fn plan(conf: &WslConf, others: &OthersFiles) -> Vec<Output> {
    if !conf.protect_binfmt {
        return Vec::new();
    }
    let mut outputs = vec![
        file!("systemd-binfmt.service.d/10-wsl-interop.conf"),
        file!("binfmt-support.service.d/10-wsl-interop.conf"),
        file!("wsl-binfmt-guard.service"),
        wanted!("sysinit.target", "wsl-binfmt-guard.service"),
        wanted!("proc-sys-fs-binfmt_misc.mount", "wsl-binfmt-guard.service"),
        file!("wsl-binfmt-release.service"),
        wanted!("shutdown.target", "wsl-binfmt-release.service"),
    ];
    if conf.interop_enabled {
        outputs.push(file!("wsl-binfmt.service.d/10-wsl-interop.conf"));
        outputs.push(file!("wsl-interop-restore.service"));
        outputs.push(wanted!("sysinit.target", "wsl-interop-restore.service"));
    }
    let binfmt = "systemd-binfmt.service.d/10-wsl-interop.conf";
    let support = "binfmt-support.service.d/10-wsl-interop.conf";
    let mut mask = |path, needs| outputs.push(Output::Link { path, target: "/dev/null", needs });
    if others.wsl_generator && !others.systemd_binfmt_override {
        mask("systemd-binfmt.service.d/override.conf", binfmt);
    }
    if others.wsl_generator && !others.binfmt_support_override {
        mask("binfmt-support.service.d/override.conf", support);
    }
    if !others.local_wsl_conf && switches_binfmt_off_on_wsl(&others.vendor_wsl_conf) {
        mask("systemd-binfmt.service.d/wsl.conf", binfmt);
    }
    outputs
}

/// Whether a drop-in is exactly the one that Ubuntu's wsl-setup shipped in 2024 and 2025 to protect
/// interop from systemd-binfmt: <https://github.com/ubuntu/wsl-setup/issues/11>.
fn switches_binfmt_off_on_wsl(drop_in: &str) -> bool {
    // To systemd, each of these ends a line.
    let lines = drop_in.split(['\n', '\r', '\0']).map(|line| line.trim_matches([' ', '\t']));
    lines
        .filter(|line| !line.is_empty() && !line.starts_with(['#', ';']))
        .eq(["[Unit]", "ConditionVirtualization=!wsl"])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(conf: &WslConf) -> Vec<Output> {
        plan(conf, &OthersFiles::default())
    }

    fn masks(others: &OthersFiles) -> Vec<&'static str> {
        let masked = |output: &Output| match output {
            Output::Link { path, target, .. } if *target == "/dev/null" => Some(*path),
            _ => None,
        };
        let plan = plan(&WslConf::default(), others);
        plan.iter().filter_map(masked).collect()
    }

    #[test]
    fn wsls_own_drop_ins_are_masked_but_nobody_elses() {
        let others =
            |wsl_generator, systemd_binfmt_override, binfmt_support_override| OthersFiles {
                wsl_generator,
                systemd_binfmt_override,
                binfmt_support_override,
                ..OthersFiles::default()
            };
        let [binfmt, support] =
            ["systemd-binfmt.service.d/override.conf", "binfmt-support.service.d/override.conf"];
        assert_eq!(masks(&others(true, false, false)), [binfmt, support]);
        assert_eq!(masks(&others(true, true, false)), [support]);
        assert_eq!(masks(&others(true, false, true)), [binfmt]);
        assert!(masks(&others(false, false, false)).is_empty());
    }

    #[test]
    fn only_ubuntus_unchanged_condition_is_lifted() {
        let masked = |text: &str, local_wsl_conf| {
            !masks(&OthersFiles {
                vendor_wsl_conf: text.to_owned(),
                local_wsl_conf,
                ..OthersFiles::default()
            })
            .is_empty()
        };
        let theirs = "# why\n[Unit]\nConditionVirtualization=!wsl\n";
        assert!(masked(theirs, false));
        assert!(!masked(theirs, true));
        assert!(!masked("", false));
        assert!(!masked("[Unit]\nConditionVirtualization=wsl\n", false));
        assert!(!masked(&format!("{theirs}ConditionPathExists=/x\n"), false));
        assert!(!masked(&format!("{theirs}ConditionVirtualization=\n"), false));
        assert!(!masked(&format!("{theirs}[Service]\nExecStop=\n"), false));
        assert!(!masked("[Service]\nConditionVirtualization=!wsl\n", false));
        // Neither does what systemd reads otherwise.
        assert!(!masked("[Unit] ConditionVirtualization=!wsl\n", false));
        assert!(!masked("[Unit]\nConditionVirtualization:!wsl\n", false));
        assert!(!masked("[Unit]\nConditionVirtualization\u{a0}=!wsl\n", false));
        assert!(!masked("#\r[Service]\n[Unit]\nConditionVirtualization=!wsl\n", false));
        assert!(!masked("[Unit]\nConditionVirtualization=\"!wsl\"\n", false));
    }

    fn paths(plan: &[Output]) -> Vec<&str> {
        let path = |output: &Output| match output {
            Output::File { path, .. } | Output::Link { path, .. } => *path,
        };
        plan.iter().map(path).collect()
    }

    #[test]
    fn what_a_link_needs_is_written_before_it() {
        let others = OthersFiles {
            wsl_generator: true,
            vendor_wsl_conf: "[Unit]\nConditionVirtualization=!wsl\n".to_owned(),
            ..OthersFiles::default()
        };
        let plan = plan(&WslConf::default(), &others);
        let mut files = Vec::new();
        for output in &plan {
            match output {
                Output::File { path, .. } => files.push(*path),
                Output::Link { path, needs, .. } => assert!(files.contains(needs), "{path}"),
            }
        }
        assert_eq!(plan.len() - files.len(), 7);
    }

    #[test]
    fn protection_switched_off_emits_nothing() {
        let conf = WslConf { protect_binfmt: false, ..WslConf::default() };
        assert_eq!(planned(&conf), []);
    }

    #[test]
    fn interop_switched_off_emits_all_but_what_restores() {
        let off = WslConf { interop_enabled: false, ..WslConf::default() };
        let (on, off) = (planned(&WslConf::default()), planned(&off));
        let mut kept = paths(&on);
        let restores = ["restore", "wsl-binfmt.service.d"];
        kept.retain(|path| !restores.iter().any(|r| path.contains(r)));
        assert_eq!(paths(&off), kept);
    }
}
