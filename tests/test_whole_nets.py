"""The laws of compression on whole nets of other people's libraries: full rank, half the model, what is left, and files."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision.models as vision
import transformers
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import make_layers
from torchvision.ops import MultiScaleRoIAlign

from tests.test_totals import torch_counts
from tests.tolerances import FLOAT64
from tnlayers import (
    SVD,
    FactorizedLayer,
    LowRank,
    MacsKept,
    ParamsKept,
    Rule,
    fraction_kept,
    load_checkpoint,
    resolve,
    save_safetensors,
    summarize,
    tensorize,
)
from tnlayers.tracing import Example, arguments_of, map_tensors, tensors_in

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* parameters and the dense weight"),
    pytest.mark.filterwarnings("ignore:.*above what a weight"),
    pytest.mark.filterwarnings("ignore:rule .* takes no layer"),
]
FULL = 10**6
PICTURE = torch.randn(2, 3, 32, 32)
TOKENS = torch.randint(0, 50, (2, 7))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


class UNet(nn.Module):
    """Two steps down and two up, by transposed convolutions, and one connection across."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1)
        self.up, self.last = nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ConvTranspose2d(64, 16, 2, 2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x).relu()
        return self.last(torch.cat([y, self.up(self.deep(y).relu())], 1))


class Pair(NamedTuple):
    words: Tensor
    picture: Tensor


class Matcher(nn.Module):
    """Takes a named tuple, and gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.words = nn.Embedding(99, 64), nn.LSTM(64, 64, batch_first=True)
        self.patches, self.picture = nn.Conv2d(3, 90, 8, 8), nn.Linear(90, 64)

    def forward(self, pair: Pair) -> Pair:
        picture = self.picture(self.patches(pair.picture).flatten(2).mean(2).relu())
        return Pair(self.words(self.table(pair.words))[0][:, -1], picture)


class Audio(nn.Module):
    """Separates a sound in one dimension: strided, dilated, depthwise and transposed convolutions, and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, 24, 16, 8, bias=False)
        self.body = nn.Sequential(
            nn.Conv1d(24, 32, 1),
            nn.PReLU(),
            nn.Conv1d(32, 32, 3, dilation=2, padding=2, groups=32),
            nn.Conv1d(32, 24, 3, 1, 1),
        )
        self.gru = nn.GRU(24, 24, batch_first=True)
        self.decoder = nn.ConvTranspose1d(24, 1, 16, 8, bias=False)

    def forward(self, *, sound: Tensor) -> dict[str, Any]:
        y = self.encoder(sound)
        mask = self.gru(self.body(y).mT)[0].mT.sigmoid()
        return {"sound": self.decoder(mask * y), "mask": [mask]}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **SMALL))


def hf_vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=50,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=20,
        max_target_positions=16,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


