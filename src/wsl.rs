//! Where does this run? Facts in, verdict out; no file is read here. The cheapest facts come first:
//! the environment from systemd, then files, only if that leaves the question open.

/// What systemd 251 and later says in a generator's environment (systemd.generator(7)), and PID 1's
/// own `container=`, which generators inherit.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `$SYSTEMD_SCOPE`: `system` or `user`.
    pub scope: Option<String>,
    /// `$SYSTEMD_IN_INITRD`: `0` or `1`.
    pub in_initrd: Option<String>,
    /// `$SYSTEMD_VIRTUALIZATION`: `vm:ID` or `container:ID`; not set on bare metal.
    pub virtualization: Option<String>,
    /// `$container`: `wsl` from WSL, something else from a container manager.
    pub container: Option<String>,
    /// Whether the output goes below `$XDG_RUNTIME_DIR`, as only a user manager's does.
    pub below_user_runtime_directory: bool,
}

/// What the machine's files say.
#[derive(Debug, Clone, Default)]
pub struct Files {
    /// Whether /etc/initrd-release exists, the mark of an initrd.
    pub initrd_release: bool,
    /// The kernel's release, as `uname -r` prints it.
    pub osrelease: String,
    /// `container=` in PID 1's environment.
    pub pid1_container: Option<String>,
    /// Whether there is a mark of a container manager.
    pub container_marker: bool,
    /// Whether /init is an executable file that WSL has mounted.
    pub init: bool,
    /// Whether the guard has run since the distro started.
    pub guarded: bool,
}

/// Where this system runs.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    /// A WSL2 distro, the only place with anything to do.
    Wsl2,
    /// A user manager.
    UserManager,
    /// The initrd, before the real root.
    Initrd,
    /// Neither WSL nor a container on it.
    NotWsl,
    /// A WSL1 distro: no systemd, and a table of its own.
    Wsl1,
    /// A container on WSL's kernel.
    Container,
    /// WSL2's kernel without WSL's interop binary.
    NoInit,
}

/// Decides where this runs. `files` is called only if the environment does not settle it.
pub fn verdict(environment: &Environment, files: impl FnOnce() -> Files) -> Verdict {
    if let Some(verdict) = from_environment(environment) {
        return verdict;
    }
    let files = files();
    let container = [&environment.container, &files.pid1_container]
        .into_iter()
        .filter_map(Option::as_deref)
        .find(|c| !c.is_empty());
    let said_by_wsl = container == Some("wsl");
    let release = files.osrelease.to_ascii_lowercase();

    if files.initrd_release {
        return Verdict::Initrd;
    }
    if !said_by_wsl && !release.contains("microsoft") && !release.contains("wsl") {
        return Verdict::NotWsl;
    }
    // WSL1 has always called itself 4.4.0-BUILD-Microsoft.
    if release.starts_with("4.4.0-") && release.ends_with("-microsoft") {
        return Verdict::Wsl1;
    }
    // A distro made from an exported container keeps that container's marks, so WSL's own word
    // takes precedence.
    if !said_by_wsl && (container.is_some() || files.container_marker) {
        return Verdict::Container;
    }
    // A soft-reboot unmounts /init. The entry still works then, and the guard's mount stays.
    if !files.init && !files.guarded {
        return Verdict::NoInit;
    }
    Verdict::Wsl2
}

