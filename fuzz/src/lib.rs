//! The program's modules for the fuzz targets. It is no library, so they are taken by their paths;
//! at this crate's root, so that their own `crate::` leads where it should.

// Each target needs a part of them, and what `verbs` keeps to itself is there twice.
#![allow(dead_code, clippy::duplicate_mod)]
#![forbid(unsafe_code)]

#[path = "../../src/binfmt_d.rs"]
pub mod binfmt_d;
#[path = "../../src/host.rs"]
pub mod host;
#[path = "../../src/interop.rs"]
pub mod interop;
#[path = "../../src/verbs/status/leftovers.rs"]
pub mod leftovers;
#[path = "../../src/log.rs"]
pub mod log;
#[path = "../../src/mounts.rs"]
pub mod mounts;
#[path = "../../src/own.rs"]
pub mod own;
#[path = "../../src/plan.rs"]
pub mod plan;
#[path = "../../src/registry.rs"]
pub mod registry;
#[path = "../../src/repair.rs"]
pub mod repair;
#[path = "../../src/verbs/status/report.rs"]
pub mod report;
#[path = "../../src/verbs/status/interop.rs"]
pub mod sockets;
#[path = "../../src/systemd.rs"]
pub mod systemd;
#[path = "../../src/units.rs"]
pub mod units;
#[path = "../../src/verbs/mod.rs"]
pub mod verbs;
#[path = "../../src/wsl.rs"]
pub mod wsl;
#[path = "../../src/wsl_conf.rs"]
pub mod wsl_conf;

/// As much of `status.rs`, which keeps its own, as the checks here need.
pub struct Wanted;

impl Wanted {
    fn interop(
        &self,
        check: &'static str,
        harm: report::Harm,
        found: String,
        mend: report::Mend,
    ) -> report::Finding {
        report::Finding::bad(check, harm, found, mend)
    }
}
