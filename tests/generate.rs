//! The built binary as a generator, against golden trees: each directory of `tests/generate` is
//! a case. It may hold
//!
//! - `root/`: the machine, for `$WSL_BINFMT_ROOT`
//! - `environment`: variables, one a line; `@OUT@` is the directory of the three outputs
//! - `early/`: what is in EARLY before
//! - `expected/`: what is in EARLY afterwards; nothing, if there is none
//! - `kmsg`: what is in the kernel's log afterwards, less the PID
//! - `status`: the exit status, if it is not 0
//!
//! `UPDATE_GOLDEN=1` writes `expected`, `kmsg` and `status` as they came out: then read the diff.
//! `GOLDEN_PROGRAM` names another build of the binary, to be tested in place of this one, and
//! `GOLDEN_RUNNER` the emulator that runs it.

#[path = "generate/golden.rs"]
mod golden;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{ensure, Context};

use golden::{cases, program, tree};

/// A directory of its own for one test, with `root` and the three output directories.
struct Sandbox {
    directory: PathBuf,
}

impl Sandbox {
    fn new(name: &str) -> anyhow::Result<Sandbox> {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generate").join(name);
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        for sub in ["root/dev", "out/normal", "out/early", "out/late"] {
            fs::create_dir_all(directory.join(sub))?;
        }
        fs::write(directory.join("root/dev/kmsg"), "")?;
        Ok(Sandbox { directory })
    }

    /// A WSL2 distro with this wsl.conf.
    fn distro(name: &str, wsl_conf: &[u8]) -> anyhow::Result<Sandbox> {
        let sandbox = Sandbox::new(name)?;
        sandbox.fill("root", &cases().join("01-wsl2/root"))?;
        fs::create_dir_all(sandbox.path("root/etc"))?;
        fs::write(sandbox.path("root/etc/wsl.conf"), wsl_conf)?;
        Ok(sandbox)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.join(path)
    }

    fn fill(&self, path: &str, from: &Path) -> anyhow::Result<()> {
        if from.exists() {
            let to = self.path(path);
            let copied = Command::new("cp")
                .args(["-a", "--no-preserve=ownership"])
                .arg(from.join("."))
                .arg(&to)
                .status()?;
            // A checkout has the modes that its umask gives it.
            let usual = Command::new("chmod").args(["-R", "go-w"]).arg(&to).status()?;
            let done = copied.success() && usual.success();
            ensure!(done, "copying {}", from.display());
        }
        Ok(())
    }

    /// Runs the generator as systemd does: three directories, and nothing in the environment but
    /// what is given.
    fn run(&self, environment: &str) -> anyhow::Result<Output> {
        let out = self.path("out");
        let environment = environment.replace("@OUT@", &out.to_string_lossy());
        Command::new("sh")
            .args(["-c", "umask 022; exec timeout 10 \"$@\"", "sh"])
            .args(words())
            .args(["normal", "early", "late"].map(|d| out.join(d)))
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("WSL_BINFMT_ROOT", self.path("root"))
            .envs(environment.lines().filter_map(|line| line.split_once('=')))
            .output()
            .context("running the generator")
    }

    /// The kernel's log, less the PID and this machine's paths.
    fn kmsg(&self) -> anyhow::Result<String> {
        let text = fs::read_to_string(self.path("root/dev/kmsg"))?;
        let text = text
            .lines()
            .map(|line| match (line.find('['), line.find(']')) {
                (Some(from), Some(to)) => format!("{}[PID]{}\n", &line[..from], &line[to + 1..]),
                _ => format!("{line}\n"),
            })
            .collect::<String>()
            .replace(&*self.path("root").to_string_lossy(), "")
            .replace(&*self.path("out").to_string_lossy(), "OUT");
        Ok(text)
    }
}

/// How the binary is called.
fn words() -> Vec<String> {
    let runner = std::env::var("GOLDEN_RUNNER").ok();
    runner.into_iter().chain([program()]).collect()
}

