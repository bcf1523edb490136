"""The ``fastcaps`` command."""

import argparse
import dataclasses
import importlib.metadata
import platform
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastcaps._version import __version__
from fastcaps.train.settings import Settings, hint, kind_of, known_settings, option, read_settings


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
        return _lacks("demo", error)
    run(out, epochs=epochs, rounds=rounds)
    return 0


def tune(sizes: list[int], dtype: str, iterations: int) -> int:
    """Find launch parameters of the Triton kernels for the GPU at hand."""
    from fastcaps.routing.backend import why_unavailable

    reason = why_unavailable("triton", "cuda") if torch.cuda.is_available() else "torch sees no CUDA device"
    if reason is not None:
        print(f"fastcaps tune: {reason}", file=sys.stderr)
        return 1
    from fastcaps.routing.dynamic.triton import tuning

    B, I, J, D_in, D_out = sizes
    kept = tuning.tune(B=B, I=I, J=J, D_in=D_in, D_out=D_out, dtype=getattr(torch, dtype), num_iterations=iterations)
    for key, parameters in kept.items():
        print(f"kept: {key}: {parameters}")
    return 0


def convert(checkpoint: Path, recipe: str, out: Path, iterations: int, image_shape: list[int] | None, fix: bool) -> int:
    """Convert a checkpoint of a public capsule network into a fastcaps.CapsNet."""
    from fastcaps.convert.checkpoints import convert_checkpoint, read_state_dict, what_fix_changes

    try:
        state = read_state_dict(checkpoint)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
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
    for note in notes:
        print(f"note: {note.message}")
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
            if "sample" in arguments and image_shape:
                raise ValueError("--image-shape has nothing to say where the function gives a sample")
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


