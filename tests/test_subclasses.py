"""Subclasses of torch's layers are opened where they are known to be plain, and left with the reason elsewhere."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Linear, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from tests.tolerances import EXACT, FLOAT64
from tnlayers import SVD, Rule, UserError, load_checkpoint, resolve, save_safetensors, summarize, tensorize, to_dense
from tnlayers.opened import close_in_place, open_module, opened_view
from tnlayers.opened.probing import probe

pytestmark = pytest.mark.filterwarnings("ignore:.* parameters and the dense weight")


class Renamed(nn.ConvTranspose2d):
    """Computes what torch's does."""


class Published(StdConv2d):
    """Computes what timm's does."""


WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 3, "dilation": 2},
    {"kernel_size": 3, "groups": 2, "bias": True},
    {"kernel_size": (1, 5), "stride": (2, 1), "bias": True},
    {"kernel_size": 1, "stride": 2},
]


def filled(module: nn.Module) -> Any:
    for parameter in module.double().parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(
    "kind", [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, Conv2dSame, Published]
)
def test_convolutions_of_timm_are_padding_and_a_plain_layer(kind: Any, window: dict[str, Any]) -> None:
    dense = filled(kind(8, 12, **window))
    opened: Any = open_module(dense)
    assert type(opened.conv) is nn.Conv2d
    assert sum(p.numel() for p in opened.parameters()) + opened.folded == sum(p.numel() for p in dense.parameters())
    for size in range(9, 15):
        x = torch.randn(2, 8, size, size + 1, dtype=torch.float64)
        assert_close(opened(x), dense(x), **FLOAT64)
        assert_close(opened(x[0]), dense(x)[0], **FLOAT64)
    exported = torch.export.export(opened, (x,), strict=False).module()
    assert_close(exported(x), dense(x), **FLOAT64)
    assert_close(pickle.loads(pickle.dumps(copy.deepcopy(opened)))(x), opened(x), **EXACT)


OWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv2dSame": (lambda: Conv2dSame(4, 6, 3, 2), (2, 4, 7, 8)),
    "Conv3DSimple": (lambda: Conv3DSimple(3, 4), (2, 3, 4, 5, 6)),
    "Conv3DNoTemporal": (lambda: Conv3DNoTemporal(3, 4), (2, 3, 4, 5, 6)),
    "Linear": (lambda: Linear(5, 6), (2, 3, 5)),
    "Renamed": (lambda: Renamed(3, 4, 3, 2, 1, 1), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("name", OWN)
def test_what_multiplies_by_its_own_parameters_keeps_them_and_is_closed_again(name: str) -> None:
    build, shape = OWN[name]
    dense = filled(build())
    dense.weight.requires_grad_(False)
    opened: Any = open_module(dense.train())
    assert [*opened.parameters()] == [*dense.parameters()]
    assert opened.training
    assert opened.weight is dense.weight
    x = torch.randn(*shape, dtype=torch.float64)
    assert_close(opened(x), dense(x), **FLOAT64)
    opened.load_state_dict({key: value + 1 for key, value in dense.state_dict().items()})
    closed = opened.closed()
    assert type(closed) is type(dense)
    assert vars(closed).keys() == vars(dense).keys()
    assert closed.state_dict().keys() == dense.state_dict().keys()
    assert_close(closed(x), opened(x), **FLOAT64)


def test_a_weight_that_is_computed_becomes_one_that_is_trained(tmp_path: Any) -> None:
    def build() -> nn.Module:
        return nn.Sequential(filled(ScaledStdConv2d(5, 6, 3)), filled(nn.Conv2d(6, 4, 1)))

    dense, x = build(), torch.randn(3, 5, 4, 4, dtype=torch.float64)
    net = tensorize(copy.deepcopy(dense), [Rule("0.*", SVD(6))])
    assert [rule.pattern for rule in resolve(dense, [Rule("*", SVD(4))])] == ["0.conv", "1"]
    assert_close(net(x), dense(x), **FLOAT64)
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    totals = summarize(net, x, measure=False).totals
    assert totals.dense_params == sum(parameter.numel() for parameter in dense.parameters())
    assert totals.params == sum(parameter.numel() for parameter in net.parameters())
    for model in (net, to_dense(copy.deepcopy(net))):
        save_safetensors(model, tmp_path / "net.safetensors")
        again = build()
        load_checkpoint(tmp_path / "net.safetensors", again)
        assert_close(again(x), dense(x), **FLOAT64)
    plain = to_dense(net)
    assert type(plain[0].conv) is nn.Conv2d
    assert close_in_place(plain)[0] is plain[0]
    with pytest.raises(
        UserError, match="ScaledStdConv2d does not hold the weight that it would have to: leave it opened"
    ):
        plain[0].closed()


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Masked(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mask", torch.ones(self.out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class Normed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, x.shape[-1:]), self.weight, self.bias)


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


class Around(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1), mode="circular"))


class Standardized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-100, 100))


class Rounded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.round())


class ByDimensions(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.dim() == 2 else x.flip(1))


class FirstOnly(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:1].expand_as(x))


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Inherited(Conv2dSame):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Scalable(nn.Linear):
    def scaled(self, x: Tensor) -> Tensor:
        return 2 * self(x)


ODD = [Scaled, Twice, Noisy, Normed, TwoInputs, Rectified, Clamped, ByDimensions]
LEFT = [kind(6, 6) for kind in (*ODD, Masked, Standardized, Detached)]
WINDOWED = [kind(6, 6, 3) for kind in (Around, Rounded, FirstOnly)]
SAME = [Conv2dSameExport(6, 6, 3, 2), Inherited(6, 6, 3)]


@pytest.mark.parametrize("layer", [*LEFT, *WINDOWED, *SAME], ids=lambda x: type(x).__name__)
def test_a_module_with_a_forward_of_its_own_is_left_with_the_reason(layer: nn.Module) -> None:
    state, keys = copy.deepcopy(layer.state_dict()), vars(layer).keys()
    torch.manual_seed(0)
    net = nn.ModuleDict({"odd": layer, "fine": nn.Linear(6, 6)})
    assert opened_view(net)["odd"] is layer
    odd, fine = resolve(net, [Rule("*", SVD(2))])
    assert fine.factorization == SVD((2,))
    assert "with a forward of its own" in odd.reason
    assert_close(layer.state_dict(), state, **EXACT)
    assert vars(layer).keys() == keys


@pytest.mark.parametrize("layer", [*(kind(6, 6) for kind in ODD), *WINDOWED], ids=lambda x: type(x).__name__)
def test_calls_show_what_is_no_padding_and_layer(layer: nn.Module) -> None:
    """Also if it came from one of the libraries whose subclasses are opened."""
    assert probe(layer) is None


def test_a_module_that_can_do_more_than_its_layer_is_left() -> None:
    patched = Renamed(3, 4, 3)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for layer in (Scalable(6, 6), patched):
        assert open_module(layer) is None
    assert resolve(nn.Sequential(Scalable(6, 6), nn.Linear(6, 6)), [Rule("*", SVD(2))])[0].reason == (
        "Scalable is a subclass of Linear with methods, buffers or modules of its own"
    )