/// Two trees are the same: paths, modes, texts, links.
fn assert_same(found: &Path, expected: &Path) -> anyhow::Result<()> {
    let (mut found, mut expected) = (tree(found)?, tree(expected)?);
    // A checkout has the modes that its umask gives it.
    for what in expected.values_mut() {
        if what.starts_with("directory ") {
            *what = "directory 755".to_owned();
        } else if let Some((_, text)) = what.split_once('\n') {
            *what = format!("file 644\n{text}");
        }
    }
    let paths: BTreeSet<_> = found.keys().chain(expected.keys()).cloned().collect();
    for path in paths {
        let (found, expected) = (found.remove(&path), expected.remove(&path));
        let text = |what: Option<String>| what.unwrap_or_else(|| "nothing".to_owned());
        assert!(
            found == expected,
            "{path} is\n{}\nbut was expected to be\n{}",
            text(found),
            text(expected)
        );
    }
    Ok(())
}

fn read_or(path: &Path, default: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|_| default.to_owned())
}

fn run_case(case: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(case)? {
        let name = entry?.file_name();
        let known = ["root", "environment", "early", "expected", "kmsg", "status"];
        ensure!(known.iter().any(|k| name == *k), "unknown file {name:?}");
    }
    let name = case.file_name().context("a case has a name")?.to_string_lossy();
    let sandbox = Sandbox::new(&name)?;
    sandbox.fill("root", &case.join("root"))?;
    sandbox.fill("out/early", &case.join("early"))?;
    let before = tree(&sandbox.path("root"))?;

    let output = sandbox.run(&read_or(&case.join("environment"), ""))?;
    let status = output.status.code().context("killed")?.to_string();
    let kmsg = sandbox.kmsg()?;
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        update(case, &sandbox, &kmsg, &status)?;
    }
    assert_same(&sandbox.path("out/early"), &case.join("expected"))?;
    assert_eq!(kmsg, read_or(&case.join("kmsg"), ""));
    assert_eq!(status, read_or(&case.join("status"), "0\n").trim_end());
    // Standard error says the same, and standard output nothing.
    let lines = String::from_utf8_lossy(&output.stderr).lines().count();
    assert_eq!((lines, output.stdout.len()), (kmsg.lines().count(), 0));
    assert!(tree(&sandbox.path("out/normal"))?.is_empty());
    assert!(tree(&sandbox.path("out/late"))?.is_empty());
    let mut after = tree(&sandbox.path("root"))?;
    after.insert("dev/kmsg".to_owned(), before["dev/kmsg"].clone());
    assert_eq!(after, before, "the machine itself was written to");
    Ok(())
}

fn update(case: &Path, sandbox: &Sandbox, kmsg: &str, status: &str) -> anyhow::Result<()> {
    let expected = case.join("expected");
    if !expected.is_symlink() {
        if expected.exists() {
            fs::remove_dir_all(&expected)?;
        }
        for (path, what) in tree(&sandbox.path("out/early"))? {
            let path = expected.join(path);
            fs::create_dir_all(path.parent().context("below expected")?)?;
            if let Some(target) = what.strip_prefix("link to ") {
                symlink(target, path)?;
            } else if let Some((_, text)) = what.split_once('\n') {
                fs::write(path, text)?;
            }
        }
    }
    for (name, text, default) in [("kmsg", kmsg, ""), ("status", &format!("{status}\n"), "0\n")] {
        if text != default {
            fs::write(case.join(name), text)?;
        }
    }
    Ok(())
}

#[test]
fn each_golden_tree_comes_out_as_it_is() -> anyhow::Result<()> {
    let mut names: Vec<_> =
        fs::read_dir(cases())?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<_>>()?;
    names.retain(|path| path.is_dir());
    names.sort();
    assert!(names.len() >= 20, "only {} cases found", names.len());
    for case in names {
        eprintln!("{}", case.display());
        run_case(&case).with_context(|| case.display().to_string())?;
    }
    Ok(())
}

