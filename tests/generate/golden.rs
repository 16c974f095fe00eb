//! The golden trees of `tests/generate`, and what is compared with them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

pub const GENERATOR: &str = env!("CARGO_BIN_EXE_wsl-binfmt-generator");
/// Where it is installed, and so what the golden trees name.
const INSTALLED: &str = "/usr/lib/systemd/system-generators/wsl-binfmt-generator";

pub fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/generate")
}

/// What the golden trees are compared with: this build of it, or another one.
pub fn program() -> String {
    std::env::var("GOLDEN_PROGRAM").unwrap_or_else(|_| GENERATOR.to_owned())
}

/// As systemd.syntax(7) has the path of a program: the folder of a checkout may be called anything.
fn as_first_word(path: &str) -> String {
    let escaped = path.chars().map(|c| match c {
        ' ' | '"' | '\'' | '\\' | '@' => format!("\\x{:02x}", c as u32),
        '%' => "%%".to_owned(),
        c => c.to_string(),
    });
    escaped.collect()
}

/// Every path below a directory with its kind, mode, and text.
pub fn tree(directory: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    fn walk(
        top: &Path,
        directory: &Path,
        found: &mut BTreeMap<String, String>,
    ) -> anyhow::Result<()> {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let name = path.strip_prefix(top)?.to_string_lossy().into_owned();
            let metadata = fs::symlink_metadata(&path)?;
            let mode = metadata.permissions().mode() & 0o7777;
            let what = if metadata.is_symlink() {
                format!("link to {}", fs::read_link(&path)?.display())
            } else if metadata.is_dir() {
                walk(top, &path, found)?;
                format!("directory {mode:o}")
            } else if !metadata.is_file() {
                "neither file, directory nor link".to_owned()
            } else {
                let program = program();
                let text = String::from_utf8_lossy(&fs::read(&path)?)
                    .replace(&as_first_word(&program), INSTALLED)
                    .replace(&program.replace('%', "%%"), INSTALLED);
                format!("file {mode:o}\n{text}")
            };
            found.insert(name, what);
        }
        Ok(())
    }
    let mut found = BTreeMap::new();
    if directory.exists() {
        walk(directory, directory, &mut found)?;
    }
    Ok(found)
}
