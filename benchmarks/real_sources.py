"""Public networks with capsule layers: where they are defined, how to build them, and what is wrong with them.

Each was read at the commit that is named; ``mistakes`` is what its code does otherwise than Sabour et al. 2017, in the
words of the doctor's checks. ``arguable`` is what may be said of it or not: the paper has nothing to compare it with.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from fastcaps.doctor.finding import (
    AGREEMENT,
    BATCH_MATES,
    CLASS_SCORES,
    INITIALISATION,
    INPUT_SQUASH,
    ITERATIONS,
    ROUTING,
    RUNS,
    SCRAMBLING,
    SOFTMAX_AXIS,
    SQUASH_AXIS,
    ZERO_CAPSULES,
)

Sample = Callable[[int], Any]  # so many samples, as the network is called with them


@dataclass(frozen=True)
class Source:
    """A network of a public repository.

    Attributes:
        repository: ``OWNER/NAME``.
        commit: at which it was read.
        module: that defines it, as it would be imported from ``folder``.
        build: the network, from that module.
        sample: what it is called with.
        mistakes: the checks of the doctor that should say "wrong" (or "suspicious").
        arguable: the checks that may say so.
        folder: inside the repository.
        given: names that files need and that would come from a command line, by module.
    """

    repository: str
    commit: str
    module: str
    build: Callable[[Any], nn.Module]
    sample: Sample
    mistakes: frozenset[str]
    arguable: frozenset[str] = frozenset()
    folder: str = "."
    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The repository and the module."""
        return f"{self.repository}:{self.module}"


def rand(*shape: int) -> Sample:
    """Uniform numbers in [0, 1)."""
    return lambda n: torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def mistakes(*checks: str) -> frozenset[str]:
    """A set of checks."""
    return frozenset(checks)


MNIST = rand(1, 28, 28)
CPU = torch.device("cpu")
HULA = Namespace(
    img_c=1, img_h=28, img_w=28, f_conv1=64, k_conv1=9, s_conv1=1, f_prim=256, k_prim=9, s_prim=2, primary_cap_dim=8,
    digit_cap_dim=16, num_classes=10, num_iterations=3, add_decoder=True, h1=512, h2=1024, share_weight=False,
)  # fmt: skip
MHY = Namespace(caps_num=32, caps_dim=8, out_dim=16, cuda=False)
FIXED_BATCH = 7  # dragen1860's network takes one size of the batch


def narrow(network: nn.Module, channels: int = 16) -> nn.Module:
    """The same with fewer than 256 channels between its two convolutions, which is where the time goes."""
    for module in network.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if module.in_channels <= 3 and module.out_channels == 256:
            module.weight = nn.Parameter(module.weight.detach()[:channels])
            module.bias = None if module.bias is None else nn.Parameter(module.bias.detach()[:channels])
            module.out_channels = channels
        elif module.in_channels == 256 and module.groups == 1:
            module.weight = nn.Parameter(module.weight.detach()[:, :channels])
            module.in_channels = channels
    return network


def capsfake(module: Any) -> nn.Module:
    """With fewer frequencies than the 102,400 of an image."""
    network: nn.Module = module.CapsNet()
    network.DCT_emb = module.DCT_emb(64, 768)
    return network


def dragen(module: Any) -> nn.Module:
    """With the size of the batch that the sample has."""
    module.glo_batch_size = module.CapsNet.batch_size = FIXED_BATCH
    return narrow(module.CapsNet(None))


