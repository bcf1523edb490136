"""The doctor: published networks have exactly the mistakes that are known of them; planted ones are found, alone."""

import sys
import threading

import pytest
import torch
from peers import adambielski, cedrickchee, danielhavir, gram_ai, higgsfield, readable_capsnet, seed, xifengguo
from safetensors.torch import save_file
from torch import nn

import fastcaps
from fastcaps import cli
from fastcaps.convert import replace_capsules
from fastcaps.convert.checkpoints import convert_checkpoint
from fastcaps.doctor import FINE, SUSPICIOUS, UNKNOWN, WRONG, examine
from fastcaps.doctor.loss_checks import margin_reduction
from fastcaps.doctor.targets import random_sample
from fastcaps.losses import margin_loss

SMALL = {"size": 12, "kernel": 3, "stem": 5, "types": 3, "dim": 4, "classes": 10, "out_dim": 6}
SHAPE = (1, 12, 12)
SCRAMBLED, ZERO, BATCH = "capsules keep their place", "zero capsules", "samples are independent"
SOFTMAX, ITERATIONS, SQUASH = "softmax over the output capsules", "number of iterations", "squash over a pose"
INPUTS, TRAINS, LOSS = "squash of the input poses", "it trains from here", "margin loss"

KNOWN = {
    "capsule": (seed, set()),
    "xifengguo": (xifengguo, {SCRAMBLED}),
    "gram-ai": (gram_ai, {SOFTMAX, ZERO}),
    "adambielski": (adambielski, {ITERATIONS, ZERO}),
    "higgsfield": (higgsfield, {BATCH, SOFTMAX, SQUASH, SCRAMBLED, ZERO}),
    "cedrickchee": (cedrickchee, {BATCH, INPUTS, ZERO}),
    "danielhavir": (danielhavir, {SCRAMBLED, ZERO}),
}


def wrong(findings):
    return {finding.check for finding in findings if finding.verdict == WRONG}


def look(model, shape=SHAPE, **losses):
    return examine(model, random_sample(model, shape), **losses)


