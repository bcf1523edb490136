"""Sizes of two convolutions, one after the other: the stem and the primary capsules."""

KERNEL_SIZES = (9, 3, 1)  # the default along an axis is the first that fits: the paper's if it does


def default_kernel_size(size: int, stem_stride: int = 1, padding: int = 0) -> int:
    """The kernel size of both convolutions along an axis of so many pixels, where none is given.

    Example:
        >>> [default_kernel_size(size) for size in (28, 8, 1)]
        [9, 3, 1]
    """
    return next(kernel for kernel in KERNEL_SIZES if places(size, kernel, stem_stride, 1, padding) > 0)


def default_kernel_sizes(
    size: tuple[int, int], stem_stride: tuple[int, int], padding: tuple[int, int]
) -> int | tuple[int, int]:
    """The default along both axes of an image; one int where it is the same."""
    rows, columns = (default_kernel_size(*axis) for axis in zip(size, stem_stride, padding, strict=True))
    return rows if rows == columns else (rows, columns)


def map_size(image_shape: tuple[int, int, int], *options: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the map of primary capsules.

    Args:
        image_shape: ``(C, H, W)``.
        *options: what :func:`places` takes beside the size, a pair of each.

    Raises:
        ValueError: the image is too small.
    """
    axes = list(zip(image_shape[1:], *options, strict=True))
    rows, columns = (places(*axis) for axis in axes)
    if min(rows, columns) < 1:
        least = " and ".join(str(least_size(kernel, stride, padding)) for _, kernel, stride, _, padding in axes)
        raise ValueError(
            f"image_shape {image_shape} is too small for two convolutions of kernel_size {options[0]}: "
            f"height and width must be at least {least}"
        )
    return rows, columns


def places(size: int, kernel: int, stem_stride: int, primary_stride: int, padding: int) -> int:
    """How many places an axis of the image has after both convolutions; below 1 where it is too small for them."""
    after_stem = (size + 2 * padding - kernel) // stem_stride + 1
    return (after_stem + 2 * padding - kernel) // primary_stride + 1


def least_size(kernel: int, stem_stride: int, padding: int) -> int:
    """The smallest axis on which :func:`places` finds a place."""
    bare = kernel - 2 * padding  # of the kernel, what the padding does not cover
    return max(1, bare + stem_stride * (max(bare, 1) - 1))
