"""Capsule layers: from feature maps to capsules, and from capsules to capsules."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcaps._axes import Axes
from fastcaps._checks import (
    axes_hint,
    check_choice,
    check_floating,
    check_like,
    check_number,
    check_pair,
    check_positive,
)
from fastcaps._deprecated import once_positional, renamed_arguments, warn_renamed
from fastcaps.functional import squash
from fastcaps.routing import RoutingTrace, dynamic_routing, routing_trace
from fastcaps.routing.conventions import Convention
from fastcaps.routing.dynamic.api import check_prior

PRIMARY_LAYOUTS = ("capsule-major", "dimension-major", "flat")
SHARE_WEIGHT = ("none", "inputs", "both")
WEIGHT_AXES = ("I", "J", "D_out", "D_in")
INITIAL_NORM = 1 / 3  # of a bias: squash makes of it the length 0.1, the margin loss's bound for absent classes


class PrimaryCapsules(nn.Module):
    """The lowest capsules: a convolution whose channels are grouped into poses, then squash (Sabour 2017, section 4).

    Args:
        in_channels: channels of the feature map.
        types: capsule types, 32 in the paper.
        pose_dim: pose size, 8 in the paper.
        kernel_size: of the convolution, in pixels: an int, or a pair (height, width).
        stride: of the convolution, in pixels; an int or a pair.
        padding: of the convolution, in pixels; an int or a pair.
        layout: which channels form a capsule. ``"capsule-major"``: channel ``type * pose_dim + k`` is entry k of a
            pose. ``"dimension-major"``: channel ``k * types + type`` is. ``"flat"``: a pose is ``pose_dim`` consecutive
            values of the flattened feature map, a mistake of many public repositories: for their checkpoints only.
        eps: as in :func:`fastcaps.squash`.

    Raises:
        TypeError: a size is not an int or a pair of ints, or ``eps`` no number.
        ValueError: a size is below 1, or the layout is unknown.

    Example:
        >>> PrimaryCapsules(256, types=32, pose_dim=8, kernel_size=9, stride=2)(torch.randn(2, 256, 20, 20)).shape
        torch.Size([2, 1152, 8])

        Signals ``[B, C, L]`` are images of height 1.

        >>> layer = PrimaryCapsules(16, types=32, pose_dim=8, kernel_size=(1, 9), stride=(1, 2))
        >>> layer(torch.randn(2, 16, 179).unsqueeze(2)).shape
        torch.Size([2, 2752, 8])
    """

    @renamed_arguments(dim="pose_dim")
    def __init__(
        self,
        in_channels: int,
        types: int,
        pose_dim: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        layout: str = "capsule-major",
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, types=types, pose_dim=pose_dim)
        kernel, steps, border = (
            check_pair(name, value, least)
            for name, value, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0))
        )
        check_choice("layout", layout, PRIMARY_LAYOUTS)
        check_number("eps", eps)
        self.types, self.pose_dim, self.layout, self.eps = types, pose_dim, layout, eps
        self.conv = nn.Conv2d(in_channels, types * pose_dim, kernel, steps, border)

    def forward(self, features: Tensor) -> Tensor:
        """From feature maps ``[B, in_channels, H, W]`` to squashed poses ``[B, types * H_out * W_out, pose_dim]``.

        Raises:
            TypeError: features have another dtype than the parameters (outside autocast).
            ValueError: the number of channels is wrong, or the map is smaller than the kernel.

        Example:
            >>> PrimaryCapsules(4, types=2, pose_dim=8, kernel_size=3)(torch.randn(1, 4, 5, 5)).shape
            torch.Size([1, 18, 8])
        """
        check_like("features", features, "[B, C, H, W]", self.conv.weight)
        C, shape = self.conv.in_channels, tuple(features.shape)
        if len(shape) != 4 or shape[1] != C:
            hint = axes_hint("features", shape, (C, None, None))
            raise ValueError(f"features must be [B, C, H, W] with C = {C}, got {shape}{hint}")
        kernel, padding = self.conv.kernel_size, self.conv.padding
        if any(size + 2 * border < k for size, border, k in zip(shape[2:], padding, kernel, strict=True)):  # type: ignore[operator]
            raise ValueError(f"features {shape} are smaller than the kernel, {'x'.join(map(str, kernel))}")
        x = self.conv(features)  # [B, types * pose_dim, H_out, W_out]
        B, places = x.shape[0], x.shape[2] * x.shape[3]  # flatten would fix the batch in PyTorch's older export to ONNX
        if self.layout == "capsule-major":
            x = x.reshape(B, self.types, self.pose_dim, places).movedim(2, -1)
        elif self.layout == "dimension-major":
            x = x.reshape(B, self.pose_dim, self.types, places).movedim(1, -1)
        return squash(x.reshape(B, self.types * places, self.pose_dim), eps=self.eps)

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the convolution."""
        eps = f", eps={self.eps!r}" if self.eps else ""
        return f"types={self.types}, pose_dim={self.pose_dim}, layout={self.layout!r}{eps}"

    @property
    def dim(self) -> int:
        """The old name of ``pose_dim``."""
        warn_renamed("PrimaryCapsules.dim", "PrimaryCapsules.pose_dim")
        return self.pose_dim

    @dim.setter
    def dim(self, value: int) -> None:
        warn_renamed("PrimaryCapsules.dim", "PrimaryCapsules.pose_dim")
        self.pose_dim = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "dim" in state:  # pickled by fastcaps 0.1
            state["pose_dim"] = state.pop("dim")
        super().__setstate__(state)


