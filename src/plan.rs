//! What to emit for a WSL2 distro: configuration in, list of files and links out; nothing is
//! touched here. The texts are the templates in `units/`, named as they are emitted.

use crate::wsl_conf::WslConf;

/// Something below the output directory.
#[derive(Debug, PartialEq)]
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
        /// The text of the link.
        target: &'static str,
    },
}

/// What to emit, and what the templates need to know.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Everything that goes below the output directory.
    pub outputs: Vec<Output>,
    /// Whether the lines that restore the interop entry belong in.
    pub interop: bool,
}

macro_rules! file {
    ($path:literal) => {
        Output::File {
            path: $path,
            template: include_str!(concat!("../units/", $path)),
        }
    };
}

/// Decides what a WSL2 distro with this wsl.conf gets. `interop.enabled=false` leaves out what
/// restores the entry; what protects it stays, since the table belongs to all distros of the VM.
pub fn plan(conf: &WslConf) -> Plan {
    if !conf.protect_binfmt {
        return Plan::default();
    }
    let mut outputs = vec![
        file!("systemd-binfmt.service.d/10-wsl-interop.conf"),
        file!("binfmt-support.service.d/10-wsl-interop.conf"),
        file!("wsl-binfmt-guard.service"),
        Output::Link {
            path: "sysinit.target.wants/wsl-binfmt-guard.service",
            target: "../wsl-binfmt-guard.service",
        },
    ];
    if conf.interop_enabled {
        outputs.push(file!("wsl-interop-restore.service"));
        outputs.push(Output::Link {
            path: "sysinit.target.wants/wsl-interop-restore.service",
            target: "../wsl-interop-restore.service",
        });
    }
    Plan {
        outputs,
        interop: conf.interop_enabled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(plan: &Plan) -> Vec<&str> {
        let path = |output: &Output| match output {
            Output::File { path, .. } | Output::Link { path, .. } => *path,
        };
        plan.outputs.iter().map(path).collect()
    }

    #[test]
    fn protection_switched_off_emits_nothing() {
        let conf = WslConf {
            protect_binfmt: false,
            ..WslConf::default()
        };
        assert_eq!(plan(&conf), Plan::default());
    }

    #[test]
    fn interop_switched_off_emits_the_same_but_the_restore_service() {
        let off = WslConf {
            interop_enabled: false,
            ..WslConf::default()
        };
        let (on, off) = (plan(&WslConf::default()), plan(&off));
        let mut kept = paths(&on);
        kept.retain(|path| !path.contains("restore"));
        assert_eq!(paths(&off), kept);
        assert!(on.interop && !off.interop);
    }
}
