"""Data sets of images, read from their original files: digits, MNIST and its relatives, CIFAR-10, image folders."""

from fastcaps.data.datasets import (
    Dataset,
    MultiMNIST,
    cifar10,
    digits,
    fashion_mnist,
    image_folder,
    mnist,
    multi_mnist,
    read_image,
)

__all__ = [
    "Dataset",
    "MultiMNIST",
    "cifar10",
    "digits",
    "fashion_mnist",
    "image_folder",
    "mnist",
    "multi_mnist",
    "read_image",
]
