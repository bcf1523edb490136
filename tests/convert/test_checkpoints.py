"""Whole checkpoints of public networks, safe files, and what a checkpoint must not be able to do."""

import os
import pickle
import warnings

import pytest
import torch
from peers import adambielski, cedrickchee, danielhavir, gram_ai, higgsfield, seed, xifengguo
from safetensors.torch import save_file

from fastcaps import CapsNet, cli
from fastcaps.convert.checkpoints import NETWORKS, convert_checkpoint, read_state_dict
from fastcaps.routing.conventions import Convention

SMALL = {"size": 12, "kernel": 3, "stem": 5, "types": 3, "dim": 4, "classes": 7, "out_dim": 6}
PEERS = {
    "capsule": lambda **sizes: seed.Network(**sizes),
    "xifengguo": lambda **sizes: xifengguo.Network(**sizes),
    "gram-ai": lambda **sizes: gram_ai.Network(**sizes),
    "adambielski": lambda **sizes: adambielski.Network(**sizes),
    "higgsfield": lambda **sizes: higgsfield.Network(**sizes),
    "jindongwang": lambda **sizes: higgsfield.Network(**sizes, jindongwang=True),
    "danielhavir": lambda **sizes: danielhavir.Network(**sizes),
}


def run(*arguments) -> int:
    return cli.main(["convert", *map(str, arguments)])


WRAPPERS = ["module", "compiled", "nested", "safetensors"]  # which know nothing of networks: one for each of these
WRAPPED = [(name, wrapper) for n, name in enumerate(PEERS) for wrapper in ("state", WRAPPERS[n % len(WRAPPERS)])]


@pytest.mark.parametrize(("name", "wrapper"), WRAPPED)
def test_a_checkpoint_becomes_a_network_that_computes_the_same(name, wrapper, tmp_path, capsys):
    network = PEERS[name](**SMALL).double()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = network.state_dict()
    file = tmp_path / ("model.safetensors" if wrapper == "safetensors" else "model.pt")
    if wrapper == "safetensors":
        save_file(state, file)
    else:
        prefix = {"module": "module.", "compiled": "_orig_mod."}.get(wrapper, "")
        state = {prefix + key: value for key, value in state.items()}
        torch.save({"epoch": 3, "state_dict": state} if wrapper == "nested" else state, file)
    recipe = "higgsfield" if name == "jindongwang" else name
    assert run(file, "--recipe", recipe, "-o", tmp_path / "out.safetensors") == 0
    out = capsys.readouterr().out
    assert "7 classes, images of 1 x 12 x 12" in out
    assert ("kept as it was trained" in out) == (recipe in ("gram-ai", "higgsfield"))
    ours, images = CapsNet.load(tmp_path / "out.safetensors"), torch.rand(4, 1, 12, 12).double()
    torch.set_default_dtype(torch.float64)  # some networks make their logits by torch.zeros
    try:
        poses, reconstruction = network(images)
    finally:
        torch.set_default_dtype(torch.float32)
    if recipe == "higgsfield":
        assert "chooses the class that it predicts and draws by a softmax of the lengths over the batch" in out
        result = ours(images, higgsfield.predicted(poses.unsqueeze(-1)))
    else:
        result = ours(images)
    # xifengguo and danielhavir add 1e-8 to the norm, which is left out.
    tolerance = 1e-5 if recipe in ("xifengguo", "danielhavir") else 1e-9
    assert torch.linalg.vector_norm(result.poses - poses) <= tolerance * torch.linalg.vector_norm(poses)
    torch.testing.assert_close(result.reconstruction.flatten(1), reconstruction, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "module._orig_mod.", "module.module.", "_orig_mod._orig_mod."])
