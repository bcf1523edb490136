"""Launches of the Triton kernels: the forward and the backward of dynamic routing on NVIDIA GPUs.

Forward, T times: ``sweep`` (partial sums over slices of the input capsules), ``squash`` (their sum in a fixed order,
the output, V). Where the output capsules need several tiles, a ``sweep`` for the softmax's statistics goes first.
Backward, from the weighted sums alone: for t = T-1 .. 1 ``sweep`` (partial dV) and ``squash_backward`` (ds of the
iteration before), then ``gradients``, all iterations at once. With one matrix for all input capsules no vote is ever
computed, as ``<W x, V> = <x, W^T V>`` and ``sum c W x = W sum c x``: poses stand for votes, ``product`` goes between.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from fastcaps.functional import squash
from fastcaps.routing.dynamic.arguments import DIFFERENTIABLE, Options, Tensors
from fastcaps.routing.dynamic.reference import dynamic_routing_backward_reference, output_capsules
from fastcaps.routing.dynamic.triton import gradients, sweeps, vectors
from fastcaps.routing.dynamic.triton.parameters import (
    BB,
    Parameters,
    gradients_parameters,
    power_of_2,
    sweep_parameters,
    tuned,
)

INTERPRETED = isinstance(sweeps.sweep, InterpretedFunction)
SWEEPS = {"first sum": 2, "sum": 3, "dV": 4}  # tensors that live in registers


@functools.cache
def _gpu(index: int) -> tuple[str, int]:
    """Name and multiprocessors; without a GPU, in the interpreter, few, as every program takes time there."""
    if not torch.cuda.is_available():
        return "none", 1
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """All launches go through here, on the current device and stream."""
    try:
        kernel[(programs,)](**arguments)
    except OutOfResources as error:  # less shared memory than on the GPUs that the heuristic was made for
        if arguments.get("num_stages", 1) == 1:
            raise RuntimeError(
                f"dynamic_routing does not fit on this GPU ({error}); use backend='reference'"
            ) from error
        kernel[(programs,)](**{**arguments, "num_stages": 1})


# ---------------------------------------------------------------------------------------------------------- strides

# A kernel is compiled for the constants among them; the others may change from call to call.


class PosesStrides(NamedTuple):
    """Of poses ``[B, I, D_in]`` or votes ``[B, I, J, D_out]``: j is 0 for poses and where one vote is for all."""

    b: int
    i: int
    j: tl.constexpr
    d: tl.constexpr


class WeightStrides(NamedTuple):
    """Of matrices ``[I, J, D_out, D_in]``: 0 over an axis that shares them."""

    i: int
    j: tl.constexpr
    e: tl.constexpr
    d: tl.constexpr


class PriorStrides(NamedTuple):
    """Of logits ``[B, I, J]``: b is 0 where all samples have the same."""

    b: int
    i: int
    j: tl.constexpr


class MaskStrides(NamedTuple):
    """Of the mask ``[B, I]``."""

    b: int
    i: int


# -------------------------------------------------------------------------------------------------------- one call


class Call:
    """One call of the op: its tensors as the kernels want them, its sizes, and its launches."""

    def __init__(self, tensors: Tensors, options: Options) -> None:
        poses, weight, prior, bias, mask = tensors
        self.poses, self.weight, self.prior, self.leaky = poses, weight, prior, options.leaky
        (self.B, self.I), self.J = poses.shape[:2], output_capsules(poses, weight, prior, bias)
        self.D_in, self.D_out = poses.shape[-1], poses.shape[3] if weight is None else weight.shape[2]
        self.absorbed = weight is not None and weight.shape[0] == 1 and self.I > 1
        self.votes = weight is None or self.absorbed
        votes_J = 1 if self.absorbed else poses.shape[2] if weight is None else weight.shape[1]
        self.one_for_all = votes_J == 1 and self.J > 1  # one matrix, or one vote, for all output capsules
        self.D_sum = self.D_in if self.absorbed else self.D_out  # entries of what is summed over the input capsules
        self.D = power_of_2(self.D_sum) if self.votes else max(16, power_of_2(self.D_out))
        self.gpu, self.multiprocessors = _gpu(poses.device.index or 0)
        self.precision = _precision(poses.dtype, options.allow_tf32)
        s_b, s_i, *_, s_d = poses.stride()
        s_j = poses.stride(2) if weight is None and votes_J > 1 else 0
        w_i, w_j, w_e, w_d = (0, 0, 0, 0) if weight is None or self.absorbed else _strides(weight)
        p_b, p_i, p_j = (0, 0, 0) if prior is None else (0, *prior.stride())[-3:]
        m_b, m_i = (0, 0) if mask is None else mask.stride()
        self.shared: dict[str, Any] = {
            "poses": poses, "weight": None if self.absorbed else weight, "prior": prior, "mask": mask,
            "B": self.B, "I": self.I,
            "s": PosesStrides(s_b, s_i, tl.constexpr(s_j), tl.constexpr(s_d)),
            "w": WeightStrides(w_i, tl.constexpr(w_j), tl.constexpr(w_e), tl.constexpr(w_d)),
            "p": PriorStrides(p_b, p_i, tl.constexpr(p_j)), "m": MaskStrides(m_b, m_i),
            "J": self.J, "D_OUT": self.D_sum, "D_IN": self.D_in, "D": self.D, "BB": BB,
            "PRECISION": self.precision, "B_EXACT": poses.dtype != torch.float32,
        }  # fmt: skip

    def new(self, *shape: int) -> Tensor:
        """Memory for float32, not written."""
        return torch.empty(shape, dtype=torch.float32, device=self.poses.device)

    def key(self, kernel: str, T: int) -> str:
        """What the launch parameters depend on, B within a factor of two."""
        form = "votes" if self.votes else f"{self.precision}, D_in = {self.D_in}"
        batch = BB * power_of_2(math.ceil(self.B / BB))
        return f"{kernel}{f', T = {T}' if T else ''}, {form}, D_out = {self.D_sum}, J = {self.J}, B <= {batch}"

    def parameters(self, kernel: str, T: int = 0) -> Parameters:
        """For a kernel of SWEEPS, or "gradients" of T iterations: from the table of this GPU, or by the heuristic."""
        table = tuned(self.gpu)
        if table and (found := table.get(self.key(kernel, T))) is not None:
            return found
        if T:
            return gradients_parameters(self.J, self.D_in, self.D, self.votes, T)
        return sweep_parameters(self.J, self.D_in, self.D, self.votes, SWEEPS[kernel], self.poses.element_size())

    def pieces(self, programs: int, parameters: Parameters, most: int) -> int:
        """Into how many pieces (at most ``most``) to cut the work of ``programs``, to fill the GPU."""
        warps = self.multiprocessors * parameters.warps_per_multiprocessor
        return max(1, min(most, math.ceil(warps / (programs * parameters.num_warps))))

    def sums(self, V: Tensor | None) -> Tensor:
        """``[slices, B, J, D_sum]``, whose sum over the slices is sum_i c u; V is None in the first iteration."""
        uniform = V is None and self.prior is None
        parameters = self.parameters("first sum" if uniform else "sum")
        stats = None
        if not uniform and self.tiles(parameters) > 1:
            stats = self.new(3, self.I, self.B)
            self.statistics(V, None, stats)
        return self._sweep(V, None, stats, "uniform" if uniform else self.softmax(parameters), parameters)

    def earlier_gradients(self, V: Tensor, ds: Tensor, stats: Tensor) -> Tensor:
        """``[slices, B, J, D_sum]``, whose sum over the slices is dV = sum_i db u; writes the statistics [3, I, B]."""
        parameters = self.parameters("dV")
        if self.tiles(parameters) > 1:
            self.statistics(V, ds, stats)
        return self._sweep(V, ds, stats, self.softmax(parameters), parameters)

    def statistics(self, V: Tensor | None, ds: Tensor | None, stats: Tensor) -> None:
        """Write the statistics of the softmax, ``[3, I, B]``: the third where ds is given."""
        kernel = "dV" if ds is not None else "first sum" if V is None and self.prior is None else "sum"
        self._sweep(V, ds, stats, "statistics", self.parameters(kernel))

    def tiles(self, parameters: Parameters) -> int:
        """How many tiles cover the output capsules."""
        return math.ceil(self.J / (parameters.JG * parameters.JT))

    def softmax(self, parameters: Parameters) -> str:
        """The mode of a sweep whose coupling is a softmax: see ``sweeps.sweep``."""
        return "read" if self.tiles(parameters) > 1 else "softmax"

    def _sweep(
        self, V: Tensor | None, ds: Tensor | None, stats: Tensor | None, mode: str, parameters: Parameters
    ) -> Tensor:
        """Launch ``sweep`` in a mode; the sums ``[slices, B, J, D_sum]``, without slices where it writes none."""
        writes_sums = mode != "statistics"
        programs = math.ceil(self.B / BB) * (self.tiles(parameters) if writes_sums else 1)
        slices = self.pieces(programs, parameters, self.I)
        partial = self.new(slices if writes_sums else 0, self.B, self.J, self.D_sum)
        launch(
            sweeps.sweep, programs * slices, V=V, ds=ds, stats=stats, partial=partial if writes_sums else None,
            slices=slices, LEAKY=self.leaky, MODE=mode, **self.shared, **_tiling(parameters),
        )  # fmt: skip
        return partial

    def per_row(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel over the B * J vectors of D_out entries."""
        N, D = self.B * self.J, power_of_2(self.D_out)
        rows = max(1, 128 // D)  # 4 entries for each lane of a warp
        launch(
            kernel, math.ceil(N / rows), **arguments, N=N, D_OUT=self.D_out, D=D, ROWS=rows,
            num_warps=max(1, min(16, D // 128)),
        )  # fmt: skip

    def product(
        self, a: Tensor, b: Tensor, out: Tensor, M: int, N: int, L: int, splits: int,
        a_strides: Sequence[int], b_strides: Sequence[int], out_strides: Sequence[int],
    ) -> None:  # fmt: skip
        """``out[split, j, m, l] = sum_n a[j, m, n] b[j, n, l]``, over a piece of N for each split."""
        names = ("a_j", "a_m", "a_n", "b_j", "b_n", "b_l", "o_s", "o_j", "o_m", "o_l")
        strides = dict(zip(names, (*a_strides, *b_strides, *out_strides), strict=True))
        launch(
            vectors.product, self.J * splits * math.ceil(M / 32) * math.ceil(L / 32), a=a, b=b, out=out, M=M, N=N, L=L,
            splits=splits, **strides, J=self.J, TM=32, TN=32, TL=32, num_warps=4,
            PRECISION="tf32" if self.precision == "tf32" else "float32",
        )  # fmt: skip

    def transform(self, x: Tensor, back: bool = False) -> Tensor:
        """Absorbed: x [..., J, D_in] times W^T, [..., J, D_out], or ``back``, x [..., J, D_out] times W."""
        assert self.weight is not None
        _, w_j, w_e, w_d = _strides(self.weight)
        N, L, w = (self.D_out, self.D_in, (w_j, w_e, w_d)) if back else (self.D_in, self.D_out, (w_j, w_d, w_e))
        out = self.new(*x.shape[:-1], L)
        rows, J = x.numel() // (self.J * N), self.J
        self.product(x, self.weight, out, rows, N, L, 1, (N, J * N, 1), w, (0, L, J * L, 1))
        return out

    def gradients(
        self, V: Tensor, ds: Tensor, stats: Tensor, detach: bool, poses: bool, weight: bool, prior: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of poses (or votes), of the weight unless absorbed, and of the prior, where wanted."""
        if not (poses or weight or prior):
            return None, None, None
        parameters = self.parameters("gradients", len(V))
        chunks = 1 if self.votes else math.ceil(self.D_in / parameters.K)
        parts = self.pieces(self.I * chunks, parameters, math.ceil(self.B / BB))
        weight_given = self.weight is not None and not self.absorbed
        if weight and self.weight is not None:  # a gradient for each part, summed at the end: at most 32 MB of them
            parts = max(1, min(parts, 32 * 2**20 // (4 * self.weight.numel())))
        per_sample = self.prior is not None and self.prior.dim() == 3
        d_poses = d_weight = d_prior = None
        if poses:
            added = self.tiles(parameters) > 1 and (
                weight_given or self.one_for_all
            )  # tile by tile: in float32, to round it once
            dtype = torch.float32 if added else self.poses.dtype
            d_poses = torch.empty(self.poses.shape, dtype=dtype, device=V.device)
        if weight:
            assert self.weight is not None
            d_weight = self.new(parts, self.I, *self.weight.shape[1:])
        if prior:
            d_prior = self.new(self.B if per_sample else parts, self.I, self.J)
        launch(
            gradients.gradients, self.I * chunks * parts, V=V, ds=ds, stats=stats, d_poses=d_poses, d_weight=d_weight,
            d_prior=d_prior, parts=parts, T=len(V), DETACH=detach, SHARED=self.one_for_all, PER_SAMPLE=per_sample,
            **self.shared, **_tiling(parameters),
        )  # fmt: skip
        return d_poses, _sum(d_weight), d_prior if per_sample else _sum(d_prior)

    def matrix_gradient(self, V: Tensor, ds: Tensor, c_sums: Tensor, db_sums: Tensor) -> Tensor:
        """Absorbed: sum over t and b of ds_t (sum_i c_t x)^T + V_t (sum_i db_t x)^T, the sums being [T, B, J, D_in]."""
        assert self.weight is not None
        V = V * math.log(2)  # the kernels' V is to base 2
        left, right = torch.cat([ds, V]), torch.cat([c_sums, db_sums])
        N, J, D_out, D_in = len(left) * self.B, self.J, self.D_out, self.D_in
        out = self.new(max(1, min(64, N // 256)), J, D_out, D_in)
        self.product(
            left, right, out, D_out, N, D_in, len(out), (D_out, 1, J * D_out), (D_in, J * D_in, 1), out.stride()
        )
        return out.sum((0, 1)) if self.weight.shape[1] == 1 else out.sum(0)


def _precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """How poses and matrices are multiplied; the interpreter cannot multiply bfloat16."""
    if dtype != torch.float32:
        return "float32" if INTERPRETED and dtype == torch.bfloat16 else "half"
    return "tf32" if allow_tf32 else "float32"


def _strides(weight: Tensor) -> tuple[int, ...]:
    """Of the weight, 0 where the matrices are shared."""
    return tuple(0 if axis < 2 and n == 1 else weight.stride(axis) for axis, n in enumerate(weight.shape))


def _tiling(parameters: Parameters) -> dict[str, int]:
    fields = parameters._asdict()
    del fields["warps_per_multiprocessor"]
    return fields


def _sum(parts: Tensor | None) -> Tensor | None:
    return None if parts is None else parts[0] if len(parts) == 1 else parts.sum(0)


# ------------------------------------------------------------------------------------------------------ op and twin


def forward(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """The output ``[B, J, D_out]`` and the sums ``[T, B, J, D_out]``: twin of ``dynamic_routing_reference``."""
    poses, bias = tensors.poses, tensors.bias
    call = Call(tensors, options)
    num_iterations, J, eps = options.num_iterations, call.J, options.eps
    sums, out = call.new(num_iterations, call.B, J, call.D_out), poses.new_empty(call.B, J, call.D_out)
    if call.B == 0 or call.I == 0:
        sums.copy_(sums.new_zeros(()) if bias is None else bias)
        return squash(sums[-1], eps=eps).to(poses.dtype), sums
    bias = None if bias is None else bias.contiguous()
    V: Tensor | None = None
    for t in range(num_iterations):
        last = t == num_iterations - 1
        seen = call.transform(V, back=True) if call.absorbed and V is not None else V
        partial = call.sums(seen)
        if call.absorbed:
            partial = call.transform(partial.sum(0))[None]
        V_next = None if last else V if V is not None else call.new(*sums[0].shape)
        call.per_row(
            vectors.squash, partial=partial, bias=bias, s=sums[t], V=V, V_next=V_next, out=out if last else None,
            parts=len(partial), eps=eps, J=J,
        )  # fmt: skip
        V = V_next
    return out, sums


def backward(
    tensors: Tensors, options: Options, sums: Tensor, grad: Tensor, wanted: Sequence[str]
) -> tuple[Tensor, ...]:
    """The gradients of poses (or votes), weight, prior and bias, of size 0 where not wanted: twin of
    ``dynamic_routing_backward_reference``."""
    poses, weight, prior, bias, _ = tensors
    _, leaky, detach, eps, _ = options
    T, B, J, _ = sums.shape
    I = poses.shape[1]
    if B == 0 or I == 0:
        wide = (None if x is None else x.to(sums.dtype) for x in (grad, poses, weight, prior, bias))
        twin: Any = dynamic_routing_backward_reference
        return _like_inputs(twin(*wide, sums, leaky=leaky, detach=detach, eps=eps), tensors, wanted)
    call = Call(tensors, options)
    V, ds, dv = call.new(*sums.shape), call.new(*sums.shape), call.new(*sums[0].shape)
    call.per_row(vectors.earlier_outputs, s=sums, V=V, T=T, eps=eps)
    seen, seen_ds = V, ds
    if call.absorbed:
        seen = call.transform(V, back=True)
        seen_ds = torch.empty_like(seen)
    stats = call.new(T, 3, I, B)
    db_sums = torch.zeros_like(seen) if call.absorbed else None  # [T, B, J, D_in]
    partial = None
    for t in reversed(range(T - 1 if detach else 0, T)):
        g = (grad, *grad.stride()) if partial is None else (None, 0, 0, 0)
        call.per_row(
            vectors.squash_backward, partial=partial, grad=g[0], dv=None if partial is None else dv, s=sums[t],
            ds=ds[t], parts=0 if partial is None else len(partial), g_b=g[1], g_j=g[2], g_e=g[3], eps=eps, J=J,
            FIRST=t == T - 2,
        )  # fmt: skip
        if call.absorbed:
            seen_ds[t] = call.transform(ds[t], back=True)
        if t > 0 and not detach:
            partial = call.earlier_gradients(seen[t], seen_ds[t], stats[t])
            if db_sums is not None:
                torch.sum(partial, 0, out=db_sums[t])
                partial = call.transform(db_sums[t])[None]
        elif t > 0 or prior is not None:
            call.statistics(seen[t] if t > 0 else None, None if detach else seen_ds[t], stats[t])
        else:
            stats[0].zero_()
            stats[0, 1] = math.log2(J + leaky)
    d_poses, d_weight, d_prior = call.gradients(
        seen, seen_ds, stats, detach, "poses" in wanted, "weight" in wanted and not call.votes,
        "prior" in wanted and not detach,
    )  # fmt: skip
    first = T - 1 if detach else 0
    if db_sums is not None and "weight" in wanted:
        c_sums = [call.sums(seen[t] if t > 0 else None).sum(0) for t in range(first, T)]
        d_weight = call.matrix_gradient(V[first:], ds[first:], torch.stack(c_sums), db_sums[first:])
    d_bias = ds[first:].sum((0, 1)) if "bias" in wanted else None
    return _like_inputs((d_poses, d_weight, d_prior, d_bias), tensors, wanted)


def _like_inputs(gradients: Sequence[Tensor | None], tensors: Tensors, wanted: Sequence[str]) -> tuple[Tensor, ...]:
    """The gradients in shape and dtype of their tensors, 0 where nothing depends on one; of size 0 if not wanted."""
    result = []
    for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
        if name not in wanted:
            result.append(tensors.poses.new_empty(0))
        else:
            x = getattr(tensors, name)
            result.append(x.new_zeros(x.shape) if gradient is None else gradient.to(x.dtype).reshape(x.shape))
    return tuple(result)
