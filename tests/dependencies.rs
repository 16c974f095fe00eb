//! What other people's code is in the program or runs while it is built, under which licences: a
//! change here is one to look at. And that the crate which other people may use for their tests has
//! nothing of this project.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{ensure, Context};
use serde_json::Value;

const EITHER: &str = "MIT or Apache-2.0";
/// Crates, their licences, and what of them runs while they are built.
const CRATES: &[(&str, &str, &str)] = &[
    ("anyhow", EITHER, "custom-build"),
    ("bitflags", EITHER, ""),
    ("camino", EITHER, "custom-build"),
    ("cfg-if", EITHER, ""),
    ("cfg_aliases", "MIT", ""),
    ("const-random", EITHER, ""),
    ("const-random-macro", EITHER, "proc-macro"),
    ("crunchy", "MIT", "custom-build"),
    ("dlv-list", EITHER, ""),
    ("getrandom", EITHER, ""),
    ("hashbrown", EITHER, ""),
    ("libc", EITHER, "custom-build"),
    ("nix", "MIT", "custom-build"),
    ("once_cell", EITHER, ""),
    ("ordered-multimap", "MIT", ""),
    ("rust-ini", "MIT", ""),
    ("tiny-keccak", "CC0-1.0", "custom-build"),
];

/// All crates of this project on this machine, tests' included: by their identity for Cargo.
struct Crates {
    by_id: BTreeMap<String, Value>,
    nodes: BTreeMap<String, Value>,
    project: String,
}

impl Crates {
    fn of_the_lock_file() -> anyhow::Result<Crates> {
        let version = Command::new("rustc").arg("-vV").output()?.stdout;
        let version = String::from_utf8(version)?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: "));
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version=1", "--locked", "--offline"])
            .args(["--filter-platform", host.context("rustc names no host")?])
            .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")])
            .output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{errors}");
        let metadata: Value = serde_json::from_slice(&output.stdout)?;
        let by_id = |list: &Value| -> BTreeMap<String, Value> {
            let list = list.as_array().into_iter().flatten();
            list.map(|item| (text(&item["id"]), item.clone())).collect()
        };
        Ok(Crates {
            by_id: by_id(&metadata["packages"]),
            nodes: by_id(&metadata["resolve"]["nodes"]),
            project: text(&metadata["resolve"]["root"]),
        })
    }

    /// Those that are in the program, or build what is.
    fn built_in(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut left = vec![self.project.clone()];
        while let Some(id) = left.pop() {
            for dependency in self.nodes[&id]["deps"].as_array().into_iter().flatten() {
                let kinds = dependency["dep_kinds"].as_array().into_iter().flatten();
                let id = text(&dependency["pkg"]);
                if kinds.map(|k| &k["kind"]).any(|kind| kind != "dev") && found.insert(id.clone()) {
                    left.push(id);
                }
            }
        }
        found
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A licence as Debian writes it.
fn licence(of: &Value) -> String {
    match text(&of["license"]).as_str() {
        "MIT OR Apache-2.0" | "Apache-2.0 OR MIT" | "MIT/Apache-2.0" => EITHER.to_owned(),
        "Unlicense OR MIT" => "MIT or Unlicense".to_owned(),
        "(MIT OR Apache-2.0) AND Unicode-3.0" => format!("({EITHER}) and Unicode-3.0"),
        other => other.to_owned(),
    }
}

/// What of it runs while it is built.
fn runs(of: &Value) -> String {
    let targets = of["targets"].as_array().into_iter().flatten();
    let kinds = targets.flat_map(|target| target["kind"].as_array().into_iter().flatten());
    let mut kinds: Vec<String> = kinds.map(text).collect();
    kinds.retain(|kind| ["custom-build", "proc-macro"].contains(&kind.as_str()));
    kinds.join(", ")
}

#[test]
fn these_crates_are_built_in_and_no_others() -> anyhow::Result<()> {
    let crates = Crates::of_the_lock_file()?;
    let mut found: Vec<_> = crates
        .built_in()
        .iter()
        .map(|id| &crates.by_id[id])
        .map(|of| (text(&of["name"]), licence(of), runs(of)))
        .collect();
    found.sort();
    let found: Vec<_> = found
        .iter()
        .map(|(name, licence, runs)| (name.as_str(), licence.as_str(), runs.as_str()))
        .collect();
    assert_eq!(found, CRATES);
    Ok(())
}

#[test]
fn all_crates_come_from_crates_io() -> anyhow::Result<()> {
    let lock = include_str!("../Cargo.lock");
    let mut crates = lock.split("[[package]]\n").skip(1).collect::<Vec<_>>();
    crates.retain(|of| {
        !of.contains(
            "source = \"registry+https://github.com/rust-lang/crates.io-index\"\nchecksum = \"",
        )
    });
    let names: Vec<_> = crates.iter().filter_map(|of| of.lines().next()).collect();
    assert_eq!(names, ["name = \"wsl-binfmt-generator\"", "name = \"wsl-vm\""]);
    Ok(())
}

/// It is to serve other projects, too.
#[test]
fn the_simulated_vm_knows_nothing_of_this_project() -> anyhow::Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wsl");
    let mut files = 0;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let mut text = fs::read_to_string(&path)?.to_lowercase();
        if path.ends_with("generation.rs") {
            // WSL's own generator has to do with units of these names.
            text = text.replace("/wsl-binfmt.service", "");
            text = text.replace("systemd-binfmt binfmt-support", "");
        }
        for name in ["wsl-binfmt", "wsl-interop", "binfmt-support", "../.."] {
            ensure!(!text.contains(name), "{name} in {}", path.display());
        }
        files += 1;
    }
    ensure!(files > 10, "{files} files");
    Ok(())
}

#[test]
fn debians_copyright_has_the_licence_of_each() -> anyhow::Result<()> {
    let copyright = include_str!("../packaging/debian/copyright");
    // The licence that a paragraph gives to the files that it names.
    let stated = |files: String| {
        let mut paragraphs = copyright.split("\n\n");
        let paragraph = paragraphs.find(|p| p.split_whitespace().any(|word| word == files))?;
        let mut lines = paragraph.lines();
        lines.find_map(|line| line.strip_prefix("License: "))
    };
    for of in Crates::of_the_lock_file()?.by_id.values() {
        let name = text(&of["name"]);
        if of["source"].is_string() {
            let stated = stated(format!("vendor/{name}/*")).or(stated("vendor/*".to_owned()));
            assert_eq!(stated, Some(licence(of).as_str()), "{name}");
        }
    }
    Ok(())
}
