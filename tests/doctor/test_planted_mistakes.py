"""The doctor of networks with one mistake, which is found, alone; and what is no mistake of the capsules."""

import pytest
from peers import readable_capsnet, seed
from support.networks_to_examine import (
    BATCH,
    INPUTS,
    ITERATIONS,
    SMALL,
    SOFTMAX,
    SQUASH,
    ZERO,
    first,
    look,
    plant,
    sample,
    wrong,
)
from torch import nn

from fastcaps.doctor import SUSPICIOUS, WRONG

pytestmark = pytest.mark.train


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
    plant(model, mistake)
    if mistake == "softmax":
        model.digits.weights.data *= 10  # the shares are small
    findings = look(model)
    assert wrong(findings) == PLANTED[mistake], "\n".join(map(str, findings))


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

    finding = first(BATCH, Normalised(**SMALL), sample())
    assert finding.verdict == WRONG
    assert finding.where == ""


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
