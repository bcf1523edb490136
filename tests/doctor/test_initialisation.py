"""The doctor of initial weights: whether a few steps of training lower the loss."""

import pytest
import torch
from peers import seed
from support.networks_to_examine import SMALL, TRAINS, look, wrong
from torch import nn

import fastcaps
from fastcaps.doctor import FINE, WRONG, examine

pytestmark = pytest.mark.train


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
