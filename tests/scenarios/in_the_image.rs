//! What the documents have maintainers of images type in theirs, which is no WSL distro then.

use wsl_vm::Vm;

use crate::markdown::InTheImage;
use crate::ours::Run;
use crate::verbs::Test;

pub const IN_THE_IMAGE: &[Test] = &[
    ("documents: what README.md runs in the image", |vm| run(vm, "README.md")),
    ("documents: what image-maintainers.md runs in the image", |vm| {
        run(vm, "docs/image-maintainers.md")
    }),
];

fn run(vm: &Vm, document: &str) -> anyhow::Result<()> {
    let image = vm.packaged("image")?.osrelease("6.12.0-amd64");
    let image = image.environment(&[]).without_init();
    let image = image.file("/etc/wsl.conf", "[boot]\nsystemd=true\n");
    let image = image.boot()?;
    let document = InTheImage::of(document)?;
    document.compare(&image.run(&document.script))
}
