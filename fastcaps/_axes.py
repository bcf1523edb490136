"""The axes of a tensor in words, as einops writes them: ``"J I D_in D_out"``, ``"I D_in (J D_out)"``."""

import math
import re
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which axes a tensor has, and in which order; parsed once, so that a traced ``forward`` meets no string.

    Attributes:
        text: as it was written.
        order: the axes in canonical order.
        groups: the axes of each dimension; ``"1"`` for a dimension of size 1.
    """

    text: str
    order: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str, order: tuple[str, ...], required: tuple[str, ...]) -> "Layout":
        """Read a layout.

        Args:
            text: the layout.
            order: all axes that it may name, in canonical order.
            required: those that it must name.

        Raises:
            TypeError: ``text`` is no string.
            ValueError: it is malformed, or names too few axes or one of them twice.

        Example:
            >>> Layout.parse("I D_in (J D_out)", ("I", "J", "D_out", "D_in"), ("D_out", "D_in")).groups
            (('I',), ('D_in',), ('J', 'D_out'))
        """
        if not isinstance(text, str):
            raise TypeError(f"layout must be a string, got {text!r}")
        words = re.findall(r"[^\s()]+", text)
        rest = re.sub(r"\([^()]*\)", "", text)
        if "(" in rest or ")" in rest or not set(words) <= {*order, "1"}:
            raise ValueError(f"layout must be made of {', '.join(order)}, 1 and pairs of parentheses, got {text!r}")
        axes = [word for word in words if word != "1"]
        if len(set(axes)) != len(axes) or not set(required) <= set(axes):
            optional = [axis for axis in order if axis not in required]
            may = f", and may name {' and '.join(optional)}" if optional else ""
            raise ValueError(f"layout must name {' and '.join(required)}{may}, each once; got {text!r}")
        groups = tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^()]*\)|[^\s()]+", text))
        return cls(text, order, groups)

    @property
    def axes(self) -> list[str]:
        """The axes in the order in which they stand, without those of size 1."""
        return [axis for group in self.groups for axis in group if axis != "1"]

    def canonical(self, tensor: Tensor, sizes: dict[str, int], name: str = "weight") -> Tensor:
        """A tensor of this layout in canonical order: a view where that can be; an axis that is not named has size 1.

        Args:
            tensor: the tensor.
            sizes: the sizes of axes that are known; those that the tensor tells are added.
            name: what an error calls the tensor.

        Raises:
            ValueError: the tensor does not fit, or a size is missing.
        """
        layout = f"layout {self.text!r}"
        if len(self.groups) != tensor.dim():
            raise ValueError(f"{layout} has {len(self.groups)} axes, the {name} {tensor.dim()}: {tuple(tensor.shape)}")
        shape: list[int] = []
        for group, total in zip(self.groups, tensor.shape, strict=True):
            unknown = [axis for axis in group if axis != "1" and axis not in sizes]
            known = math.prod([sizes[axis] for axis in group if axis in sizes])
            if len(unknown) > 1:
                raise ValueError(f"{layout}: the size of {' or '.join(unknown)} must be given")
            if unknown:
                sizes[unknown[0]] = total // max(known, 1)
            group_shape = [1 if axis == "1" else sizes[axis] for axis in group]
            if math.prod(group_shape) != total:
                raise ValueError(f"{layout}: axis ({' '.join(group)}) of size {total} is not {group_shape}")
            shape += [size for axis, size in zip(group, group_shape, strict=True) if axis != "1"]
        axes = self.axes
        tensor = tensor.reshape(shape).permute([axes.index(axis) for axis in self.order if axis in axes])
        for position, axis in enumerate(self.order):
            if axis not in axes:
                tensor = tensor.unsqueeze(position)
        return tensor

    def arranged(self, tensor: Tensor) -> Tensor:
        """A tensor in canonical order, brought to this layout, contiguous; the layout names all axes."""
        sizes = dict(zip(self.order, tensor.shape, strict=True))
        tensor = tensor.permute([self.order.index(axis) for axis in self.axes])
        shape = [math.prod([sizes[axis] for axis in group if axis != "1"]) for group in self.groups]
        return tensor.reshape(shape).contiguous()
