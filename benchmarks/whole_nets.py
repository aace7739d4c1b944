"""Half of the parameters of whole nets: what torch counts before and after, the time that it takes, and every layer that was left.

python -m benchmarks.whole_nets                          # writes benchmarks/whole_nets.json, a net at a time
python -m benchmarks.whole_nets --net vit_b_16 --method SVD
python -m benchmarks.whole_nets --table                  # prints the file as a table

The weights are those of the constructors. Rows that are in the file are not made again.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision.models as vision
import transformers
from torch import nn

import tnlayers
from benchmarks.counted import counted
from lightning_modules.report import environment
from tnlayers import ParamsKept, Rule, resolve, summarize, tensorize
from tnlayers.markdown import markdown_table
from tnlayers.tracing import Example, arguments_of

JSON = Path(__file__).with_suffix(".json")
BUDGET = ParamsKept(0.5, of="model")
PICTURE = torch.zeros(1, 3, 224, 224)
TOKENS = {"input_ids": torch.zeros(1, 128, dtype=torch.long)}
SPEECH = {"input_features": torch.zeros(1, 80, 3000), "decoder_input_ids": torch.zeros(1, 8, dtype=torch.long)}


def whisper_base() -> transformers.WhisperConfig:
    """Returns the sizes of openai/whisper-base, whose output is tied to an embedding of 36 % of the parameters."""
    sizes = {"d_model": 512, "use_cache": False}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 6, f"{part}_attention_heads": 8, f"{part}_ffn_dim": 2048}
    return transformers.WhisperConfig(**sizes)


NETS: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    **{
        name: (lambda name=name: vision.get_model(name, weights=None), PICTURE)
        for name in (
            *("resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16"),
            *("vgg11", "densenet121"),
        )
    },
    "r3d_18": (lambda: vision.get_model("r3d_18", weights=None), torch.zeros(1, 3, 8, 112, 112)),
    **{
        f"timm/{name}": (lambda name=name: timm.create_model(name), PICTURE)
        for name in (
            *("resnetv2_50x1_bit", "dm_nfnet_f0", "tf_efficientnet_b0", "mobilenetv4_conv_small"),
            "vit_small_patch16_224",
        )
    },
    "BERT": (lambda: transformers.BertModel(transformers.BertConfig()), TOKENS),
    "GPT-2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)), TOKENS),
    "Whisper base": (lambda: transformers.WhisperForConditionalGeneration(whisper_base()), SPEECH),
}
EVERYWHERE, LARGE = "LowRank", "SVD"
"""The method of all nets, and one more for those that hold their weights in linears or wide convolutions."""
ROWS = [
    *((net, EVERYWHERE) for net in NETS),
    *((net, LARGE) for net in ("vit_b_16", "convnext_tiny", "swin_t", "BERT", "GPT-2")),
]


def counts(net: nn.Module, example: Example) -> tuple[int, int]:
    """Returns parameters and multiply-accumulates by torch alone."""
    args, kwargs = arguments_of(example)
    return sum(parameter.numel() for parameter in net.parameters()), counted(net, *args, **kwargs)


def measure(name: str, method: str) -> dict[str, Any]:
    torch.manual_seed(0)
    make, example = NETS[name]
    net = make().eval()
    dense_params, dense_macs = counts(net, example)
    start = time.perf_counter()
    plan = resolve(net, [Rule("*", getattr(tnlayers, method)(BUDGET))], example)
    resolved = time.perf_counter()
    net = tensorize(net, plan, example_input=example)
    done = time.perf_counter()
    params, macs = counts(net, example)
    report = summarize(net, example, rules=plan, measure=False)
    dense = [layer for layer in report.layers if layer.method == "dense"]
    return {
        "params": [dense_params, params],
        "macs": [dense_macs, macs],
        "macs_of_the_report": [report.totals.dense_macs, report.totals.macs],
        "resolve_seconds": resolved - start,
        "convert_seconds": done - resolved,
        "factorized": len(report.layers) - len(dense),
        "left": {layer.name: f"{layer.kind}: {layer.note}" for layer in dense},
    }


def table(rows: Mapping[str, Any]) -> str:
    """Returns the rows in Markdown; of the layers that were left, how many for which reason."""
    return markdown_table(
        ["net, method", "parameters", "kept", "MACs", "kept", "seconds", "layers", "left"],
        [
            [
                name,
                f"{row['params'][0]:,}",
                f"{row['params'][1] / row['params'][0]:.2%}",
                f"{row['macs'][0]:,}",
                f"{row['macs'][1] / row['macs'][0]:.1%}",
                f"{row['resolve_seconds']:.0f} + {row['convert_seconds']:.0f}",
                str(row["factorized"]),
                "; ".join(
                    f"{count} {left.replace(f'{BUDGET}: ', '')}"
                    for left, count in Counter(row["left"].values()).most_common()
                ),
            ]
            for name, row in rows.items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--method", nargs="+", default=[EVERYWHERE, LARGE])
    parser.add_argument("--out", type=Path, default=JSON)
    parser.add_argument("--table", action="store_true", help="print the file as a table, and measure nothing")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    if options.table:
        print(table(found["rows"]))
        return
    for net, method in ROWS:
        if net in options.net and method in options.method and f"{net}, {method}" not in found["rows"]:
            found["rows"][f"{net}, {method}"] = measure(net, method)
            found["rows"] = {row: found["rows"][row] for row in map(", ".join, ROWS) if row in found["rows"]}
            found["environment"] = environment()
            options.out.write_text(json.dumps(found, indent=2) + "\n")
            print(table({f"{net}, {method}": found["rows"][f"{net}, {method}"]}), flush=True)


if __name__ == "__main__":
    main()