def test_prefixes_of_wrappers_go_in_any_order(prefix, tmp_path):
    names = ["conv1.weight", "inner.module.weight"]  # only in front
    torch.save({prefix + name: torch.ones(2) for name in names}, tmp_path / "a.pt")
    assert list(read_state_dict(tmp_path / "a.pt")) == names
    torch.save({prefix + "a": torch.ones(2), "a": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="same names with and without the prefixes"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["xifengguo", "danielhavir", "capsule"])
def test_a_dropped_norm_eps_is_said(name):
    state = PEERS[name](**SMALL).state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_checkpoint(state, name)
    told = [str(w.message) for w in caught if "adds to the norm is left out" in str(w.message)]
    assert len(told) == (name != "capsule")
    assert all(f"the 1e-08 that squash of {name!r}" in text for text in told)


def test_the_paper_s_sizes_and_iterations(tmp_path):
    network = adambielski.Network().capsnet  # alone, without the network that reconstructs
    network.digitCaps.routing_module.n_iterations = 1
    with pytest.raises(ValueError, match="give image_shape"):
        convert_checkpoint(network.state_dict(), "adambielski")
    ours = convert_checkpoint(network.state_dict(), "adambielski", num_iterations=1, image_shape=(1, 28, 28))
    assert ours.capsules.num_iterations == 2
    assert ours.decoder is None
    assert ours.config["primary_stride"] == 2
    assert ours.capsules.weight.shape == (1152, 10, 16, 8)


def test_a_network_that_chooses_its_class_otherwise_says_so():
    """What the published network predicts is another class for some images, and what it draws too."""
    torch.manual_seed(0)
    network = higgsfield.Network(**SMALL)
    network.digit_capsules.W.data *= 30
    with pytest.warns(UserWarning, match="over the batch.*; here the longest capsule is the class"):
        ours = convert_checkpoint(network.state_dict(), "higgsfield")
    result = ours(torch.rand(16, 1, 12, 12))
    assert (higgsfield.predicted(result.poses.unsqueeze(-1)) != result.lengths.argmax(1)).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_checkpoint(gram_ai.Network(**SMALL).state_dict(), "gram-ai")  # a softmax over the classes keeps them


@pytest.mark.parametrize("prefix", ["", "model.", "net.", "model.net.encoder."])
def test_counters_of_a_profiler_and_prefixes_of_all_names_are_left_out_and_said(prefix, tmp_path, capsys):
    state = seed.Network(**SMALL).state_dict()
    counted = {"total_ops": torch.zeros(1), "total_params": torch.zeros(1), "conv1.total_ops": torch.zeros(1)}
    torch.save({prefix + key: value for key, value in (state | counted).items()}, tmp_path / "a.pt")
    assert run(tmp_path / "a.pt", "--recipe", "capsule", "-o", tmp_path / "out.safetensors") == 0
    out = capsys.readouterr().out
    assert "note: 3 counters of a profiler (total_ops, total_params) are left out" in out
    assert (f"note: the prefix {prefix} that all names share is left out" in out) == bool(prefix)
    assert torch.equal(CapsNet.load(tmp_path / "out.safetensors").stem.weight, state["conv1.weight"])


def test_a_prefix_of_some_names_is_not_taken_off():
    state = {f"model.{key}": value for key, value in seed.Network(**SMALL).state_dict().items()}
    with pytest.raises(ValueError, match=r"missing: conv1\.weight, conv1\.bias, primary\.weight and 2 more"):
        convert_checkpoint(state | {"criterion.margin": torch.ones(1)}, "capsule")


def test_an_unknown_checkpoint_gets_a_way_out(tmp_path, capsys):
    state = {f"features.{n}.conv.weight": torch.zeros(8, 8, 3, 3) for n in range(50)}
    state |= {"features.0.long.weight": torch.zeros(8, 8, 1, 9), "features.0.long.bias": torch.zeros(8)}
    torch.save(state | {"caps.W": torch.zeros(1, 9, 4, 16, 8)}, tmp_path / "a.pt")
    for command in (["doctor", tmp_path / "a.pt"], ["convert", tmp_path / "a.pt", "--recipe=capsule", "-o", "out"]):
        assert cli.main(list(map(str, command))) > 0
        error = capsys.readouterr().err
        assert len(error) < 1000, error
        assert len(error.splitlines()) == 3
        assert "capsule layer: caps.W [1, 9, 4, 16, 8]\n" in error
        assert "FILE.py:FUNCTION" in error
    assert "unexpected: features.0.conv.weight, features.1.conv.weight, features.2.conv.weight and 50 more" in error
    torch.save(state, tmp_path / "a.pt")
    assert cli.main(["doctor", str(tmp_path / "a.pt")]) > 0
    assert "features.2.conv.weight [8, 8, 3, 3] and 47 more\n" in capsys.readouterr().err
    torch.save({"caps.W": torch.zeros(9, 4, 8, 8)}, tmp_path / "a.pt")  # poses of one size before and after
    assert cli.main(["doctor", str(tmp_path / "a.pt")]) > 0
    assert "capsule layer: W [9, 4, 8, 8]\n" in capsys.readouterr().err.replace("caps.W", "W")


def test_what_a_known_network_lacks_is_said_by_the_doctor(tmp_path, capsys):
    state = {k: v for k, v in xifengguo.Network(**SMALL).state_dict().items() if not k.startswith("decoder")}
    torch.save(state, tmp_path / "a.pt")
    assert cli.main(["doctor", str(tmp_path / "a.pt")]) > 0
    assert "does not tell the size of the images: give image_shape" in capsys.readouterr().err


def test_fix_routes_as_in_the_paper(tmp_path, capsys):
    torch.save(gram_ai.Network(**SMALL).state_dict(), tmp_path / "model.pt")
    assert run(tmp_path / "model.pt", "--recipe", "gram-ai", "--fix", "-o", tmp_path / "out.safetensors") == 0
    assert "measure the accuracy again: the softmax runs over the input capsules" in capsys.readouterr().out
    ours = CapsNet.load(tmp_path / "out.safetensors")
    assert not isinstance(ours.capsules.routing, Convention)
    torch.save(cedrickchee.Network(**SMALL).state_dict(), tmp_path / "model.pt")
    assert run(tmp_path / "model.pt", "--recipe", "cedrickchee", "-o", tmp_path / "no.safetensors") == 1
    assert "squashed over the capsules instead of over each pose; fix=True (--fix)" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()
    assert run(tmp_path / "model.pt", "--recipe", "cedrickchee", "--fix", "-o", tmp_path / "out.safetensors") == 0
    assert "averaged over the batch" in capsys.readouterr().out
    assert CapsNet.load(tmp_path / "out.safetensors").primary.layout == "dimension-major"


# ------------------------------------------------------------------------------------------------------------ bad input


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", ["torch", "legacy", "pickle"])
def test_a_hostile_checkpoint_is_refused_unexecuted(protocol, tmp_path, capsys):
    file, made = tmp_path / "model.pt", tmp_path / "made"
    content = {"conv1.weight": torch.ones(1), "more": Hostile(str(made))}
    if protocol == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=protocol == "torch")
    assert run(file, "--recipe", "xifengguo", "-o", tmp_path / "out.safetensors") == 1
    error = capsys.readouterr().err
    assert "refused" in error
    assert "posix.mkdir" in error or protocol == "pickle"  # there the tensor is refused first
    assert "weights_only" not in error
    assert not made.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_missing_and_unexpected_keys_are_all_named():
    state = xifengguo.Network(**SMALL).state_dict()
    del state["conv1.bias"], state["digitcaps.weight"]
    state |= {"extra.weight": torch.ones(1), "another": torch.ones(1)}
    with pytest.raises(ValueError, match=r"missing: conv1.bias, digitcaps.weight; unexpected: extra.weight, another"):
        convert_checkpoint(state, "xifengguo")


