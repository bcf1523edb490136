"""Bad input: an error that names the argument, what was wanted and what came. Legal corner cases are elsewhere."""

import math

import pytest
import torch

from fastcaps import CapsNet, CapsuleLayer, Decoder, PrimaryCapsules, dynamic_routing, route_votes, routing_trace

# B=2, I=5, J=4, D_in=3, D_out=6
GOOD = {"poses": torch.randn(2, 5, 3), "weight": torch.randn(5, 4, 6, 3)}
VOTES = {"votes": torch.randn(2, 5, 4, 6)}

# What is wrong with either function's options.
OPTIONS = [
    ({"num_iterations": 0}, ValueError, "num_iterations must be at least 1, got 0"),
    ({"num_iterations": -2}, ValueError, "num_iterations must be at least 1, got -2"),
    ({"num_iterations": 2.5}, TypeError, r"num_iterations must be an int, got 2\.5 \(float\)"),
    ({"num_iterations": 3.0}, TypeError, r"num_iterations must be an int, got 3\.0"),
    ({"num_iterations": True}, TypeError, r"num_iterations must be an int, got True \(bool\)"),
    ({"num_iterations": None}, TypeError, "num_iterations must be an int, got None"),
    ({"num_iterations": "3"}, TypeError, "num_iterations must be an int, got '3'"),
    ({"leaky": 1}, TypeError, "leaky must be True or False, got 1"),
    ({"detach": None}, TypeError, "detach must be True or False, got None"),
    ({"eps": -1e-3}, ValueError, r"eps must be finite and not negative, got -0\.001"),
    ({"eps": math.nan}, ValueError, "eps must be finite and not negative, got nan"),
    ({"eps": math.inf}, ValueError, "eps must be finite and not negative, got inf"),
    ({"eps": "small"}, TypeError, "eps must be a float, got 'small'"),
    ({"prior": torch.zeros(3)}, ValueError, r"prior must broadcast to \[B, I, J\] = \[2, 5, 4\].* got \(3,\)"),
    ({"prior": torch.zeros(7)}, ValueError, r"(weight|votes) must have J = 7 or 1 output capsules, .* got 4"),
    ({"bias": torch.zeros(7, 6)}, ValueError, r"(weight|votes) must have J = 7 or 1 output capsules, .* got 4"),
    ({"prior": torch.zeros(3, 4)}, ValueError, r"prior must broadcast to \[B, I, J\] = \[2, 5, 4\].* got \(3, 4\)"),
    ({"prior": torch.zeros(3, 5, 4)}, ValueError, r"prior must broadcast to .* got \(3, 5, 4\)"),
    ({"prior": torch.zeros(1, 2, 5, 4)}, ValueError, r"prior must broadcast to .* got \(1, 2, 5, 4\)"),
    ({"prior": torch.zeros(5, 0)}, ValueError, r"prior must broadcast to .* got \(5, 0\)"),
    ({"prior": 0.5}, TypeError, "prior must be a tensor broadcastable to .* got float"),
    ({"prior": torch.zeros(4, dtype=torch.int64)}, TypeError, "prior must be float64, float32, .* got torch.int64"),
    ({"prior": torch.zeros(4).double()}, TypeError, "prior must have the dtype of .* torch.float32, got torch.float64"),
    ({"prior": torch.zeros(4, device="meta")}, ValueError, "prior must be on the device of .* cpu, got meta"),
    ({"bias": torch.zeros(6)}, ValueError, r"bias must be \[J or 1, D_out\], got 1 dimensions"),
    ({"bias": torch.zeros(4, 5)}, ValueError, r"bias must be \[J = 4 or 1, D_out = 6\], got \(4, 5\)"),
    ({"bias": torch.zeros(3, 6)}, ValueError, r"bias must be \[J = 4 or 1, D_out = 6\], got \(3, 6\)"),
    ({"bias": torch.zeros(0, 6)}, ValueError, r"bias must be .* got \(0, 6\)"),
    ({"bias": [0.0]}, TypeError, "bias must be a tensor .* got list"),
    ({"bias": torch.zeros(4, 6).half()}, TypeError, "bias must have the dtype of .* got torch.float16"),
    ({"bias": torch.zeros(4, 6, device="meta")}, ValueError, "bias must be on the device of .* got meta"),
    ({"mask": torch.ones(2, 5)}, TypeError, r"mask must be a bool tensor \[B, I\], got torch.float32"),
    ({"mask": torch.ones(2, 5, dtype=torch.uint8)}, TypeError, "mask must be a bool tensor .* got torch.uint8"),
    ({"mask": True}, TypeError, "mask must be a bool tensor .* got bool"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask must be \[B, I\] = \[2, 5\], got \(5,\)"),
    ({"mask": torch.ones(5, 2, dtype=torch.bool)}, ValueError, r"mask must be \[B, I\] = \[2, 5\], got \(5, 2\)"),
    ({"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")}, ValueError, "mask must be on the device of"),
    ({"backend": "cuda"}, ValueError, "backend must be one of 'native', 'triton', 'reference', got 'cuda'"),
    ({"backend": "triton"}, ValueError, "backend 'triton' cannot run on 'cpu': .* use backend='reference' or None"),
]