@pytest.mark.parametrize("name", KNOWN)
def test_published_networks_have_the_mistakes_that_are_known_of_them(name):
    module, mistakes = KNOWN[name]
    model = module.Network(**SMALL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    findings = look(model)
    assert wrong(findings) == mistakes, "\n".join(map(str, findings))
    assert all(finding.fix for finding in findings if finding.verdict == WRONG)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_evidence_is_in_numbers():
    findings = {finding.check: finding for finding in look(higgsfield.Network(**SMALL))}
    assert "sums to 1 over the 48 input capsules; over the 10 output capsules it sums to 0.21" in str(findings[SOFTMAX])
    assert "one capsule is made from 4 places of the 4 x 4 feature map" in str(findings[SCRAMBLED])
    assert "axis of size 1 (output (7, 10, 6, 1))" in str(findings[SQUASH])
    assert findings[BATCH].where == "digit_capsules"
    assert "average the agreement" in findings[BATCH].fix


@pytest.mark.parametrize(
    "model",
    [
        lambda: fastcaps.CapsNet(SHAPE, 10, kernel_size=3, stem_channels=5, types=3),
        lambda: fastcaps.CapsNet(SHAPE, 10, kernel_size=3, stem_channels=5, types=3, primary_layout="dimension-major"),
        lambda: fastcaps.CapsNet(SHAPE, 10, kernel_size=3, stem_channels=5, types=3, decoder=False, detach=True),
    ],
)
def test_our_own_network_is_fine(model):
    findings = look(model(), margin_loss=margin_loss, reconstruction_loss=fastcaps.losses.reconstruction_loss)
    assert {finding.verdict for finding in findings} == {FINE}, "\n".join(map(str, findings))
    without = look(model())
    assert [f.check for f in without] == [f.check for f in findings]
    assert {f.check for f in without if f.verdict != FINE} == {LOSS, "reconstruction loss"}


def test_our_own_flat_layout_is_named():
    model = fastcaps.CapsNet(SHAPE, 10, kernel_size=3, stem_channels=5, types=3, primary_layout="flat")
    assert wrong(look(model)) == {SCRAMBLED}


def test_a_converted_layer_is_fine_and_a_reproduced_mistake_still_found():
    model = adambielski.Network(**SMALL)
    replace_capsules(model, random_sample(model, SHAPE), measure=False)
    assert wrong(look(model)) == {ZERO}  # of the primary capsules
    model = gram_ai.Network(**SMALL)
    with pytest.warns(UserWarning, match="input capsules"):
        replace_capsules(model, random_sample(model, SHAPE), measure=False)
    assert SOFTMAX in wrong(look(model))


# ----------------------------------------------------------------------------------------------------- planted mistakes


class Planted(seed.Capsule):
    """The seed form with one mistake."""

    mistake = "none"

    def forward(self, x):
        u = torch.einsum("ijod,bid->bijo", self.weights[0], x)
        b = u.new_zeros(u.shape[:3])
        for _ in range(self.num_routing - (self.mistake == "iterations")):
            c = b.softmax(1 if self.mistake == "softmax" else 2)
            s = torch.einsum("bij,bijo->bjo", c, u)
            n2 = (s * s).sum(1 if self.mistake == "squash" else -1, keepdim=True)
            v = s * n2 / (1 + n2) / (n2 + (0 if self.mistake == "zero" else 1e-8)).sqrt()
            a = torch.einsum("bijo,bjo->bij", u, v)
            b = b + (a.mean(0, keepdim=True) if self.mistake == "batch" else a)
        return v


PLANTED = {
    "none": set(),
    "iterations": {ITERATIONS},
    "softmax": {SOFTMAX},
    "squash": {SQUASH},
    "zero": {ZERO},
    "batch": {BATCH},
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found_alone(mistake):
    model = seed.Network(**SMALL)
    model.digits.__class__ = type("Planted", (Planted,), {"mistake": mistake})
    if mistake == "softmax":
        model.digits.weights.data *= 10  # the shares are small
    findings = look(model)
    assert wrong(findings) == PLANTED[mistake], "\n".join(map(str, findings))


@pytest.mark.parametrize(("deviation", "verdict"), [(0.01, FINE), (0.0, WRONG), (300.0, WRONG)])
def test_an_initialisation_that_does_not_train(deviation, verdict):
    model = seed.Network(**SMALL)
    nn.init.normal_(model.digits.weights, std=deviation)
    finding = next(finding for finding in look(model) if finding.check == TRAINS)
    assert finding.verdict == verdict, str(finding)
    assert "40 steps of Adam on the sample take the margin loss from" in finding.evidence


def test_one_iteration_and_no_squash_are_suspicious():
    model = seed.Network(**SMALL)
    model.digits.num_routing = 1
    assert {f.check for f in look(model) if f.verdict == SUSPICIOUS} == {ITERATIONS}

    class Unsquashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 12, 5)
            self.capsules = readable_capsnet.CapsuleLayerWithRouting(192, 4, 10, 6)

        def forward(self, images):
            x = self.conv(images).unflatten(1, (3, 4)).movedim(2, -1).flatten(1, 3)
            return self.capsules(x)

    findings = look(Unsquashed())
    assert {f.check for f in findings if f.verdict == SUSPICIOUS} == {INPUTS}
    assert wrong(findings) == {ZERO}


def test_scores_that_were_softmaxed():
    class Scores(seed.Network):
        def forward(self, images):
            return super().forward(images)[0].norm(dim=2).softmax(1)

    findings = look(Scores(**SMALL))
    assert "sum to 1, as after a softmax" in "\n".join(str(f) for f in findings if f.verdict == SUSPICIOUS)
    assert SOFTMAX not in wrong(findings)  # the softmax of the scores is not the coupling


def test_batch_normalisation_in_the_loop_is_not_blamed_on_the_capsules():
    class Normalised(seed.Network):
        def forward(self, images):
            return super().forward(images - images.mean(0, keepdim=True))

    finding = next(f for f in look(Normalised(**SMALL)) if f.check == BATCH)
    assert finding.verdict == WRONG
    assert finding.where == ""


def test_a_model_that_does_not_route():
    findings = look(nn.Sequential(nn.Flatten(), nn.Linear(144, 10)))
    assert any("nothing routes here" in finding.evidence for finding in findings)
    assert wrong(findings) == set()


@pytest.mark.parametrize("B", [6, 10])  # D_out and J
def test_a_batch_as_large_as_another_axis(B):
    model = seed.Network(**SMALL)
    model.digits.__class__ = type("Planted", (Planted,), {"mistake": "batch"})
    assert wrong(examine(model, torch.rand(B, *SHAPE))) == {BATCH}
    model.digits.__class__ = seed.Capsule
    assert wrong(examine(model, torch.rand(B, *SHAPE))) == set()


@pytest.mark.parametrize("B", [6, 10])  # D_out and J
def test_a_model_for_one_batch_size_that_is_as_large_as_another_axis(B):
    class Fixed(seed.Network):
        def forward(self, images):
            assert len(images) == B
            return super().forward(images)

    model = Fixed(**SMALL)
    assert wrong(examine(model, torch.rand(B, *SHAPE))) == set()
    model.digits.__class__ = type("Planted", (Planted,), {"mistake": "batch"})
    assert wrong(examine(model, torch.rand(B, *SHAPE))) == {BATCH}


def test_labels_and_numbers_beside_the_images():
    class Labelled(seed.Network):
        def forward(self, images, labels, scale):
            assert labels.max() < 10
            return super().forward(images * scale)

    model = Labelled(**SMALL)
    assert wrong(examine(model, (torch.rand(7, *SHAPE), torch.full((7,), 9), torch.tensor(1.0)))) == set()


class Twice(nn.Module):
    """One layer called twice, a tensor with a history, and no gradient."""

    def __init__(self, grad):
        super().__init__()
        self.network, self.grad = seed.Network(**SMALL), grad
        self.kept = self.network.digits.weights * 2

    def forward(self, images):
        with torch.set_grad_enabled(self.grad):
            return self.network(images) + self.network(images)


@pytest.mark.parametrize("grad", [True, False])
def test_models_that_are_hard_to_look_at(grad):
    findings = look(Twice(grad))
    assert wrong(findings) == set(), "\n".join(map(str, findings))
    assert next(f for f in findings if f.check == TRAINS).verdict == (FINE if grad else UNKNOWN)


def test_models_that_cannot_be_trained_or_given_other_samples():
    class Training(seed.Network):
        """It wants labels in training."""

        def forward(self, images, labels=None):
            return super().forward(images + labels if self.training else images)

    class Keeping(seed.Network):
        """It keeps a graph from call to call."""

        kept = 0.0

        def forward(self, images):
            self.kept = super().forward(images)[0].mean() + 0 * self.kept
            return super().forward(images)[0] + 0 * self.kept

    class Bounded(seed.Network):
        def forward(self, images):
            assert images.max() <= 1
            return super().forward(images)

    frozen = seed.Network(**SMALL).requires_grad_(False)
    for model, check, text in [
        (Training(**SMALL), TRAINS, "on the sample alone: TypeError"),
        (Keeping(**SMALL), TRAINS, "on the sample alone: RuntimeError: Trying to backward"),
        (frozen, TRAINS, "no parameter requires a gradient"),
        (Bounded(**SMALL), BATCH, "does not take twice the last sample as the others: AssertionError"),
    ]:
        findings = look(model)
        assert wrong(findings) == set()
        finding = next(f for f in findings if f.check == check)
        assert (finding.verdict, text in finding.evidence) == (UNKNOWN, True), str(finding)


def test_a_batch_mistake_where_the_samples_decide_what_is_called():
    class Deciding(seed.Network):
        def __init__(self, **sizes):
            super().__init__(**sizes)
            self.same = nn.Identity()

        def forward(self, images):
            for _ in range(1 + int(images.max() > 1)):
                images = self.same(images - images.mean(0, keepdim=True))
            return super().forward(images)

    assert wrong(look(Deciding(**SMALL))) == {BATCH}


def test_a_model_that_cannot_be_copied_is_refused():
    model = seed.Network(**SMALL)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="the model cannot be copied: TypeError"):
        examine(model, torch.rand(7, *SHAPE))


