//! What the documents tell people to type is run as it stands there. A comment before each indented
//! block says how: `run` and `prints` here, `run in the image` in tests/scenarios/in_the_image.rs.

#[allow(dead_code)] // Each user needs a part of it.
mod markdown;
#[allow(dead_code)] // Each user needs a part of it.
mod ours;
mod shell;

use std::fs;
use std::path::Path;

use anyhow::{ensure, Context};
use wsl_vm::{Machine, Needs};

use markdown::blocks;
use ours::extent;
use shell::{have_programs, sh, SOURCE};

const DOCUMENTS: [&str; 4] =
    ["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/image-maintainers.md"];

/// A copy of the project, in which commands may leave what they make. Installed is beside it. What
/// cargo has built in an earlier one is kept, which makes this one fast.
const COPY: &str = r#"
    mkdir -p copy/build/cargo built
    rm -rf built image
    mv copy/build/cargo built
    rm -rf copy
    mkdir -p copy/build
    mv built copy/build/cargo
    tar -C "$SOURCE" --exclude=./target --exclude=./build --exclude=./.git -cf - . | tar -C copy -xf -
    image=$PWD/image
    export DESTDIR="$image"
    cd copy
"#;
/// Where all is built already.
const PLACE: &str = r#"cd "$SOURCE"; "#;

#[test]
fn every_command_of_the_documents_is_run_or_says_where_it_is() -> anyhow::Result<()> {
    if !have_programs("meson:meson ninja:ninja-build pkg-config:pkgconf systemd.pc:systemd-dev")? {
        return Ok(());
    }
    let needs = Needs { suites: &["trixie"], packages: ours::PACKAGES, ..Needs::default() };
    let has_vm = Machine::is_prepared_for("WHAT README.md RUNS IN A VM IS", &needs)?;
    let mut runs = 0;
    for document in DOCUMENTS {
        let mut printed = String::new();
        for block in blocks(document)? {
            let text = &block.text;
            match block.mark.split_once(' ').unwrap_or((&block.mark, "")) {
                ("run", "in place") | ("prints", "") if !has_vm => {}
                ("run", place @ ("" | "in place")) => {
                    let place = if place.is_empty() { COPY } else { PLACE };
                    printed = sh("run", &format!("{place}{text}"))?;
                    runs += 1;
                }
                ("prints", "") => ensure!(printed.contains(text), "{document}:\n{printed}"),
                ("see", file) => {
                    let file = Path::new(SOURCE).join(file);
                    let there = fs::read_to_string(&file)?;
                    for line in text.lines() {
                        let file = file.display();
                        ensure!(there.contains(line), "{document}: {line}: not in {file}");
                    }
                }
                // Another distribution's, or a test in the VM.
                ("run" | "prints", "in the image") | ("text", _) | ("elsewhere:", _) => {}
                _ => anyhow::bail!("{document}: {block:?}"),
            }
        }
    }
    ensure!(runs > usize::from(has_vm), "{runs} commands were run");
    Ok(())
}

#[test]
fn the_commands_of_contributing_find_what_they_name() -> anyhow::Result<()> {
    let text = fs::read_to_string(Path::new(SOURCE).join("CONTRIBUTING.md"))?;
    let is_cargo = |c: &&str| c.starts_with("cargo ") || c.contains(" cargo ");
    let commands: Vec<&str> = text.split('`').filter(is_cargo).collect();
    ensure!(commands.len() > 20, "{commands:?}");
    for command in commands {
        let words: Vec<&str> = command.split(' ').skip_while(|w| *w != "cargo").collect();
        let there = |path: String| -> anyhow::Result<()> {
            let there = Path::new(SOURCE).join(path).exists();
            ensure!(there, "{command}: there is none");
            Ok(())
        };
        match words[..] {
            ["cargo", "run", "--example", name, ..] => there(format!("examples/{name}.rs"))?,
            ["cargo", "bench", "--bench", name, ..] => there(format!("benches/{name}.rs"))?,
            ["cargo", "test", "--test", name] => there(format!("tests/{name}.rs"))
                .or_else(|_| there(format!("tests/{name}/main.rs")))?,
            ["cargo", "test", "--test", _, "--", ..]
                if !command.contains("NAME") && !command.contains("--list") =>
            {
                let listed = sh("list", &format!("cd \"$SOURCE\"; {command} --list"))?;
                let found = listed.lines().filter(|line| line.ends_with(": test"));
                ensure!(found.count() > 0, "{command} finds no test:\n{listed}");
            }
            _ => {}
        }
    }
    Ok(())
}

/// It is the first thing that is read of the crate, and its lines are copied.
#[test]
fn the_example_of_the_simulated_vm_compiles() -> anyhow::Result<()> {
    if !extent::has("THE EXAMPLE OF WSL-VM IS")? {
        return Ok(());
    }
    let tested = sh("example", r#"cd "$SOURCE"; "$CARGO" test --locked --quiet -p wsl-vm --doc"#)?;
    ensure!(tested.contains("1 passed"), "{tested}");
    Ok(())
}

/// The table of the tests begins with what a contributor needs first.
#[test]
fn contributing_begins_with_three_commands() -> anyhow::Result<()> {
    let first = blocks("CONTRIBUTING.md")?;
    let first = first.first().context("no commands")?;
    ensure!(first.text.lines().count() == 3, "{first:?}");
    Ok(())
}
