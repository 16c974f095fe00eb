//! Parts of the documents that commands write: what they print, between two comments that name it.

use std::fs;
use std::path::Path;

use anyhow::{ensure, Context};

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
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->\n"));
    let parts = text.split_once(&begin).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(&end)?;
        Some((before, after))
    });
    let (before, after) = parts.with_context(|| format!("no part {name} in {file}"))?;
    let text = format!("{before}{begin}{}\n{end}{after}", table.trim());
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

/// An indented block of a document, and what the comment before it says of it.
#[derive(Debug)]
pub struct Block {
    pub mark: String,
    pub text: String,
}

/// All indented blocks of a Markdown file.
///
/// # Errors
/// The file cannot be read, or a block has no comment `<!-- ... -->` in the line before the empty one.
pub fn blocks(file: &str) -> anyhow::Result<Vec<Block>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut blocks: Vec<Block> = Vec::new();
    let (mut mark, mut inside) = (None, false);
    for line in text.lines() {
        let comment = line.strip_prefix("<!-- ").and_then(|line| line.strip_suffix(" -->"));
        match (comment, line.strip_prefix("    "), blocks.last_mut()) {
            (Some(comment), _, _) => (mark, inside) = (Some(comment.to_owned()), false),
            (_, Some(line), Some(block)) if inside => block.text += &format!("{line}\n"),
            (_, Some(line), _) => {
                let mark = mark.take().with_context(|| format!("{file}: nothing before {line}"))?;
                let text = format!("{line}\n");
                blocks.push(Block { mark, text });
                inside = true;
            }
            (_, None, Some(block)) if inside && line.is_empty() => block.text.push('\n'),
            _ if line.is_empty() => {}
            _ => (mark, inside) = (None, false),
        }
    }
    for block in &mut blocks {
        block.text = format!("{}\n", block.text.trim_end());
    }
    Ok(blocks)
}

/// What a document has people type in their image, and what it says comes of it.
pub struct InTheImage {
    /// One, as later blocks use what earlier ones have set.
    pub script: String,
    expected: Vec<Option<String>>,
}

/// A line that none of the commands prints.
const NEXT: &str = "--next--";

impl InTheImage {
    /// Of the blocks that are marked so.
    ///
    /// # Errors
    /// As for all blocks.
    pub fn of(document: &str) -> anyhow::Result<InTheImage> {
        let (mut script, mut expected) = (String::new(), Vec::new());
        for block in blocks(document)? {
            match block.mark.as_str() {
                // A line that begins with $ is typed, and the others are what comes of it.
                "run in the image" if block.text.starts_with("$ ") => {
                    let (typed, printed): (Vec<_>, Vec<_>) =
                        block.text.lines().partition(|line| line.starts_with("$ "));
                    let typed = typed.iter().map(|line| line.trim_start_matches("$ "));
                    script += &typed.collect::<Vec<_>>().join("\n");
                    expected.push(Some(printed.join("\n")));
                }
                "run in the image" => {
                    script += &block.text;
                    expected.push(None);
                }
                "prints in the image" => {
                    if let Some(last) = expected.last_mut() {
                        *last = Some(block.text.trim_end().to_owned());
                    }
                    continue;
                }
                _ => continue,
            }
            script += &format!("\necho {NEXT}\n");
        }
        Ok(InTheImage { script, expected })
    }

    /// Compares with what the script has printed.
    ///
    /// # Errors
    /// Something else was to be printed.
    pub fn compare(&self, printed: &str) -> anyhow::Result<()> {
        let printed: Vec<&str> = printed.split(NEXT).map(str::trim).collect();
        ensure!(printed.len() == self.expected.len() + 1, "{printed:?}");
        for (printed, expected) in printed.iter().zip(&self.expected) {
            ensure!(
                expected.as_ref().is_none_or(|e| e == printed),
                "{printed}\nbut expected was\n{expected:?}"
            );
        }
        Ok(())
    }
}
