"""The ``fastcaps`` command."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastcaps._version import __version__


def info() -> int:
    """Print versions, what was compiled, and which backends can run here, or why not and what would help."""
    from fastcaps.routing.backend import BACKENDS, ENVIRONMENT, EXTENSION_BUILD, why_unavailable

    print(f"fastcaps   {__version__}")
    print(f"python     {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "numpy"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<10} {version}")
    print(f"extension  {EXTENSION_BUILD or 'not compiled'}")
    print(f"CPU        {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"CUDA       {torch.version.cuda}, {torch.cuda.get_device_name()}")
    else:
        print("CUDA       no device that torch can use")
    print(f"FASTCAPS_BACKEND {ENVIRONMENT or 'not set'}")
    print()
    for device in devices:
        for backend in BACKENDS:
            print(f"{backend:<10} on {device:<5} {why_unavailable(backend, device) or 'can run'}")
    return 0


def selftest() -> int:
    """Compare every backend that can run here with float64 and print the worst errors."""
    import fastcaps

    for row in fastcaps.selftest():
        print(
            f"{row.backend:<10} {row.device:<5} {row.dtype:<9} {row.case:<27} "
            f"error {row.error:.1e} of {row.budget:.1e} allowed ({row.tensor})"
        )
    return 0


def demo(out: Path, epochs: int, rounds: int) -> int:
    """Train on real digits, draw pictures, and time the paper's layer beside plain PyTorch."""
    try:
        from fastcaps.demo import run
    except ModuleNotFoundError as error:
        print(
            f"fastcaps demo needs {error.name}: pip install --no-build-isolation '.[train]' in a checkout of fastcaps",
            file=sys.stderr,
        )
        return 1
    run(out, epochs=epochs, rounds=rounds)
    return 0


def tune(sizes: list[int], dtype: str, iterations: int) -> int:
    """Find launch parameters of the Triton kernels for the GPU at hand."""
    from fastcaps.routing.backend import why_unavailable

    reason = why_unavailable("triton", "cuda") if torch.cuda.is_available() else "torch sees no CUDA device"
    if reason is not None:
        print(f"fastcaps tune: {reason}", file=sys.stderr)
        return 1
    from fastcaps.routing import dynamic_triton_tuning

    B, I, J, D_in, D_out = sizes
    for key, parameters in dynamic_triton_tuning.tune(
        (B, I, J, D_in, D_out), getattr(torch, dtype), iterations
    ).items():
        print(f"kept: {key}: {parameters}")
    return 0


def convert(checkpoint: Path, recipe: str, out: Path, iterations: int, image_shape: list[int] | None, fix: bool) -> int:
    """Convert a checkpoint of a public capsule network into a fastcaps.CapsNet."""
    from fastcaps.checkpoints import convert_checkpoint, read_state_dict, what_fix_changes

    try:
        state = read_state_dict(checkpoint)
        network = convert_checkpoint(state, recipe, num_iterations=iterations, image_shape=image_shape, fix=fix)
        network.save(out)
    except (OSError, ValueError) as error:
        print(f"fastcaps convert: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"fastcaps convert needs {error.name}: pip install {error.name}", file=sys.stderr)
        return 1
    C, H, W = network.image_shape
    print(f"{out}: {network.num_classes} classes, images of {C} x {H} x {W}, {network.capsules}")
    for effect in getattr(network.capsules.routing, "effects", []):
        print(f"kept as it was trained: {effect}; --fix routes as in the paper")
    if fix and (changed := what_fix_changes(recipe)):
        print(f"fixed, so measure the accuracy again: {'; '.join(changed)}")
    return 0


def doctor(target: str, image_shape: list[int] | None) -> int:
    """Look for the known mistakes in a capsule model or a checkpoint; 1 where something is wrong."""
    from fastcaps.doctor import FINE, WRONG, examine
    from fastcaps.doctor.targets import examine_checkpoint, load_target, random_sample

    try:
        if ":" in Path(target).name:
            arguments = load_target(target)
            if "sample" not in arguments:
                arguments["sample"] = random_sample(arguments["model"], image_shape)
            what, findings = target, examine(**arguments)
        else:
            what, findings = examine_checkpoint(Path(target), image_shape)
    except (OSError, ValueError) as error:
        print(f"fastcaps doctor: {error}", file=sys.stderr)
        return 2
    wrong = [finding for finding in findings if finding.verdict == WRONG]
    print(f"{what}: {len(wrong)} of {len(findings)} checks found something wrong")
    for finding in sorted(findings, key=lambda finding: finding.verdict == FINE):
        print(finding)
    return 1 if wrong else 0


def _at_least(least: int):  # type: ignore[no-untyped-def]
    def parse(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    parse.__name__ = "int"  # what argparse calls a value that is none
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastcaps", description="Fused, exact routing for capsule networks.")
    parser.add_argument("--version", action="version", version=f"fastcaps {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, what was compiled, which backends can run here and why others cannot")
    commands.add_parser("selftest", help="every backend that can run here against float64, in seconds")
    demo_parser = commands.add_parser("demo", help="train on 1,797 real digits, draw pictures, time the paper's layer")
    demo_parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures (default: demo)")
    demo_parser.add_argument("--epochs", type=_at_least(1), default=30, help="passes over the digits (default: 30)")
    demo_parser.add_argument("--rounds", type=_at_least(0), default=7, help="timing rounds (default: 7; 0: no timing)")
    tune_parser = commands.add_parser("tune", help="find and keep launch parameters of the GPU kernels for these sizes")
    tune_parser.add_argument("sizes", type=_at_least(1), nargs=5, metavar=("B", "I", "J", "D_in", "D_out"))
    tune_parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    tune_parser.add_argument("--iterations", type=_at_least(1), default=3, help="routing iterations (default: 3)")
    convert_parser = commands.add_parser("convert", help="a checkpoint of a public capsule network as a CapsNet file")
    convert_parser.add_argument("checkpoint", type=Path, help="a state dict: .safetensors, or what torch.save wrote")
    convert_parser.add_argument("--recipe", required=True, help="whose network it is: xifengguo, gram-ai, ...")
    convert_parser.add_argument("-o", "--out", type=Path, required=True, help="the .safetensors file to write")
    convert_parser.add_argument(
        "--iterations", type=_at_least(0), default=3, help="as its own constructor counts them (default: 3)"
    )
    convert_parser.add_argument("--image-shape", type=_at_least(1), nargs=3, metavar=("C", "H", "W"))
    convert_parser.add_argument("--fix", action="store_true", help="route as in the paper where the network does not")
    doctor_parser = commands.add_parser("doctor", help="known mistakes of capsule networks, looked for in yours")
    doctor_parser.add_argument("target", help="FILE.py:FUNCTION that builds the model, or a checkpoint")
    doctor_parser.add_argument("--image-shape", type=_at_least(1), nargs=3, metavar=("C", "H", "W"))
    parsed = parser.parse_args(arguments)
    if parsed.command == "info":
        return info()
    if parsed.command == "selftest":
        return selftest()
    if parsed.command == "doctor":
        return doctor(parsed.target, parsed.image_shape)
    if parsed.command == "convert":
        return convert(parsed.checkpoint, parsed.recipe, parsed.out, parsed.iterations, parsed.image_shape, parsed.fix)
    if parsed.command == "tune":
        return tune(parsed.sizes, parsed.dtype, parsed.iterations)
    return demo(parsed.out, parsed.epochs, parsed.rounds)


if __name__ == "__main__":
    sys.exit(main())
