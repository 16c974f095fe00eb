//! Where we are, against the questions in their order.

#![no_main]

use std::cell::Cell;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use wsl_binfmt_generator_fuzz::wsl::{verdict, Environment, Files, Verdict};

fuzz_target!(|data: &[u8]| {
    let _ = check(&mut Unstructured::new(data));
});

/// One of the values that mean something, or any other, or none.
fn value(data: &mut Unstructured, known: &[&str]) -> Result<Option<String>> {
    match data.int_in_range(0..=known.len() + 1)? {
        0 => Ok(None),
        1 => Ok(Some(data.arbitrary()?)),
        i => Ok(Some(known[i - 2].to_owned())),
    }
}

fn check(data: &mut Unstructured) -> Result<()> {
    let containers = ["wsl", "", "docker", "WSL"];
    let kernels = [
        "6.6.87.2-microsoft-standard-WSL2",
        "4.4.0-19041-Microsoft",
        "4.4.0-1-custom-wsl",
        "6.12.0-amd64",
        "4.4.0-microsoft",
    ];
    let environment = Environment {
        scope: value(data, &["user", "system"])?,
        in_initrd: value(data, &["0", "1"])?,
        virtualization: value(data, &["container:wsl", "vm:microsoft", "container:docker"])?,
        container: value(data, &containers)?,
        below_user_runtime_directory: data.arbitrary()?,
    };
    let files = Files {
        initrd_release: data.arbitrary()?,
        osrelease: value(data, &kernels)?.unwrap_or_default(),
        pid1_container: value(data, &containers)?,
        container_marker: data.arbitrary()?,
        init: data.arbitrary()?,
        guarded: data.arbitrary()?,
    };
    let looked = Cell::new(false);
    let found = verdict(&environment, || {
        looked.set(true);
        files.clone()
    });

    let is = |value: &Option<String>, text: &str| *value == Some(text.to_owned());
    let user = match &environment.scope {
        Some(scope) => scope == "user",
        None => environment.below_user_runtime_directory,
    };
    let kernel = files.osrelease.to_ascii_lowercase();
    let non_empty = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    let container = non_empty(&environment.container).or(non_empty(&files.pid1_container));
    let wsl = is(&container, "wsl");
    let answers = [
        (user, Verdict::UserManager),
        (is(&environment.in_initrd, "1"), Verdict::Initrd),
        (
            environment.virtualization.is_some()
                && !is(&environment.virtualization, "container:wsl"),
            Verdict::NotWsl,
        ),
        (files.initrd_release, Verdict::Initrd),
        (
            !(wsl || kernel.contains("microsoft") || kernel.contains("wsl")),
            Verdict::NotWsl,
        ),
        (
            kernel.starts_with("4.4.0-") && kernel.ends_with("-microsoft"),
            Verdict::Wsl1,
        ),
        (
            !wsl && (container.is_some() || files.container_marker),
            Verdict::Container,
        ),
        (!(files.init || files.guarded), Verdict::NoInit),
        (true, Verdict::Wsl2),
    ];
    let at = answers.iter().position(|(holds, _)| *holds).unwrap();
    assert_eq!(found, answers[at].1, "{environment:?} {files:?}");
    assert_eq!(looked.get(), at > 2, "{environment:?}");
    Ok(())
}
