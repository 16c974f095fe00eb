//! What the documents have maintainers of images type in theirs, which is no WSL distro then.

use anyhow::ensure;
use wsl_vm::Vm;

use crate::markdown::blocks;
use crate::ours::Run;
use crate::verbs::Test;

pub const IN_THE_IMAGE: &[Test] = &[
    ("documents: what README.md runs in the image", |vm| {
        run(vm, "README.md")
    }),
    (
        "documents: what image-maintainers.md runs in the image",
        |vm| run(vm, "docs/image-maintainers.md"),
    ),
];

/// A line that none of the commands prints.
const NEXT: &str = "--next--";

fn run(vm: &Vm, document: &str) -> anyhow::Result<()> {
    let image = vm.packaged("image")?.osrelease("6.12.0-amd64");
    let image = image.environment(&[]).without_init();
    let image = image.file("/etc/wsl.conf", "[boot]\nsystemd=true\n");
    let image = image.boot()?;
    // One script, as later blocks use what earlier ones have set.
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
    let printed = image.run(&script);
    let printed: Vec<&str> = printed.split(NEXT).map(str::trim).collect();
    ensure!(printed.len() == expected.len() + 1, "{printed:?}");
    for (printed, expected) in printed.iter().zip(&expected) {
        ensure!(
            expected.as_ref().is_none_or(|e| e == printed),
            "{printed}\nbut expected was\n{expected:?}"
        );
    }
    Ok(())
}
