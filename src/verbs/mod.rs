//! The verbs, one file each.

pub mod generate;
pub mod guard;
pub mod restore;
pub mod status;
pub mod unit;
pub mod watch;
