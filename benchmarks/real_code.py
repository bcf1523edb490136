"""Public networks tried: replace_capsules and the doctor on sources that are not part of this repository.

Clone the repositories of ``real_sources.py`` as DIR/OWNER/NAME, at the commits that are named there. Then:

python benchmarks/real_code.py --sources DIR    # some minutes; what is not in DIR is listed and left out
python benchmarks/report.py                     # the tables of docs/real-code.md
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from definitions import load
from machine import commit, description
from real_sources import SOURCES, Source
from torch import nn

from fastcaps.convert import replace_capsules
from fastcaps.convert.modules import call_arguments, floating_tensors
from fastcaps.doctor import SUSPICIOUS, UNKNOWN, WRONG, Finding, examine

RESULTS = Path(__file__).parent / "results" / "real_code.json"
EXAMINED, CONVERTED = 5, 16  # samples
ROUNDS = 5
SECONDS, BYTES = 300, 12 * 2**30  # for one network


def judged(findings: Iterable[Finding], source: Source) -> dict[str, list[str]]:
    """What the doctor said, against the truth: names of checks."""
    verdicts: dict[str, set[str]] = {}
    for finding in findings:
        verdicts.setdefault(finding.check, set()).add(finding.verdict)
    told = {check for check, seen in verdicts.items() if WRONG in seen}
    unsure = {check for check, seen in verdicts.items() if SUSPICIOUS in seen} - told
    not_found = source.mistakes - told - unsure
    unchecked = {check for check in not_found if UNKNOWN in verdicts.get(check, ())}
    return {
        "found": sorted(source.mistakes - not_found),
        "false_alarms": sorted(told - source.mistakes - source.arguable),
        "suspicions": sorted(unsure - source.mistakes - source.arguable),
        "missed": sorted(not_found - unchecked),
        "not_checked": sorted(unchecked),
    }


def as_when_they_were_written() -> None:
    """Let sources run that move to a GPU unasked, or view a product as PyTorch before 1.5 laid it out."""
    if not torch.cuda.is_available():
        torch.Tensor.cuda = nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
        torch.cuda.FloatTensor = torch.FloatTensor
    view = torch.Tensor.view

    def view_or_copy(x: torch.Tensor, *shape: Any) -> torch.Tensor:
        try:
            return view(x, *shape)
        except RuntimeError:
            return x.reshape(*shape)

    torch.Tensor.view = view_or_copy  # type: ignore[assignment]


def one(source: Source, root: Path) -> dict[str, Any]:
    """Everything about one network."""
    repository = root / source.repository
    module = load([repository / source.folder, repository], source.module, source.given)
    torch.manual_seed(0)
    network = source.build(module)
    return {
        "doctor": examined(source, network),
        "conversion": converted(source, network),
    }


def examined(source: Source, network: nn.Module) -> dict[str, Any]:
    """The doctor's findings, and what they are worth."""
    start = time.perf_counter()
    try:
        findings = examine(network, source.sample(EXAMINED))
    except ValueError as error:
        return {"error": str(error)}
    rows = [dataclasses.asdict(finding) for finding in findings]
    return {"seconds": time.perf_counter() - start, "findings": rows, **judged(findings, source)}


def converted(source: Source, network: nn.Module) -> dict[str, Any]:
    """What replace_capsules says of each layer, and what it gains."""
    old, sample = copy.deepcopy(network), source.sample(CONVERTED)
    try:
        report = replace_capsules(network, sample, measure=False)
    except ValueError as error:
        return {"error": str(error)}
    rows = []
    for layer in report.layers:
        row = {key: value for key, value in dataclasses.asdict(layer).items() if key not in ("before", "after")}
        if layer.replaced:
            row |= speed(old, network, layer.path, sample)
        rows.append(row)
    return {"layers": rows, "hints": [text.splitlines()[0] for text in report.similar]}


