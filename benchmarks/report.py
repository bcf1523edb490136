"""The tables and the chart of README.md and of the pages of docs/, from the committed results in benchmarks/results.

python benchmarks/report.py           # writes them
python benchmarks/report.py --check   # exits 1 where they are not what the results say
"""

import dataclasses
import io
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fastcaps.train.settings import FREE, Settings

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("cpu-*.json"), key=lambda path: "avx512" not in path.name)  # the widest vectors first
CONVERSION = sorted(RESULTS.glob("conversion-*.json"))
GRIDS = sorted(RESULTS.glob("grid-*.json"))
GPUS = sorted(RESULTS.glob("gpu-nvidia-*.json"), reverse=True)  # the last run first
SHARES, RUNS = sorted(RESULTS.glob("share-*.json")), sorted(RESULTS.glob("run-*.json"))
REAL_CODE = RESULTS / "real_code.json"
README, PAGE, IMAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images"
REAL_PAGE = ROOT / "docs" / "real-code.md"
GRID_PAGE = ROOT / "docs" / "benchmarks-grid.md"
BEGIN, END = "<!-- written by benchmarks/report.py: {} -->\n", "<!-- end -->\n"
SEEDS = [path for path in RUNS if path.stem.startswith("run-mnist-gpu-seed")]  # of one command

MODES = ("forward", "training")
GRID_SIZES = 150
TITLES = {
    "paper": "the paper's layer",
    "one_sample": "one sample",
    "four_samples": "four samples",
    "odd_sizes": "odd sizes",
    "hundred_classes": "100 classes",
    "wide_outputs": "wide outputs",
    "shared_matrix": "one matrix for all inputs, learned prior, mask",
    "tiny": "tiny",
}


def load(path: Path) -> tuple[dict[str, Any], dict[tuple[str, str, str], dict[str, Any]], list[dict[str, Any]]]:
    """The conditions, the times by (row, mode, contestant), and the other measurements of a result file."""
    content = json.loads(path.read_text())
    timed = {(b["row"], b["mode"], b["contestant"]): b for b in content["benchmarks"] if "row" in b}
    conditions = {**content["machine_info"], "commit": content["commit_info"]["id"][:7]}
    return conditions, timed, [b for b in content["benchmarks"] if "row" not in b]


