"""The doctor's axes: found by experiment, whatever their sizes and however softmax is written."""

import math

import pytest
import torch
from support.networks_to_examine import (
    AGREEMENT,
    BATCH,
    DISTINCT,
    INPUTS,
    ITERATIONS,
    LOSS,
    ROUTING,
    SOFTMAX,
    SQUASH,
    TRAINS,
    Routes,
    examined,
    examined_up_to,
)
from torch import nn
from torch.nn import functional as F

import fastcaps
from fastcaps.doctor import FINE, SUSPICIOUS, UNKNOWN, WRONG, examine, iter_findings
from fastcaps.doctor.axes import find_routings
from fastcaps.doctor.watch import Run
from fastcaps.losses import margin_loss


def by_hand(b, axis):
    e = b.exp()
    return e / e.sum(axis, keepdim=True)


def by_hand_in_place(b, axis):
    e = (b - b.amax(axis, keepdim=True)).exp_()
    e /= e.sum(axis, keepdim=True)
    return e


def by_hand_without_keepdim(b, axis):
    e = torch.exp(b).movedim(axis, 0)
    return (e / e.sum(0)).movedim(0, axis)


WAYS = {
    "method": lambda b, axis: b.softmax(axis),
    "torch": lambda b, axis: torch.softmax(b, dim=axis),
    "functional": lambda b, axis: F.softmax(b, axis),
    "by keyword": lambda b, axis: F.softmax(input=b, dim=axis),
    "module": lambda b, axis: nn.Softmax(dim=axis)(b),
    "log": lambda b, axis: F.log_softmax(b, axis).exp(),
    "log-sum-exp": lambda b, axis: (b - b.logsumexp(axis, keepdim=True)).exp(),
    "by hand": by_hand,
    "by hand, in place": by_hand_in_place,
    "by hand, without keepdim": by_hand_without_keepdim,
    "flattened": lambda b, axis: b.movedim(axis, -1).flatten(0, -2).softmax(1).view(
        b.movedim(axis, -1).shape
    ).movedim(-1, axis),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("axis", "verdict"), [(2, FINE), (1, WRONG)])
def test_every_way_to_write_a_softmax(way, axis, verdict):
    class Layer(Routes):
        def coupling(self, logits, t):
            return WAYS[way](logits, axis)

    found = examined_up_to(ITERATIONS, Layer())
    assert found[SOFTMAX].verdict == verdict, str(found[SOFTMAX])
    assert found[ITERATIONS].verdict == FINE


@pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning")
@pytest.mark.parametrize("softmax", [F.softmax, nn.Softmax(), nn.Softmax(dim=None), lambda b: F.log_softmax(b).exp()])
def test_a_softmax_without_dim(softmax):
    """Of 4 axes PyTorch takes axis 1, the input capsules; of 3, the first one."""

    class Layer(Routes):
        def coupling(self, logits, t):
            return softmax(logits)

    finding = examined(SOFTMAX, Layer())
    assert (finding.verdict, "over the 12 input capsules" in finding.evidence) == (WRONG, True), str(finding)

    class Batch(Layer):
        def coupling(self, logits, t):
            return softmax(logits[..., 0])[..., None]

    finding = examined(BATCH, Batch())
    assert (finding.verdict, "over axis 0 of (7, 12, 4)" in finding.evidence) == (WRONG, True), str(finding)
    assert "over the 7 samples of the batch" in examined(SOFTMAX, Batch()).evidence


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_every_softmax_of_a_loop(wrong):
    class Layer(Routes):
        def coupling(self, logits, t):
            return logits.softmax(1 if t == wrong else 2)

    finding = examined(SOFTMAX, Layer())
    assert (finding.verdict, f"in pass {wrong + 1} of 3" in finding.evidence) == (WRONG, True), str(finding)


def test_a_softmax_over_nothing():
    class Layer(Routes):
        def coupling(self, logits, t):
            return logits.softmax(-1)

    finding = examined(SOFTMAX, Layer())
    assert (finding.verdict, "an axis of 1" in finding.evidence) == (WRONG, True), str(finding)


def test_a_softmax_over_the_batch_of_the_class_scores():
    class Network(Routes):
        def forward(self, poses):
            v = super().forward(poses)
            return v * F.one_hot(v.norm(dim=2).softmax(0).argmax(1), v.shape[1])[..., None]

    finding = examined(BATCH, Network())
    assert (finding.verdict, "over axis 0 of (7, 4)" in finding.evidence) == (WRONG, True), str(finding)


