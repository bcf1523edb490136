"""The report of a run: one page without external resources."""

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastcaps._atomic import write_whole
from fastcaps._deprecated import FormerTuple
from fastcaps._reading import read_json
from fastcaps._version import __version__
from fastcaps.models import CapsNet
from fastcaps.models.network import Network
from fastcaps.train import figures
from fastcaps.train.evaluation import (
    Evaluation,
    class_counts,
    confusion_counts,
    evaluate,
    list_classes,
    load_for,
    never_predicted,
    wrong_of,
)
from fastcaps.train.samples import Samples
from fastcaps.train.settings import Settings, run_config

SHOWN = 20  # misclassified images

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
img { max-width: 100%; height: auto } table { border-collapse: collapse }
td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top } .note { color: #666; font-size: .9em }
"""


@dataclass(frozen=True)
class Section(FormerTuple):
    """A part of a page.

    Attributes:
        heading: plain text.
        note: plain text below it.
        content: figures, and tables as lists of rows of cells.
    """

    heading: str
    note: str
    content: Sequence[Figure | list[Sequence[Any]]]


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page that needs nothing beside itself; the figures are closed.

    Args:
        path: the file; it is there whole or not at all.
        title: plain text.
        sections: from top to bottom.
    """
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"]
    parts += [f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts += [f"<h2>{html.escape(section.heading)}</h2><p class=note>{html.escape(section.note)}</p>"]
        parts += [_image(c, section.heading) if isinstance(c, Figure) else _table(c) for c in section.content]
    write_whole(path, "\n".join(parts).encode())


def _image(figure: Figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _table(rows: list[Sequence[Any]]) -> str:
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def read_log(out: Path) -> list[dict[str, float]]:
    """What a run has measured, by step: where it was resumed, the later record counts.

    Args:
        out: folder of the run.
    """
    rows: list[dict[str, float]] = []
    versions = [int(name) for folder in (out / "log").glob("version_*") if (name := folder.name[8:]).isdecimal()]
    folders = [out / "log" / f"version_{version}" for version in sorted(versions)]
    for file in (folder / "metrics.csv" for folder in folders):
        read = _read_csv(file) if file.exists() else []
        if read:
            start, epochs = read[0]["step"], {row.get("epoch") for row in read}
            # The test after the last step before a checkpoint has that step's number, too.
            before = [r for r in rows if r["step"] < start or (r["step"] == start and "epoch" in r)]
            rows = [r for r in before if "epoch" not in r or r["epoch"] not in epochs] + read
    return rows


def _read_csv(file: Path) -> list[dict[str, float]]:
    """The whole rows of a log; a machine that stops may cut the last one."""
    rows = []
    with file.open(newline="", errors="replace") as lines:
        whole = [line for line in lines if line.endswith("\n") and "\0" not in line]
    for row in csv.DictReader(whole):
        try:
            numbers = {name: float(value) for name, value in row.items() if value}
        except (TypeError, ValueError):
            continue
        if "step" in numbers:
            rows.append(numbers)
    return rows


def _course(rows: list[dict[str, float]], *names: str) -> dict[str, tuple[list[float], list[float]]]:
    lines = {}
    for name in names:
        found = [(row["step"], row[name]) for row in rows if name in row]
        lines[name.split("/")[-1].replace("_", " ")] = ([x for x, _ in found], [y for _, y in found])
    return {name: line for name, line in lines.items() if line[0]}


def _curves(rows: list[dict[str, float]]) -> Section | None:
    smooth = _course(rows, "train_loss", "test_loss"), _course(rows, "train_error", "test_error")
    panels = [("loss", smooth[0], True), ("error (%)", smooth[1], False), ("learning rate", _course(rows, "lr"), False)]
    note = "Training: single batches, with augmentation and class weights. Test: the whole test set after each epoch."
    drawn = [panel for panel in panels if panel[1]]
    return Section("Curves", note, [figures.curves(drawn, "step")]) if drawn else None


def _routing(rows: list[dict[str, float]], T: int) -> Section | None:
    panels = []
    labels = {"entropy": "entropy of the coupling\n/ log J", "agreement": "agreement", "change": "change of v"}
    for name, label in labels.items():
        lines = _course(rows, *(f"routing/{name}_{t + 1}" for t in range(T)))
        panels.append((label, lines, False))
    panels.append(("dead output capsules", _course(rows, "routing/dead"), False))
    if not all(panel[1] for panel in panels):
        return None
    note = (
        "Of the same test images throughout, per routing iteration. Entropy 1: the votes go to all classes alike; 0: "
        "each to one. Agreement: scalar product of vote and output capsule, weighted by the coupling. Change: the "
        "distance from the output of the iteration before; near 0 once routing has converged. Dead: no image makes it "
        "longer than 0.1. A bug shows as entropy of exactly 1 in every iteration or capsules that stay dead from the "
        "start; an unstable routing as lines that jump while the loss does. Entropy near 1 is no bug: the votes are so "
        "small beside their sum that the iterations after the first decide little."
    )
    return Section("Routing over training", note, [figures.curves(panels, "step")])


def _mistakes(samples: Samples, found: Evaluation) -> Section:
    wrong = wrong_of(found.scores, found.labels).nonzero()[:, 0]
    chosen = wrong[:SHOWN]
    K = found.labels.shape[1]
    guesses = found.scores[chosen].topk(K, 1).indices
    titles = [
        f"{'+'.join(map(str, sorted(a)))} as {'+'.join(map(str, sorted(b)))}"
        for a, b in zip(found.labels[chosen].tolist(), guesses.tolist(), strict=True)
    ]
    shown = [figures.pictures(samples.test(chosen)[0], titles)] if len(chosen) else []
    note = f"{len(wrong)} of {len(found.labels)} test images; the first {len(chosen)}."
    return Section("Taken for something else", note, shown)


def network_sections(network: Network, images: Tensor, labels: Tensor | None = None) -> list[Section]:
    """Reconstructions, coupling maps and perturbations of a few images.

    Args:
        network: one without capsules has no such section.
        images: ``[B, C, H, W]``, in the network's dtype.
        labels: ``[B]``; None: not known.
    """
    if not isinstance(network, CapsNet):
        return []
    sections = []
    if network.decoder is not None:
        sections.append(Section("Reconstructions", "", [figures.reconstructions(network, images[:12], labels)]))
    note = "The primary capsules in the order of what they give to the class that wins."
    maps = [
        figures.coupling(network, images[n : n + 1], "" if labels is None else f"a {labels[n]}")
        for n in range(min(3, len(images)))
    ]
    sections.append(Section("Coupling, iteration by iteration", note, maps))
    if network.decoder is not None:
        note = "What the pose entries have come to mean: each is moved by -0.25 .. 0.25 and decoded."
        sections.append(Section("Perturbations", note, [figures.perturbations(network, images[:1])]))
    return sections


def write_report(out: Path) -> None:
    """Test the model of a finished run and write ``report.html`` beside it.

    Model and data are read again from the disk, on purpose: the page then tells of the files that the run has left, not
    of what was in memory.

    Args:
        out: folder of the run.

    Raises:
        FileNotFoundError: the run is not finished, or its data are gone.
    """
    config = run_config(read_json(out / "config.json"), str(out / "config.json"))
    settings = Settings(**config["settings"])
    network, samples = load_for(out / "model.safetensors", settings)
    found = evaluate(network, settings, samples)
    rows = read_log(out)
    sections = [_summary(samples, network, found, rows)]
    sections += [section for section in (_curves(rows), _routing(rows, settings.num_iterations)) if section is not None]
    note = "Rows: true; columns: predicted. Red: mistakes."
    sections.append(Section("Confusion", note, [figures.confusion(confusion_counts(found.scores, found.labels))]))
    sections.append(_mistakes(samples, found))
    images, labels, _ = samples.test(torch.arange(min(12, len(found.labels))))
    sections += network_sections(network, images.to(network.dtype), labels[:, 0] if labels.shape[1] == 1 else None)
    sections.append(Section("Settings", "As in config.json.", [list(config["settings"].items())]))
    write_page(out / "report.html", f"{settings.model} on {settings.data}: {found.error:.2f} % test error", sections)


def _summary(samples: Samples, network: Network, found: Evaluation, rows: Sequence[Mapping[str, float]]) -> Section:
    speeds = sorted(row["images/s"] for row in rows if "images/s" in row)
    speed = f"{speeds[len(speeds) // 2]:.0f} (median of the epochs)" if speeds else "not measured"
    table: list[Sequence[Any]] = [
        ("test error", f"{found.error:.2f} %"),
        ("test loss", f"{found.loss:.4f}"),
        ("test images", len(found.labels)),
        ("parameters", f"{network.num_parameters():,}"),
        ("images/s in training", speed),
        ("fastcaps", __version__),
    ]
    names = samples.data.class_names
    if missing := never_predicted(class_counts(found.scores, found.labels)):
        table.append(("never predicted", list_classes(missing, names)))
    if names:
        table.append(("classes", ", ".join(f"{n}: {name}" for n, name in enumerate(names))))
    return Section("Summary", "The network as it was after the last epoch.", [table])
