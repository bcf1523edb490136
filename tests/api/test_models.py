"""What training asks of a network, and old argument orders."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from fastcaps import CapsNet, Decoder
from fastcaps.losses import cross_entropy_loss, margin_loss, reconstruction_loss
from fastcaps.models import CNN
from fastcaps.models.convolutions import least_size
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


@pytest.mark.parametrize("build", [capsnet, cnn])
def test_training_loss_with_class_weights(build):
    network, weights = build(), torch.tensor([0.0, 0.0, 0.0, 2.0])  # the first image alone is of class 3
    loss, scores = network.training_loss(IMAGES, LABELS, IMAGES[:, None], class_weights=weights)
    of_its_own = margin_loss if build is capsnet else cross_entropy_loss
    torch.testing.assert_close(loss, 2 * of_its_own(scores[:1], LABELS[:1, 0]) / 3)


def test_losses_that_know_one_class_refuse_pairs():
    pairs, targets = torch.tensor([[3, 0], [1, 2], [0, 1]]), torch.rand(3, 2, 1, 8, 8)
    for network, name in ((capsnet(), "spread"), (capsnet(), "cross-entropy"), (cnn(), None)):
        with pytest.raises(ValueError, match=r"this loss knows one class in an image, labels \[B, 1\], got \(3, 2\)"):
            network.training_loss(IMAGES, pairs, targets, loss=name)


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


# ------------------------------------------------------------------------------------------------ sizes of the images


def small(image_shape, **options) -> CapsNet:
    return CapsNet(image_shape, 3, **{"stem_channels": 4, "types": 2, **options})


@pytest.mark.parametrize(
    ("image_shape", "options", "kernel_size", "places"),
    [
        ((1, 1, 187), {}, (1, 9), 86),
        ((12, 187, 1), {}, (9, 1), 86),
        ((1, 8, 40), {}, (3, 9), 2 * 12),
        ((1, 28, 28), {}, 9, 36),
        ((1, 17, 17), {}, 9, 1),
        ((1, 16, 17), {}, (3, 9), 6),
        ((1, 4, 4), {}, 1, 4),
        ((1, 40, 40), {"stem_stride": 2}, 9, 16),
        ((1, 24, 24), {"stem_stride": 2}, 3, 25),
        ((1, 16, 16), {"padding": 1}, 9, 4),
        ((1, 1, 64), {"kernel_size": (1, 5), "stem_stride": 2, "primary_stride": (1, 3), "padding": (0, 2)}, None, 11),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:image_shape")
def test_images_of_any_aspect(image_shape, options, kernel_size, places, tmp_path):
    network = small(image_shape, **options)
    assert network.config["kernel_size"] == (kernel_size or options["kernel_size"])
    images = torch.rand(2, *image_shape)
    output = network(images)
    assert network.primary_poses(images).shape == (2, 2 * places, 8)
    assert output.reconstruction.shape == images.shape
    network.save(tmp_path / "model.safetensors")
    again = CapsNet.load(tmp_path / "model.safetensors")
    assert again(images).lengths.equal(output.lengths)


def test_the_default_kernel_is_what_was_asked_for():
    torch.manual_seed(0)
    asked = small((1, 20, 20), kernel_size=9, primary_stride=2, stem_stride=1, padding=0)
    torch.manual_seed(0)
    default = small((1, 20, 20))
    assert all(a.equal(b) for a, b in zip(asked.parameters(), default.parameters(), strict=True))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_the_least_image(kernel, padding, stride):
    least = least_size(kernel, stride, padding)
    options = {"kernel_size": kernel, "padding": padding, "stem_stride": stride}
    assert small((1, least, 30), **options)(torch.rand(1, 1, least, 30)).lengths.shape == (1, 3)
    if least > 1:
        with pytest.raises(ValueError, match=f"height and width must be at least {least} and {least}"):
            small((1, least - 1, 30), **options)


def test_the_baseline_takes_signals():
    assert CNN((2, 1, 30), 3, channels=(4,), units=(6,))(torch.rand(5, 2, 1, 30)).shape == (5, 3)


def test_signals_without_height_are_told_how_to_get_it():
    with pytest.raises(ValueError, match=r"\[B, 2, 1, 30\], got \(4, 2, 30\); images.unsqueeze\(2\) adds"):
        small((2, 1, 30))(torch.rand(4, 2, 30))
    with pytest.raises(ValueError, match=r"\[B, 1, 8, 8\], got \(4, 8, 8\); images.unsqueeze\(1\) adds"):
        cnn()(torch.rand(4, 8, 8))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_that_are_last(channels):
    with pytest.raises(ValueError, match=r"got \(2, 9, 8, \d\); are the channels last\? images.movedim\(3, 1\)"):
        small((channels, 9, 8))(torch.rand(2, 9, 8, channels))
    for build in (small, lambda shape: CNN(shape, 3, channels=(4,), units=(6,))):
        with pytest.warns(UserWarning, match=rf"channels last\? Then write \({channels}, 9, 8\)") as warned:
            build((9, 8, channels))
        assert warned[0].filename == __file__


def test_a_large_network_warns_before_it_takes_memory(monkeypatch):
    from fastcaps.models import capsnet

    made = []

    class Recorded(capsnet.CapsuleLayer):
        def __init__(self, *args, **options):
            made.append(options.get("device"))
            super().__init__(*args, **options)

    monkeypatch.setattr(capsnet, "CapsuleLayer", Recorded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small((1, 8, 8))
        assert made == ["meta", None]
        with pytest.raises(UserWarning, match=r"has 421 million parameters, 266 million of them in the capsule"):
            small((3, 224, 224), types=64, num_iterations=2)
    assert made == ["meta", None, "meta"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CapsNet((3, 96, 96), 10), r"million of them in the capsule layers; .* a larger stem_stride"),
        (lambda: CapsNet((3, 96, 96), 10, stem_stride=4, share_weight="inputs", kernel_size=5), None),
        (lambda: small((3, 140, 140), stem_stride=8, kernel_size=3), "in the decoder; .* decoder=False"),
        (lambda: CNN((3, 64, 64), 10), "in the linear layers; .* smaller images"),
        (lambda: CNN((3, 32, 32), 10), None),
    ],
)
def test_which_part_is_large(build, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if message is None:
            build()
        else:
            with pytest.raises(UserWarning, match=message):
                build()