class Backbone(nn.Sequential):
    out_channels = 16

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 24, 3, 4, 1), nn.ReLU(), nn.Conv2d(24, 16, 3, 2, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict([("0", super().forward(x))])


def faster_rcnn() -> nn.Module:
    pool = MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2)
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 9, 40), nn.ReLU())
    predictor = vision.detection.faster_rcnn.FastRCNNPredictor(40, 4)
    sizes = {"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 20}
    anchors = AnchorGenerator(((16, 32),), ((0.5, 1.0),))
    return FasterRCNN(
        Backbone(), rpn_anchor_generator=anchors, box_roi_pool=pool, box_head=head, box_predictor=predictor, **sizes
    )


def retinanet() -> nn.Module:
    anchors = AnchorGenerator(((16, 32),), ((0.5, 1.0),))
    return RetinaNet(Backbone(), 4, min_size=64, max_size=96, anchor_generator=anchors, score_thresh=0.0)


def vgg() -> nn.Module:
    body = make_layers([16, "M", 32, "M", 48, "M", 64, "M"])
    return nn.Sequential(body, nn.Flatten(), nn.Linear(256, 80), nn.ReLU(), nn.Linear(80, 9))


def efficientnet() -> nn.Module:
    return EfficientNet([MBConvConfig(1, 3, 1, 16, 16, 1), MBConvConfig(4, 5, 2, 16, 24, 2)], 0.2, num_classes=9)


def r3d() -> nn.Module:
    kind = vision.video.resnet.Conv3DSimple
    stem, block = vision.video.resnet.BasicStem, vision.video.resnet.BasicBlock
    return without(vision.video.VideoResNet(block, [kind] * 4, [1, 1, 1, 1], stem), "layer3", "layer4", width=128)


def without(net: Any, *parts: str, width: int) -> nn.Module:
    """Takes the widest parts of a net off, which take most of the time, and gives it a head of this width."""
    for part in parts:
        setattr(net, part, nn.Identity())
    net.fc = nn.Linear(width, 9)
    return net


PIXELS = {"pixel_values": PICTURE}
DETECTED = [torch.rand(3, 64, 64), torch.rand(3, 64, 80)]
NETS: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "resnet": (lambda: without(ResNet(BasicBlock, [1, 1, 1, 1]), "layer4", width=256), PICTURE),
    "mobilenet_v3_small": (lambda: vision.mobilenet_v3_small(width_mult=0.25, num_classes=9), PICTURE),
    "efficientnet": (efficientnet, PICTURE),
    "convnext": (lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], num_classes=9), PICTURE),
    "swin": (lambda: SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=9), PICTURE),
    "vit": (lambda: vision.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=9), PICTURE),
    "vgg": (vgg, PICTURE),
    "densenet": (lambda: DenseNet(8, (2, 2), 16, num_classes=9), PICTURE),
    "r3d": (r3d, torch.randn(1, 3, 2, 8, 8)),
    "BiT": (lambda: ResNetV2([1, 1], (128, 256), num_classes=9, stem_chs=32, stem_type="same"), PICTURE),
    "NFNet": (lambda: timm.create_model("test_nfnet", num_classes=9), PICTURE),
    "tf_efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=9, pad_type="same"), PICTURE),
    "mobilenetv4": (lambda: timm.create_model("mobilenetv4_conv_small_035", num_classes=9), PICTURE),
    "timm's vit": (lambda: timm.create_model("test_vit", img_size=32, num_classes=9), PICTURE),
    "BERT": (bert, {"input_ids": TOKENS, "attention_mask": (TOKENS > 4).long()}),
    "HF ViT": (hf_vit, PIXELS),
    "GPT-2": (gpt2, {"input_ids": TOKENS}),
    "Whisper": (whisper, {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": TOKENS}),
    "U-Net": (UNet, (PICTURE,)),
    "pair": (Matcher, (Pair(TOKENS, PICTURE),)),
    "audio": (Audio, {"sound": torch.randn(2, 1, 120)}),
    "Faster R-CNN": (faster_rcnn, [*DETECTED]),
    "RetinaNet": (retinanet, [*DETECTED]),
}


def built(name: str) -> tuple[nn.Module, Example]:
    """Returns a net in float64 whose every parameter matters, with what it takes."""
    build, example = NETS[name]
    net = build().double().eval()
    for parameter in net.parameters():
        if parameter.numel() == 1 or parameter.std() == 0:  # such as the gains that start as zeros
            nn.init.uniform_(parameter, 0.5, 1.5)
    return net, map_tensors(example, lambda x: x.double() if x.is_floating_point() else x)


def outputs(net: nn.Module, example: Example) -> list[Tensor]:
    args, kwargs = arguments_of(example)
    with torch.no_grad():
        found = [*tensors_in(net(*args, **kwargs))]
    assert found
    return found


def with_weights(net: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold a matrix themselves and are not factorized."""
    layers = {part for layer in net.modules() if isinstance(layer, FactorizedLayer) for part in layer.modules()}
    return {
        name: module
        for name, module in net.named_modules()
        if module not in layers and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }


def num_params(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def under(rank: Any) -> list[Rule]:
    return [Rule("*", LowRank(rank)), Rule("*", SVD(rank))]


@pytest.mark.parametrize("name", NETS)
def test_at_full_rank_a_net_computes_what_it_did(name: str) -> None:
    net, example = built(name)
    expected = outputs(net, example)
    rules = resolve(net, [Rule("*", SVD(FULL)), Rule("*", LowRank(FULL))])
    tensorize(net, rules)
    assert {rule.pattern for rule in rules if rule.factorization} == {
        name for name, layer in net.named_modules() if isinstance(layer, FactorizedLayer)
    }
    assert_close(outputs(net, example), expected, **FLOAT64)


@pytest.mark.parametrize("name", NETS)
def test_half_of_the_parameters_of_a_net(name: str, tmp_path: Path) -> None:
    """They are counted by torch; what is left is listed; and a file of it is read into a fresh net."""
    net, example = built(name)
    dense, kinds = num_params(net), {at: type(module) for at, module in net.named_modules()}
    rules = resolve(net, under(ParamsKept(0.5, of="model")), example)
    tensorize(net, rules)
    assert 0.99 * 0.5 <= num_params(net) / dense <= 0.5
    assert fraction_kept(net, ParamsKept, example, of="model") == num_params(net) / dense
    summary = summarize(net, example, rules=rules, measure=False)
    assert (summary.totals.params, summary.totals.dense_params) == (num_params(net), dense)
    rows = {row.name: row for row in summary.layers}
    for layer, module in with_weights(net).items():
        assert any(f"{rule.pattern}.".startswith(f"{layer}.") and rule.reason for rule in rules), layer
        assert rows[layer].note
        assert rows[layer].kind.rpartition(".")[2] in {kinds.get(layer, type(module)).__name__, type(module).__name__}

    save_safetensors(net, tmp_path / "net.safetensors")
    again, _ = built(name)
    assert load_checkpoint(tmp_path / "net.safetensors", again).matched
    assert_close(outputs(again, example), outputs(net, example), **FLOAT64)


@pytest.mark.parametrize("name", NETS)
def test_half_of_the_operations_of_a_net(name: str) -> None:
    net, example = built(name)
    dense = torch_counts(net, example)
    tensorize(net, under(MacsKept(0.5, of="model")), example_input=example, init="random")
    totals = summarize(net, example, measure=False)
    kept, samples = torch_counts(net, example), totals.batch
    assert (totals.totals.macs, totals.totals.dense_macs) == (kept // samples, dense // samples)
    assert 0.98 * 0.5 <= kept / dense <= 0.5


def test_heads_that_only_training_calls() -> None:
    """GoogLeNet gives a named tuple with the outputs of its auxiliary heads in training."""
    net = vision.GoogLeNet(9, init_weights=False, dropout=0.0, dropout_aux=0.0).double()
    picture = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = net(picture)
    assert len(expected) == 3
    names = ["inception3a.*", "aux?.*"]
    rules = {rule.pattern: rule for rule in resolve(net, [Rule("*", SVD(MacsKept(0.5)))], picture, init="random")}
    assert "the example input never calls it" in rules["aux1.fc1"].reason
    tensorize(net, [Rule(name, SVD(FULL)) for name in names])
    assert isinstance(net.aux1.fc1, FactorizedLayer)
    assert net.training
    again = net(picture)
    assert type(again) is type(expected)
    assert_close(list(again), list(expected), **FLOAT64)
    sum(each.sum() for each in again).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
