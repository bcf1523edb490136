"""PrimaryCapsules, CapsuleLayer, Decoder and CapsNet."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastcaps
from fastcaps import CapsNet, CapsuleLayer, Decoder, PrimaryCapsules, dynamic_routing, squash

SMALL = {"stem_channels": 8, "kernel_size": 3, "types": 4, "primary_dim": 4, "primary_stride": 1, "capsule_dim": 6}


# ---------------------------------------------------------------------------------------------------- primary capsules


@pytest.mark.parametrize("layout", ["capsule-major", "dimension-major", "flat"])
def test_primary_layouts(layout):
    types, dim = 3, 4
    layer = PrimaryCapsules(2, types, dim, kernel_size=3, stride=2, padding=1, layout=layout)
    features = torch.randn(2, 2, 7, 9)
    maps = layer.conv(features)  # [2, 12, 4, 5]
    poses = layer(features)
    assert poses.shape == (2, types * 4 * 5, dim)
    for b in range(2):
        for kind in range(types):
            for row in range(4):
                for column in range(5):
                    capsule = (kind * 4 + row) * 5 + column
                    if layout == "capsule-major":
                        expected = maps[b, kind * dim : (kind + 1) * dim, row, column]
                    elif layout == "dimension-major":
                        expected = maps[b, kind::types, row, column]
                    else:
                        expected = maps[b].flatten()[capsule * dim : (capsule + 1) * dim]
                    torch.testing.assert_close(poses[b, capsule], squash(expected))


def test_primary_capsules_of_signals():
    layer = PrimaryCapsules(16, types=3, pose_dim=4, kernel_size=(1, 9), stride=(1, 2), padding=(0, 1))
    signals = torch.randn(2, 16, 179)
    poses = layer(signals.unsqueeze(2))
    maps = nn.functional.conv1d(signals, layer.conv.weight[:, :, 0], layer.conv.bias, stride=2, padding=1)
    expected = maps.unflatten(1, (3, 4)).movedim(2, -1).flatten(1, 2)  # [B, types * L, pose_dim]
    torch.testing.assert_close(poses, squash(expected))
    assert poses.shape == (2, 3 * 87, 4)


def test_one_size_is_a_pair_of_it():
    torch.manual_seed(0)
    one = PrimaryCapsules(2, 3, 4, 3, 2, 1)
    torch.manual_seed(0)
    pairs = PrimaryCapsules(2, 3, 4, (3, 3), [2, 2], (1, 1))
    features = torch.randn(2, 2, 7, 9)
    assert one(features).equal(pairs(features))
    assert repr(one) == repr(pairs)


def test_primary_pose_dim_was_dim_in_0_1():
    features = torch.randn(2, 2, 7, 9)
    layer = PrimaryCapsules(2, 3, pose_dim=4, kernel_size=3)
    with pytest.warns(DeprecationWarning, match="PrimaryCapsules: dim= is now pose_dim=") as warned:
        old = PrimaryCapsules(2, 3, dim=4, kernel_size=3)
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="PrimaryCapsules.dim is now PrimaryCapsules.pose_dim") as warned:
        assert old.dim == layer.pose_dim == 4
    assert warned[0].filename == __file__
    state = {name: value for name, value in vars(layer).items() if name != "pose_dim"} | {"dim": 4}  # a pickle of 0.1
    unpickled = PrimaryCapsules.__new__(PrimaryCapsules)
    unpickled.__setstate__(state)
    assert torch.equal(unpickled(features), layer(features))
    assert torch.equal(copy.deepcopy(layer)(features), layer(features))


# ------------------------------------------------------------------------------------------------------ capsule layer


def test_layer_is_the_op_on_its_parameters(implementation):
    backend, device = implementation
    layer = CapsuleLayer(7, 3, 5, 4, 2, bias=True, learn_prior=True, leaky=True, backend=backend, device=device)
    nn.init.normal_(layer.prior)
    poses, mask = torch.randn(6, 7, 3, device=device), torch.rand(6, 7, device=device) < 0.5
    prior = torch.randn(6, 7, 5, device=device)
    result = layer(poses, mask=mask, prior=prior, num_iterations=4)
    expected = dynamic_routing(
        poses, layer.weight, num_iterations=4, prior=prior + layer.prior, bias=layer.bias, mask=mask, leaky=True,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(result, expected)
    assert not torch.equal(result, layer(poses, mask=mask, prior=prior))  # 2 iterations are not 4
    result.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("share", ["none", "inputs", "both"])
def test_sharing(share):
    layer = CapsuleLayer(7, 3, 5, 4, share_weight=share)
    shape = {"none": (7, 5, 4, 3), "inputs": (1, 5, 4, 3), "both": (1, 1, 4, 3)}[share]
    assert layer.weight.shape == shape
    poses = torch.randn(2, 7, 3)
    out = layer(poses)
    assert out.shape == (2, 5, 4)
    torch.testing.assert_close(out, dynamic_routing(poses, layer.weight.expand(7, 5, 4, 3)))
    if share == "both":
        torch.testing.assert_close(out, out[:, :1].expand_as(out))
        prior = torch.randn(2, 7, 5)
        assert layer(poses, prior=prior).std(dim=1).max() > 0
    if share != "none":
        assert layer(torch.randn(2, 11, 3)).shape == (2, 5, 4)


def test_another_algorithm_needs_no_registration():
    seen = {}

    def mean_vote(poses, weight, *, num_iterations, temperature, **given):
        seen.update(num_iterations=num_iterations, temperature=temperature, **given)
        return torch.einsum("ijdk,bik->bjd", weight, poses) / poses.shape[1]

    layer = CapsuleLayer(7, 3, 5, 4, routing=mean_vote, temperature=2.0)
    assert layer(torch.randn(2, 7, 3)).shape == (2, 5, 4)
    assert seen == {"num_iterations": 3, "temperature": 2.0}
    assert "routing=mean_vote, temperature=2.0" in repr(layer)


def test_state_dict_of_the_widely_copied_layer_loads():
    weights = torch.randn(1, 7, 5, 4, 3)
    layer = CapsuleLayer(7, 3, 5, 4)
    layer.load_state_dict({"weights": weights})
    assert torch.equal(layer.weight, weights[0])
    network = nn.Sequential(nn.Identity(), CapsuleLayer(7, 3, 5, 4))
    network.load_state_dict({"1.weights": weights})
    assert torch.equal(network[1].weight, weights[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"weights": weights.transpose(3, 4)})
    assert set(layer.state_dict()) == {"weight"}


def test_copies_pickles_and_saves():
    layer = CapsuleLayer(7, 3, 5, 4, bias=True, learn_prior=True, eps=1e-8)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    restored = CapsuleLayer(7, 3, 5, 4, bias=True, learn_prior=True, eps=1e-8)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    poses = torch.randn(2, 7, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), restored):
        assert torch.equal(twin(poses), layer(poses))
        assert repr(twin) == repr(layer)
    assert repr(layer) == "CapsuleLayer(7, 3, 5, 4, 3, bias=True, learn_prior=True, eps=1e-08)"


def test_meta_device_then_real_parameters():
    layer = CapsuleLayer(7, 3, 5, 4, bias=True, device="meta", dtype=torch.float64)
    assert layer.weight.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.weight.dtype == torch.float64
    assert layer(torch.randn(2, 7, 3, dtype=torch.float64)).isfinite().all()


def test_a_state_dict_without_a_bias_loads_as_bias_0():
    old, new = CapsuleLayer(7, 3, 5, 4), CapsuleLayer(7, 3, 5, 4, bias=True)
    new.load_state_dict(old.state_dict())
    poses = torch.randn(2, 7, 3)
    assert torch.equal(new(poses), old(poses))
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bias"'):
        old.load_state_dict(new.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight", "bias"'):
        new.load_state_dict({})


def test_initial_parameters_are_the_documented_ones():
    layer = CapsuleLayer(400, 8, 10, 16, bias=True, learn_prior=True)
    deviation = (10 / (400 * 16)) ** 0.5
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.02)  # 512,000 draws: 20 standard errors
    torch.testing.assert_close(layer.bias.norm(dim=1), torch.full((10,), 1 / 3))
    assert (layer.prior == 0).all()


@pytest.mark.parametrize("T", [1, 3, 5])
@pytest.mark.parametrize(("I", "J"), [(72, 10), (2048, 10), (512, 100), (72, 1000)])
def test_initial_lengths_hardly_depend_on_sizes(I, J, T):
    # Five pixels and kernels of three leave one place, so that there are as many capsules as types.
    network = CapsNet(
        (1, 5, 5), J, stem_channels=1, kernel_size=3, types=I, primary_dim=2, num_iterations=T, decoder=False
    )
    directions = nn.functional.normalize(torch.randn(2, I, 2), dim=2)
    for length in (0.05, 0.3, 0.9):
        lengths = network.capsules(length * directions).norm(dim=2)
        assert 0.05 < lengths.mean() < 0.2


AXES = {
    "I J D_out D_in": ((0, 1, 2, 3), {}),
    "1 I J D_out D_in": ((0, 1, 2, 3), {}),
    "J I D_in D_out": ((1, 0, 3, 2), {}),
    "1 J I D_out D_in 1": ((1, 0, 2, 3), {}),
    "I D_in (J D_out)": ((0, 3, 1, 2), {"out_capsules": 5}),
    "I D_in (D_out J)": ((0, 3, 2, 1), {"out_dim": 4}),
    "(I J) (D_out D_in)": ((0, 1, 2, 3), {"in_capsules": 7, "in_dim": 3}),
}


@pytest.mark.parametrize("axes", AXES)
def test_from_weight(axes):
    order, options = AXES[axes]
    canonical = torch.randn(7, 5, 4, 3, dtype=torch.float64)
    foreign = canonical.permute(order).contiguous()
    sizes = {"I": 7, "J": 5, "D_out": 4, "D_in": 3, "1": 1}
    shape = [sizes[name] for name in axes.replace("(", "").replace(")", "").split()]
    foreign = foreign.reshape(shape)
    for group in axes.split("("):  # merge what stands in parentheses
        if ")" in group:
            first = axes.replace("(", "").replace(")", "").split().index(group.split()[0])
            position = foreign.dim() - len(shape) + first if foreign.dim() < len(shape) else first
            foreign = foreign.flatten(position, position + 1)
    layer = CapsuleLayer.from_weight(foreign, axes, num_iterations=2, **options)
    assert torch.equal(layer.weight, canonical)
    assert (layer.in_capsules, layer.in_dim, layer.out_capsules, layer.out_dim) == (7, 3, 5, 4)
    assert layer.num_iterations == 2
    foreign.zero_()
    assert layer.weight.abs().max() > 0  # a copy


def test_from_a_shared_weight():
    layer = CapsuleLayer.from_weight(torch.randn(5, 4, 3), "J D_out D_in", in_capsules=7)
    assert layer.share_weight == "inputs"
    assert layer(torch.randn(2, 7, 3)).shape == (2, 5, 4)
    layer = CapsuleLayer.from_weight(torch.randn(3, 4), "D_in D_out", in_capsules=7, out_capsules=5, bias=True)
    assert layer.share_weight == "both"
    assert layer(torch.randn(2, 7, 3)).shape == (2, 5, 4)


def test_from_weight_axes_were_layout_in_0_1():
    weight = torch.randn(5, 7, 3, 4)
    with pytest.warns(DeprecationWarning, match=r"CapsuleLayer\.from_weight: layout= is now axes=") as warned:
        old = CapsuleLayer.from_weight(weight, layout="J I D_in D_out")
    assert warned[0].filename == __file__
    assert torch.equal(old.weight, CapsuleLayer.from_weight(weight, axes="J I D_in D_out").weight)


# -------------------------------------------------------------------------------------------------------------- models


def test_the_papers_network():
    network = CapsNet((1, 28, 28), 10)
    assert network.capsules.weight.shape == (1152, 10, 16, 8)
    # Sabour et al. (2017), section 4: 8.2 M parameters, 6.8 M without the decoder.
    assert sum(p.numel() for p in network.parameters()) == 8_215_728
    assert sum(p.numel() for p in CapsNet((1, 28, 28), 10, decoder=False).parameters()) == 6_804_384
    output = network(torch.rand(2, 1, 28, 28))
    assert output.poses.shape == (2, 10, 16)
    assert output.reconstruction.shape == (2, 1, 28, 28)
    torch.testing.assert_close(output.lengths, output.poses.norm(dim=-1))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 9), (2, 5, 17)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_any_image_size(shape, stride):
    network = CapsNet(shape, 7, **{**SMALL, "primary_stride": stride}, bias=True, share_weight="inputs")
    images = torch.rand(3, *shape)
    output = network(images, torch.tensor([0, 6, 3]))
    assert network.primary_poses(images).shape[1] == network.capsules.in_capsules
    assert output.lengths.shape == (3, 7)
    assert output.reconstruction.shape == images.shape
    assert torch.equal(network.predict(images), output.lengths.argmax(1))
    network.loss(output, images, torch.tensor([0, 6, 3])).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert network(images[:0]).lengths.shape == (0, 7)


def test_decoder_sees_only_the_chosen_capsule():
    decoder = Decoder((1, 3, 3), 4, 6, hidden=(10,))
    poses, labels = torch.randn(2, 4, 6, requires_grad=True), torch.tensor([1, 3])
    decoder(poses, labels).sum().backward()
    chosen = torch.zeros(2, 4, dtype=torch.bool)
    chosen[[0, 1], [1, 3]] = True
    assert (poses.grad[~chosen] == 0).all()
    assert (poses.grad[chosen] != 0).any()


def test_reconstruction_follows_the_label_or_the_longest():
    network = CapsNet((1, 8, 8), 5, **SMALL)
    images = torch.rand(4, 1, 8, 8)
    output = network(images)
    longest = network.predict(images)
    assert torch.equal(output.reconstruction, network(images, longest).reconstruction)
    assert torch.equal(output.reconstruction, network.reconstruct(output.poses))
    assert not torch.equal(output.reconstruction, network(images, (longest + 1) % 5).reconstruction)


def test_several_classes_in_an_image():
    network = CapsNet((1, 8, 8), 5, **SMALL)
    images = torch.rand(3, 1, 8, 8)
    present = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    output = network(images, present)
    unmasked = (output.poses * present[..., None]).flatten(1)
    torch.testing.assert_close(output.reconstruction.flatten(1), network.decoder.layers(unmasked))
    assert output.reconstruction.equal(network.reconstruct(output.poses, present))
    assert output.reconstruction[1].equal(network.reconstruct(output.poses, torch.tensor([0, 4, 0]))[1])
    loss = network.loss(output, images, present)
    expected = fastcaps.losses.margin_loss(output.lengths, present)
    torch.testing.assert_close(loss, expected + fastcaps.losses.reconstruction_loss(output.reconstruction, images))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    one_hot = torch.eye(5).bool()[[3, 0, 4]]
    assert network(images, one_hot).reconstruction.equal(network(images, torch.tensor([3, 0, 4])).reconstruction)


def test_loss_is_the_papers():
    network = CapsNet((1, 8, 8), 5, **SMALL)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 4])
    output = network(images, labels)
    margin = fastcaps.losses.margin_loss(output.lengths, labels)
    squares = (output.reconstruction - images).square().sum() / 4
    torch.testing.assert_close(network.loss(output, images, labels), margin + 0.0005 * squares)
    weighted = network.loss(output, images, labels, reconstruction_weight=0.5)
    torch.testing.assert_close(weighted, margin + 0.5 * squares)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    margin = fastcaps.losses.margin_loss(output.lengths, labels, class_weights=weights)
    torch.testing.assert_close(network.loss(output, images, labels, class_weights=weights), margin + 0.0005 * squares)
    without = CapsNet((1, 8, 8), 5, **SMALL, decoder=False)
    output = without(images)
    assert output.reconstruction is None
    torch.testing.assert_close(
        without.loss(output, images, labels), fastcaps.losses.margin_loss(output.lengths, labels)
    )


def test_network_learns():
    """Fifty steps on sixteen images: the loss must fall to less than a fifth (it falls to about a twelfth)."""
    network = CapsNet((1, 8, 8), 4, **SMALL)
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 4
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    losses = []
    for _ in range(50):
        loss = fastcaps.losses.margin_loss(network(images, labels).lengths, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


def test_export(implementation):
    backend, device = implementation
    network = CapsNet((1, 8, 8), 5, **SMALL, backend=backend).to(device)
    images = torch.rand(3, 1, 8, 8, device=device)
    program = torch.export.export(network, (images,), dynamic_shapes={"images": {0: torch.export.Dim.DYNAMIC}})
    for B in (3, 5):
        images = torch.rand(B, 1, 8, 8, device=device)
        expected = network(images)
        for ours, wanted in zip(program.module()(images), expected, strict=True):
            torch.testing.assert_close(ours, wanted)
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("native_dynamic_routing_forward" in target for target in targets) == (backend == "native")


def test_exported_network_saves_and_loads(tmp_path):
    network = CapsNet((1, 8, 8), 5, **SMALL)
    images = torch.rand(3, 1, 8, 8)
    torch.export.save(torch.export.export(network, (images,)), tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for ours, expected in zip(loaded(images), network(images), strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradients_per_sample_and_meta_tensors():
    network = CapsNet((1, 8, 8), 5, **SMALL).double()
    images, labels = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 4, 2])
    parameters = dict(network.named_parameters())

    def loss(parameters, image, label):
        output = torch.func.functional_call(network, parameters, (image[None], label[None]))
        return network.loss(output, image[None], label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    network.loss(network(images, labels), images, labels).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name].mean(0), parameter.grad)
    output = network.to("meta")(images.to("meta"), labels.to("meta"))
    assert output.reconstruction.shape == images.shape


@pytest.mark.compiler
def test_compiled_network_trains_as_the_eager_one(implementation):
    backend, device = implementation
    images, labels = torch.rand(6, 1, 8, 8, device=device), torch.arange(6, device=device) % 5
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = CapsNet((1, 8, 8), 5, **SMALL, backend=backend).to(device).double()

        def step(images, labels, network=network):
            return network.loss(network(images, labels), images, labels)

        function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        loss = function(images.double(), labels)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in network.parameters())])
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


def test_trained_copy_moves_between_backends():
    network = CapsNet((1, 8, 8), 5, **SMALL, backend="native")
    twin = CapsNet((1, 8, 8), 5, **SMALL, backend="reference")
    twin.load_state_dict(network.state_dict())
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(network(images), twin(images))
