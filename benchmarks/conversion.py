"""Published capsule layers before and after replace_capsules: a training step of each at the paper's size.

python benchmarks/conversion.py            # about 4 minutes on 2 cores; writes results/conversion-*.json
python benchmarks/report.py                # the table of it in docs/benchmarks.md
"""

import argparse
import copy
import json
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from machine import commit, description
from torch import nn

from fastcaps.benchmarking import median_and_p20
from fastcaps.convert import RECIPES, replace_capsules
from fastcaps.convert.recipes import find_recipe
from fastcaps.measure import training_cost

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from peers import (  # noqa: E402
    abc_capsnet,
    adambielski,
    ale_ayotte,
    alex_capsnet,
    cedrickchee,
    cezannec,
    danielhavir,
    gchochla,
    gram_ai,
    higgsfield,
    hula_ai,
    labml,
    laubonghaudoi,
    leftthomas,
    motokimura,
    point_capsules,
    readable_capsnet,
    riroaki,
    sabour_tensorflow,
    seed,
    timomernick,
    xifengguo,
)

B, I, J, D_IN, D_OUT, T = 128, 1152, 10, 8, 16, 3  # the paper's
LAYERS = {
    "capsule": lambda: seed.Capsule(I, D_IN, J, D_OUT, T),
    "xifengguo": lambda: xifengguo.DenseCapsule(I, D_IN, J, D_OUT, T),
    "gram-ai": lambda: gram_ai.CapsuleLayer(J, I, D_IN, D_OUT, num_iterations=T),
    "adambielski": lambda: adambielski.CapsLayer(I, D_IN, J, D_OUT, adambielski.AgreementRouting(I, J, T - 1)),
    "higgsfield": lambda: higgsfield.DigitCaps(J, I, D_IN, D_OUT),
    "cedrickchee": lambda: cedrickchee.CapsuleLayer(D_IN, I, J, D_OUT, True, T),
    "danielhavir": lambda: danielhavir.RoutingCapsules(D_IN, I, J, D_OUT, T),
    "readable_capsnet": lambda: readable_capsnet.CapsuleLayerWithRouting(I, D_IN, J, D_OUT, T),
    "sabour": lambda: sabour_tensorflow.CapsuleLayer(I, J, D_IN, D_OUT, T),
    "riroaki": lambda: riroaki.DigitCaps(D_IN, I, J, D_OUT, T),
    "motokimura": lambda: motokimura.DigitCaps(I, D_IN, J, D_OUT, T),
    "hula-ai": lambda: hula_ai.DigitCapsLayer(J, I, D_IN, D_OUT, T),
    "gchochla": lambda: gchochla.SemanticCaps(J, I, D_OUT, D_IN, T),
    "cezannec": lambda: cezannec.DigitCaps(J, I, D_IN, D_OUT),
    "aleayotte": lambda: ale_ayotte.CapsuleLayer(J, I, D_IN, D_OUT, T),
    "labml": lambda: labml.Router(I, J, D_IN, D_OUT, T),
    "laubonghaudoi": lambda: laubonghaudoi.DigitCaps(SimpleNamespace(r=T), I, J, D_IN, D_OUT),
    "leftthomas": lambda: leftthomas.CapsuleLinear(J, D_IN, D_OUT, I, T),
    "3d-point-capsules": lambda: point_capsules.LatentCapsLayer(J, I, D_IN, D_OUT),
    "abc-capsnet": lambda: abc_capsnet.DigitCapsuleLayer(J, I, D_IN, D_OUT, T),
    "alexcapsnet": lambda: alex_capsnet.DenseCapsule(I, D_IN, J, D_OUT, "cpu", T),
    "timomernick": lambda: timomernick.CapsuleLayer(D_IN, I, J, D_OUT),
}
COLUMNS = ("cedrickchee", "timomernick")  # their poses come as [B, D_in, I]


def step(layer: nn.Module, poses: torch.Tensor) -> None:
    """Forward, and backward to the poses and all parameters."""
    out = layer(poses)
    out = out[0] if isinstance(out, tuple) else out
    torch.autograd.grad(out, [poses, *layer.parameters()], torch.ones_like(out))


def measure(name: str, rounds: int, device: str, fix: bool = False) -> dict[str, Any]:
    """One convention: old and new take turns."""
    generator = torch.Generator().manual_seed(0)
    shape = (B, D_IN, I) if name in COLUMNS else (B, I, D_IN)
    poses = (torch.randn(shape, generator=generator) / D_IN**0.5).to(device)
    torch.manual_seed(0)
    new = LAYERS[name]().to(device)
    old = copy.deepcopy(new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (row,) = replace_capsules(new, poses, measure=False, fix=fix).layers
    assert row.replaced, row.reason
    times: dict[str, list[float]] = {"before": [], "after": []}
    for n in range(rounds + 1):
        for key, layer in (("before", old), ("after", new)):
            x = poses.clone().requires_grad_()
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(layer, x)
            if device == "cuda":
                torch.cuda.synchronize()
            if n:  # the first warms up
                times[key].append(1e3 * (time.perf_counter() - start))
    x = poses.clone().requires_grad_()
    result: dict[str, Any] = {"recipe": name, "fix": fix}
    result |= {"output": row.output, "gradient": row.gradient}
    for key, layer in (("before", old), ("after", new)):
        result[f"{key}_ms"], result[f"{key}_p20_ms"] = median_and_p20(times[key])
        result[f"{key}_peak_MB"] = training_cost(lambda: step(layer, x), device, rounds=1).peak / 1e6  # noqa: B023
    return result


def line(row: dict[str, Any]) -> str:
    """What is printed of a row."""
    name = row["recipe"] + (", fix" if row["fix"] else "")
    return (
        f"{name:<17} {row['before_ms']:8.1f} ms -> {row['after_ms']:7.1f} ms   "
        f"{row['before_peak_MB']:7.0f} MB -> {row['after_peak_MB']:6.1f} MB"
    )


def main() -> None:
    """Measure all, print a line for each, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds in which old and new take turns (default: 7)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=list(LAYERS), nargs="*", default=list(LAYERS))
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/conversion-DEVICE.json)")
    given = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    known = {recipe.name for recipe in RECIPES}
    assert known >= set(LAYERS), known
    rows = []
    for name in given.only:
        wrong = find_recipe(name).convention.effects
        for fix in (False, True) if wrong else (False,):
            rows.append(measure(name, given.rounds, given.device, fix))
            print(line(rows[-1]), flush=True)
    content = {
        "machine": description(given.device),
        "commit": commit(),
        "sizes": [B, I, J, D_IN, D_OUT, T],
        "rows": rows,
    }
    out = given.out or ROOT / "benchmarks" / "results" / f"conversion-{given.device}.json"
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
