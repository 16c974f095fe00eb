//! What systemd has this program do, one file each. `status` is the doctor.

pub mod generate;
pub mod guard;
pub mod restore;
pub mod unit;
pub mod watch;
