"""The arguments of a call, as they are passed from the checks to the kernels."""

from typing import NamedTuple

from torch import Tensor


class Tensors(NamedTuple):
    """The tensors of a call, in the order of the ops' arguments.

    Attributes:
        poses: ``[B, I, D_in]``, or the votes ``[B, I, J or 1, D_out]`` where ``weight`` is None.
        weight: ``[I or 1, J or 1, D_out, D_in]``, or None.
        prior: initial routing logits, broadcastable to ``[B, I, J]``, or None; an op takes ``[I, J]`` and
            ``[B, I, J]``, at least float32.
        bias: ``[J or 1, D_out]``, or None; an op takes ``[J, D_out]``, at least float32.
        mask: ``[B, I]`` bool, or None.
    """

    poses: Tensor
    weight: Tensor | None
    prior: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None


class Options(NamedTuple):
    """The other arguments of a call, in the order of the ops' arguments; as in :func:`fastcaps.dynamic_routing`.

    Attributes:
        num_iterations: T.
        leaky: whether a vote may go to no output capsule.
        detach: whether the coupling coefficients are constants for the gradient.
        eps: that of ``squash``.
        allow_tf32: whether matrix products of float32 may be rounded to tf32.
    """

    num_iterations: int
    leaky: bool
    detach: bool
    eps: float
    allow_tf32: bool = False


DIFFERENTIABLE = ("poses", "weight", "prior", "bias")  # the tensors that may have a gradient
