"""The doctor: published networks have exactly the mistakes that are known of them; planted ones are found, alone."""

import threading

import pytest
import torch
from peers import adambielski, gram_ai, higgsfield, readable_capsnet, seed
from support.networks_to_examine import (
    BATCH,
    INPUTS,
    ITERATIONS,
    KNOWN,
    LOSS,
    SCRAMBLED,
    SHAPE,
    SMALL,
    SOFTMAX,
    SQUASH,
    TRAINS,
    ZERO,
    look,
    wrong,
)
from torch import nn
from torch.nn.parameter import is_lazy

import fastcaps
from fastcaps.convert import replace_capsules
from fastcaps.doctor import FINE, SUSPICIOUS, UNKNOWN, WRONG, examine
from fastcaps.doctor.targets import random_sample
from fastcaps.losses import margin_loss

pytestmark = pytest.mark.train


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


def many_classes(J, **options):
    return fastcaps.CapsNet((1, 12, 12), J, kernel_size=3, stem_channels=16, types=2, primary_stride=4, **options)


@pytest.mark.parametrize("J", [10, 100, 1000])
def test_our_own_network_trains_whatever_the_number_of_classes(J):
    findings = examine(many_classes(J, decoder=False), torch.rand(5, 1, 12, 12))
    assert not wrong(findings), "\n".join(map(str, findings))


def test_many_classes_without_a_bias_are_told_to_have_one():
    network = many_classes(1000, decoder=False, bias=False)
    nn.init.normal_(network.capsules.weight, std=network.capsules.in_capsules**-0.5)  # the default of version 0.1
    finding = next(finding for finding in examine(network, torch.rand(5, 1, 12, 12)) if finding.check == TRAINS)
    assert finding.verdict == WRONG, str(finding)
    assert "bias [J, D_out] of norm 1/3" in finding.fix


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


def test_parameters_without_a_shape_before_or_even_after_a_call():
    class Spare(seed.Network):
        def __init__(self, **sizes):
            super().__init__(**sizes)
            self.digits.spare = nn.LazyLinear(3)  # never called

    assert wrong(look(nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), None)) == set()
    model = Spare(**SMALL)
    findings = look(model)
    assert wrong(findings) == set(), "\n".join(map(str, findings))
    assert {f.verdict for f in findings if f.check in (SOFTMAX, TRAINS)} == {FINE}
    assert is_lazy(model.digits.spare.weight)


@pytest.mark.parametrize("where", ["parameter", "sample"])
def test_an_output_that_is_not_finite_is_called_so_and_nothing_else(where):
    model, sample = seed.Network(**SMALL), torch.rand(7, *SHAPE)
    with torch.no_grad():
        (sample if where == "sample" else model.digits.weights).flatten()[0] = float("nan")
    findings = examine(model, sample)
    assert wrong(findings) == {"the output is finite"}, "\n".join(map(str, findings))
    assert not any(f.verdict == SUSPICIOUS or "nan" in f.evidence for f in findings), "\n".join(map(str, findings))


# ------------------------------------------------------------------------------- axes of one size are not mixed up


@pytest.mark.parametrize("mistake", ["none", "squash"])
def test_as_many_output_capsules_as_entries_of_a_pose(mistake):
    """J = D_out = 10: only its place tells the axis that squash takes the norm of."""
    model = seed.Network(**{**SMALL, "out_dim": 10})
    model.digits.__class__ = type("Planted", (Planted,), {"mistake": mistake})
    finding = next(f for f in look(model) if f.check == SQUASH)
    assert finding.verdict == (FINE if mistake == "none" else WRONG), str(finding)


def test_as_many_input_capsules_as_entries_of_a_pose():
    """I = D_in = 16."""
    for module in (seed.Network, adambielski.Network):
        model = module(**{**SMALL, "types": 1, "dim": 16})
        assert {f.verdict for f in look(model) if f.check == INPUTS} == {FINE}
        replace_capsules(model, random_sample(model, SHAPE), measure=False)
        assert {f.verdict for f in look(model) if f.check == INPUTS} == {FINE}
    model = fastcaps.CapsNet(SHAPE, 10, kernel_size=3, stem_channels=5, types=1, primary_dim=16)
    assert model.capsules.weight.shape[0] == 16
    assert {f.verdict for f in look(model) if f.check == INPUTS} == {FINE}


@pytest.mark.parametrize(("axis", "verdict"), [(1, WRONG), (2, FINE)])
def test_as_many_input_capsules_as_entries_of_an_output_pose(axis, verdict):
    """Votes [B, 48, 10, 48]: an axis of 48 in the output need not be that of the output capsules."""

    class Route(nn.Module):
        def forward(self, votes):
            logits = votes.new_zeros(votes.shape[:3])
            for _ in range(2):
                s = (logits.softmax(axis)[..., None] * votes).sum(1)
                v = fastcaps.squash(s)
                logits = logits + (votes * v[:, None]).sum(-1)
            return v

    class Layer(seed.Capsule):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.route = Route()

        def forward(self, x):
            return self.route(torch.einsum("ijod,bid->bijo", self.weights[0], x))

    model = seed.Network(**{**SMALL, "out_dim": 48})
    model.digits = Layer(48, 4, 10, 48, 2)
    finding = next(f for f in look(model) if f.check == SOFTMAX)
    assert finding.verdict == verdict, str(finding)


def test_a_softmax_over_another_axis_is_no_iteration():
    class Gated(seed.Capsule):
        """The gate has an axis of J, too, but sums to 1 over D_out."""

        def forward(self, x):
            v = super().forward(x)
            return v * v.softmax(-1).sum(-1, keepdim=True)

    model = seed.Network(**SMALL)
    model.digits.__class__ = Gated
    findings = look(model)
    assert wrong(findings) == set()
    assert "the coupling is computed 3 times" in next(f for f in findings if f.check == ITERATIONS).evidence


def test_a_convolution_called_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(input=x)

    model = seed.Network(**SMALL)
    model.primary = ByKeyword(model.primary)
    assert {f.verdict for f in look(model) if f.check == SCRAMBLED} == {FINE}


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_input():
    model = fastcaps.CapsNet(SHAPE, 10, kernel_size=3)
    with pytest.raises(ValueError, match="at least 5 samples"):
        examine(model, torch.rand(4, *SHAPE))
    with pytest.raises(ValueError, match="samples in floating point"):
        examine(model, torch.zeros(5, *SHAPE, dtype=torch.uint8))
    with pytest.raises(TypeError, match="model must be a module, got int"):
        examine(3, torch.rand(5, *SHAPE))
    assert UNKNOWN == "not checked"