def filled(network: nn.Module) -> nn.Module:
    """Normal numbers in parameters that the constructor leaves as they lie in memory."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


SOURCES = (
    Source(
        "XifengGuo/CapsNet-Pytorch", "8a5a3572d91eb9479425168d3d565eb02e78be46", "capsulenet",
        lambda m: narrow(m.CapsuleNet([1, 28, 28], 10, 3)), MNIST, mistakes(SCRAMBLING),
    ),
    Source(
        "gram-ai/capsule-networks", "6eeda0882bff819b2e788be40cf87fe69f20f26a", "capsule_network",
        lambda m: narrow(m.CapsuleNet()), MNIST, mistakes(SOFTMAX_AXIS, CLASS_SCORES, ZERO_CAPSULES),
        given={"capsule_network": {"Variable": Variable}},
    ),
    Source(
        "higgsfield/Capsule-Network-Tutorial", "ef447daf329e26101c7636173f80f8be2536b9e8", "Capsule Network",
        lambda m: narrow(m.CapsNet()), MNIST,
        mistakes(BATCH_MATES, SOFTMAX_AXIS, SQUASH_AXIS, SCRAMBLING, ZERO_CAPSULES),
    ),
    Source(
        "jindongwang/Pytorch-CapsuleNet", "c5031b719dcd2e67bbc6ed4d1557af4362c1d9d0", "capsnet",
        lambda m: narrow(m.CapsNet()), MNIST,
        mistakes(BATCH_MATES, SOFTMAX_AXIS, SQUASH_AXIS, SCRAMBLING, ZERO_CAPSULES),
    ),
    Source(
        "danielhavir/capsule-network", "1c37c2f10d3485672fd609748502a45d40e54bd7", "model",
        lambda m: m.CapsuleNetwork((1, 28, 28), 64, 8, 10, 16, 3, CPU), MNIST, mistakes(SCRAMBLING, ZERO_CAPSULES),
    ),
    Source(
        "adambielski/CapsNet-pytorch", "bee0cbee5bb8b30399e75c751d3085c2f261dea3", "net",
        lambda m: narrow(m.CapsNet(3)), MNIST, mistakes(ITERATIONS, ZERO_CAPSULES),
    ),
    Source(
        "cedrickchee/capsule-net-pytorch", "7707ea0c3faaf6dded753d7c16641617a9954d9a", "model",
        lambda m: m.Net(1, 64, 8, 1152, 10, 16, 3, False, 0.0005, 28, 28, False), MNIST,
        mistakes(BATCH_MATES, INPUT_SQUASH, ZERO_CAPSULES),
    ),
    Source(
        "timomernick/pytorch-capsule", "d2e9aa876793408350e0521648d59990665d0df3", "capsule_network",
        lambda m: m.CapsuleNetwork(28, 28, 1, 1, 64, 8, 1152, 10, 16), MNIST,
        mistakes(BATCH_MATES, SOFTMAX_AXIS, SQUASH_AXIS, INPUT_SQUASH, ZERO_CAPSULES),
    ),
    Source(
        "Riroaki/CapsNet", "695c35873922d79f78119cff6225ad81ef573e36", "capsnet",
        lambda m: narrow(m.CapsNet()), MNIST, mistakes(SCRAMBLING, ZERO_CAPSULES),
    ),
    Source(
        "motokimura/capsnet_pytorch", "76befdaeb166b381870fa92a44800e16c4bf215f", "capsule_network",
        lambda m: narrow(m.CapsuleNetwork(3, True, -1)), MNIST, mistakes(BATCH_MATES, ZERO_CAPSULES),
    ),
    Source(
        "hula-ai/capsule_network_dynamic_routing", "1865a2a5322714aac918bdf3119b749572fb111c", "capsnet",
        lambda m: m.CapsuleNet(HULA), MNIST, mistakes(ZERO_CAPSULES), given={"config": {"options": HULA}},
    ),
    Source(
        "hula-ai/capsule_network_dynamic_routing", "1865a2a5322714aac918bdf3119b749572fb111c", "capsnet_v2",
        lambda m: m.CapsuleNet(HULA), MNIST, mistakes(SOFTMAX_AXIS, ZERO_CAPSULES),
        given={"config": {"options": HULA}},
    ),
    Source(
        "gchochla/capsules-utils", "84f3688e8769240d3b65f9dd4768848300a8e67f", "examples.capsnet",
        lambda m: narrow(m.CapsNet()), MNIST, mistakes(ZERO_CAPSULES),
    ),
    Source(
        "cezannec/capsule_net_pytorch", "607b7ab12daaebc9d8ae8aef305dc76cbc765787", "Capsule_Network",
        lambda m: narrow(m.CapsuleNetwork()), MNIST, mistakes(SOFTMAX_AXIS, ZERO_CAPSULES),
    ),
    Source(
        "AleAyotte/FastCapsNet", "043a1e74777153245cf0d75dfed27f93e075a2a5", "CapsNet",
        lambda m: narrow(m.CapsuleNet()), MNIST, mistakes(SOFTMAX_AXIS, CLASS_SCORES, ZERO_CAPSULES),
    ),
    Source(
        "labmlai/annotated_deep_learning_paper_implementations", "e6b3c8a6a2cdae4071bcde1abeaaf9a2bc37bd53",
        "labml_nn.capsule_networks.mnist", lambda m: narrow(m.MNISTCapsuleNetworkModel()), MNIST,
        mistakes(SOFTMAX_AXIS),
    ),
    Source(
        "laubonghaudoi/CapsNet_guide_PyTorch", "1d149490bedd4ec57320ed31e54b5a470635138a", "CapsNet",
        lambda m: m.CapsNet(Namespace(r=3, use_cuda=False)), MNIST,
        mistakes(ZERO_CAPSULES, INITIALISATION),  # with Adam at 1e-3 all lengths are 1 after 10 steps
    ),
    Source(
        "leftthomas/CapsNet", "5de2f45daadbe4377df4ccf8a4d31683d7f397bf", "capsnet",
        lambda m: narrow(m.CapsuleNet()), MNIST, mistakes(SOFTMAX_AXIS, CLASS_SCORES, ZERO_CAPSULES),
    ),
    Source(
        "leftthomas/CapsuleLayer", "2205a603ac1cb3d24673ea7796a4a7e817914712", "capsule_layer",
        lambda m: m.CapsuleLinear(10, 8, 16, 72, share_weight=False, routing_type="dynamic"), rand(72, 8),
        mistakes(), arguable=mistakes(SQUASH_AXIS),  # without squash in the last pass: an option
    ),
    Source(
        "yongheng1991/3D-point-capsule-networks", "f2d55d845f4bf74e931ee1eaeaf60f481e4c59ad", "pointcapsnet_ae",
        lambda m: m.PointCapsNet(1024, 16, 8, 16, 32), rand(3, 32), mistakes(ZERO_CAPSULES), folder="models",
    ),
    Source(
        "Taiba11/ABC-CapsNet", "b3b2dadc2bd8d5ba5693cd29760f99c434feff34", "models.capsule_network",
        lambda m: m.CapsuleNetwork1(32, 64), rand(32, 7, 7), mistakes(),
    ),
    Source(
        "Taibamajidwani/ABC-CapsNet", "3c14220486d18454ffd28839968c1a39d13f4772", "capsule_network",
        lambda m: m.CapsuleNetwork1(), rand(256, 20, 20), mistakes(RUNS),
    ),
    Source(
        "BaoBao0926/AlexCapsNet", "8e87cb242b0037cfc2ea5dad17012b24bbcc7146", "AlexNet_Module",
        lambda m: m.AlexCapsNet_CIFAR10(CPU), rand(3, 32, 32), mistakes(ZERO_CAPSULES),
    ),
    Source(
        "tuanrpt/CapsFake", "a3c5926b6bbcfa6562f1838c0a474fb679119471", "capsule_network", capsfake,
        lambda n: (rand(768)(n), rand(768)(n), rand(8, 8)(n), CPU),
        mistakes(BATCH_MATES, SOFTMAX_AXIS, SQUASH_AXIS), folder="CapsFake",
    ),
    Source(
        "Woodman718/FixCaps", "16d5adc6c165e6fd19a9dadb091bb8ea1ac5f6dd", "model",
        lambda m: m.FixCapsNet(3, 64, 8, 8 * 36, 16, mode="64"), rand(3, 64, 64),
        mistakes(BATCH_MATES, SOFTMAX_AXIS, SQUASH_AXIS, INPUT_SQUASH, ZERO_CAPSULES), folder="Module/HAM10000",
    ),
    Source(
        "dragen1860/CapsNet-Pytorch", "5c26cede005ee11946de6952c0faa54132d80504", "main", dragen,
        lambda n: MNIST(FIXED_BATCH), mistakes(BATCH_MATES, SQUASH_AXIS, INPUT_SQUASH, ZERO_CAPSULES),
        arguable=mistakes(ROUTING),  # its softmax is written by hand
    ),
    Source(
        "nishnik/CapsNet-PyTorch", "d05255736fa166d79729178ca11d9872b016fa34", "capsnet",
        lambda m: m.CapsNet(), MNIST, mistakes(RUNS),
    ),
    Source(
        "mhy12345/Capsnet-Pytorch", "c5a8863f87bd4dbf173da7ab476dc31145f9f189", "main",
        lambda m: narrow(m.CapsNet()), MNIST, mistakes(ZERO_CAPSULES), given={"main": {"args": MHY}},
    ),
    Source(
        "Minglin-Chen/Capsule-Network-in-PyTorch", "12608b705304eaa614a9aa27365367f83518787e", "models.CapsNet",
        lambda m: m.CapsNet(), MNIST, mistakes(ITERATIONS),
    ),
    Source(
        "oguzserbetci/capsule-network-pytorch", "70f8db9a02c6b153c20878d640a784dc6a29e914", "modules",
        lambda m: narrow(m.CapsuleNetwork()), MNIST,
        mistakes(BATCH_MATES, SOFTMAX_AXIS, SQUASH_AXIS, INPUT_SQUASH, ZERO_CAPSULES),
    ),
    Source(
        "lidq92/pytorch-capsule-networks", "4388cd36193348cbb10035008360330e67acdd41", "model.model",
        lambda m: m.CapsuleNetwork((1, 28, 28), 64, 8, 10, 16, 3, use_cuda=False), MNIST,
        mistakes(SCRAMBLING, ZERO_CAPSULES),
    ),
    Source(
        "psavine42/pytorch-capsule-networks", "3aac192fd5e923ee2e7f0bf7fe7c1f57eeb44149", "main",
        lambda m: m.CapsuleNet(num_layer1_convs=64, data_shape=[2, 1, 28, 28]), MNIST,
        mistakes(BATCH_MATES, SOFTMAX_AXIS, SQUASH_AXIS, CLASS_SCORES, ZERO_CAPSULES),
    ),
    Source(
        "SeyedParsa/capsule-networks-pytorch", "04706f766eba979a30426dff08979a8742f57ac5", "models.capsnet",
        lambda m: narrow(m.CapsNet(1152)), MNIST, mistakes(SOFTMAX_AXIS, SCRAMBLING, CLASS_SCORES, ZERO_CAPSULES),
    ),
    Source(
        "jeong-tae/CapsNet-pytorch", "e08253920895b3987d8f3f054ddd001c9e5e7654", "models.CapsNet",
        lambda m: narrow(m.capsNet(Namespace(r_iterations=3, cuda=False))), MNIST,
        mistakes(SQUASH_AXIS, INPUT_SQUASH, ZERO_CAPSULES),
    ),
    Source(
        "spikefairway/CapsNet-PyTorch", "76aaabaad01283333a5f73a564cb1461449b4449", "capsule_network",
        lambda m: narrow(m.CapsuleNetwork(3)), MNIST, mistakes(ZERO_CAPSULES),
    ),
    Source(
        "davrot/CapsNet-pytorch", "b1933a5d4a7dc0acb9bd989bca9558a3ab2b6cb1", "network",
        lambda m: narrow(m.network(with_reconstruction=False)[0]), MNIST, mistakes(ITERATIONS, ZERO_CAPSULES),
    ),
    Source(
        "manuelsh/capsule-networks-pytorch", "dd609d9a3b46dc21f489837c1fc1ff0e98747d0a",
        "capsule-network-model-pytorch-notebook",
        lambda m: m.CapsModel(1, 64, 9, 1, 64, 32, 8, 9, 2, 28, 10, 16, 3, 0.4), MNIST, mistakes(),
    ),
    Source(
        "nii-yamagishilab/Capsule-Forensics-v2", "e12f40539d6a0e2137f9d3adc41c05ca43fef173", "model_big",
        lambda m: m.CapsuleNet(2, -1), rand(256, 16, 16),
        mistakes(SOFTMAX_AXIS, AGREEMENT, INPUT_SQUASH, ZERO_CAPSULES),
        arguable=mistakes(CLASS_SCORES),  # its classes are entries of the poses, trained with a cross entropy
    ),
    Source(
        "SCLBD/DeepfakeBench", "8a4a7bf5e966c5c5618bc27d1719c3683eae9a04", "capsule_net_detector",
        lambda m: m.RoutingLayer(10, 2, 8, 4, 2), lambda n: (rand(8, 10)(n), False, 0.0),
        mistakes(SOFTMAX_AXIS, AGREEMENT, ZERO_CAPSULES), folder="training/detectors",
    ),
    Source(
        "mhaut/CapsNet-HSI", "d75af7c5110ca8363e91e1e57a0a9af703ed1419", "model",
        lambda m: m.CapsuleNet((30, 9, 9), 16, 3, 5), rand(30, 9, 9), mistakes(SCRAMBLING),
    ),
    Source(
        "alibaba/TorchEasyRec", "54cac3165a2adece9a932616463a5b6a2095b0ce", "tzrec.modules.capsule",
        lambda m: m.CapsuleLayer(
            Namespace(
                max_seq_len=20, max_k=4, high_dim=12, num_iters=3, routing_logits_scale=20.0,
                routing_logits_stddev=1.0, squash_pow=1.0, const_caps_num=True, routing_init_method="normal",
            ), 8,
        ),
        lambda n: (rand(20, 8)(n), torch.arange(n) % 20 + 1), mistakes(),
        arguable=mistakes(ITERATIONS),  # random logits that are replaced by their softmax: another algorithm
    ),
    Source(
        "ShiningCosmos/pytorch_ComiRec", "ad44d0612ec5538a24a15b1f606492abe6dcce34", "BasicModel",
        lambda m: filled(m.CapsuleNetwork(16, 20)), lambda n: (rand(20, 16)(n), torch.ones(n, 20), CPU),
        mistakes(SOFTMAX_AXIS),
    ),
    Source(
        "datawhalechina/torch-rechub", "5a73b2eebc3a670dc64c54971cc06a78ddd55394", "torch_rechub.basic.layers",
        lambda m: filled(m.CapsuleNetwork(16, 20, bilinear_type=0)), lambda n: (rand(20, 16)(n), torch.ones(n, 20)),
        mistakes(SOFTMAX_AXIS),
    ),
    Source(
        "yanx27/PointCapsNet", "e4ade2b40c3057a95bbb07b68db3d2538ec4d352", "PointCapsNetClf",
        lambda m: m.Routing(8, 16, 72, 10), lambda n: (rand(72, 8)(n), 3), mistakes(ZERO_CAPSULES),
        arguable=mistakes(ROUTING),  # its softmax is written by hand
    ),
    Source(
        "KushanChamindu/Capsule_network_text_pytorch", "1f6a80b2f0ecee3ee3eec49da488981758edf503", "layers.routing",
        lambda m: m.Routing(5, 16, (72, 8)), rand(72, 8), mistakes(SOFTMAX_AXIS),
    ),
    Source(
        "mavanb/capsnet_pytorch", "53694b384a2c848d52155aae5904dcdb1e7317d9", "nets",
        lambda m: m.ToyCapsNet(64, 10, 16, 40, 8, 3, False, False, []), rand(64), mistakes(RUNS),
    ),
)  # fmt: skip
