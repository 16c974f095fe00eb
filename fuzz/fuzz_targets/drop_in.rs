//! A drop-in is masked only if systemd reads in it what Ubuntu's says, and nothing else.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::plan::{plan, Neighbors, Output};
use wsl_binfmt_generator_fuzz::wsl_conf::WslConf;

fuzz_target!(|text: &str| {
    let only_it = [(
        "Unit".to_owned(),
        "ConditionVirtualization".to_owned(),
        "!wsl".to_owned(),
    )];
    let read = read(text);
    if masked(text) {
        assert_eq!(read.as_deref(), Some(&only_it[..]), "{text:?}");
        assert!(!masked(&format!("{text}\n[Service]\nExecStop=/x\n")));
        assert!(masked(&format!("# {}\n{text}", "why")));
    }
    // Lines that say nothing make no difference, nor do blanks around those that do.
    let lines = || text.split('\n').map(str::trim);
    let says = |line: &&str| !line.is_empty() && !line.starts_with(['#', ';']);
    if lines()
        .filter(says)
        .eq(["[Unit]", "ConditionVirtualization=!wsl"])
        && text.is_ascii()
    {
        assert!(
            masked(text) || text.contains(['\r', '\x0b', '\x0c', '\0']),
            "{text:?}"
        );
    }
});

fn masked(text: &str) -> bool {
    let neighbors = Neighbors {
        vendor_wsl_conf: text.to_owned(),
        ..Neighbors::default()
    };
    let plan = plan(&WslConf::default(), &neighbors);
    let mask =
        |output: &Output| matches!(output, Output::Link { target, .. } if *target == "/dev/null");
    plan.outputs.iter().any(mask)
}

/// The settings of a unit as systemd's config_parse() reads them; `None` if it does not read on.
fn read(text: &str) -> Option<Vec<(String, String, String)>> {
    let blank = [' ', '\t', '\n', '\r'];
    let mut settings = Vec::new();
    let mut section = String::new();
    let mut begun = String::new();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for line in text.split(['\n', '\r', '\0']).chain([""]) {
        if line.trim_start_matches(blank).starts_with(['#', ';']) {
            continue;
        }
        begun += line;
        // Backslashes in pairs are none.
        let backslashes = begun.len() - begun.trim_end_matches('\\').len();
        if backslashes % 2 == 1 {
            begun.pop();
            begun.push(' ');
            continue;
        }
        let line = std::mem::take(&mut begun);
        let line = line.trim_matches(blank);
        if line.is_empty() {
        } else if let Some(name) = line.strip_prefix('[') {
            section = name.strip_suffix(']')?.to_owned();
        } else if let Some((key, value)) = line.split_once('=') {
            let part = |part: &str| part.trim_matches(blank).to_owned();
            settings.push((section.clone(), part(key), part(value)));
        }
        // It warns of any other line, and goes on.
    }
    Some(settings)
}
