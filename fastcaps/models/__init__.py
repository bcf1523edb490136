"""Whole networks: the capsule network and the baseline of Sabour et al. (2017)."""

from fastcaps.models.capsnet import CapsNet, CapsNetOutput
from fastcaps.models.cnn import CNN
from fastcaps.models.decoder import Decoder
from fastcaps.models.network import Network, describe

__all__ = ["CNN", "CapsNet", "CapsNetOutput", "Decoder", "Network", "describe"]
