"""The doctor of whole networks: published ones have exactly the mistakes that are known of them, ours have none."""

import pytest
import torch
from peers import adambielski, gram_ai, higgsfield
from support.networks_to_examine import BATCH, KNOWN, LOSS, SCRAMBLED, SHAPE, SMALL, SOFTMAX, SQUASH, ZERO, look, wrong
from torch import nn

import fastcaps
from fastcaps.convert import replace_capsules
from fastcaps.doctor import FINE, WRONG
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


def test_a_model_that_does_not_route():
    findings = look(nn.Sequential(nn.Flatten(), nn.Linear(144, 10)))
    assert any("nothing routes here" in finding.evidence for finding in findings)
    assert wrong(findings) == set()
