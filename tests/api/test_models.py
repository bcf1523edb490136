"""What training asks of a network, and old argument orders."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fastcaps import CapsNet, Decoder
from fastcaps.losses import cross_entropy_loss, margin_loss, reconstruction_loss
from fastcaps.models import CNN
from fastcaps.models.network import METADATA, Network

IMAGES = torch.rand(3, 1, 8, 8)
LABELS = torch.tensor([[3], [1], [0]])


def capsnet(**options) -> CapsNet:
    return CapsNet((1, 8, 8), 4, stem_channels=4, kernel_size=3, types=2, **options)


def cnn() -> CNN:
    return CNN((1, 8, 8), 4, channels=(4,), units=(6,)).eval()


@pytest.mark.parametrize("build", [capsnet, cnn])
def test_probabilities_name_the_predicted_class(build):
    network = build()
    probabilities = network.probabilities(IMAGES)
    assert probabilities.shape == (3, 4)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    assert probabilities.argmax(1).equal(network.predict(IMAGES))


def test_training_loss_of_a_capsule_network():
    network = capsnet()
    output = network(IMAGES, LABELS[:, 0])
    loss, lengths = network.training_loss(IMAGES, LABELS, IMAGES[:, None], reconstruction_weight=0.01)
    drawn = reconstruction_loss(output.reconstruction, IMAGES, weight=0.01)
    assert loss == margin_loss(output.lengths, LABELS[:, 0]) + drawn
    assert lengths.equal(output.lengths)
    by_name = network.training_loss(IMAGES, LABELS, IMAGES[:, None], loss="cross-entropy")[0]
    torch.testing.assert_close(by_name, cross_entropy_loss(output.lengths, LABELS[:, 0], scale=10.0))


def test_training_loss_of_pairs_draws_each_of_them():
    network, pairs = capsnet(), torch.tensor([[3, 0], [1, 2], [0, 1]])
    targets = torch.rand(3, 2, 1, 8, 8)
    poses = network.class_poses(IMAGES)
    present = torch.zeros(3, 4, dtype=torch.bool).scatter(1, pairs, True)
    expected = margin_loss(poses.norm(dim=-1), present)
    for k in range(2):
        expected = expected + reconstruction_loss(network.reconstruct(poses, pairs[:, k]), targets[:, k], weight=0.01)
    loss, _ = network.training_loss(IMAGES, pairs, targets, reconstruction_weight=0.01)
    torch.testing.assert_close(loss, expected)


def test_training_loss_of_the_baseline():
    network = cnn()
    loss, scores = network.training_loss(IMAGES, LABELS, IMAGES[:, None])
    assert scores.equal(network(IMAGES))
    assert loss == cross_entropy_loss(scores, LABELS[:, 0])
    for options in ({"loss": "margin"}, {"reconstruction_weight": 0.1}):
        with pytest.raises(ValueError, match="trained with cross-entropy and has no decoder"):
            network.training_loss(IMAGES, LABELS, IMAGES[:, None], **options)


def test_losses_of_half_precision_are_in_float32():
    for network in (capsnet().bfloat16(), cnn().bfloat16()):
        images = IMAGES.bfloat16()
        loss, scores = network.training_loss(images, LABELS, images[:, None].float())
        assert loss.dtype == scores.dtype == torch.float32


def test_a_trace_is_of_the_class_capsules():
    network = capsnet(hidden_capsules=[(6, 4)])
    trace = network.trace(IMAGES)
    assert trace.coupling.shape == (3, 3, 6, 4)
    assert not trace.poses.requires_grad
    torch.testing.assert_close(trace.poses, network.class_poses(IMAGES))
    assert cnn().trace(IMAGES) is None


def test_a_summary_says_the_sizes():
    network = capsnet(hidden_capsules=[(6, 4)], num_iterations=2)
    assert network.summary() == "CapsNet, 6 -> 4 capsules, 2 routing iterations"
    assert cnn().summary() == "CNN"
    assert network.num_parameters() == sum(p.numel() for p in network.parameters())
    assert network.double().dtype == torch.float64


def test_a_decoder_takes_the_order_of_0_1():
    torch.manual_seed(0)
    new = Decoder((1, 8, 8), 4, 6, (10,))
    for args, named in (
        ((4, 6, (1, 8, 8), (10,)), {}),
        ((4, 6, (1, 8, 8)), {"hidden": (10,)}),
        ((4,), {"capsule_dim": 6, "image_shape": (1, 8, 8), "hidden": (10,)}),
    ):
        torch.manual_seed(0)
        with pytest.warns(DeprecationWarning, match=r"Decoder\(num_classes, .*is now Decoder\(image_shape, "):
            old = Decoder(*args, **named)
        poses = torch.randn(2, 4, 6)
        assert old(poses).equal(new(poses))
    named = Decoder(num_classes=4, capsule_dim=6, image_shape=(1, 8, 8))
    assert named.image_shape == (1, 8, 8)


def test_a_file_of_0_1_is_read(tmp_path):
    network = capsnet(num_iterations=2, bias=False)
    config = {
        "image_shape": [1, 8, 8], "num_classes": 4, "stem_channels": 4, "kernel_size": 3, "types": 2, "primary_dim": 8,
        "primary_stride": 2, "primary_layout": "capsule-major", "primary_eps": 0.0, "hidden_capsules": [],
        "capsule_dim": 16, "num_iterations": 2, "decoder": True, "detach": True,
    }  # fmt: skip
    described = {"model": "CapsNet", "version": "0.1.0", "config": config, "run": {"settings": {"iterations": 2}}}
    save_file(network.state_dict(), tmp_path / "old.safetensors", {METADATA: json.dumps(described)})
    old = Network.load(tmp_path / "old.safetensors")
    assert old.capsules.num_iterations == 2
    assert old.capsules.bias is None
    assert old(IMAGES).reconstruction.equal(network(IMAGES).reconstruction)
