"""The machine code of the native CUDA kernels: registers, spills, instructions, beside the committed table."""

import json
from pathlib import Path

import pytest

from fastcaps.routing import backend as backends

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.static


@pytest.fixture(scope="module")
def rows():
    """What the compiler made of every kernel of the extension that is installed, for each architecture."""
    if "CUDA" not in (backends.EXTENSION_BUILD or ""):
        pytest.skip("the extension was built without CUDA kernels: there was no CUDA toolkit")
    pytest.importorskip("triton", reason="the tools that read machine code come with Triton")
    from cuda_static import table

    return table(["sm_80", "sm_90", "sm_100", "sm_120"])


def test_every_architecture_has_every_kernel(rows):
    names = {}
    for row in rows:
        names.setdefault(row["architecture"], set()).add(row["kernel"])
    assert sorted(names) == ["sm_100", "sm_120", "sm_80", "sm_90"]
    assert all(kernels == names["sm_90"] for kernels in names.values())
    assert len(names["sm_90"]) > 100


def name(row: dict) -> str:
    return f"{row['kernel']}, {row['architecture']}"


def test_nothing_is_spilled_in_a_loop(rows):
    """A register or two may wait outside of the loops for the usual sizes, some more of those where priors, masks and
    further entries of D_in are looked for, and of a ring where its copies are asked for. There a round takes one from
    memory at most; in the last sweep, with its 255, up to five."""
    tiles = [row for row in rows if row["kernel"].startswith("tile_")]
    for row in tiles:
        plain, ring = ", true>, Tile" in row["kernel"], row["kernel"].startswith("tile_ring")
        assert row["stack"] <= (88 if ring else 16 if plain else 48), name(row)
    for row in tiles:
        limit = 0 if ", true>, Tile" in row["kernel"] else 5 if "gradients" in row["kernel"] else 1
        assert row["unit"]["local"] <= limit, name(row)


def test_registers_let_the_promised_blocks_be_resident(rows):
    """Three blocks of 128 threads for the sweeps of the forward, two for those of the backward."""
    for row in rows:
        if row["kernel"].startswith("tile_"):
            backward = "gradients" in row["kernel"] or row["kernel"].endswith("true>")
            assert row["registers"] <= (255 if backward else 168), name(row)


def test_instructions_are_those_of_the_design(rows):
    """Of a unit, one input capsule for 8 samples: a product of 16 x 8 for every 16 rows of the tile, three of them
    where float32 is exact; 16 bytes at a time from shared memory; and no more of anything than was committed."""
    from cuda_static import RESULTS, compiler

    plain = [row for row in rows if row["kernel"].startswith("tile_") and ", true>, Tile" in row["kernel"]]
    # Architectures, forms (by a ring those of float32), tiles, kernels.
    assert len(plain) == 4 * 4 * 3 * 6 + 4 * 2 * 3 * 3
    for row in plain:
        m = 8 if "Tile<8" in row["kernel"] else 10
        products = 3 if "<float, false" in row["kernel"] else 1
        gradients = "gradients" in row["kernel"]
        of_gradients = {"float, false": 3, "float, true": 1, "bfloat16": 1, "float16": 2}
        second = next(n for form, n in of_gradients.items() if f"Form<{form}" in row["kernel"])
        assert row["unit"]["matrix"] == m * (products + second if gradients else products), name(row)
        assert row["unit"]["LDS 16 bytes"] == (5 * m if gradients else m), name(row)
        of_a_pose = {"tile_persistent": 1, "tile_ring_sweep": 2}.get(row["kernel"].split("<")[0], 0)
        assert row["unit"]["LDS"] == row["unit"]["LDS 16 bytes"] + of_a_pose, name(row)
    committed = json.loads(RESULTS.read_text())
    if committed["nvcc"] != compiler():
        pytest.skip(f"what was committed is of nvcc {committed['nvcc']}: another one's instructions differ")
    before = {(row["kernel"], row["architecture"]): row["unit"] for row in committed["rows"]}
    worse = [
        f"{name(row)}: {count} {kind}, {before[row['kernel'], row['architecture']][kind]} before"
        for row in plain
        for kind, count in row["unit"].items()
        if "bytes" not in kind and count > 1.03 * before[row["kernel"], row["architecture"]][kind] + 2
    ]
    assert not worse
