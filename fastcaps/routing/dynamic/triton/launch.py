"""Dynamic routing on NVIDIA GPUs: how the Triton kernels are put together, and with which launch parameters.

Forward, T times: ``sweep`` (partial sums over slices of the input capsules), ``squash`` (their sum in a fixed order,
the output, V). Where the output capsules need several tiles, a ``sweep`` for the softmax's statistics goes first.
Backward, from the weighted sums alone: for t = T-1 .. 1 ``sweep`` (partial dV) and ``squash_backward`` (ds of the
iteration before), then ``gradients``, all iterations at once. With one matrix for all input capsules no vote is ever
computed, as ``<W x, V> = <x, W^T V>`` and ``sum c W x = W sum c x``: poses stand for votes, ``product`` goes between.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from fastcaps.functional import squash
from fastcaps.routing.dynamic.reference import dynamic_routing_backward_reference, output_capsules
from fastcaps.routing.dynamic.triton import sweeps as kernels
from fastcaps.routing.dynamic.triton import vectors

INTERPRETED = isinstance(kernels.sweep, InterpretedFunction)
BB = 16  # samples of a tile: the rows of a tensor-core instruction
SWEEPS = {"first sum": 2, "sum": 3, "dV": 4}  # tensors that live in registers
REGISTERS = 160  # per thread, for the tensors that live through the loop over the input capsules
TUNED = Path(__file__).with_name("tuned.json")  # {GPU: {key: parameters}}, by `fastcaps tune`


# ----------------------------------------------------------------------------------------------- launch parameters


class Parameters(NamedTuple):
    """Of ``sweep`` and ``gradients``: JG x JT output capsules in a tile, K entries of D_in at a time, and how many
    warps a multiprocessor is given."""

    JG: int
    JT: int
    K: int
    num_warps: int
    num_stages: int = 2
    warps_per_multiprocessor: int = 8


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _tile(J: int, most_JT: int, most_JG: int) -> tuple[int, int]:
    """JG and JT with the fewest tiles, then the fewest groups, then no more capsules than needed."""
    JG = 1
    while most_JG >= 2 * JG and JG * most_JT < J:
        JG *= 2
    return JG, math.ceil(J / (JG * math.ceil(J / (JG * most_JT))))


def sweep_parameters(J: int, D_in: int, D: int, votes: bool, tensors: int, itemsize: int) -> Parameters:
    """As many output capsules as the registers hold.

    Args:
        J: output capsules.
        D_in: entries of a pose.
        D: entries of what is summed, rounded up to a power of two.
        votes: whether these are given, or poses stand for them.
        tensors: how many there are of their size: sums, votes, V (but for the first uniform sum), ds in the backward.
        itemsize: of poses and weight, in bytes.
    """
    if votes:  # no matrix product that wants its own layout: all warps share a tensor
        num_warps = 4 if D <= 128 else 8
        most = max(1, REGISTERS * 32 * num_warps // (tensors * BB * D))
        JG, JT = _tile(J, min(most, 8), max(1, most // 8))
        return Parameters(JG, JT, 16, num_warps)
    wide = max(1, D // 64)  # warps that share the entries of a vote
    K = min(power_of_2(max(D_in, 16)), 128 // itemsize, 512 // wide)
    registers = REGISTERS - (K - 16) * itemsize // 4  # the poses, and their lo parts
    most = max(1, registers * 32 * wide // (tensors * BB * D))
    JG, JT = _tile(J, most, 8 if wide == 1 else 1)
    if tensors == 4 and JG * JT < J and JT > 4:  # a loop over tiles needs some registers
        JG, JT = _tile(J, 4, JG)
    while K > 16 and JG * JT * K * D * itemsize > 48 * 1024:  # shared memory of a stage
        K //= 2
    return Parameters(JG, JT, K, JG * wide)


def gradients_parameters(J: int, D_in: int, D: int, votes: bool, T: int) -> Parameters:
    """As many output capsules as shared memory (V, ds of all iterations) and registers (the matrices' gradients) hold.

    The arguments are those of :func:`sweep_parameters`, and T, the iterations.
    """
    if votes:
        return Parameters(1, min(J, 4 if D <= 64 else 1), 16, 4 if D <= 128 else 8)
    wide = max(1, D // 64)
    K = max(16, min(power_of_2(D_in), 32, 1024 // D))
    T = min(T, 5)  # more of them are not in flight at the same time
    capsule = (2 * T - 1) * BB * D * 4 + 2 * D * K * 4  # bytes of shared memory
    spills_beyond = 1 if D >= 32 else 5 if J <= 10 else 3  # as the compiler's reports say
    most = max(1, min(spills_beyond, 64 * 32 * wide // (D * K), 40 * 1024 * wide // capsule))
    groups = 1
    while wide == 1 and groups < 2 and 2 * groups * most * capsule <= 80 * 1024:
        groups *= 2
    JG, JT = _tile(J, most, groups)
    return Parameters(JG, JT, K, JG * wide, num_stages=2 if JG * JT * capsule <= 80 * 1024 else 1)


@functools.cache
def tuned(gpu: str) -> dict[str, Parameters]:
    """The table of a GPU, by ``Call.key``; empty where nobody has tuned for it."""
    table = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    return {key: Parameters(**value) for key, value in table.get(gpu, {}).items()}


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


# -------------------------------------------------------------------------------------------------------- one call


class Call:
    """One call of the op: its tensors as the kernels want them, its sizes, and its launches."""

    def __init__(
        self,
        poses: Tensor,  # [B, I, D_in], or votes [B, I, J or 1, D_out]
        weight: Tensor | None,  # [I or 1, J or 1, D_out, D_in]
        prior: Tensor | None,  # [I, J] or [B, I, J], float32
        mask: Tensor | None,  # [B, I]
        J: int,
        leaky: bool,
        allow_tf32: bool = False,
    ) -> None:
        self.poses, self.weight, self.prior = poses, weight, prior
        self.B, self.I, self.J, self.leaky = *poses.shape[:2], J, leaky
        self.D_in, self.D_out = poses.shape[-1], poses.shape[3] if weight is None else weight.shape[2]
        self.absorbed = weight is not None and weight.shape[0] == 1 and self.I > 1
        self.votes = weight is None or self.absorbed
        votes_J = 1 if self.absorbed else poses.shape[2] if weight is None else weight.shape[1]
        self.one_for_all = votes_J == 1 and J > 1  # one matrix, or one vote, for all output capsules
        self.D_sum = self.D_in if self.absorbed else self.D_out  # entries of what is summed over the input capsules
        self.D = power_of_2(self.D_sum) if self.votes else max(16, power_of_2(self.D_out))
        self.gpu, self.multiprocessors = _gpu(poses.device.index or 0)
        self.precision = _precision(poses.dtype, allow_tf32)
        s_j = poses.stride(2) if weight is None and votes_J > 1 else 0
        w = (0, 0, 0, 0) if weight is None or self.absorbed else _strides(weight)
        p = (0, 0, 0) if prior is None else (0, *prior.stride())[-3:]
        m = (0, 0) if mask is None else mask.stride()
        self.shared: dict[str, Any] = {
            "poses": poses, "weight": None if self.absorbed else weight, "prior": prior, "mask": mask,
            "B": self.B, "I": self.I,
            "s_b": poses.stride(0), "s_i": poses.stride(1), "s_j": s_j, "s_d": poses.stride(-1),
            "w_i": w[0], "w_j": w[1], "w_e": w[2], "w_d": w[3], "p_b": p[0], "p_i": p[1], "p_j": p[2],
            "m_b": m[0], "m_i": m[1], "J": J, "D_OUT": self.D_sum, "D_IN": self.D_in, "D": self.D, "BB": BB,
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

    def sweep(self, V: Tensor | None, ds: Tensor | None, stats: Tensor | None, sums: bool = True) -> Tensor:
        """``[slices, B, J, D_sum]``, whose sum is sum_i c u or, where ds is given, sum_i db u; ``stats`` [3, I, B] is
        written where given. Without ``sums`` only that."""
        uniform = V is None and self.prior is None
        parameters = self.parameters("dV" if ds is not None else "first sum" if uniform else "sum")
        tiles, batches = math.ceil(self.J / (parameters.JG * parameters.JT)), math.ceil(self.B / BB)
        if sums and tiles > 1 and not uniform:
            stats = self.new(3, self.I, self.B) if stats is None else stats
            self.sweep(V, ds, stats, sums=False)
        programs = batches * tiles if sums else batches
        slices = self.pieces(programs, parameters, self.I)
        partial = self.new(slices if sums else 0, self.B, self.J, self.D_sum)
        launch(
            kernels.sweep, programs * slices, V=V, ds=ds, stats=stats, partial=partial if sums else None, slices=slices,
            LEAKY=self.leaky, **self.shared, **_tiling(parameters),
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
        tiles = math.ceil(self.J / (parameters.JG * parameters.JT))
        per_sample = self.prior is not None and self.prior.dim() == 3
        d_poses = d_weight = d_prior = None
        if poses:
            added = tiles > 1 and (weight_given or self.one_for_all)  # tile by tile: in float32, to round it once
            dtype = torch.float32 if added else self.poses.dtype
            d_poses = torch.empty(self.poses.shape, dtype=dtype, device=V.device)
        if weight:
            assert self.weight is not None
            d_weight = self.new(parts, self.I, *self.weight.shape[1:])
        if prior:
            d_prior = self.new(self.B if per_sample else parts, self.I, self.J)
        launch(
            kernels.gradients, self.I * chunks * parts, V=V, ds=ds, stats=stats, d_poses=d_poses, d_weight=d_weight,
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


def forward(
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    num_iterations: int,
    leaky: bool,
    detach: bool,
    eps: float,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output ``[B, J, D_out]`` and the sums ``[T, B, J, D_out]``: twin of ``dynamic_routing_reference``."""
    J = output_capsules(poses, weight, prior, bias)
    call = Call(poses, weight, prior, mask, J, leaky, allow_tf32)
    sums, out = call.new(num_iterations, call.B, J, call.D_out), poses.new_empty(call.B, J, call.D_out)
    if call.B == 0 or call.I == 0:
        sums.copy_(sums.new_zeros(()) if bias is None else bias)
        return squash(sums[-1], eps=eps).to(poses.dtype), sums
    bias = None if bias is None else bias.contiguous()
    V: Tensor | None = None
    for t in range(num_iterations):
        last = t == num_iterations - 1
        seen = call.transform(V, back=True) if call.absorbed and V is not None else V
        partial = call.sweep(seen, None, None)
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
    grad: Tensor,
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sums: Tensor,
    leaky: bool,
    detach: bool,
    eps: float,
    need_poses: bool,
    need_weight: bool,
    need_prior: bool,
    need_bias: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    """The gradients of poses (or votes), weight, prior and bias, of size 0 where not needed: twin of
    ``dynamic_routing_backward_reference``."""
    inputs, needed = (poses, weight, prior, bias), (need_poses, need_weight, need_prior, need_bias)
    T, B, J, _ = sums.shape
    I = poses.shape[1]
    if B == 0 or I == 0:
        wide = (None if x is None else x.to(sums.dtype) for x in (grad, *inputs))
        twin: Any = dynamic_routing_backward_reference
        found = twin(*wide, sums, leaky=leaky, detach=detach, eps=eps)
        return _like_inputs(found, inputs, needed)
    call = Call(poses, weight, prior, mask, J, leaky, allow_tf32)
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
            partial = call.sweep(seen[t], seen_ds[t], stats[t])
            if db_sums is not None:
                torch.sum(partial, 0, out=db_sums[t])
                partial = call.transform(db_sums[t])[None]
        elif t > 0 or prior is not None:
            call.sweep(seen[t] if t > 0 else None, None if detach else seen_ds[t], stats[t], sums=False)
        else:
            stats[0].zero_()
            stats[0, 1] = math.log2(J + leaky)
    d_poses, d_weight, d_prior = call.gradients(
        seen, seen_ds, stats, detach, needed[0], needed[1] and not call.votes, needed[2] and not detach
    )
    first = T - 1 if detach else 0
    if db_sums is not None and needed[1]:
        c_sums = [call.sweep(seen[t] if t > 0 else None, None, None).sum(0) for t in range(first, T)]
        d_weight = call.matrix_gradient(V[first:], ds[first:], torch.stack(c_sums), db_sums[first:])
    d_bias = ds[first:].sum((0, 1)) if needed[3] else None
    return _like_inputs((d_poses, d_weight, d_prior, d_bias), inputs, needed)


def _like_inputs(
    found: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients in shape and dtype of their inputs, 0 where nothing depends on one; of size 0 where not needed."""
    result = []
    for gradient, x, need in zip(found, inputs, needed, strict=True):
        if x is None or not need:
            assert inputs[0] is not None
            result.append(inputs[0].new_empty(0))
        else:
            result.append(x.new_zeros(x.shape) if gradient is None else gradient.to(x.dtype).reshape(x.shape))
    return tuple(result)
