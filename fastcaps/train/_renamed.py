"""Functions of version 0.1 that became methods; found under their old module paths until 0.3."""

from torch import Tensor

from fastcaps.data import Dataset, MultiMNIST
from fastcaps.models.network import Network
from fastcaps.train.settings import Settings


def network_loss(network: Network, settings: Settings, *batch: Tensor) -> tuple[Tensor, Tensor]:
    """Now :meth:`fastcaps.models.Network.training_loss`."""
    return network.training_loss(*batch, **settings.loss_options())


def image_shape(data: Dataset | MultiMNIST) -> tuple[int, int, int]:
    """Now an attribute of the data set."""
    return data.image_shape


def single(data: Dataset | MultiMNIST) -> Dataset:
    """Now :attr:`fastcaps.data.MultiMNIST.digits`."""
    return data.digits if isinstance(data, MultiMNIST) else data
