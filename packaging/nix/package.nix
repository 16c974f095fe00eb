# To be called with pkgs.callPackage.
{
  lib,
  stdenv,
  rustPlatform,
  cargo,
  meson,
  ninja,
  rustc,
}:

stdenv.mkDerivation {
  pname = "wsl-binfmt-generator";
  version = "0.1.0";

  src = lib.fileset.toSource {
    root = ../..;
    fileset = lib.fileset.difference ../.. (
      lib.fileset.unions (map lib.fileset.maybeMissing [ ../../.git ../../target ])
    );
  };

  cargoDeps = rustPlatform.importCargoLock { lockFile = ../../Cargo.lock; };

  nativeBuildInputs = [
    cargo
    meson
    ninja
    rustPlatform.cargoSetupHook
    rustc
  ];

  # Below the package's own directory, not where systemd.pc says.
  mesonFlags = [ "-Dsystemdsystemgeneratordir=lib/systemd/system-generators" ];

  postInstall = ''
    install -Dm644 -t "$out/share/doc/wsl-binfmt-generator" \
      ../LICENSE ../NEWS.md ../README.md ../docs/*.md ../docs/*.svg ../docs/status.schema.json
  '';

  meta = {
    description = "Keep Windows programs starting from Linux on WSL2";
    homepage = "https://github.com/wsl-binfmt/wsl-binfmt-generator";
    license = lib.licenses.mit;
    mainProgram = "wsl-binfmt";
    platforms = lib.platforms.linux;
  };
}