#[test]
fn a_single_directory_gets_everything() -> anyhow::Result<()> {
    let sandbox = Sandbox::distro("single-directory", b"")?;
    let output = Command::new("timeout")
        .arg("10")
        .args(words())
        .arg(sandbox.path("out/normal"))
        .env_clear()
        .env("WSL_BINFMT_ROOT", sandbox.path("root"))
        .status()?;
    assert!(output.success());
    assert_same(&sandbox.path("out/normal"), &cases().join("01-wsl2/expected"))
}

/// What a wsl.conf leads to, seen from outside: `None` if nothing was emitted, else whether there
/// is anything that restores the entry.
fn emitted(sandbox: &Sandbox) -> anyhow::Result<Option<bool>> {
    let tree = tree(&sandbox.path("out/early"))?;
    let restores =
        tree.iter().any(|(path, what)| path.contains("restore") || what.contains(" restore"));
    Ok((!tree.is_empty()).then_some(restores))
}

#[test]
fn each_wsl_conf_has_the_effect_that_wsl_gives_it() -> anyhow::Result<()> {
    let cases: Vec<serde_json::Value> =
        serde_json::from_str(include_str!("generate/wsl-conf-cases.json"))?;
    assert_eq!(cases.len(), 64);
    for case in cases {
        let text = case["text"].as_str().context("text")?;
        let protect = case["protectBinfmt"].as_bool().context("protectBinfmt")?;
        let interop = case["interopEnabled"].as_bool().context("interopEnabled")?;
        let sandbox = Sandbox::distro("wsl-conf", text.as_bytes())?;
        assert!(sandbox.run("")?.status.success());
        assert_eq!(emitted(&sandbox)?, protect.then_some(interop), "{}", case["name"]);
    }
    Ok(())
}

#[test]
fn a_wsl_conf_that_is_noise_or_no_file_is_survived() -> anyhow::Result<()> {
    let noise: Vec<u8> =
        (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let comment = [b"#".repeat(2 << 20), b"\n[boot]\nprotectBinfmt=false\n".to_vec()].concat();
    for (name, bytes, warning) in [
        ("noise", noise, "WSL stops reading at this line, ignoring the rest\n"),
        ("2-MiB-comment", comment, "etc/wsl.conf: File too large (os error 27), ignoring\n"),
    ] {
        let sandbox = Sandbox::distro(name, &bytes)?;
        assert!(sandbox.run("")?.status.success(), "{name}");
        assert_eq!(emitted(&sandbox)?, Some(true), "{name}");
        let kmsg = sandbox.kmsg()?;
        assert_eq!(kmsg.lines().count(), 1, "{name}: {kmsg}");
        assert!(kmsg.ends_with(warning), "{name}: {kmsg}");
    }

    // As long as a file may be, it is read to its end.
    let setting = b"\n[boot]\nprotectBinfmt=false";
    let longest = [&b"#".repeat((1 << 20) - setting.len())[..], setting].concat();
    let sandbox = Sandbox::distro("1-MiB-comment", &longest)?;
    assert!(sandbox.run("")?.status.success());
    assert_eq!(emitted(&sandbox)?, None);

    let sandbox = Sandbox::distro("fifo", b"")?;
    let path = sandbox.path("root/etc/wsl.conf");
    fs::remove_file(&path)?;
    assert!(Command::new("mkfifo").arg(&path).status()?.success());
    assert!(sandbox.run("")?.status.success());
    assert_eq!(emitted(&sandbox)?, Some(true));
    let warning =
        "<4>wsl-binfmt-generator[PID]: reading /etc/wsl.conf: not a regular file, ignoring\n";
    assert_eq!(sandbox.kmsg()?, warning);
    Ok(())
}
