"""Where the microseconds of one small call go: Python's checks, autograd, the op boundary, the kernel.

    python benchmarks/call_overhead.py

The layer is tiny (B = 8, 10 -> 10 capsules, 16 -> 16), so that the kernel does not hide the rest. Every part is the
difference of two calls, medians of interleaved rounds, one thread.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastcaps.benchmarking import einsum_routing
from fastcaps.routing import dynamic_routing
from fastcaps.routing.dynamic.api import check_poses
from fastcaps.routing.dynamic.arguments import Options, Tensors
from fastcaps.routing.dynamic.ops import DynamicRouting, EagerDynamicRouting

B, I, J, D_in, D_out, T = 8, 10, 10, 16, 16, 3
ROUNDS, CALLS = 15, 200


@torch.library.custom_op("fastcaps_overhead::custom", mutates_args=())
def custom(poses: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The op as ``torch.library.custom_op`` would wrap it."""
    return torch.ops.fastcaps.native_dynamic_routing_forward(poses, weight, None, None, None, T, False, False, 0.0)


def _custom_backward(ctx, grad, _):
    poses, weight, sums = ctx.saved_tensors
    grads = torch.ops.fastcaps.native_dynamic_routing_backward(
        grad, poses, weight, None, None, None, sums, False, False, 0.0, True, True, False, False
    )
    return grads[0], grads[1]


custom.register_autograd(
    _custom_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1])
)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    poses, weight = torch.randn(B, I, D_in), torch.randn(I, J, D_out, D_in) / 4
    leaves = poses.clone().requires_grad_(), weight.clone().requires_grad_()
    grad = torch.randn(B, J, D_out)
    op = torch.ops.fastcaps.native_dynamic_routing_forward
    tensors, options = Tensors(poses, weight), Options(T, leaky=False, detach=False, eps=0.0)

    def op_below_autograd(poses: Tensor) -> object:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*Tensors(poses, weight), *options)

    def train(routing: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: routing(*leaves).backward(grad)

    calls: dict[str, Callable[[], object]] = {
        "dynamic_routing, no gradient": lambda: dynamic_routing(poses, weight),
        "dynamic_routing, to be differentiated": lambda: dynamic_routing(*leaves),
        "checks": lambda: check_poses(tensors, options),
        "autograd.Function": lambda: EagerDynamicRouting.apply("native", options, *Tensors(*leaves)),
        "autograd.Function with setup_context": lambda: DynamicRouting.apply("native", options, *Tensors(*leaves)),
        "op": lambda: op(*tensors, *options),
        "op, below autograd": lambda: op_below_autograd(poses),
        "op of no samples, below autograd": lambda: op_below_autograd(poses[:0]),
        "op, differentiable by register_autograd": lambda: op(*Tensors(*leaves), *options),
        "custom_op, no gradient": lambda: custom(poses, weight),
        "custom_op, to be differentiated": lambda: custom(*leaves),
        "einsum, no gradient": lambda: einsum_routing(poses, weight, T),
        "training: dynamic_routing": train(dynamic_routing),
        "training: custom_op": train(lambda x, w: custom(x, w)[0]),
        "training: einsum": train(lambda x, w: einsum_routing(x, w, T)),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            with torch.set_grad_enabled("no gradient" not in name and "below" not in name):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                times[name].append(1e6 * (time.perf_counter() - start) / CALLS)
    for name, values in times.items():
        print(f"{name:45s} {statistics.median(values):7.1f} us   best {min(values):7.1f}")


if __name__ == "__main__":
    main()
