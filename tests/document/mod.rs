//! Parts of the documents that commands write: what they print, between two comments that name it.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// Prints a table. With `UPDATE_DOCS` set it is also put into a file of the project, in place of what
/// an earlier run has written there.
///
/// # Errors
/// The file does not have the comments `<!-- NAME -->` and `<!-- end of NAME -->`, a line each; or
/// it cannot be written.
pub fn print(file: &str, name: &str, table: &str) -> anyhow::Result<()> {
    println!("{table}");
    if std::env::var_os("UPDATE_DOCS").is_none() {
        return Ok(());
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let (begin, end) = (
        format!("<!-- {name} -->\n"),
        format!("<!-- end of {name} -->\n"),
    );
    let parts = text.split_once(&begin).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(&end)?;
        Some((before, after))
    });
    let (before, after) = parts.with_context(|| format!("no part {name} in {file}"))?;
    let text = format!("{before}{begin}{}\n{end}{after}", table.trim());
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}