POSES_AND_WEIGHT = [
    ({"poses": None}, TypeError, r"poses must be a tensor \[B, I, D_in\], got NoneType"),
    ({"weight": None}, TypeError, r"weight must be a tensor \[I or 1, J or 1, D_out, D_in\], got NoneType"),
    ({"poses": [[1.0]]}, TypeError, "poses must be a tensor .* got list"),
    ({"poses": torch.randn(5, 3)}, ValueError, r"poses must be \[B, I, D_in\], got 2 dimensions: \(5, 3\)"),
    ({"poses": torch.randn(2, 5, 3, 1)}, ValueError, "poses must be .* got 4 dimensions"),
    ({"poses": torch.ones(2, 5, 3, dtype=torch.int32)}, TypeError, "poses must be float64, .* got torch.int32"),
    ({"poses": torch.ones(2, 5, 3, dtype=torch.complex64)}, TypeError, "poses must be float64, .* got torch.complex64"),
    ({"poses": torch.ones(2, 5, 3, dtype=torch.bool)}, TypeError, "poses must be float64, .* got torch.bool"),
    ({"poses": torch.randn(2, 5, 3).double()}, TypeError, "weight must have the dtype of .* torch.float64, got"),
    ({"poses": torch.randn(2, 5, 3, device="meta")}, ValueError, "weight must be on the device of .* meta, got cpu"),
    ({"poses": torch.randn(2, 7, 3)}, ValueError, r"weight must have I = 7 or 1 .* got \(5, 4, 6, 3\)"),
    ({"poses": torch.randn(2, 5, 8)}, ValueError, r"weight must have D_in = 8 on its last axis, .* got \(5, 4, 6, 3\)"),
    ({"weight": torch.randn(4, 6, 3)}, ValueError, r"weight must be \[I or 1, J or 1, D_out, D_in\], got 3 dimensions"),
    ({"weight": torch.randn(5, 4, 3, 6)}, ValueError, "weight must have D_in = 3"),
    ({"weight": torch.randn(5, 0, 6, 3)}, ValueError, "J, D_out and D_in must be at least 1"),
    ({"weight": torch.randn(5, 4, 0, 3)}, ValueError, "J, D_out and D_in must be at least 1"),
    ({"weight": torch.randn(5, 4, 6, 0), "poses": torch.randn(2, 5, 0)}, ValueError, "D_in must be at least 1"),
]

VOTES_ONLY = [
    ({"votes": None}, TypeError, r"votes must be a tensor \[B, I, J or 1, D_out\], got NoneType"),
    ({"votes": torch.randn(2, 5, 4)}, ValueError, "votes must be .* got 3 dimensions"),
    ({"votes": torch.randn(2, 5, 0, 6)}, ValueError, "J and D_out must be at least 1"),
    ({"votes": torch.randn(2, 5, 4, 0)}, ValueError, "J and D_out must be at least 1"),
    ({"votes": torch.ones(2, 5, 4, 6, dtype=torch.int64)}, TypeError, "votes must be float64, .* got torch.int64"),
]


def words(value: object) -> str:
    """The message of a case, and nothing of its tensors: the same name in every process."""
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("changed", "error", "message"), OPTIONS + POSES_AND_WEIGHT, ids=words)
def test_dynamic_routing(changed, error, message):
    dynamic_routing(**GOOD)
    with pytest.raises(error, match=message):
        dynamic_routing(**{**GOOD, **changed})


@pytest.mark.parametrize(("changed", "error", "message"), OPTIONS + VOTES_ONLY, ids=words)
def test_route_votes(changed, error, message):
    route_votes(**VOTES)
    with pytest.raises(error, match=message):
        route_votes(**{**VOTES, **changed})