def test_random_samples_are_enough_also_where_parameters_have_their_number():
    model = nn.Sequential(nn.Flatten(), nn.Linear(35, 7), nn.Linear(7, 5))
    assert wrong(look(model, (1, 5, 7))) == set()


@pytest.mark.parametrize("where", ["parameter", "sample"])
def test_an_output_that_is_not_finite_is_called_so_and_nothing_else(where):
    model, sample = seed.Network(**SMALL), torch.rand(7, *SHAPE)
    with torch.no_grad():
        (sample if where == "sample" else model.digits.weights).flatten()[0] = float("nan")
    findings = examine(model, sample)
    assert wrong(findings) == {"the output is finite"}, "\n".join(map(str, findings))
    assert not any(f.verdict == SUSPICIOUS or "nan" in f.evidence for f in findings), "\n".join(map(str, findings))


# --------------------------------------------------------------------------------------------------------------- losses


def unsquared(lengths, labels):
    target = nn.functional.one_hot(labels, lengths.shape[1])
    return (target * (0.9 - lengths).relu() + 0.5 * (1 - target) * (lengths - 0.1).relu()).sum(1).mean()


def unreduced(lengths, labels):
    return torch.stack([margin_loss(*pair) for pair in zip(lengths.split(1), labels.split(1), strict=True)])