@pytest.mark.parametrize("sizes", [{"J": 6, "D_out": 6}, {"J": 12}, {"J": 3, "D_out": 3}, {"J": 12, "D_out": 12}])
@pytest.mark.parametrize("squash_axis", [1, 2])
def test_sizes_that_are_equal(sizes, squash_axis):
    class Layer(Routes):
        def squashed(self, s):
            return fastcaps.squash(s.movedim(squash_axis, -1)).movedim(-1, squash_axis)

    found = examined_up_to(SQUASH, Layer(**sizes))
    assert found[SOFTMAX].verdict == FINE
    assert found[SQUASH].verdict == (FINE if squash_axis == 2 else WRONG), str(found[SQUASH])


@pytest.mark.parametrize("J", [4, 6])
@pytest.mark.parametrize(("axis", "verdict"), [(0, WRONG), (1, WRONG), (2, FINE)])
def test_outputs_in_another_order(J, axis, verdict):
    """``[B, D_out, J]``: squash over the samples, the output capsules, the entries."""

    class Layer(Routes):
        def squashed(self, s):
            return fastcaps.squash(s.movedim(axis, -1)).movedim(-1, axis)

        def forward(self, poses):
            return super().forward(poses).mT

    finding = examined(SQUASH, Layer(J=J))
    assert finding.verdict == verdict, str(finding)


@pytest.mark.parametrize("way", WAYS)
def test_poses_of_every_way_to_write_a_softmax(way):
    class Layer(Routes):
        def coupling(self, logits, t):
            return WAYS[way](logits, 2)

    (routing,) = find_routings(Run.of(Layer().eval(), (torch.randn(7, 12, 3),), {}))
    if way == "by hand, in place":  # it has no gradient
        assert routing.poses is None
    else:
        assert (routing.poses.capsules, routing.poses.entries) == ((1,), (2,))


def test_poses_as_they_come_in():
    """The squash of ``[B, D_in, I]`` and ``[B, types, places, D_in]`` over the entries, and over the capsules."""

    class Network(nn.Module):
        def __init__(self, arranged, back, axis):
            super().__init__()
            self.primary, self.arranged, self.axis = nn.Linear(20, 36), arranged, axis

            class Layer(Routes):
                def forward(self, x):
                    return super().forward(back(x))

            self.capsules = Layer()

        def forward(self, x):
            x = self.arranged(self.primary(x).unflatten(1, (12, 3)))
            return self.capsules(fastcaps.squash(x.movedim(self.axis, -1)).movedim(-1, self.axis))

    flat = (lambda x: x, lambda x: x)
    transposed = (lambda x: x.mT, lambda x: x.mT)
    typed = (lambda x: x.unflatten(1, (4, 3)), lambda x: x.flatten(1, 2))
    column = (lambda x: x[..., None], lambda x: x[..., 0])
    for (arranged, back), right, wrong in [
        (flat, 2, 1), (transposed, 1, 2), (typed, 3, 1), (typed, 3, 2), (column, 2, 1),
    ]:  # fmt: skip
        assert examined(INPUTS, Network(arranged, back, right), 20).verdict == FINE
        finding = examined(INPUTS, Network(arranged, back, wrong), 20)
        assert finding.verdict == WRONG, str(finding)


# ----------------------------------------------------------------------------------------------- what is seen besides


def test_logits_of_each_entry():
    class Layer(Routes):
        def agreement(self, votes, v):
            return votes * v

    class Repeated(Routes):
        """Each entry has logits of its own, but all the same."""

        def agreement(self, votes, v):
            return (votes * v).sum(-1, keepdim=True).expand_as(votes)

    finding = examined(AGREEMENT, Layer())
    assert (finding.verdict, "each of the 6 entries" in finding.evidence) == (WRONG, True), str(finding)
    assert examined(AGREEMENT, Repeated()).verdict == FINE
    assert examined(AGREEMENT, Routes()).verdict == FINE


def test_output_capsules_that_are_all_equal():
    layer = Routes()
    layer.weight.data = layer.weight.data[:, :1].expand(-1, 4, -1, -1).clone()
    finding = examined(DISTINCT, layer)
    assert (finding.verdict, "all 4 output capsules are equal" in finding.evidence) == (WRONG, True), str(finding)
    assert examined(DISTINCT, Routes()).verdict == FINE


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_number_of_iterations_of_any_name(off):
    """It is known by what it does; ``T`` and options are as good as ``num_iterations``, ``max_iter`` may be another."""

    class Options:
        r = 3

    class Layer(Routes):
        max_iter = 3

        def __init__(self):
            super().__init__()
            self.options, self.num_iterations = Options(), 17
            self.options.r = 3
            del self.T

        @property
        def T(self):
            return self.options.r + off

        @T.setter
        def T(self, value):
            pass

        @T.deleter
        def T(self):
            pass

    finding = examined(ITERATIONS, Layer())
    assert finding.verdict == (FINE if off == 0 else WRONG), str(finding)
    assert off == 0 or "r is 3" in finding.evidence


