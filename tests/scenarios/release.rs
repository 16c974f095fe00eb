//! Nothing stays behind: what a distro has registered goes when it stops, or its file system
//! would be held by the table of the VM for ever.

use std::fs;
use std::thread;
use std::time::Duration;

use wsl_vm::{Distro, Generation, Vm};

use crate::ours::Install;
use crate::promises::{Expect, Scenario, Setting};

/// Debian's rule for programs of arm64.
const QEMU: &str = r":qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:POCF";
/// A rule that a peer has, too.
const SHARED: &str = ":shared:M::SHARED::/bin/cat:F";

pub const RELEASE: &[Scenario] = &[
    Scenario {
        name: "nothing is held after poweroff",
        play: |setting| on_a_disk(setting, Generation::None, ""),
        expect: Expect::Differs {
            stock: &[
                "qemu-aarch64: enabled, interpreter /usr/bin/qemu-aarch64-static, flags: POCF",
                "supportfmt: enabled, interpreter /bin/cat, flags: F",
                "after poweroff: ",
                "its disk: free, clean",
            ],
            ours: OURS,
        },
    },
    Scenario {
        name: "nothing is held after poweroff under WSL's own lock",
        play: |setting| on_a_disk(setting, Generation::Lock, ""),
        expect: Expect::Differs { stock: HELD, ours: OURS },
    },
    Scenario {
        name: "nothing is held after poweroff when a rule had failed",
        play: |setting| on_a_disk(setting, Generation::Lock, ":broken:M::BROKEN::/missing:F\n"),
        expect: Expect::Differs { stock: HELD, ours: OURS },
    },
    Scenario {
        name: "a rule that is gone from binfmt.d is gone after a restart",
        play: |setting| {
            let mine = setting.mine().boot()?;
            let before = setting.entry("testfmt");
            mine.run("rm /etc/binfmt.d/test.conf; systemctl restart systemd-binfmt");
            let seen = vec![before, setting.entry("testfmt"), setting.exe("then")];
            Ok(seen)
        },
        expect: Expect::Differs {
            stock: &[
                "testfmt: enabled, interpreter /bin/cat, flags: F",
                "testfmt: missing",
                ".exe then: Exec format error",
            ],
            ours: &[
                "testfmt: enabled, interpreter /bin/cat, flags: F",
                "testfmt: missing",
                ".exe then: starts",
            ],
        },
    },
];

/// WSL's lock keeps all of it.
const HELD: &[&str] = &[
    "qemu-aarch64: enabled, interpreter /usr/bin/qemu-aarch64-static, flags: POCF",
    "supportfmt: enabled, interpreter /bin/cat, flags: F",
    "after poweroff: WSLInterop peerfmt python3 qemu-aarch64 shared supportfmt",
    "its disk: busy",
];

const OURS: &[&str] = &[
    "qemu-aarch64: enabled, interpreter /usr/bin/qemu-aarch64-static, flags: POCF",
    "supportfmt: enabled, interpreter /bin/cat, flags: F",
    "after poweroff: WSLInterop peerfmt shared",
    "its disk: free, clean",
];

/// A distro whose root is on a disk of its own, and a peer that registers one of its names later.
fn on_a_disk(
    setting: &Setting,
    generation: Generation,
    more_rules: &str,
) -> anyhow::Result<Vec<String>> {
    let vm = setting.vm;
    put_on_a_disk(vm)?;
    fs::create_dir_all("/vm/mine/upper/usr/bin")?;
    fs::copy("/vm/init", "/vm/mine/upper/usr/bin/qemu-aarch64-static")?;
    let peer = setting.peer().boot()?;
    let mine = setting
        .mine()
        .generation(generation)
        .binfmt_support()
        .file("/etc/binfmt.d/test.conf", &format!("{QEMU}\n{SHARED}\n{more_rules}"))
        .boot()?;
    mine.run(
        "printf 'package supportfmt\\ninterpreter /bin/cat\\nmagic SUPPORT\\nfix_binary yes\\n' >/usr/share/binfmts/supportfmt; \
         update-binfmts --import supportfmt; systemctl restart binfmt-support",
    );
    vm.renew_interop()?;
    peer.register(r":peerfmt:M::\x09\x08\x07::/bin/cat:");
    vm.write("shared", "-1")?;
    peer.register(SHARED);
    let mut seen = vec![setting.entry("qemu-aarch64"), setting.entry("supportfmt")];
    mine.poweroff()?;
    // Of python3.13 the first part is the same on every Debian.
    let left = vm.entries();
    let left: Vec<_> = left.iter().filter_map(|name| name.split('.').next()).collect();
    seen.push(format!("after poweroff: {}", left.join(" ")));
    seen.push(format!("its disk: {}", disk_afterwards(vm)?));
    drop::<Distro>(peer);
    Ok(seen)
}

/// Mounts a disk of its own where the distro `mine` will be laid out.
pub fn put_on_a_disk(vm: &Vm) -> anyhow::Result<()> {
    let made = vm.as_machine(
        "cd /vm && truncate -s 256M disk && mkfs.ext4 -q disk && mkdir mine && mount -o loop disk mine",
    )?;
    anyhow::ensure!(made.is_empty(), "{made}");
    Ok(())
}

/// The loop device goes by itself when nothing holds the file system any more.
pub fn disk_afterwards(vm: &Vm) -> anyhow::Result<String> {
    let unmounted = vm.as_machine("umount /vm/mine")?;
    anyhow::ensure!(unmounted.is_empty(), "{unmounted}");
    for _ in 0..50 {
        if vm.as_machine("losetup -j /vm/disk")?.is_empty() {
            let state = vm.as_machine("dumpe2fs -h /vm/disk 2>/dev/null | grep 'system state'")?;
            let clean = state.ends_with(" clean");
            return Ok(if clean { "free, clean".to_owned() } else { state });
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok("busy".to_owned())
}