def test_sizes_that_do_not_fit_are_named():
    state = xifengguo.Network(**SMALL).state_dict()
    with pytest.raises(ValueError, match="no stride makes 48 capsules"):
        convert_checkpoint(state, "xifengguo", image_shape=(1, 40, 40))
    wrong = {**state, "decoder.0.weight": torch.ones(512, 6)}
    with pytest.raises(ValueError, match=r"decoder.layers.0.weight is \[512, 6\], not \[512, 42\]"):
        convert_checkpoint(wrong, "xifengguo")
    wrong = {**state, "digitcaps.weight": torch.ones(7, 48)}
    with pytest.raises(ValueError, match=r"digitcaps.weight must have 4 axes, got \[7, 48\]"):
        convert_checkpoint(wrong, "xifengguo")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("capsnet.digitCaps.routing_module.b", torch.tensor(0.0), r"routing_module.b must have 2 axes, got \[\]"),
        ("capsnet.digitCaps.routing_module.b", torch.ones(48, 7, 1), r"must have 2 axes, got \[48, 7, 1\]"),
        ("capsnet.digitCaps.routing_module.b", torch.ones(48, 0), r"b must have no axis of size 0, got \[48, 0\]"),
        ("capsnet.conv1.bias", torch.tensor(0.0), r"conv1.bias must have 1 axes, got \[\]"),
        ("reconstruction_net.fc3.weight", torch.tensor(0.0), r"fc3.weight must have 2 axes, got \[\]"),
    ],
    ids=["scalar prior", "prior of 3 axes", "empty prior", "scalar bias", "scalar decoder"],
)
def test_ranks_that_do_not_fit_are_named(key, value, match):
    state = adambielski.Network(**SMALL).state_dict()
    assert key in state
    with pytest.raises(ValueError, match=match):
        convert_checkpoint({**state, key: value}, "adambielski")


