"""The doctor of models that are hard to look at, and what it refuses."""

import threading

import pytest
import torch
from peers import seed
from support.networks_to_examine import BATCH, SCRAMBLED, SHAPE, SMALL, SOFTMAX, TRAINS, first, look, sample, wrong
from torch import nn
from torch.nn.parameter import is_lazy

import fastcaps
from fastcaps.doctor import FINE, SUSPICIOUS, UNKNOWN, examine

pytestmark = pytest.mark.train


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


def test_a_model_that_cannot_be_copied_is_refused():
    model = seed.Network(**SMALL)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="the model cannot be copied: TypeError"):
        examine(model, torch.rand(7, *SHAPE))


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


def test_a_convolution_called_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(input=x)

    model = seed.Network(**SMALL)
    model.primary = ByKeyword(model.primary)
    assert first(SCRAMBLED, model, sample()).verdict == FINE


def test_bad_input():
    model = fastcaps.CapsNet(SHAPE, 10, kernel_size=3)
    with pytest.raises(ValueError, match="at least 5 samples"):
        examine(model, torch.rand(4, *SHAPE))
    with pytest.raises(ValueError, match="samples in floating point"):
        examine(model, torch.zeros(5, *SHAPE, dtype=torch.uint8))
    with pytest.raises(TypeError, match="model must be a module, got int"):
        examine(3, torch.rand(5, *SHAPE))
    assert UNKNOWN == "not checked"
