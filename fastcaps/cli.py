"""The ``fastcaps`` command: its options, its subcommands, and what it says where it cannot go on."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastcaps._version import __version__
from fastcaps.train.settings import RENAMED, Settings, hint, kind_of, option, read_settings, run_settings

OLD_OPTIONS = {option(old): new for old, new in RENAMED.items()}  # of version 0.1, until 0.3

# --------------------------------------------------------------------------------------------------------- subcommands
# Each takes its options by name and returns the exit status.


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
    from fastcaps.demo import run

    run(out, epochs=epochs, rounds=rounds)
    return 0


def tune(B: int, I: int, J: int, D_in: int, D_out: int, dtype: str, num_iterations: int) -> int:
    """Find launch parameters of the Triton kernels for the GPU at hand, and keep them."""
    from fastcaps.routing.backend import why_unavailable

    reason = why_unavailable("triton", "cuda") if torch.cuda.is_available() else "torch sees no CUDA device"
    if reason is not None:
        return refuse("tune", reason)
    from fastcaps.routing.dynamic.triton import tuning

    options = {"dtype": getattr(torch, dtype), "num_iterations": num_iterations}
    found = tuning.tune(B=B, I=I, J=J, D_in=D_in, D_out=D_out, **options)
    for key, parameters in found.items():
        print(f"kept: {key}: {parameters}")
    return 0


def convert(
    checkpoint: Path, recipe: str, out: Path, num_iterations: int, image_shape: list[int] | None, fix: bool
) -> int:
    """Convert a checkpoint of a public capsule network into a fastcaps.CapsNet."""
    from fastcaps.convert.checkpoints import convert_checkpoint, read_state_dict, what_fix_changes

    state = read_state_dict(checkpoint)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        network = convert_checkpoint(state, recipe, num_iterations=num_iterations, image_shape=image_shape, fix=fix)
    network.save(out)
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
    """Look for the known mistakes in a capsule model or a checkpoint; exit status 1 where something is wrong."""
    from fastcaps.doctor import WRONG, iter_findings
    from fastcaps.doctor.targets import examine_checkpoint, load_target, random_sample

    if ":" in Path(target).name:
        arguments = load_target(target)
        if "sample" in arguments and image_shape:
            raise ValueError("--image-shape has nothing to say where the function gives a sample")
        if "sample" not in arguments:
            arguments["sample"] = random_sample(arguments["model"], image_shape)
        what, findings = target, iter_findings(**arguments)
    else:
        what, findings = examine_checkpoint(Path(target), image_shape)
    checks = wrong = 0
    for finding in findings:
        print(finding, flush=True)
        checks, wrong = checks + 1, wrong + (finding.verdict == WRONG)
    print(f"{what}: {wrong} of {checks} checks found something wrong")
    return 1 if wrong else 0


def train(out: Path | None, config: Path | None, resume: bool, overwrite: bool, **options: Any) -> int:
    """Train a network on a data set; exit status 1 where it cannot go on, 130 where it was interrupted."""
    given = read_settings(config, options) if config else options
    settings = Settings(**given)
    folder = out or Path("runs") / f"{settings.data}-{settings.model}"
    from fastcaps.train import run as training
    from fastcaps.train.callbacks import Interrupted

    try:
        training.train(given, folder, resume=resume, overwrite=overwrite)
    except (KeyboardInterrupt, Interrupted) as stop:
        begun = (folder / "config.json").exists()
        advice = f"; to go on: fastcaps train --resume --out {shlex.quote(str(folder))}" if begun else ""
        return refuse("train", f"{str(stop) or 'stopped'}{advice}", status=130)
    except training.Diverged as error:
        return refuse("train", error)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return refuse("train", f"{str(error).splitlines()[0]} (--accumulate and a smaller network take less)")
    return 0


def evaluate(model: Path, data: str | None, root: str | None, download: bool | None, backend: str | None) -> int:
    """Test a model that ``fastcaps train`` wrote."""
    from fastcaps.models.network import describe
    from fastcaps.train.evaluation import confusion_lines, load_for
    from fastcaps.train.evaluation import evaluate as tested

    run = describe(model).get("run", {})
    changed = {"data": data, "root": root, "download": download}
    given: dict[str, Any] = {name: value for name, value in changed.items() if value is not None}
    given |= {"backend": backend, "image_size": ""}  # load_for scales to what the network takes
    settings = dataclasses.replace(run_settings(run.get("settings", {}), str(model)), **given)
    network, samples = load_for(model, settings)
    found = tested(network, settings, samples)
    wrong = round(found.error * len(found.labels) / 100)
    print(f"{settings.data}: test error {found.error:.2f} % ({wrong} of {len(found.labels)}), loss {found.loss:.4f}")
    for line in confusion_lines(found.scores, found.labels, samples.data.class_names):
        print(line)
    return 0


def show(model: Path, images: list[Path], out: Path) -> int:
    """Draw what a network makes of one's own images."""
    from fastcaps.train.show import show as drawn

    for line in drawn(model, images, out):
        print(line)
    return 0