@pytest.mark.parametrize("command", ["convert", "doctor"])
@pytest.mark.parametrize(
    ("key", "change", "match"),
    [
        ("digits.weights", lambda t: t[..., :0], "must have no axis of size 0"),
        ("conv1.weight", lambda t: t[:, :0], "must have no axis of size 0"),
        ("digits.weights", lambda t: t.long(), "must be a dense floating-point tensor, got torch.int64"),
        ("digits.weights", lambda t: t.to(torch.complex64), "must be a dense floating-point tensor, got torch.complex"),
        ("decoder.0.bias", lambda t: t > 0, "must be a dense floating-point tensor, got torch.bool"),
        ("decoder.0.weight", lambda t: t.to_sparse(), "got torch.float32, torch.sparse_coo"),
    ],
    ids=["no D_in", "no channels", "int64", "complex", "bool", "sparse"],
)
def test_tensors_that_no_network_holds_are_named(command, key, change, match, tmp_path, capsys):
    state = seed.Network(**SMALL).state_dict()
    torch.save({**state, key: change(state[key])}, tmp_path / "a.pt")
    options = ["--recipe", "capsule", "-o", str(tmp_path / "out.safetensors")] if command == "convert" else []
    assert cli.main([command, str(tmp_path / "a.pt"), *options]) == (1 if command == "convert" else 2)
    said = capsys.readouterr().err
    assert f"{key} must" in said
    assert match in said


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (torch.ones(3), "holds no state dict .* but Tensor"),
        ([torch.ones(3)], "holds no state dict .* but list"),
        ({"epoch": 3}, "holds no state dict .* but dict"),
        ({}, "holds no state dict"),
        (b"not a checkpoint", "refused"),
        (b"", "cannot be read as a checkpoint"),
    ],
    ids=["tensor", "list", "numbers", "empty", "text", "nothing"],
)
def test_what_is_no_state_dict(content, match, tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=match):
        read_state_dict(file)


def test_truncated_files(tmp_path):
    torch.save(xifengguo.Network(**SMALL).state_dict(), tmp_path / "a.pt")
    save_file(xifengguo.Network(**SMALL).state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            read_state_dict(tmp_path / name)


def test_a_changed_byte_in_a_torch_file(tmp_path):
    file = tmp_path / "a.pt"
    torch.save(xifengguo.Network(**SMALL).state_dict(), file)
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint: .*is not what was written there"):
        read_state_dict(file)
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)  # as before torch 1.6
    assert read_state_dict(file)["a"].tolist() == [1, 1]


def test_other_errors_of_the_command(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert run(tmp_path / "missing.pt", "--recipe", "xifengguo", "-o", out) == 1
    assert "there is no file" in capsys.readouterr().err
    torch.save(xifengguo.Network(**SMALL).state_dict(), tmp_path / "a.pt")
    assert run(tmp_path / "a.pt", "--recipe", "somebody", "-o", out) == 1
    assert all(repr(name) in capsys.readouterr().err for name in ["xifengguo"])
    assert run(tmp_path / "a.pt", "--recipe", "xifengguo", "-o", tmp_path / "no" / "folder.safetensors") == 1
    assert "fastcaps convert: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt"]
    assert set(NETWORKS) <= {*PEERS, "cedrickchee"}


# ---------------------------------------------------------------------------------------------------------- our files


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder": False, "share_weight": "inputs", "bias": True, "leaky": True},
        {"learn_prior": True, "eps": 1e-8, "primary_eps": 1e-8, "primary_layout": "flat", "backend": "reference"},
        {"routing": Convention(softmax="inputs"), "num_iterations": 2},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_a_network_comes_back_from_its_file(options, tmp_path):
    network = CapsNet((2, 9, 8), 3, stem_channels=4, kernel_size=3, types=2, **options).bfloat16()
    network.save(tmp_path / "a.safetensors")
    again = CapsNet.load(tmp_path / "a.safetensors")
    images = torch.rand(2, 2, 9, 8, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(network(images)[:2], again(images)[:2], strict=True))
    assert repr(again).replace(", backend='reference'", "") == repr(network).replace(", backend='reference'", "")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        CapsNet.load(tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"does not say that it holds a network of fastcaps"):
        CapsNet.load(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        CapsNet.load(tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match="cannot be saved"):
        CapsNet((1, 9, 9), 3, kernel_size=3, routing=lambda *a, **k: None).save(tmp_path / "b.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    network = CapsNet((1, 9, 9), 3, stem_channels=4, kernel_size=3, types=2)
    network.save(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        network.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
