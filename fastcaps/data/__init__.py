"""Data sets of images: digits, numbers of several digits, MNIST and its relatives, CIFAR-10, image folders."""

from fastcaps.data.datasets import Dataset, cifar10, digits, fashion_mnist, mnist
from fastcaps.data.images import image_folder, read_image
from fastcaps.data.multi_digit import multi_digit
from fastcaps.data.pairs import MultiMNIST, multi_mnist

__all__ = [
    "Dataset",
    "MultiMNIST",
    "cifar10",
    "digits",
    "fashion_mnist",
    "image_folder",
    "mnist",
    "multi_digit",
    "multi_mnist",
    "read_image",
]
