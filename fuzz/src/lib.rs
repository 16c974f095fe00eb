//! The program's modules for the fuzz targets. It is no library, so they are taken by their paths;
//! at this crate's root, so that their own `crate::` leads where it should.

// Each target needs a part of them, and what `verbs` keeps to itself is there twice.
#![allow(dead_code, clippy::duplicate_mod)]
#![forbid(unsafe_code)]

#[path = "../../src/binfmt_d.rs"]
pub mod binfmt_d;
#[path = "../../src/binfmt_misc.rs"]
pub mod binfmt_misc;
#[path = "../../src/host.rs"]
pub mod host;
#[path = "../../src/mounts.rs"]
pub mod mounts;
#[path = "../../src/plan.rs"]
pub mod plan;
#[path = "../../src/wsl.rs"]
pub mod wsl;
#[path = "../../src/wsl_conf.rs"]
pub mod wsl_conf;
