{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.programs.wsl-binfmt-generator;
in
{
  options.programs.wsl-binfmt-generator = {
    enable = lib.mkEnableOption "the systemd generator that keeps Windows programs starting on WSL2";

    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The package of wsl-binfmt-generator.";
    };
  };

  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ cfg.package ];

    systemd.generators.wsl-binfmt-generator =
      "${cfg.package}/lib/systemd/system-generators/wsl-binfmt-generator";
  };
}
