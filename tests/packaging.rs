//! What packages rely on: the meson build, the command line, the manual page.

mod shell;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{ensure, Context};

use shell::{have_programs, scratch, sh, SOURCE};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// What the tests run, and the packages that it is in.
const PROGRAMS: &str =
    "meson:meson ninja:ninja-build pkg-config:pkgconf groff:groff-base mandoc:mandoc";

#[test]
fn meson_installs_these_files_and_runs_cargo_only_after_a_change() -> anyhow::Result<()> {
    if !have_programs(PROGRAMS)? {
        return Ok(());
    }
    let sh = |script| sh("meson", script);
    // This cargo keeps a list of its calls. Of an earlier run only the real one's target directory
    // is kept, which makes this one fast.
    sh(r#"
        mkdir -p bin build
        find build -mindepth 1 -maxdepth 1 -not -name cargo -exec rm -rf {} +
        rm -rf staging calls
        printf '#!/bin/sh\necho "$*" >>"%s"\nexec "%s" "$@"\n' "$PWD/calls" "$CARGO" >bin/cargo
        chmod +x bin/cargo
        PATH=$PWD/bin:$PATH meson setup --prefix=/usr -Dsystemdsystemgeneratordir=lib/g build "$SOURCE"
        ninja -C build"#)?;
    let no_work = "ninja: no work to do.";
    let again = sh("ninja -C build")?;
    ensure!(again.contains(no_work), "{again}");
    sh("meson install -C build --destdir \"$PWD/staging\"")?;
    let calls = sh("cat calls")?;
    ensure!(calls.starts_with("build --locked --profile release "));
    ensure!(calls.lines().count() == 1, "cargo was called: {calls}");

    let list = r"find staging -type l -printf '/%P -> %l\n' -o ! -type d -printf '/%P %m\n' | sort";
    let installed = "\
        /usr/bin/wsl-binfmt -> /usr/lib/g/wsl-binfmt-generator\n\
        /usr/lib/g/wsl-binfmt-generator 755\n\
        /usr/share/man/man8/wsl-binfmt-generator.8 644\n\
        /usr/share/man/man8/wsl-binfmt.8 644\n";
    assert_eq!(sh(list)?, installed);
    let version = sh("staging/usr/lib/g/wsl-binfmt-generator --version")?;
    assert_eq!(version, format!("wsl-binfmt-generator {VERSION}\n"));

    let sources = r#"cd "$SOURCE"; find src units Cargo.* -type f -not -name '.*'"#;
    let sources = sh(sources)?;
    ensure!(sources.contains("units/wsl-binfmt-guard.service\n"));
    for source in sources.lines() {
        let file = File::open(Path::new(SOURCE).join(source))?;
        let modified = file.metadata()?.modified()?;
        file.set_modified(SystemTime::now())?;
        let plan = sh("ninja -n -C build");
        // Or the next cargo would build again, too.
        file.set_modified(modified)?;
        ensure!(!plan?.contains(no_work), "{source} changes nothing");
    }
    Ok(())
}

/// What ninja reads has none of the quotes of the sources' place, which it does not understand.
#[test]
fn a_change_is_seen_in_any_folder() -> anyhow::Result<()> {
    let depfile = sh(
        "depfile",
        r#"
        rm -rf "it's \"mine\"" build
        mkdir -p "it's \"mine\"/src" build
        touch "it's \"mine\"/src/main.rs"
        # Called as `cargo build --locked --profile release --target-dir DIRECTORY`.
        cat >build/cargo <<'END'
#!/bin/sh
mkdir -p "$6/release"
touch "$6/release/wsl-binfmt-generator"
echo "/wsl-binfmt-generator: $(pwd | sed 's/ /\\ /g')/src/main.rs" >"$6/release/wsl-binfmt-generator.d"
END
        chmod +x build/cargo
        source="$PWD/it's \"mine\""
        cd build
        "$SOURCE/build-aux/cargo-build.sh" "$PWD/cargo" release "$source" "$PWD" program program.d
        cat program.d
        ls program.source/src"#,
    )?;
    assert_eq!(depfile, "program: program.source/src/main.rs\nmain.rs\n");
    Ok(())
}

#[test]
fn systemd_pc_says_where_generators_live_unless_the_option_does() -> anyhow::Result<()> {
    if !have_programs(PROGRAMS)? {
        return Ok(());
    }
    for (pc, option, expected) in
        [("systemd.pc", "", "/pc/generators"), ("other.pc", "/x/generators", "/x/generators")]
    {
        let script = format!(
            "rm -rf build *.pc; export PKG_CONFIG_LIBDIR=$PWD; unset PKG_CONFIG_PATH
            printf '%s: 252\n' Name Description Version >{pc}
            echo systemdsystemgeneratordir=/pc/generators >>{pc}
            meson setup --prefix=/opt -Dsystemdsystemgeneratordir={option} -Dman=false \
                -Dtests=false build \"$SOURCE\" >log
            meson test -C build --no-rebuild | grep -q 'No tests defined'
            meson introspect --installed build"
        );
        let installed = sh("systemd-pc", &script)?;
        let target = format!(": \"{expected}/wsl-binfmt-generator\"");
        ensure!(installed.contains(&target), "{installed}");
        ensure!(!installed.contains("/man8/"), "{installed}");
    }
    Ok(())
}

#[test]
fn the_manual_pages_are_valid_roff() -> anyhow::Result<()> {
    if have_programs(PROGRAMS)? {
        // Pages name each other from the directory above.
        let groff = "ln -sfn \"$SOURCE/man\" man8; groff -man -ww -z -Tutf8 man8/*.8";
        assert_eq!(sh("roff", groff)?, "");
        assert_eq!(sh("roff", "mandoc -T lint man8/wsl-binfmt-generator.8")?, "");
    }
    Ok(())
}

#[test]
fn scripts_of_all_packages_do_the_same() -> anyhow::Result<()> {
    let postinst = include_str!("../packaging/debian/wsl-binfmt-generator.postinst");
    let postrm = include_str!("../packaging/debian/wsl-binfmt-generator.postrm");
    let spec = include_str!("../packaging/rpm/wsl-binfmt-generator.spec");
    let (_, spec) = spec.split_once("\n%post\n").context("no %post")?;
    let (post, postun) = spec.split_once("\n%postun\n").context("no %postun")?;
    let arch = include_str!("../packaging/arch/wsl-binfmt-generator.install");
    for (function, scripts) in [
        ("runs_here", vec![postinst, postrm, post, postun, arch]),
        ("is_allowed", vec![postinst, postrm]),
        ("take_effect", vec![postinst, post, arch]),
        ("take_away", vec![postrm, postun, arch]),
    ] {
        let text = |script: &'static str| {
            let (_, rest) = script.split_once(&format!("\n{function}() {{\n"))?;
            rest.split("\n}\n").next()
        };
        let first = text(scripts[0]).context(function)?;
        for script in scripts {
            assert_eq!(text(script), Some(first), "{function}");
        }
    }
    Ok(())
}