def train(options: dict[str, Any], out: Path | None, config: Path | None, resume: bool, overwrite: bool) -> int:
    """Train a network on a data set; 1 where it cannot go on, 130 where it was interrupted."""
    try:
        given = read_settings(config, options) if config else options
        settings = Settings(**given)
        folder = out or Path("runs") / f"{settings.data}-{settings.model}"
        from fastcaps.train import run as training
        from fastcaps.train.callbacks import Interrupted
    except (OSError, ValueError) as error:
        print(f"fastcaps train: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        return _lacks("train", error)
    try:
        training.train(given, folder, resume=resume, overwrite=overwrite)
    except (KeyboardInterrupt, Interrupted) as stop:
        begun = (folder / "config.json").exists()
        advice = f"; to go on: fastcaps train --resume --out {shlex.quote(str(folder))}" if begun else ""
        print(f"fastcaps train: {str(stop) or 'stopped'}{advice}", file=sys.stderr)
        return 130
    except (OSError, ValueError, training.Diverged) as error:
        print(f"fastcaps train: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "allocate memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).splitlines()[0]
        print(f"fastcaps train: {reason} (--accumulate and a smaller network take less)", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        return _lacks("train", error)
    return 0


def evaluate(model: Path, data: str | None, root: str | None, download: bool, backend: str | None) -> int:
    """Test a model that ``fastcaps train`` wrote."""
    from fastcaps.models.network import describe

    try:
        from fastcaps.train.evaluation import evaluate as tested
        from fastcaps.train.evaluation import load_for
        from fastcaps.train.report import confusion_counts

        run = describe(model).get("run", {})
        changed = {"data": data, "root": root, "download": download}
        given = {name: value for name, value in changed.items() if value is not None} | {"backend": backend}
        settings = Settings(**(known_settings(run.get("settings", {}), str(model)) | given))
        network, samples = load_for(model, settings)
        found = tested(network, settings, samples)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"fastcaps evaluate: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        return _lacks("evaluate", error)
    wrong = round(found.error * len(found.labels) / 100)
    print(f"{settings.data}: test error {found.error:.2f} % ({wrong} of {len(found.labels)}), loss {found.loss:.4f}")
    print("class      images   right  most often taken for")
    counts = confusion_counts(found.scores, found.labels)
    names = [*samples.single.class_names, *map(str, range(len(samples.single.class_names), len(counts)))]
    for n, row in enumerate(counts):
        mistaken = row.clone()
        mistaken[n] = 0
        other = f"{names[int(mistaken.argmax())]} ({int(mistaken.max())} times)" if mistaken.any() else ""
        print(f"{names[n]:<10} {int(row.sum()):>6}  {int(row[n]):>6}  {other}")
    return 0


def show(model: Path, images: list[Path], out: Path) -> int:
    """Draw what a network makes of one's own images."""
    try:
        from fastcaps.train.report import show as drawn

        for line in drawn(model, images, out):
            print(line)
    except (OSError, ValueError) as error:
        print(f"fastcaps show: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        return _lacks("show", error)
    return 0


def _lacks(command: str, error: ModuleNotFoundError) -> int:
    print(
        f"fastcaps {command} needs {error.name}: pip install --no-build-isolation '.[train]' in a checkout of fastcaps",
        file=sys.stderr,
    )
    return 1


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each setting; those that are not given are not there afterwards."""
    for field in dataclasses.fields(Settings):
        kind = kind_of(field)
        choices, text = field.metadata["choices"], field.metadata["help"]
        if choices:
            text += f": {', '.join(choices)}"
        if field.default not in (None, "", False):
            text += f" (default: {field.default})"
        how: dict[str, Any] = {"type": kind, "metavar": field.name.rsplit("_", 1)[-1].upper()}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(option(field.name), default=argparse.SUPPRESS, help=text, **how)


def _refuse_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> None:
    known = [name for action in parser._actions for name in action.option_strings]
    for text in unknown:
        parser.error(f"unknown argument {text}{hint(text.split('=')[0], known)}")


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
    doctor_parser.add_argument(
        "target",
        help="FILE.py:FUNCTION that returns the model, (model, sample), or a dict with model, sample, margin and "
        "reconstruction (its losses); or a checkpoint",
    )
    doctor_parser.add_argument("--image-shape", type=_at_least(1), nargs=3, metavar=("C", "H", "W"))
    train_parser = commands.add_parser(
        "train", help="train a capsule network or the paper's baseline", allow_abbrev=False
    )
    train_parser.add_argument("--out", type=Path, help="folder of the run (default: runs/DATA-MODEL)")
    train_parser.add_argument("--config", type=Path, help="settings in JSON, as a run's config.json; options go first")
    before = train_parser.add_mutually_exclusive_group()
    before.add_argument("--resume", action="store_true", help="go on with the run in --out if there is one")
    before.add_argument("--overwrite", action="store_true", help="delete the run in --out")
    _add_settings(train_parser)
    evaluate_parser = commands.add_parser("evaluate", help="test a model that train wrote", allow_abbrev=False)
    evaluate_parser.add_argument("model", type=Path, help="model.safetensors of a run, or what convert wrote")
    evaluate_parser.add_argument("--data", help="the data set (default: that of the run)")
    evaluate_parser.add_argument("--root", help="folder with its files (default: that of the run)")
    evaluate_parser.add_argument("--download", action="store_true", default=None, help="fetch what is missing there")
    evaluate_parser.add_argument("--backend", help="of the routing (default: the fastest that can run)")
    show_parser = commands.add_parser("show", help="what a network makes of your images, as a page", allow_abbrev=False)
    show_parser.add_argument("model", type=Path, help="model.safetensors of a run, or what convert wrote")
    show_parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="png, jpg, ...")
    show_parser.add_argument("--out", type=Path, default=Path("show.html"), help="the page (default: show.html)")
    parsed, unknown = parser.parse_known_args(arguments)
    _refuse_unknown(commands.choices[parsed.command], unknown)
    if parsed.command == "train":
        given = vars(parsed)
        names = ("out", "config", "resume", "overwrite")
        options = {name: value for name, value in given.items() if name not in (*names, "command")}
        return train(options, *(given[name] for name in names))
    if parsed.command == "evaluate":
        return evaluate(parsed.model, parsed.data, parsed.root, parsed.download, parsed.backend)
    if parsed.command == "show":
        return show(parsed.model, parsed.images, parsed.out)
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