def milliseconds(x: float) -> str:
    """Three significant digits, in ms."""
    return f"{x:.3f}" if x < 1 else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def table(machine: dict[str, Any], timed: dict[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    """A row for each size: times of the best alternative and of fastcaps, their ratio, the distance from the floor."""
    lines = [
        f"{machine['processor']}, {machine['instruction_set']}, {machine['threads']} threads, torch {machine['torch']},"
        f" commit {machine['commit']}.",
        "float32, T = 3. Times are ms, median (20th percentile) of rounds that take turns.",
        "",
        "| | | best plain PyTorch | fastcaps | ratio | of the floor |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row, title in TITLES.items():
        for mode in ("forward", "training"):
            if (row, mode, "fastcaps") not in timed:
                continue
            ours = timed[row, mode, "fastcaps"]
            best = timed[row, mode, ours["best_alternative"]]
            B, I, J, D_in, D_out = ours["sizes"]
            name = ours["best_alternative"].replace("best chunk", f"chunks of {best.get('chunk')}")
            label = f"{title}: B={B}, {I} -> {J}, {D_in} -> {D_out}" if mode == "forward" else ""
            share = f"{100 * ours['share_of_floor']:.0f} %" if "share_of_floor" in ours else ""
            times = (f"{milliseconds(t['median_ms'])} ({milliseconds(t['p20_ms'])})" for t in (best, ours))
            theirs, mine = times
            lines.append(f"| {label} | {mode} | {theirs} {name} | **{mine}** | **{ours['ratio']:.1f}** | {share} |")
    return lines


def layers(path: Path) -> str:
    """What one result file of ``pytest benchmarks/`` says."""
    machine, timed, others = load(path)
    lines = table(machine, timed)
    if len(rows_of(timed)) > 1:
        lines += ["", f"![speed against the best plain PyTorch]({chart_of(path).relative_to(PAGE.parent)})"]
    half = {mode: timed["paper", mode, "fastcaps, bfloat16"] for mode in ("forward", "training")}
    lines += [
        "",
        f"On bfloat16 inputs the paper's layer is {half['forward']['ratio_to_float32']:.2f} (forward) and "
        f"{half['training']['ratio_to_float32']:.2f} (training) times as fast as in float32.",
    ]
    memory = {b["contestant"]: b["peak_beyond_tensors_MB"] for b in others if "peak_beyond_tensors_MB" in b}
    if memory:
        lines.append(
            f"A training step of it takes {memory['fastcaps']:.1f} MB beyond inputs, output and gradients; eager "
            f"einsum takes {memory['einsum']:.0f} MB."
        )
    exponents = {b["letter"]: b["exponent"] for b in others if "exponent" in b}
    if exponents:
        lines.append("Training time grows as " + ", ".join(f"{n}^{exponents[n]:.2f}" for n in "BIJT") + ".")
    return "\n".join(lines) + "\n"


def conditions(content: dict[str, Any]) -> str:
    """Where and with what a result was measured."""
    machine = content["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['instruction_set']}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}, commit {content['commit'][:7]}"


def start_of(run: dict[str, Any]) -> str:
    """What to add to the conditions of a run whose capsule layers had other initial weights than today's."""
    settings = run["settings"]
    return ", initial weights of version 0.1" if settings["model"] == "capsnet" and "bias" not in settings else ""


def conversion(path: Path) -> str:
    """The table of published layers before and after ``replace_capsules``."""
    content = json.loads(path.read_text())
    B, I, J, D_in, D_out, T = content["sizes"]
    lines = [
        f"{conditions(content)}. float32, B={B}, {I} -> {J}, {D_in} -> {D_out}, T = {T}.",
        "Times are ms, median (20th percentile) of rounds in which old and new take turns.",
        "Memory is the peak of PyTorch's allocations in MB.",
        "",
        "| recipe | before | after | ratio | MB before | MB after |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in content["rows"]:
        times = [f"{milliseconds(row[f'{k}_ms'])} ({milliseconds(row[f'{k}_p20_ms'])})" for k in ("before", "after")]
        name = f"{row['recipe']}, fix=True" if row["fix"] else row["recipe"]
        memory = (f"{row[f'{k}_peak_MB']:.0f}" for k in ("before", "after"))
        ratio = f"**{row['before_ms'] / row['after_ms']:.1f}**"
        lines.append(f"| {' | '.join([name, *times, ratio, *memory])} |")
    return "\n".join(lines) + "\n"


def gpu(path: Path) -> str:
    """The table of the op on a GPU: medians in a graph, beside the fastest form in plain PyTorch of the same run."""
    content = json.loads(path.read_text())
    machine, times = content["machine"], {}
    for name, case in content["cases"].items():
        shape, precision, contestant = name.split(" | ")
        for mode in ("forward", "training"):
            if "graph_us" in case.get(mode, {}):
                times.setdefault((shape, precision, mode), {})[contestant] = case[mode]
    versions = f"torch {machine['torch']}, Triton {machine['triton']}, CUDA {machine['cuda']}"
    lines = [
        f"{machine['gpu']}, {versions}, commit {content['commit'][:7]}. Times are us in a CUDA graph: "
        f"[all numbers]({link(path)}).",
        "",
        "| layer | precision | | best eager PyTorch | native | ratio | of the bound | Triton | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (shape, precision, mode), found in times.items():
        us = {name: result["graph_us"]["median"] for name, result in found.items()}
        plain = min((name for name in us if not name.startswith("fastcaps")), key=lambda name: us[name], default=None)
        cells = [shape, precision, mode, f"{us[plain]:.0f} {plain}" if plain else ""]
        for ours in ("fastcaps native", "fastcaps triton"):
            there = ours in us
            cells += [f"{us[ours]:.0f}" if there else "", f"**{us[plain] / us[ours]:.1f}**" if there and plain else ""]
            if ours == "fastcaps native":
                cells.append(f"{100 * found[ours]['share_of_bound']:.0f} %" if there else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def share(path: Path) -> str:
    """The table of what routing costs in a training step."""
    content = json.loads(path.read_text())
    lines = [
        f"{conditions(content)}. The paper's network, batch {content['batch']}, T = 3.",
        "A step is forward, loss with reconstruction, backward and Adam.",
        f"Times are the median of {content['rounds']} rounds that take turns.",
        "Routing is timed by PyTorch's profiler, forward and backward.",
        "",
        "| precision | routing | ms a step | images/s | profiled: ms a step | of these in routing | share |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in content["rows"]:
        cells = [row["precision"], row["routing"], f"{row['step_ms']:.0f}", f"{row['images_per_s']:.0f}"]
        cells += [f"{row['profiled_step_ms']:.0f}", f"{row['routing_ms']:.0f}", f"**{100 * row['share']:.1f} %**"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def grid(path: Path) -> str:
    """The table of random sizes: ratios to the fastest alternative, and how many are losses."""
    content = json.loads(path.read_text())
    rows, modes, clock = content["rows"], ("forward", "training"), content["clock"]
    forms = "eager and compiled einsum" if content["compiled"] else "eager einsum only"
    some = f"{len(rows)} sizes" if len(rows) == GRID_SIZES else f"the {len(rows)} sizes where eager einsum came closest"
    lines = [
        f"{conditions(content)}. {forms}, {some}, {clock}: [all numbers]({link(path)}).",
        "",
        "| sizes | | losses | lowest | median | highest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    small = [row for row in rows if max(row["sizes"][3:]) <= 32]
    for title, some in (("D_in, D_out up to 32", small), ("larger ones", [row for row in rows if row not in small])):
        for mode in modes if some else ():
            ratios = [row[mode]["ratio"] for row in some]
            losses = sum(row[mode].get("loss", False) for row in some)
            found = (f"{x:.2f}" for x in (min(ratios), statistics.median(ratios), max(ratios)))
            lines.append(f"| {len(some)} with {title} | {mode} | {losses} | {' | '.join(found)} |")
    lines += ["", "| B | I | J | D_in | D_out | dtype | forward | training |", f"|{' --- |' * 8}"]
    for row in sorted(rows, key=lambda row: min(row[mode]["ratio"] for mode in modes)):
        cells = [*map(str, row["sizes"]), row["dtype"]]
        cells += [f"{row[m]['ratio']:.2f} ({row[m]['low']:.2f}-{row[m]['high']:.2f})" for m in modes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def command(settings: dict[str, Any]) -> str:
    """The options of ``fastcaps train`` that decide what is computed and that data and model do not decide."""
    settings = {"num_iterations" if name == "iterations" else name: value for name, value in settings.items()}  # 0.1's
    data, model = settings["data"], settings["model"]
    shape = (3, 32, 32) if data == "cifar10" else (1, 8, 8) if data == "digits" else (1, 28, 28)
    default = dataclasses.asdict(Settings(data=data, model=model).resolved(shape)) | {"model": "capsnet"}
    shown = default.keys() - FREE - {"data"} | {"root", "epochs"}
    changed = {name: value for name, value in settings.items() if name in shown and value != default[name]}
    options = "".join(f" --{name.replace('_', '-')}" + ("" if x is True else f" {x}") for name, x in changed.items())
    return f"fastcaps train --data {data}{options}"


def runs(paths: list[Path]) -> str:
    """The table of what training runs came to; those that differ in nothing but the seed are one row."""
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in paths:
        content = json.loads(path.read_text())
        key = command(content["settings"] | {"seed": 0}) + conditions(content)
        groups.setdefault(key, []).append((path, content))
    lines = ["| command | test error after some epochs (%) | last | conditions |", "| --- | --- | --- | --- |"]
    for group in groups.values():
        errors = [[row["test_error"] for row in content["epochs"]] for _, content in group]
        done, wanted = min(map(len, errors)), group[0][1]["settings"]["epochs"]  # a run may have been stopped
        means = [sum(column) / len(column) for column in zip(*(own[:done] for own in errors), strict=True)]
        course = ", ".join(f"{n}: {x:.2f}" for n, x in enumerate(means, 1) if n in (1, 2, 3, 5, 10, 20, done))
        last = f"**{means[-1]:.2f} %**"
        if len(group) > 1:
            course = f"mean {course}"
            last = f"mean {last} of {', '.join(f'{own[done - 1]:.2f}' for own in errors)}"
        if done < wanted:
            last += f", stopped after {done} of {wanted} epochs"
        seeds = ", ".join(str(content["settings"]["seed"]) for _, content in group)
        shown = command(group[0][1]["settings"] | {"seed": 0}) + (f" --seed {seeds}" if seeds != "0" else "")
        links = " ".join(f"[{path.stem}]({link(path)})" for path, _ in group)
        lines.append(f"| `{shown}` | {course} | {last} | {conditions(group[0][1])}{start_of(group[0][1])}: {links} |")
    return "\n".join(lines) + "\n"


def real_layers(content: dict[str, Any]) -> str:
    """The table of public layers before and after ``replace_capsules``, and why the others were left."""
    rows, left, replaced = [], [], 0
    for row in content["rows"]:
        layers = row.get("conversion", {}).get("layers", [])
        for layer in layers:
            cells = [row["repository"], layer["class_name"], layer["recipe"], "left as it was", "", "", "", ""]
            if layer["replaced"]:
                replaced += 1
                times = {mode: [layer[f"{mode}_{when}_ms"] for when in ("before", "after")] for mode in MODES}
                cells[3:5] = (f"{layer['output']:.0e}, {layer['gradient']:.0e}", errors(layer.get("float32") or ()))
                cells[5:7] = (", ".join(map(milliseconds, times[mode])) for mode in MODES)
                cells[7] = f"**{times['training'][0] / times['training'][1]:.1f}**"
            else:
                left.append(f"- {row['repository']}, {layer['class_name']}: {layer['reason'].splitlines()[0]}")
            rows.append(cells)
        if not layers:
            why = "no recipe" if "conversion" in row else "not finished"
            why = "does not run" if "it runs" in row["mistakes"] else why
            rows.append([row["repository"], "", why, *[""] * 5])
    lines = [
        f"{conditions(content)}. float32, {content['samples']} samples, the sizes of each network.",
        f"{len(content['rows'])} networks, {replaced} layers replaced, {len(left)} recognised and left as they were.",
        "Times are ms before and after, medians of rounds in which old and new take turns.",
        "The difference is that of outputs and of gradients in float64; float32 errors are those before and after.",
        "",
        "| repository | layer | recipe | difference | float32 error | forward | training | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]
    return "\n".join([*lines, *([""] if left else []), *left, ""])


def errors(values: Sequence[float]) -> str:
    """Errors with one digit."""
    return ", ".join(f"{value:.0e}" for value in values)


def real_findings(content: dict[str, Any]) -> str:
    """The table of the doctor's findings against what is wrong."""
    kinds = {"found": "found", "false_alarms": "false alarms", "missed": "missed", "not_checked": "not checked"}
    total, counts, rows = 0, dict.fromkeys(kinds, 0), []
    for row in content["rows"]:
        mistakes = row["mistakes"]
        found = {kind: row.get("doctor", {}).get(kind, []) for kind in kinds}
        if "findings" not in row.get("doctor", {}):  # it refused to examine the network
            found["not_checked"] = mistakes
        total, counts = total + len(mistakes), {kind: n + len(found[kind]) for kind, n in counts.items()}
        cells = [", ".join(found[kind]) for kind in kinds]
        if mistakes and found["found"] == mistakes:
            cells[0] = "all"
        rows.append([row["repository"], f"`{row['module']}`", ", ".join(mistakes) or "none", *cells])
    lines = [
        f"{total} mistakes: {', '.join(f'{n} {kinds[kind]}' for kind, n in counts.items())}.",
        "",
        f"| repository | module | its mistakes | {' | '.join(kinds.values())} |",
        f"|{' --- |' * (len(kinds) + 3)}",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]
    return "\n".join([*lines, ""])


def summary() -> str:
    """The README's table: one number of each kind with its conditions."""
    machine, timed, others = load(FILES[0])
    ours, memory = timed["paper", "training", "fastcaps"], {}
    for b in others:
        if "peak_beyond_tensors_MB" in b:
            memory[b["contestant"]] = b["peak_beyond_tensors_MB"]
    cpu = f"{machine['processor']}, {machine['instruction_set']}, {machine['threads']} threads"
    content = json.loads(GPUS[0].read_text())
    times = {name: case["training"] for name, case in content["cases"].items() if name.startswith("paper | float32 |")}
    us = {name.split(" | ")[2]: result["graph_us"]["median"] for name, result in times.items() if "graph_us" in result}
    plain = min(time for name, time in us.items() if not name.startswith("fastcaps"))
    runs_ = [json.loads(path.read_text()) for path in SEEDS]
    done = min(len(run["epochs"]) for run in runs_)
    error = sum(run["epochs"][done - 1]["test_error"] for run in runs_) / len(runs_)
    gpu_name, wanted = content["machine"]["gpu"], runs_[0]["settings"]["epochs"]
    return "\n".join(
        [
            "| what | fastcaps | compared with | where |",
            "| --- | --- | --- | --- |",
            f"| CPU: time of a training step | **{ours['ratio']:.1f} times as fast** "
            f"| the fastest plain PyTorch form ({ours['best_alternative'].replace(', best chunk', ', in chunks')}) "
            f"| {cpu}, commit {machine['commit']} |",
            f"| CPU: memory of a training step | **{memory['fastcaps']:.1f} MB** "
            f"| {memory['einsum']:.0f} MB (einsum, eager) | the same run |",
            f"| GPU: time of a training step | **{plain / us['fastcaps native']:.1f} times as fast** "
            f"| the fastest eager PyTorch form, both in CUDA graphs | {gpu_name}, commit {content['commit'][:7]} |",
            f"| MNIST: test error after {done} of {wanted} epochs | **{error:.2f} %** "
            f"| mean of {len(runs_)} seeds | {runs_[0]['machine']['gpu']}, commit {runs_[0]['commit'][:7]}"
            f"{start_of(runs_[0])} |",
            "",
        ]
    )


def link(path: Path) -> str:
    """A result file, as docs/benchmarks.md links to it."""
    return f"../{path.relative_to(ROOT)}"


def chart_of(path: Path) -> Path:
    """The chart of a result file."""
    return IMAGES / f"{path.stem}.svg"


def filled(page: Path, parts: dict[str, str]) -> str:
    """The text of a page with what stands between each mark and the next end replaced."""
    text = page.read_text()
    for name, content in parts.items():
        before, rest = text.split(BEGIN.format(name))
        text = before + BEGIN.format(name) + "\n" + content + "\n" + END + rest.split(END, 1)[1]
    return text


def rows_of(timed: dict[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    """The rows that a result file has."""
    return [row for row in TITLES if (row, "forward", "fastcaps") in timed]


def chart(path: Path) -> str:
    """Speed against the best plain PyTorch, forward and training, as SVG."""
    _, timed, _ = load(path)
    rows = rows_of(timed)
    settings = {"svg.hashsalt": "fastcaps", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7, 0.5 * len(rows) + 1), layout="constrained")
        axes = figure.subplots()
        for shift, mode, color in ((-0.2, "forward", "tab:blue"), (0.2, "training", "tab:orange")):
            ratios = [timed[row, mode, "fastcaps"]["ratio"] for row in rows]
            bars = axes.barh([n + shift for n in range(len(rows))], ratios, height=0.38, color=color, label=mode)
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(
            range(len(rows)), [TITLES[row].replace(" for all inputs, learned prior, mask", "") for row in rows]
        )
        axes.invert_yaxis()
        axes.set_xlabel("times as fast as the fastest form in plain PyTorch (1)")
        axes.legend(loc="lower right")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def main() -> int:
    """Write the tables and charts, or check them."""
    wanted = {chart_of(path): chart(path) for path in FILES if len(rows_of(load(path)[1])) > 1}
    wanted[README] = filled(README, {"summary": summary()})
    parts = {
        "layers": "\n".join(map(layers, FILES)),
        "conversion": "\n".join(map(conversion, CONVERSION)),
        "training": "\n".join([*map(share, SHARES), runs(RUNS)]),
        "gpu": "\n".join(map(gpu, GPUS)),
    }
    wanted[PAGE] = filled(PAGE, parts)
    content = json.loads(REAL_CODE.read_text())
    wanted[REAL_PAGE] = filled(REAL_PAGE, {"layers": real_layers(content), "findings": real_findings(content)})
    wanted[GRID_PAGE] = filled(GRID_PAGE, {"grid": "\n".join(map(grid, GRIDS)) or "Not measured yet.\n"})
    if "--check" not in sys.argv:
        for path, content in wanted.items():
            path.write_text(content)
        return 0
    stale = [path for path, content in wanted.items() if not path.exists() or path.read_text() != content]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not what the results say: run python benchmarks/report.py", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
