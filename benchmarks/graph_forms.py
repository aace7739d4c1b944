"""What the forms that a net is deployed in take of the dense net's time in the same form, half of the multiply-accumulates kept.

OMP_NUM_THREADS=1 python -m benchmarks.graph_forms          # writes benchmarks/graph_forms.json

One 64x64 picture through torchvision's resnet18 in evaluation; all forms take turns in one process; medians over rounds.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.timing import medians
from lightning_modules.report import environment
from tnlayers import MacsKept, Rule, Tucker, tensorize

Form = Callable[[Tensor], Tensor]


def forms(net: nn.Module, example: Tensor) -> dict[str, Form]:
    return {
        "eager": net,
        "compiled": torch.compile(copy.deepcopy(net)),
        "exported": torch.export.export(net, (example,)).module(),
        "traced": torch.jit.trace(net, example),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    example = torch.randn(1, 3, 64, 64)
    dense = torchvision.models.resnet18(num_classes=10).eval()
    small = tensorize(copy.deepcopy(dense), [Rule("layer*", Tucker(MacsKept(0.5)))], example_input=example)
    nets = {"dense": forms(dense, example), "tensorized": forms(small, example)}
    calls = {
        f"{form} {kind}": lambda call=call: call(example) for kind, made in nets.items() for form, call in made.items()
    }
    with torch.no_grad():
        seconds = medians(calls, options.rounds)
    of_dense = {form: seconds[f"{form} tensorized"] / seconds[f"{form} dense"] for form in nets["dense"]}
    result = {"seconds": seconds, "of_the_dense_form": of_dense, "environment": environment()}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