def speed(old: nn.Module, new: nn.Module, path: str, sample: Any) -> dict[str, float]:
    """Median milliseconds of a layer before and after, forward and training, in rounds that take turns."""
    args, kwargs = call_arguments(sample)
    with torch.no_grad():
        old.eval()(*args, **kwargs)  # some make their layers in their first call
    layers = {"before": old.get_submodule(path), "after": new.get_submodule(path)}
    args, kwargs = _first_call(old, layers["before"], sample)
    times: dict[str, list[float]] = {}
    for n in range(ROUNDS + 1):
        for name, layer in layers.items():
            start = time.perf_counter()
            with torch.no_grad():
                layer(*args, **kwargs)
            middle = time.perf_counter()
            for output in floating_tensors(layer(*args, **kwargs))[:1]:
                output.backward(torch.ones_like(output))
            if n:  # the first warms up
                times.setdefault(f"forward_{name}_ms", []).append(1e3 * (middle - start))
                times.setdefault(f"training_{name}_ms", []).append(1e3 * (time.perf_counter() - middle))
    return {name: statistics.median(values) for name, values in times.items()}


def _first_call(model: nn.Module, layer: nn.Module, sample: Any) -> Any:
    """With what a layer is called first when its model is."""
    calls = []
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    args, kwargs = call_arguments(sample)
    with hook, torch.no_grad():
        model.eval()(*args, **kwargs)
    for tensor in floating_tensors(calls[0]):
        tensor.requires_grad_()
    return calls[0]


def child(name: str, root: Path) -> None:
    """Write the result of one network as JSON, in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    as_when_they_were_written()
    warnings.simplefilter("ignore")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    sys.argv = sys.argv[:1]  # sources read the command line
    source = next(source for source in SOURCES if source.name == name)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # some write images
        result = one(source, root)
        os.chdir(root)
    json.dump(result, sys.stdout)


def run(source: Source, root: Path) -> dict[str, Any]:
    """The result of one network, or the error of its process."""
    command = [sys.executable, __file__, "--sources", str(root), "--child", source.name]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {SECONDS} s"}
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        return {"error": lines[-1].replace(os.fspath(root), "DIR")}
    result: dict[str, Any] = json.loads(process.stdout)
    return result


def at(path: Path) -> str:
    """The commit of a clone; empty where it is none."""
    command = ["git", "-C", os.fspath(path), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def line(source: Source, result: dict[str, Any]) -> str:
    """What is printed of one network."""
    if "error" in result:
        return f"{source.name}: {result['error']}"
    doctor, conversion = result["doctor"], result["conversion"]
    words = [source.name]
    if "error" in doctor:
        words.append(f"doctor: {doctor['error']}")
    else:
        words += [f"{key}: {', '.join(doctor[key])}" for key in ("false_alarms", "suspicions", "missed") if doctor[key]]
        words += [f"not checked: {', '.join(doctor['not_checked'])}"] if doctor["not_checked"] else []
        words.append(f"found {len(doctor['found'])} of {len(source.mistakes)}, {doctor['seconds']:.0f} s")
    for row in conversion.get("layers", ()):
        words.append(f"{row['class_name']} ({row['recipe']}): {row['reason'] or 'replaced'}")
        if row["replaced"]:
            words.append(f"training {row['training_before_ms']:.3g} -> {row['training_after_ms']:.3g} ms")
    words += conversion.get("hints", [])
    return "\n    ".join(words)


def main() -> int:
    """Run all networks that are there, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, metavar="DIR", help="where the clones are")
    parser.add_argument("--only", default="", metavar="TEXT", help="networks whose OWNER/NAME:MODULE has this text")
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help=f"result file (default: {RESULTS.name}; none with --only)"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    root = given.sources.resolve()
    if given.child:
        child(given.child, root)
        return 0
    rows, missing = [], []
    for source in SOURCES:
        if given.only not in source.name:
            continue
        if not (root / source.repository).is_dir():
            missing.append(f"{source.repository} at {source.commit}")
            continue
        if (found := at(root / source.repository)) != source.commit:
            print(f"{source.repository} is at {found or 'no commit'}, not {source.commit}", flush=True)
        result = run(source, root)
        print(line(source, result), flush=True)
        facts = {key: getattr(source, key) for key in ("repository", "commit", "module")}
        rows.append(facts | {"mistakes": sorted(source.mistakes), **result})
    out = given.json or (None if given.only else RESULTS)
    if rows and out:
        content = {"machine": description(), "commit": commit(), "samples": CONVERTED, "rows": rows}
        out.write_text(json.dumps(content, indent=1) + "\n")
    for text in dict.fromkeys(missing):
        print(f"missing: {text}")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