#[test]
fn cargo_and_meson_have_the_same_version() {
    let line = format!("\n  version: '{VERSION}',\n");
    assert!(include_str!("../meson.build").contains(&line), "{line}");
}

#[test]
fn help_and_version_go_to_standard_output_and_nothing_else_does() -> anyhow::Result<()> {
    let help = program(b"--help")?;
    for line in help.1.lines() {
        assert!(line.len() <= 80, "wider than 80 columns: {line}");
    }
    let nothing = String::new();
    let version = format!("wsl-binfmt-generator {VERSION}\n");
    assert_eq!(program(b"--version")?, (Some(0), version, nothing.clone()));
    assert_eq!(program(b"-V")?, program(b"--version")?);
    assert_eq!(program(b"-h")?, help);
    assert_eq!((help.0, help.2), (Some(0), nothing));
    Ok(())
}

#[test]
fn status_is_one_line_where_it_is_not_wsl() -> anyhow::Result<()> {
    // Not in an empty root: on this very machine.
    let status = |arguments: &[&str]| -> anyhow::Result<_> {
        let output = Command::new(env!("CARGO_BIN_EXE_wsl-binfmt-generator"))
            .arg("status")
            .args(arguments)
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        Ok((output.status.code(), text, output.stderr.is_empty()))
    };
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?.to_lowercase();
    if release.contains("microsoft") {
        let lack = "WHAT status SAYS WHERE IT IS NOT WSL IS NOT TESTED: this is WSL, or its kernel";
        ensure!(std::env::var_os("CI").is_none(), lack);
        // In one piece, as the harness prints at the same time.
        return Ok(io::stderr().write_all(format!("\n{lack}\n\n").as_bytes())?);
    }
    let line = "This is not WSL: nothing to do.".to_owned();
    assert_eq!(status(&[])?, (Some(0), line.clone() + "\n", true));
    let (code, json, _) = status(&["--json"])?;
    let report: serde_json::Value = serde_json::from_str(&json)?;
    let expected = serde_json::json!({
        "verdict": "not-wsl", "summary": line, "healthy": true, "checks": [],
    });
    assert_eq!((code, report), (Some(0), expected));
    Ok(())
}