def test_a_first_pass_without_a_softmax_is_an_iteration():
    class Layer(Routes):
        def coupling(self, logits, t):
            return torch.full_like(logits, 0.25) if t == 0 else logits.softmax(2)

    assert examined(ITERATIONS, Layer()).verdict == FINE


@pytest.mark.parametrize(("axis", "verdict"), [(2, FINE), (1, WRONG)])
@pytest.mark.parametrize("taken", ["poses", "votes"])
@pytest.mark.parametrize(("I", "J"), [(12, 4), (200, 2), (5, 3), (40, 40)])
def test_the_second_of_two_passes_is_an_agreement_with_the_first(I, J, taken, axis, verdict):
    """Its softmax is the only one, and depends on what comes in as that of attention does."""

    class FromVotes(nn.Module):
        def forward(self, votes):
            v = fastcaps.squash(votes.sum(1) / J)
            c = torch.einsum("bijo,bjo->bij", votes, v).softmax(axis)
            return fastcaps.squash(torch.einsum("bij,bijo->bjo", c, votes))

    class FromPoses(FromVotes):
        def __init__(self):
            super().__init__()
            self.weight, self.rounds = nn.Parameter(0.3 * torch.randn(I, J, 6, 3)), 2

        def forward(self, poses):
            return super().forward(torch.einsum("ijok,bik->bijo", self.weight, poses))

    model, shape = (FromPoses(), (I, 3)) if taken == "poses" else (FromVotes(), (I, J, 6))
    found = examined_up_to(ITERATIONS, model, *shape)
    assert found[SOFTMAX].verdict == verdict
    finding = found[ITERATIONS]
    assert (finding.verdict, "is computed 2 times" in finding.evidence) == (FINE, True), str(finding)


@pytest.mark.parametrize("given", ["tokens", "keys", "queries"])
@pytest.mark.parametrize("J", [2, 9])
def test_one_softmax_of_what_comes_in_is_attention(given, J):
    """Whichever of keys and queries comes in first; of the other, nothing does."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.other, self.value = nn.Parameter(torch.randn(5 if given == "queries" else J, 8)), nn.Linear(8, 8)

        def forward(self, x):
            q, k = {"tokens": (x, x), "keys": (self.other, x), "queries": (x, self.other)}[given]
            return (q @ k.mT).softmax(-1) @ self.value(k)

    finding = examined(ROUTING, Attention(), J if given == "queries" else 6, 8)
    assert (finding.verdict, "attention" in finding.evidence) == (UNKNOWN, True), str(finding)


def test_attention_is_no_routing():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out((q @ k.mT / math.sqrt(8)).softmax(-1) @ v)

    torch.manual_seed(0)
    for model in (Attention(), nn.Sequential(Attention(), Attention())):
        findings = list(iter_findings(model, torch.randn(7, 6, 8)))
        assert not [str(f) for f in findings if f.verdict in (WRONG, SUSPICIOUS)]
        found = [f for f in findings if f.check == ROUTING]
        assert {f.verdict for f in found} == {UNKNOWN}
        assert all("attention" in f.evidence for f in found)


def test_attention_after_the_capsules_has_no_classes():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.capsules, self.summary = Routes(), Pooling()

        def forward(self, x):
            poses = self.capsules(x)
            return self.summary(poses), poses

    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.randn(5, 6))

        def forward(self, poses):
            return (self.queries @ poses.mT).softmax(-1) @ poses

    torch.manual_seed(0)

    def mean_over_classes(lengths, labels):
        return margin_loss(lengths, labels) / lengths.shape[1]

    findings = examine(Network(), torch.randn(7, 12, 3), margin_loss=mean_over_classes)
    assert "attention" in next(f for f in findings if f.check == ROUTING).evidence
    finding = next(f for f in findings if f.check == LOSS)
    assert (finding.verdict, "and 4 classes" in finding.evidence) == (WRONG, True), str(finding)
    assert next(f for f in findings if f.check == TRAINS).verdict == FINE


def test_a_softmax_that_is_no_coupling():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x).softmax(1)

    finding = examined(ROUTING, Gate(), 8)
    assert (finding.verdict, "none of the 1 softmaxes" in finding.evidence) == (UNKNOWN, True), str(finding)