@pytest.mark.parametrize(("changed", "error", "message"), OPTIONS + POSES_AND_WEIGHT, ids=words)
def test_routing_trace(changed, error, message):
    if changed.keys() & {"backend", "detach"}:
        error, message = TypeError, "unexpected keyword argument"
    with pytest.raises(error, match=message):
        routing_trace(**{**GOOD, **changed})


def test_under_autocast_only_a_float32_prior_and_bias_may_stay():
    half = {name: x.bfloat16() for name, x in GOOD.items()}
    prior = torch.zeros(5, 4)
    with pytest.raises(TypeError, match=r"prior must have the dtype .* torch.bfloat16, got torch.float32"):
        dynamic_routing(**half, prior=prior)
    with torch.autocast("cpu", torch.bfloat16):
        dynamic_routing(**GOOD, prior=prior)
        dynamic_routing(GOOD["poses"], half["weight"], prior=prior)
        with pytest.raises(TypeError, match=r"prior must have the dtype .* got torch.float64"):
            dynamic_routing(**GOOD, prior=prior.double())


PRIOR = CapsuleLayer(5, 3, 4, 6, learn_prior=True)
PRIMARY = PrimaryCapsules(2, 4, 8, 3)

LAYERS = [
    (lambda: CapsuleLayer(0, 3, 4, 6), ValueError, "in_capsules must be at least 1, got 0"),
    (lambda: CapsuleLayer(5, 3, 4.0, 6), TypeError, r"out_capsules must be an int, got 4\.0"),
    (lambda: CapsuleLayer(5, 3, 4, 6, 0), ValueError, "num_iterations must be at least 1, got 0"),
    (lambda: CapsuleLayer(5, 3, 4, 6, True), TypeError, "num_iterations must be an int, got True"),
    (lambda: CapsuleLayer(5, 3, 4, 6, share_weight="all"), ValueError, "share_weight must be one of 'none', 'inputs'"),
    (lambda: CapsuleLayer(5, 3, 4, 6, learn_prior=True, detach=True), ValueError, "learn_prior needs detach=False"),
    (lambda: CapsuleLayer(5, 3, 4, 6, leeky=True), TypeError, "CapsuleLayer has no option leeky"),
    (lambda: CapsuleLayer(5, 3, 4, 6, routing=None), TypeError, "routing must be a function, got None"),
    (lambda: PRIOR(GOOD["poses"], prior=0.5), TypeError, "prior must be a tensor"),
    (lambda: PRIOR(GOOD["poses"], prior=torch.zeros(4, dtype=torch.int64)), TypeError, "prior must be float64"),
    (lambda: PRIOR(GOOD["poses"], prior=torch.zeros(7)), ValueError, "prior must broadcast"),
    (lambda: PRIMARY(None), TypeError, "features must be .* got NoneType"),
    (lambda: PRIMARY(torch.zeros(1, 2, 5, 5, dtype=torch.int32)), TypeError, "features must be .* got torch.int32"),
    (lambda: PRIMARY(torch.zeros(1, 2, 5, 5).double()), TypeError, "features must have the dtype of the parameters"),
    (lambda: PRIMARY(torch.zeros(1, 3, 5, 5)), ValueError, r"features must be \[B, C, H, W\] with C = 2, got"),
    (lambda: PRIMARY(torch.zeros(2, 5, 5)), ValueError, r"features must be .* got \(2, 5, 5\)"),
    (lambda: PRIMARY(torch.zeros(1, 2, 2, 5)), ValueError, "smaller than the kernel, 3x3"),
    (lambda: PrimaryCapsules(2, 4, 8, 3, padding=-1), ValueError, "padding must be at least 0, got -1"),
    (
        lambda: PrimaryCapsules(2, 4, 8, 3, padding=1.5),
        TypeError,
        r"padding must be an int or a pair of ints .* got 1\.5",
    ),
    (lambda: PrimaryCapsules(2, 4, 8, (3, 0)), ValueError, r"kernel_size must be at least 1, got \(3, 0\)"),
    (
        lambda: PrimaryCapsules(2, 4, 8, (3, 3, 3)),
        TypeError,
        r"kernel_size must be an int or a pair .* got \(3, 3, 3\)",
    ),
    (lambda: PrimaryCapsules(2, 4, 8, 3, stride=(1, True)), TypeError, r"stride must be an int or a pair of ints"),
    (lambda: PrimaryCapsules(2, 4, 8, (1, 9))(torch.zeros(1, 2, 1, 8)), ValueError, "smaller than the kernel, 1x9"),
    (lambda: PRIMARY(torch.zeros(1, 5, 5, 2)), ValueError, r"channels last\? features.movedim\(3, 1\) puts them"),
    (lambda: PRIMARY(torch.zeros(1, 2, 5)), ValueError, r"features.unsqueeze\(2\) adds the missing axis"),
    (lambda: CapsuleLayer.from_weight(None, "I J D_out D_in"), TypeError, "weight must be .* got NoneType"),
    (lambda: CapsuleLayer.from_weight(torch.ones(2, 2, dtype=torch.int64), "D_out D_in"), TypeError, "got torch.int64"),
    (lambda: CapsuleLayer.from_weight(torch.randn(5, 4, 6, 3), None), TypeError, "axes must be a string, got None"),
    (lambda: CapsuleLayer.from_weight(torch.randn(5, 4, 6, 3), "(I (J D_out D_in"), ValueError, "pairs of parentheses"),
    (
        lambda: CapsuleLayer.from_weight(torch.randn(5, 3, 24), "I D_in (J D_out)", out_capsules=0),
        ValueError,
        "out_capsules must be at least 1, got 0",
    ),
    (lambda: CapsuleLayer(5, 3, 4, 6)(torch.randn(2, 7, 3)), ValueError, "weight must have I = 7 or 1"),
    (lambda: CapsuleLayer(5, 3, 4, 6)(GOOD["poses"], num_iterations=0), ValueError, "num_iterations must be at least"),
    (lambda: PrimaryCapsules(2, 4, 8, 3, layout="rows"), ValueError, "layout must be one of 'capsule-major'"),
    (lambda: PrimaryCapsules(2, 0, 8, 3), ValueError, "types must be at least 1, got 0"),
    (lambda: CapsuleLayer.from_weight(torch.randn(5, 4, 6, 3), "I J D_out"), ValueError, "must name D_in and D_out"),
    (lambda: CapsuleLayer.from_weight(torch.randn(5, 4, 6, 3), "I J K D_in D_out"), ValueError, "made of I, J"),
    (lambda: CapsuleLayer.from_weight(torch.randn(5, 4), "I J D_out D_in"), ValueError, "has 4 axes, the weight 2"),
    (
        lambda: CapsuleLayer.from_weight(torch.randn(5, 3, 24), "I D_in (J D_out)"),
        ValueError,
        "size of J or D_out must",
    ),
    (
        lambda: CapsuleLayer.from_weight(torch.randn(5, 3, 24), "I D_in (J D_out)", out_capsules=5),
        ValueError,
        r"axis \(J D_out\) of size 24 is not \[5, 4\]",
    ),
    (
        lambda: CapsuleLayer.from_weight(torch.randn(5, 4, 6, 3), "I J D_out D_in", out_dim=7),
        ValueError,
        r"axis \(D_out\) of size 6 is not \[7\]",
    ),
    (lambda: CapsuleLayer.from_weight(torch.randn(4, 6, 3), "J D_out D_in"), ValueError, "do not tell in_capsules"),
    (
        lambda: CapsuleLayer.from_weight(torch.randn(5, 6, 3), "I D_out D_in", out_capsules=4),
        ValueError,
        "shared over J only",
    ),
    (lambda: Decoder((1, 8, 8), 10, 0), ValueError, "capsule_dim must be at least 1, got 0"),
    (lambda: Decoder((1, 8, 8), 4, 6)(torch.randn(2, 4, 6), torch.tensor([0, 4])), ValueError, r"labels must lie in 0"),
    (lambda: Decoder((1, 8, 8), 4, 6, hidden=(0,)), ValueError, r"hidden\[0\] must be at least 1, got 0"),
    (lambda: Decoder((1, 8, 8), 4, 6)(torch.randn(2, 1, 6), torch.tensor([0, 1])), ValueError, r"= \[B, 4, 6\], got"),
    (lambda: Decoder((1, 8, 8), 4, 6)(None), ValueError, r"poses must be \[B, J, D_out\] = .* got NoneType"),
    (lambda: CapsNet((1, 28, 28), 10, capsule_dim=0), ValueError, "capsule_dim must be at least 1, got 0"),
    (lambda: CapsNet((1, 28, 28), 10, foo=3), TypeError, "no option foo"),
    (lambda: CapsNet((1, 16, 28), 10, kernel_size=9), ValueError, r"\(1, 16, 28\) is too small .* at least 17 and 17"),
    (
        lambda: CapsNet((1, 2, 28), 10, kernel_size=(2, 9), stem_stride=2, padding=(0, 1)),
        ValueError,
        r"kernel_size \(2, 9\): height and width must be at least 4 and 19",
    ),
    (lambda: CapsNet((1, 28, 28), 10, stem_stride=0), ValueError, "stem_stride must be at least 1, got 0"),
    (lambda: CapsNet((1, 28, 28), 10, padding="same"), TypeError, "padding must be an int or a pair of ints"),
    (lambda: CapsNet((28, 28), 10), ValueError, r"image_shape must be \(C, H, W\), got \(28, 28\)"),
    (lambda: CapsNet(28, 10), ValueError, r"image_shape must be \(C, H, W\), got 28"),
    (lambda: CapsNet((1.0, 28, 28), 10), TypeError, r"image_shape's C must be an int, got 1\.0"),
    (lambda: CapsNet((1, 28, 28), 0), ValueError, "num_classes must be at least 1, got 0"),
    (lambda: CapsNet((1, 28, 28), 10, primary_stride=0), ValueError, "primary_stride must be at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), LAYERS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_layers_and_models(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.fixture(scope="module")
def network():
    return CapsNet((3, 9, 9), 4, stem_channels=4, kernel_size=3, types=2, primary_dim=4)


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (
            torch.rand(2, 1, 9, 9),
            None,
            ValueError,
            r"images must be \[B, C, H, W\] = \[B, 3, 9, 9\], got \(2, 1, 9, 9\)",
        ),
        (torch.rand(2, 3, 8, 9), None, ValueError, r"images must be .* got \(2, 3, 8, 9\)"),
        (torch.rand(3, 9, 9), None, ValueError, r"images must be .* got \(3, 9, 9\)"),
        (torch.ones(2, 3, 9, 9, dtype=torch.uint8), None, TypeError, "images must be a floating-point .* torch.uint8"),
        (None, None, TypeError, "images must be .* got NoneType"),
        (
            torch.rand(2, 3, 9, 9).double(),
            None,
            TypeError,
            "images must have the dtype of the parameters, torch.float32",
        ),
        (torch.rand(2, 3, 9, 9), torch.tensor([0, 4]), ValueError, r"labels must lie in 0 \.\. 3, got 0 \.\. 4"),
        (torch.rand(2, 3, 9, 9), torch.tensor([0]), ValueError, r"labels must be \[B\] = \[2\], or bool \[B, J\]"),
        (torch.rand(2, 3, 9, 9), torch.tensor([0.0, 1.0]), TypeError, r"labels must be an int64.*, or bool \[B, J\]"),
        (torch.rand(2, 3, 9, 9), torch.ones(2, 4), TypeError, r"or bool \[B, J\] for several classes .* torch.float32"),
        (torch.rand(2, 3, 9, 9), torch.ones(2, 4).long(), ValueError, r"or bool \[B, J\] for several .* got \(2, 4\)"),
        (torch.rand(2, 3, 9, 9), torch.ones(2, 3).bool(), ValueError, r"bool labels must be \[B, J\] = \[2, 4\], got"),
        (torch.rand(2, 9, 9, 3), None, ValueError, r"are the channels last\? images.movedim\(3, 1\) puts them first"),
        (torch.rand(3, 9, 9), None, ValueError, r"images.unsqueeze\(0\) adds the missing axis"),
    ],
    ids=words,
)
def test_network(network, images, labels, error, message):
    with pytest.raises(error, match=message):
        network(images, labels)


def test_network_without_decoder_cannot_reconstruct():
    network = CapsNet((1, 9, 9), 4, stem_channels=4, kernel_size=3, types=2, primary_dim=4, decoder=False)
    with pytest.raises(ValueError, match="decoder=False: it cannot reconstruct"):
        network.reconstruct(torch.randn(2, 4, 16))


def test_compiled_calls_are_refused_too():
    """The checks are part of the traced function; Dynamo passes a ValueError of the user's code on as it is."""
    compiled = torch.compile(dynamic_routing, backend="aot_eager")
    with pytest.raises(ValueError, match="num_iterations must be at least 1"):
        compiled(**GOOD, num_iterations=0)
    with pytest.raises(ValueError, match="weight must have D_in = 8"):
        compiled(torch.randn(2, 5, 8), GOOD["weight"])