class CapsuleLayer(nn.Module):
    """Capsules that receive the routed votes of other capsules (Sabour et al. 2017, section 2).

    The positional arguments are those of the widely copied ``Capsule(in_capsules, in_dim, out_capsules, out_dim,
    num_routing)``, and its state dict (``weights [1, I, J, D_out, D_in]``) loads as it is.

    Args:
        in_capsules: I. A layer whose weight is shared over the inputs accepts any number of them.
        in_dim: D_in.
        out_capsules: J.
        out_dim: D_out.
        num_iterations: T, at least 1.
        share_weight: ``"none"``: a matrix for every pair of capsules, ``weight [I, J, D_out, D_in]``; ``"inputs"``: one
            per output capsule, ``[1, J, D_out, D_in]``; ``"both"``: one for all, ``[1, 1, D_out, D_in]``, which makes
            all outputs equal unless a prior or a bias tells them apart.
        bias: learn a bias ``[J, D_out]``, initially of norm 1/3, which alone gives every output capsule length 0.1.
            Loading a state dict without one sets it to 0.
        learn_prior: learn initial routing logits ``[I, J]``, initially 0.
        routing: a function ``(poses, weight, *, num_iterations, ...) -> poses``. It is also given ``prior``, ``bias``
            and ``mask`` where there are any.
        device: of the parameters.
        dtype: of the parameters.
        **routing_options: passed to ``routing``: ``leaky``, ``detach``, ``eps``, ``backend``.

    Raises:
        TypeError: a size is not an int, or an option is unknown.
        ValueError: a size is below 1, ``share_weight`` is unknown, or a learned prior meets ``detach=True``, under
            which it would never get a gradient.

    Example:
        >>> CapsuleLayer(1152, 8, 10, 16)(torch.randn(2, 1152, 8)).shape
        torch.Size([2, 10, 16])
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        num_iterations: int = 3,
        *,
        share_weight: str = "none",
        bias: bool = False,
        learn_prior: bool = False,
        routing: Callable[..., Tensor] = dynamic_routing,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **routing_options: Any,
    ) -> None:
        super().__init__()
        check_positive(
            in_capsules=in_capsules,
            in_dim=in_dim,
            out_capsules=out_capsules,
            out_dim=out_dim,
            num_iterations=num_iterations,
        )
        check_choice("share_weight", share_weight, SHARE_WEIGHT)
        if not callable(routing):
            raise TypeError(f"routing must be a function, got {routing!r}")
        if routing is dynamic_routing or isinstance(routing, Convention):
            known = {"leaky", "detach", "eps"} | ({"backend"} if routing is dynamic_routing else set())
            if unknown := routing_options.keys() - known:
                raise TypeError(f"CapsuleLayer has no option {', '.join(sorted(unknown))}")
            check_number("eps", routing_options.get("eps", 0.0))
        if learn_prior and routing_options.get("detach"):
            raise ValueError("learn_prior needs detach=False: with constant coupling the prior gets no gradient")
        self.in_capsules, self.in_dim = in_capsules, in_dim
        self.out_capsules, self.out_dim = out_capsules, out_dim
        self.num_iterations, self.share_weight = num_iterations, share_weight
        self.routing, self.routing_options = routing, routing_options
        I = in_capsules if share_weight == "none" else 1
        J = 1 if share_weight == "both" else out_capsules

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(I, J, out_dim, in_dim)
        self.bias = parameter(out_capsules, out_dim) if bias else None
        self.prior = parameter(in_capsules, out_capsules) if learn_prior else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution of deviation ``sqrt(J / (I D_out))``; bias of norm 1/3, prior 0.

        With them the initial lengths hardly depend on the sizes: ``docs/how-it-works.md`` has the derivation, and
        ``benchmarks/NOTES.md`` a comparison with other deviations.
        """
        nn.init.normal_(self.weight, std=math.sqrt(self.out_capsules / (self.in_capsules * self.out_dim)))
        if self.bias is not None:
            nn.init.normal_(self.bias)
            with torch.no_grad():
                self.bias.copy_(INITIAL_NORM * F.normalize(self.bias, dim=1))
        if self.prior is not None:
            nn.init.zeros_(self.prior)

    def forward(
        self,
        poses: Tensor,
        *,
        mask: Tensor | None = None,
        prior: Tensor | None = None,
        num_iterations: int | None = None,
    ) -> Tensor:
        """Route poses to the output capsules.

        Args:
            poses: ``[B, I, D_in]``.
            mask: ``[B, I]`` bool; False: this input capsule does not vote, whatever its pose and prior hold.
            prior: initial routing logits, broadcastable to ``[B, I, J]``; added to the learned prior if there is one.
            num_iterations: T for this call; None: the layer's own.

        Returns:
            ``[B, J, D_out]``

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: sizes or devices do not fit.

        Example:
            >>> layer, mask = CapsuleLayer(6, 4, 3, 8), torch.tensor([[True] * 5 + [False]])
            >>> layer(torch.randn(1, 6, 4), mask=mask, num_iterations=5).shape
            torch.Size([1, 3, 8])
        """
        arguments = self._arguments(poses, mask, prior, num_iterations)
        return self.routing(poses, self._full_weight(), **arguments, **self.routing_options)

    @once_positional("num_iterations")
    def trace(
        self,
        poses: Tensor,
        *,
        mask: Tensor | None = None,
        prior: Tensor | None = None,
        num_iterations: int | None = None,
    ) -> RoutingTrace:
        """Route poses as :meth:`forward` does, and record every iteration.

        Args:
            poses: as in :meth:`forward`.
            mask: as in :meth:`forward`.
            prior: as in :meth:`forward`.
            num_iterations: as in :meth:`forward`.

        Returns:
            A :class:`fastcaps.routing.RoutingTrace`, without gradient.

        Raises:
            TypeError: as :meth:`forward`, or the layer routes by another function than :func:`dynamic_routing`.
            ValueError: as :meth:`forward`.

        Example:
            >>> CapsuleLayer(6, 4, 3, 8).trace(torch.randn(2, 6, 4), num_iterations=5).entropy.shape
            torch.Size([5, 2, 6])
        """
        if self.routing is not dynamic_routing:
            raise TypeError(f"only dynamic_routing can be traced, and this layer routes by {self.routing}")
        # The other options, detach and backend, change the gradient or the speed, not the output.
        options = {name: value for name, value in self.routing_options.items() if name in ("leaky", "eps")}
        arguments = self._arguments(poses, mask, prior, num_iterations)
        return routing_trace(poses, self._full_weight(), **arguments, **options)

    def _full_weight(self) -> Tensor:
        """A view of the weight with all J output capsules, even where they share a matrix."""
        return self.weight.expand(-1, self.out_capsules, -1, -1)

    def _arguments(
        self, poses: Tensor, mask: Tensor | None, prior: Tensor | None, num_iterations: int | None
    ) -> dict[str, Any]:
        """The keyword arguments of one call of the routing function, without the layer's options."""
        if prior is not None and self.prior is not None:
            B, I, J = (*poses.shape[:2], self.out_capsules)
            check_prior(prior, B, I, J)
            prior = prior + self.prior
        optional = {"prior": self.prior if prior is None else prior, "bias": self.bias, "mask": mask}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"num_iterations": self.num_iterations if num_iterations is None else num_iterations, **given}

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        text = f"{self.in_capsules}, {self.in_dim}, {self.out_capsules}, {self.out_dim}, {self.num_iterations}"
        if self.share_weight != "none":
            text += f", share_weight={self.share_weight!r}"
        if self.bias is not None:
            text += ", bias=True"
        if self.prior is not None:
            text += ", learn_prior=True"
        if self.routing is not dynamic_routing:
            text += f", routing={getattr(self.routing, '__name__', self.routing)}"
        return text + "".join(f", {name}={value!r}" for name, value in self.routing_options.items())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        copied = state_dict.get(prefix + "weights")  # the widely copied layer's name and shape
        if isinstance(copied, Tensor) and copied.dim() == 5 and copied.shape[0] == 1:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "weights")[0]
        weight = state_dict.get(prefix + "weight")
        if self.bias is not None and isinstance(weight, Tensor) and prefix + "bias" not in state_dict:
            state_dict[prefix + "bias"] = weight.new_zeros(self.bias.shape)  # what a layer without a bias computes
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    @renamed_arguments(layout="axes")
    def from_weight(cls, weight: Tensor, axes: str, **options: Any) -> "CapsuleLayer":
        """A layer with a copy of somebody else's weight.

        Args:
            weight: the transformation matrices in any order of axes; its dtype and device become the layer's.
            axes: the order of the axes ``I``, ``J``, ``D_out`` and ``D_in``, as einops writes it:
                ``"J I D_in D_out"``, or ``"I D_in (J D_out)"`` where one axis holds two; ``1`` for an axis of size 1.
                Without ``I``, or without ``I`` and ``J``, the weight is shared over these.
            **options: of :class:`CapsuleLayer`. ``in_capsules``, ``in_dim``, ``out_capsules`` and ``out_dim`` are
                needed only where the weight does not tell them: to split an axis, or for axes it is shared over.

        Returns:
            A new layer.

        Raises:
            TypeError: the weight is no floating-point tensor, or ``axes`` no string.
            ValueError: ``axes`` do not fit the weight, or a size is missing or contradicts it.

        Example:
            >>> CapsuleLayer.from_weight(torch.randn(1152, 8, 10 * 16), "I D_in (J D_out)", out_capsules=10)
            CapsuleLayer(1152, 8, 10, 16, 3)
        """
        names = {"I": "in_capsules", "J": "out_capsules", "D_in": "in_dim", "D_out": "out_dim"}
        check_floating("weight", weight)
        check_positive(**{name: options[name] for name in names.values() if name in options})
        sizes = {axis: options.pop(name) for axis, name in names.items() if name in options}
        parsed = Axes.parse(axes, WEIGHT_AXES, ("D_in", "D_out"))
        sizes |= parsed.sizes(weight, sizes)
        missing = [names[axis] for axis in names if axis not in sizes]
        if missing:
            raise ValueError(f"axes {axes!r} do not tell {' and '.join(missing)}: pass it as a keyword")
        share = {(False, False): "none", (True, False): "inputs", (True, True): "both"}
        shared = ("I" not in parsed.names, "J" not in parsed.names)
        if shared not in share:
            raise ValueError(f"axes {axes!r}: a weight shared over J only is not a CapsuleLayer's")
        options = {"share_weight": share[shared], "device": weight.device, "dtype": weight.dtype, **options}
        layer = cls(**{names[axis]: size for axis, size in sizes.items()}, **options)
        with torch.no_grad():
            layer.weight.copy_(parsed.canonical(weight, sizes))
        return layer