#[test]
fn wrong_usage_and_failure_are_one_line_on_standard_error() -> anyhow::Result<()> {
    for (arguments, expected) in [
        (b"" as &[u8], 2),
        (b"nothing", 2),
        (b"--nothing", 2),
        (b"restore nothing", 2),
        (b"release --watch", 2),
        (b"release --remember", 2),
        (b"started", 2),
        (b"stopped nothing", 2),
        (b"started wsl-binfmt-guard", 2),
        (b"status --watch", 2),
        (b"--json", 2),
        (b"--help restore", 2),
        (b"/one /two", 2),
        (b"/not-utf8-\xff", 2),
        // binfmt_misc is not mounted in an empty root.
        (b"restore", 1),
        (b"started systemd-binfmt", 1),
        (b"stopped systemd-binfmt", 1),
    ] {
        let (status, output, errors) = program(arguments)?;
        assert_eq!((status, output.as_str()), (Some(expected), ""), "{errors}");
        assert!(errors.starts_with("wsl-binfmt-generator: "), "{errors}");
        assert!(errors.find('\n') == Some(errors.len() - 1), "{errors}");
        assert_eq!(errors.ends_with("; see --help\n"), expected == 2);
    }
    Ok(())
}

#[test]
fn help_and_manual_tell_of_all_that_there_is_and_of_nothing_else() -> anyhow::Result<()> {
    let main = include_str!("../src/main.rs");
    let (_, parse) = main.split_once("\nfn parse(").context("no parse()")?;
    let mut words = quoted(parse.split("\n}\n").next().unwrap_or_default());
    words.retain(|w| w.chars().all(|c| c.is_ascii_alphabetic() || c == '-'));
    assert_eq!(&tags("VERBS") | &tags("OPTIONS"), words);

    let variables = r#"grep -rhoE 'var(iable|_os)?\((host, )?"\w+"\)' "$SOURCE/src""#;
    let variables = sh("grep", variables)?;
    assert_eq!(tags("ENVIRONMENT"), quoted(&variables));

    let files = sh("find", r#"find "$SOURCE/units" -type f -printf '"%P"\n'"#)?;
    assert_eq!(tags("DESCRIPTION"), quoted(&files));

    let statuses = ["0", "1", "2"].map(str::to_owned);
    assert_eq!(tags("EXIT STATUS"), statuses.clone().into());

    let (_, help, _) = program(b"--help")?;
    let help: Vec<&str> = help.split([' ', ',', '\n']).collect();
    words.extend(statuses);
    words.extend(["WSL_BINFMT_ROOT", "NO_COLOR"].map(str::to_owned));
    for word in words {
        assert!(help.contains(&word.as_str()), "{word} is not in --help");
    }
    Ok(())
}

/// What stands between double quotes.
fn quoted(text: &str) -> BTreeSet<String> {
    let quoted = text.split('"').skip(1).step_by(2);
    quoted.map(str::to_owned).collect()
}

/// What the tagged paragraphs of a section of the manual are about.
fn tags(section: &str) -> BTreeSet<String> {
    let manual = include_str!("../man/wsl-binfmt-generator.8").replace("\\-", "-");
    let mut sections = manual.split("\n.SH ");
    let section = sections.find_map(|s| s.strip_prefix(&format!("{section}\n")));
    let tags = section.unwrap_or_default().split(".TP\n.").skip(1);
    tags.filter_map(|tag| tag.lines().next())
        .flat_map(|tag| tag.split([' ', ',', '"']).skip(1))
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Exit status, standard output and standard error of the program in an empty root.
fn program(arguments: &[u8]) -> anyhow::Result<(Option<i32>, String, String)> {
    let arguments = arguments.split(|b| *b == b' ').filter(|a| !a.is_empty());
    let output = Command::new(env!("CARGO_BIN_EXE_wsl-binfmt-generator"))
        .args(arguments.map(OsStr::from_bytes))
        .env("WSL_BINFMT_ROOT", scratch("empty")?)
        .output()?;
    let [text, errors] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok((output.status.code(), text, errors))
}