# ------------------------------------------------------------------------------------------------------------- refusals


def refuse(command: str, reason: object, status: int = 1) -> int:
    """Say why a command ends here; returns the exit status."""
    print(f"fastcaps {command}: {reason}", file=sys.stderr)
    return status


@contextlib.contextmanager
def refusals(command: str, expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """One line on stderr instead of a traceback for what input, machine or installation can cause.

    Args:
        command: the subcommand.
        expected: these exceptions; all others but a missing module are passed on.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "fastcaps":  # a mistake of its own
            raise
        extra = command in ("demo", "train", "evaluate", "show")
        cure = "--no-build-isolation '.[train]' in a checkout of fastcaps" if extra else error.name
        refuse(command, f"{error.name} is missing: pip install {cure}" if error.name else error)
    except expected as error:
        refuse(command, error)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device has no more memory.

    A GPU's allocator raises a type of its own. The CPU's raises a plain RuntimeError, which only its text, with the
    allocator's name in it, or the system's words, tells from others.
    """
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("DefaultCPUAllocator: ", "allocate memory")
    )


# -------------------------------------------------------------------------------------------------------------- options


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; what a subcommand sets beside its options is in :func:`_add_command`."""
    parser = argparse.ArgumentParser(prog="fastcaps", description="Fused, exact routing for capsule networks.")
    parser.add_argument("--version", action="version", version=f"fastcaps {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_installation(commands)
    _add_conversion(commands)
    _add_training(commands)
    for command in commands.choices.values():
        _accept_old_options(command)
    return parser


def _add_command(
    commands: Any,
    run: Callable[..., int],
    summary: str,
    *,
    expected: tuple[type[Exception], ...] = (OSError, ValueError),
    refused: int = 1,
    allow_abbrev: bool = True,
) -> argparse.ArgumentParser:
    """A subcommand with the name of the function that it runs.

    Args:
        commands: what ``add_subparsers`` returned.
        run: called with the subcommand's options by name; returns the exit status.
        summary: a line for ``fastcaps --help``.
        expected: exceptions of ``run`` that are no mistake of the program.
        refused: the exit status after one of them.
        allow_abbrev: whether the beginning of an option's name will do.
    """
    parser = commands.add_parser(run.__name__, help=summary, description=run.__doc__, allow_abbrev=allow_abbrev)
    parser.set_defaults(run=run, parser=parser, expected=expected, refused=refused)
    return parser


def _add_installation(commands: Any) -> None:
    _add_command(commands, info, "versions, what was compiled, which backends can run here and why others cannot")
    _add_command(
        commands, selftest, "every backend that can run here against float64, in seconds", expected=(RuntimeError,)
    )
    parser = _add_command(commands, demo, "train on 1,797 real digits, draw pictures, time the paper's layer")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures (default: demo)")
    parser.add_argument("--epochs", type=_at_least(1), default=30, help="passes over the digits (default: 30)")
    parser.add_argument("--rounds", type=_at_least(0), default=7, help="timing rounds (default: 7; 0: no timing)")
    parser = _add_command(commands, tune, "find and keep launch parameters of the GPU kernels for these sizes")
    # One argument each: with one of five names many versions of Python fail to print the help.
    for size, text in (
        ("B", "samples"),
        ("I", "input capsules"),
        ("J", "output capsules"),
        ("D_in", "pose size of the input capsules"),
        ("D_out", "pose size of the output capsules"),
    ):
        parser.add_argument(size, type=_at_least(1), help=text)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--num-iterations", type=_at_least(1), default=3, help="routing iterations (default: 3)")


def _add_conversion(commands: Any) -> None:
    parser = _add_command(commands, convert, "a checkpoint of a public capsule network as a CapsNet file")
    parser.add_argument("checkpoint", type=Path, help="a state dict: .safetensors, or what torch.save wrote")
    parser.add_argument("--recipe", required=True, help="whose network it is: xifengguo, gram-ai, ...")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument(
        "--num-iterations", type=_at_least(0), default=3, help="as its own constructor counts them (default: 3)"
    )
    parser.add_argument("--image-shape", type=_at_least(1), nargs=3, metavar=("C", "H", "W"))
    parser.add_argument("--fix", action="store_true", help="route as in the paper where the network does not")
    parser = _add_command(commands, doctor, "known mistakes of capsule networks, looked for in yours", refused=2)
    parser.add_argument(
        "target",
        help="FILE.py:FUNCTION that returns the model, (model, sample), or a dict with model, sample, margin_loss and "
        "reconstruction_loss; or a checkpoint",
    )
    parser.add_argument("--image-shape", type=_at_least(1), nargs=3, metavar=("C", "H", "W"))


def _add_training(commands: Any) -> None:
    parser = _add_command(commands, train, "train a capsule network or the paper's baseline", allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/DATA-MODEL)")
    parser.add_argument(
        "--config",
        type=Path,
        help="settings in JSON, as a run's config.json; options on the command line take precedence",
    )
    before = parser.add_mutually_exclusive_group()
    before.add_argument("--resume", action="store_true", help="go on with the run in --out if there is one")
    before.add_argument("--overwrite", action="store_true", help="delete the run in --out")
    _add_settings(parser)
    parser = _add_command(
        commands,
        evaluate,
        "test a model that train wrote",
        expected=(OSError, ValueError, RuntimeError),
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, help="model.safetensors of a run, or what convert wrote")
    parser.add_argument("--data", help="the data set (default: that of the run)")
    parser.add_argument("--root", help="folder with its files (default: that of the run)")
    parser.add_argument("--download", action="store_true", default=None, help="fetch what is missing there")
    parser.add_argument("--backend", help="of the routing (default: the fastest that can run)")
    parser = _add_command(commands, show, "what a network makes of your images, as a page", allow_abbrev=False)
    parser.add_argument("model", type=Path, help="model.safetensors of a run, or what convert wrote")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="png, jpg, ...")
    parser.add_argument("--out", type=Path, default=Path("show.html"), help="the page (default: show.html)")


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


class _OldOption(argparse.Action):
    """Takes an option under its old name, and says the new one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        print(f"{parser.prog}: note: {option_string} is now {option(self.dest)}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def _accept_old_options(parser: argparse.ArgumentParser) -> None:
    actions = {action.dest: action for action in parser._actions}
    for old, dest in OLD_OPTIONS.items():
        if dest in actions:
            how: dict[str, Any] = {"type": actions[dest].type, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            parser.add_argument(old, dest=dest, action=_OldOption, **how)


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    parse.__name__ = "int"  # what argparse calls a value that is none
    return parse


def _refuse_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> None:
    known = [name for action in parser._actions for name in action.option_strings if name not in OLD_OPTIONS]
    for text in unknown:
        parser.error(f"unknown argument {text}{hint(text.split('=')[0], known)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parsed, unknown = build_parser().parse_known_args(arguments)
    given = vars(parsed)
    command, run, parser = given.pop("command"), given.pop("run"), given.pop("parser")
    expected, refused = given.pop("expected"), given.pop("refused")
    _refuse_unknown(parser, unknown)
    with refusals(command, expected):
        return run(**given)
    return refused  # an expected exception, whose message refusals() has printed


if __name__ == "__main__":
    sys.exit(main())
