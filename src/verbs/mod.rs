//! What one invocation does, one file each.

pub mod generate;
pub mod guard;
pub mod release;
pub mod restore;
pub mod status;
pub mod watch;