def one_hot_margin(lengths, target):
    if target.dim() != 2:
        raise TypeError("one-hot labels, please")
    return (target * (0.9 - lengths).relu() ** 2 + 0.5 * (1 - target) * (lengths - 0.1).relu() ** 2).sum(1).mean()


def one_hot_by_product(lengths, target):
    """Made for one-hot labels; indices broadcast where there are as many samples as classes."""
    return (target * (0.9 - lengths).relu() ** 2 + 0.5 * (1 - target) * (lengths - 0.1).relu() ** 2).sum(1).mean()


MARGINS = {
    "the paper's": (margin_loss, FINE, "it is the paper's"),
    "one-hot": (one_hot_margin, FINE, "it is the paper's"),
    "mean over classes": (lambda v, y: margin_loss(v, y) / v.shape[1], WRONG, "averaged over the classes"),
    "sum over samples": (lambda v, y: margin_loss(v, y) * len(v), WRONG, "summed over the samples"),
    "both": (lambda v, y: margin_loss(v, y) * len(v) / v.shape[1], WRONG, "summed over the samples and averaged"),
    "unsquared": (unsquared, WRONG, "not a multiple of the paper's"),
    "scaled": (lambda v, y: 3 * margin_loss(v, y), SUSPICIOUS, "it is 3 times the paper's"),
    "unreduced": (lambda v, y: (v - 0.1).relu()[:, :1].expand(-1, 3), WRONG, "no scalar"),
    "unreduced, labels first": (lambda y, v: unreduced(v, y), WRONG, ",), no scalar"),
    "nothing": (lambda v, y: None, WRONG, "it returns NoneType, no scalar"),
    "a float": (lambda v, y: margin_loss(v, y).item(), FINE, "it is the paper's"),
    "labels first": (lambda y, v: margin_loss(v, y), FINE, "it is the paper's"),
    "three arguments": (lambda v, y, images: margin_loss(v, y), UNKNOWN, "does not take lengths"),
    "broadcast": (one_hot_by_product, FINE, "it is the paper's"),
}


CASES = [(name, J) for J in (4, 7, 8, 10) for name in MARGINS]
CASES += [(name, 1) for name in MARGINS if name not in ("mean over classes", "both", "unsquared")]  # alike for J = 1


@pytest.mark.parametrize(("name", "J"), CASES)
def test_reductions_of_the_margin_loss(name, J):
    loss, verdict, text = MARGINS[name]
    finding = margin_reduction(loss, J, torch.float32)
    assert (finding.verdict, text in finding.evidence) == (verdict, True), str(finding)


RECONSTRUCTIONS = {
    "summed": (lambda a, b: (a - b).pow(2).flatten(1).sum(1).mean(), FINE, "it is the paper's"),
    "weighted": (lambda a, b: 0.0005 * (a - b).pow(2).flatten(1).sum(1).mean(), FINE, "times 0.0005"),
    "mean": (nn.MSELoss(), WRONG, "averaged over the pixels"),
    "weighted mean": (
        lambda a, b: 0.0005 * nn.functional.mse_loss(a, b),
        WRONG,
        "averaged over the pixels, times 0.0005",
    ),
    "sum": (nn.MSELoss(reduction="sum"), WRONG, "summed over the samples"),
    "unreduced": (nn.MSELoss(reduction="none"), WRONG, "no scalar"),
    "three": (lambda a, b, c: a.sum(), UNKNOWN, "does not take two batches"),
    "other": (lambda a, b: 0.3 * (a - b).pow(2).flatten(1).sum(1).mean(), SUSPICIOUS, "0.3 times"),
}


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_reductions_of_the_reconstruction_loss(name):
    loss, verdict, text = RECONSTRUCTIONS[name]
    findings = look(fastcaps.CapsNet(SHAPE, 10, kernel_size=3), reconstruction_loss=loss)
    finding = next(f for f in findings if f.check == "reconstruction loss")
    assert (finding.verdict, text in finding.evidence) == (verdict, True), str(finding)


# ---------------------------------------------------------------------------------------------------------- the command

SCRIPT = """
import torch
from peers import gram_ai, seed
from torch import nn
S = {"size": 12, "kernel": 3, "stem": 5, "types": 3, "dim": 4}
def alone(): return seed.Network(**S)
def with_sample(): return gram_ai.Network(**S), torch.rand(7, 1, 12, 12)
def everything():
    return {"model": seed.Network(**S), "sample": torch.rand(7, 1, 12, 12), "reconstruction_loss": nn.MSELoss()}
def nothing(): return 3
def sized(n): return seed.Network(**S)
"""


