"""The public names, where they are imported, and the module paths of version 0.1."""

import importlib
import sys
import warnings

import pytest
from support.processes import python

import fastcaps
from fastcaps._deprecated import MOVED, once_positional, renamed_arguments

NAMES_0_1 = {  # what one may have imported from a module that is elsewhere now
    "fastcaps.batches": "Batches augment",
    "fastcaps.callbacks": "Interrupted Keeper Pictures Progress",
    "fastcaps.checkpoints": "convert_checkpoint read_state_dict",
    "fastcaps.conventions": "Convention plain_routing",
    "fastcaps.doctor.losses": "losses",
    "fastcaps.evaluation": "evaluate Evaluation",
    "fastcaps.figures": "coupling curves perturbations reconstructions",
    "fastcaps.files": "write_whole",
    "fastcaps.layouts": "Layout",
    "fastcaps.network": "Network describe",
    "fastcaps.ready": "SelftestRow error_budget relative_error selftest warmup",
    "fastcaps.recipes": "RECIPES Recipe",
    "fastcaps.report": "confusion_counts read_log show write_report",
    "fastcaps.routing.dynamic_ops": "DynamicRouting EagerDynamicRouting op",
    "fastcaps.routing.dynamic_reference": "dynamic_routing_reference dynamic_routing_backward_reference",
    "fastcaps.routing.dynamic_triton_tuning": "tune",
    "fastcaps.routing.trace": "RoutingTrace routing_trace",
    "fastcaps.samples": "Samples load_data",
    "fastcaps.settings": "Settings read_settings",
    "fastcaps.sources": "Source fetch",
    "fastcaps.timing": "Cost Timing compare contestants einsum_routing median_and_p20 saved_bytes training_cost",
    "fastcaps.training": "Diverged Training build_network train",
    "fastcaps.verification": "Verdict verify",
}


def test_public_names_exist():
    assert all(hasattr(fastcaps, name) for name in fastcaps.__all__)


@pytest.mark.process
def test_tab_shows_the_subpackages_and_loads_them_at_first_use():
    assert {*fastcaps.__all__, *fastcaps._SUBPACKAGES} <= set(dir(fastcaps))
    for name in fastcaps._SUBPACKAGES:
        assert getattr(fastcaps, name) is importlib.import_module(f"fastcaps.{name}")
    code = "import fastcaps; print(*(getattr(fastcaps, name).__name__ for name in fastcaps._SUBPACKAGES))"
    result = python("-c", code)
    assert result.stdout.split() == [f"fastcaps.{name}" for name in fastcaps._SUBPACKAGES], result.stderr
    with pytest.raises(AttributeError, match="module 'fastcaps' has no attribute 'trian'"):
        fastcaps.trian  # noqa: B018


@pytest.mark.parametrize("old", MOVED)
def test_module_paths_of_0_1(old, monkeypatch):
    if "triton" in old:
        pytest.importorskip("triton")
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=rf"^{old} is now {' and '.join(MOVED[old])}; the old path works until"):
        module = importlib.import_module(old)
    seen: set[str] = set()
    for place in MOVED[old]:
        there = vars(importlib.import_module(place))
        own = {name for name, value in there.items() if getattr(value, "__module__", None) == place}
        assert own, place
        for name in own - seen:
            assert getattr(module, name) is there[name]
        seen |= set(there)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a name may be an old one, too
        missing = [name for name in NAMES_0_1.get(old, "").split() if not hasattr(module, name)]
    assert not missing
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'nothing'"):
        _ = module.nothing


def test_a_moved_module_is_imported_as_before(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastcaps.timing", raising=False)
    monkeypatch.delattr(fastcaps, "timing", raising=False)
    with pytest.warns(DeprecationWarning) as warned:  # noqa: PT030 - the text is compared above
        from fastcaps import timing
    assert [w.filename for w in warned] == [__file__]
    from fastcaps import benchmarking, measure

    assert timing.compare is benchmarking.compare
    assert timing.training_cost is measure.training_cost


def test_renamed_arguments():
    @renamed_arguments(layout="axes", size="count")
    def function(weight, axes, count=1):
        return weight, axes, count

    assert function(1, 2, 3) == function(1, axes=2, count=3) == (1, 2, 3)
    with pytest.warns(DeprecationWarning, match=r"function: layout= is now axes=; the old name") as warned:
        assert function(1, layout=2) == (1, 2, 1)
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="is now axes="):
        assert function(1, axes=2, layout=4) == (1, 4, 1)  # as dataclasses.replace calls it


def test_once_positional():
    @once_positional(("B", "I"), "dtype")
    def function(first, *, B, I, dtype="float32"):
        return first, B, I, dtype

    assert function(0, B=1, I=2) == (0, 1, 2, "float32")
    with pytest.warns(DeprecationWarning, match="an argument by position is now") as warned:
        assert function(0, (1, 2), "float64") == (0, 1, 2, "float64")
    assert [w.filename for w in warned] == [__file__] * 2
    with pytest.raises(TypeError, match="multiple values for B"):
        function(0, (1, 2), B=3)
    with pytest.warns(DeprecationWarning, match="is now"), pytest.raises(TypeError, match="positional argument"):
        function(0, (1, 2), "float64", 5)


def test_moved_modules_are_attributes_as_before():
    for package, name in (("fastcaps", "conventions"), ("fastcaps.routing", "trace"), ("fastcaps.doctor", "losses")):
        old = f"{package}.{name}"
        sys.modules.pop(old, None)
        vars(sys.modules[package]).pop(name, None)
        with pytest.warns(DeprecationWarning, match=f"^{old} is now") as warned:
            module = getattr(sys.modules[package], name)
        assert module.__name__ == old
        assert warned[0].filename == __file__
    with pytest.raises(AttributeError, match=r"module 'fastcaps\.routing' has no attribute 'nothing'"):
        _ = fastcaps.routing.nothing


def test_a_star_of_an_old_path_has_all_names():
    names: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match="timing is now"):
        exec("import sys; sys.modules.pop('fastcaps.timing', None); from fastcaps.timing import *", names)
    assert {"compare", "training_cost"} <= names.keys()


def test_results_can_be_unpacked_as_in_0_1():
    cost = fastcaps.measure.Cost(1.5, 7)
    with pytest.warns(DeprecationWarning, match="Cost as a tuple is now a dataclass") as warned:
        milliseconds, peak = cost
    assert (milliseconds, peak) == (1.5, 7)
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="as a tuple is now"):
        assert cost[1] == 7
    with pytest.warns(DeprecationWarning, match="as a tuple is now"):
        assert len(cost) == 2
    with pytest.warns(DeprecationWarning, match="is now dataclasses.replace"):
        assert cost._replace(peak=8) == fastcaps.measure.Cost(1.5, 8)
    with pytest.warns(DeprecationWarning, match="is now dataclasses.asdict"):
        assert cost._asdict() == {"milliseconds": 1.5, "peak": 7}