fn from_environment(environment: &Environment) -> Option<Verdict> {
    match environment.scope.as_deref() {
        Some("user") => return Some(Verdict::UserManager),
        None if environment.below_user_runtime_directory => return Some(Verdict::UserManager),
        _ => {}
    }
    if environment.in_initrd.as_deref() == Some("1") {
        return Some(Verdict::Initrd);
    }
    // systemd checks the kernel's name first, so on WSL a container is container:wsl, too.
    match environment.virtualization.as_deref() {
        None | Some("container:wsl") => None,
        Some(_) => Some(Verdict::NotWsl),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WSL2: &str = "6.6.87.2-microsoft-standard-WSL2";

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    /// A distro of WSL2 on systemd before 251, which sets no variables.
    fn distro() -> (Environment, Files) {
        let files = Files { osrelease: WSL2.to_owned(), init: true, ..Files::default() };
        (Environment::default(), files)
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Environment, &mut Files), expected: Verdict) {
        let (mut environment, mut files) = distro();
        change(&mut environment, &mut files);
        let facts = format!("{environment:?} {files:?}");
        assert_eq!(verdict(&environment, || files), expected, "{facts}");
    }

    #[test]
    fn a_wsl2_distro_is_one_with_and_without_systemds_variables() {
        check(|_, _| {}, Verdict::Wsl2);
        check(
            |e, _| {
                e.scope = some("system");
                e.in_initrd = some("0");
                e.virtualization = some("container:wsl");
            },
            Verdict::Wsl2,
        );
    }

    #[test]
    fn every_kernel_name_of_wsl2_counts() {
        for name in [
            WSL2,
            "5.15.0-MICROSOFT-STANDARD",
            "4.19.84-microsoft-standard",
            "6.1.0-custom-wsl",
            "4.4.0-custom-WSL2",
        ] {
            check(|_, f| f.osrelease = name.to_owned(), Verdict::Wsl2);
        }
    }

    #[test]
    fn a_kernel_name_that_does_not_say_wsl_needs_wsls_word() {
        let custom = |f: &mut Files| f.osrelease = "6.18.1-mine".to_owned();
        check(|_, f| custom(f), Verdict::NotWsl);
        check(
            |e, f| {
                custom(f);
                e.container = some("wsl");
            },
            Verdict::Wsl2,
        );
        check(
            |_, f| {
                custom(f);
                f.pid1_container = some("wsl");
            },
            Verdict::Wsl2,
        );
    }

    #[test]
    fn wsl1_is_told_by_its_one_kernel_name() {
        check(|_, f| f.osrelease = "4.4.0-19041-Microsoft".to_owned(), Verdict::Wsl1);
    }

    #[test]
    fn a_container_on_wsls_kernel_is_not_a_distro() {
        check(|_, f| f.container_marker = true, Verdict::Container);
        check(|e, _| e.container = some("docker"), Verdict::Container);
        check(|e, _| e.container = some(""), Verdict::Wsl2);
        check(|_, f| f.pid1_container = some("lxc"), Verdict::Container);
        check(|_, f| f.init = false, Verdict::NoInit);
        check(
            |e, f| {
                e.virtualization = some("container:wsl");
                f.container_marker = true;
            },
            Verdict::Container,
        );
    }

    #[test]
    fn a_distro_made_from_an_exported_container_is_one() {
        check(
            |_, f| {
                f.container_marker = true;
                f.pid1_container = some("wsl");
            },
            Verdict::Wsl2,
        );
    }

    #[test]
    fn a_distro_without_init_after_a_soft_reboot_is_one() {
        check(
            |_, f| {
                f.init = false;
                f.guarded = true;
            },
            Verdict::Wsl2,
        );
    }

    #[test]
    fn user_managers_and_initrds_are_left_alone() {
        check(|e, _| e.scope = some("user"), Verdict::UserManager);
        check(|e, _| e.below_user_runtime_directory = true, Verdict::UserManager);
        check(|e, _| e.in_initrd = some("1"), Verdict::Initrd);
        check(|_, f| f.initrd_release = true, Verdict::Initrd);
    }

    #[test]
    fn no_file_is_read_once_systemd_has_said_no() {
        for virtualization in ["vm:microsoft", "vm:kvm", "container:docker", "container:lxc"] {
            let environment =
                Environment { virtualization: some(virtualization), ..Environment::default() };
            let answer = verdict(&environment, || panic!("files read"));
            assert_eq!(answer, Verdict::NotWsl, "{virtualization}");
        }
    }
}