def test_the_command(tmp_path, capsys, monkeypatch):
    file = tmp_path / "some_model.py"
    file.write_text(SCRIPT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["doctor", f"{file}:alone", "--image-shape", "1", "12", "12"]) == 0
    assert "0 of 12 checks found something wrong" in capsys.readouterr().out
    assert cli.main(["doctor", f"{file}:with_sample"]) == 1
    out = capsys.readouterr().out
    assert "WRONG       softmax over the output capsules, digit_capsules" in out
    assert out.index("WRONG") < out.index("FINE")
    assert cli.main(["doctor", f"{file}:everything"]) == 1
    assert "averaged over the pixels" in capsys.readouterr().out
    assert cli.main(["doctor", f"{file}:with_sample", "--image-shape", "1", "12", "12"]) == 2
    assert "--image-shape has nothing to say" in capsys.readouterr().err
    (tmp_path / "m.txt").write_text(SCRIPT)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "random.py").write_text("def build(): pass")
    import random

    for target, text in {
        str(file): "which function of",
        f"{tmp_path}/m.txt:alone": "is no .py file",
        f"{tmp_path}/broken.py:build": "cannot be imported: ModuleNotFoundError",
        f"{tmp_path}/random.py:build": "must return a module",
        f"{file}:sized": "must be a function without arguments",
        f"{file}:nothing": "must return a module, (module, sample), or a dict with model, sample, margin_loss",
        f"{file}:missing": "has no function 'missing'",
        f"{tmp_path}/no.py:build": "there is no file",
        f"{file}:alone": "the model takes none of these images; give --image-shape C H W",
        f"{tmp_path}/no.pt": "there is no file",
    }.items():
        assert cli.main(["doctor", target]) == 2
        assert text in capsys.readouterr().err
    assert sys.modules["random"] is random


@pytest.mark.parametrize("name", KNOWN)
def test_a_checkpoint_tells_what_is_known_of_its_network(name, tmp_path, capsys):
    module, mistakes = KNOWN[name]
    torch.save(module.Network(**SMALL).state_dict(), tmp_path / "a.pt")
    assert cli.main(["doctor", str(tmp_path / "a.pt")]) == (1 if mistakes else 0)
    out = capsys.readouterr().out
    assert f"the network of {name}, run as it is converted" in out
    checks = (SCRAMBLED, ZERO, BATCH, SOFTMAX, ITERATIONS, SQUASH, INPUTS)
    found = {check for check in checks if f"WRONG       {check}" in out}
    # What a square root does to a gradient does not stand in a checkpoint.
    assert found == mistakes - {"danielhavir": {ZERO}}.get(name, set())
    assert not [check for check in found if f"FINE        {check}" in out]
    assert out.count("(known of this network, not computed)") == (2 if name == "cedrickchee" else 0)


def test_our_own_file_and_other_files(tmp_path, capsys):
    convert_checkpoint(xifengguo.Network(**SMALL).state_dict(), "xifengguo").save(tmp_path / "a.safetensors")
    assert cli.main(["doctor", str(tmp_path / "a.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "a fastcaps.CapsNet: 1 of" in out
    assert f"WRONG       {SCRAMBLED}" in out
    assert cli.main(["doctor", str(tmp_path / "a.safetensors"), "--image-shape", "3", "12", "12"]) == 2
    assert "is of a network for images (1, 12, 12), not --image-shape" in capsys.readouterr().err
    save_file({"a": torch.ones(1)}, tmp_path / "damaged.safetensors", {"fastcaps": "{"})
    assert cli.main(["doctor", str(tmp_path / "damaged.safetensors")]) == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err
    torch.save({"a": torch.ones(1)}, tmp_path / "b.pt")
    assert cli.main(["doctor", str(tmp_path / "b.pt")]) == 2
    assert "is of no network that is known" in capsys.readouterr().err


def test_bad_input():
    model = fastcaps.CapsNet(SHAPE, 10, kernel_size=3)
    with pytest.raises(ValueError, match="at least 5 samples"):
        examine(model, torch.rand(4, *SHAPE))
    with pytest.raises(ValueError, match="the model cannot run on the sample: ValueError: images must be"):
        examine(model, torch.rand(5, 1, 5, 5))
    with pytest.raises(ValueError, match="samples in floating point"):
        examine(model, torch.zeros(5, *SHAPE, dtype=torch.uint8))
    assert UNKNOWN == "not checked"
