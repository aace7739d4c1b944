"""What is done on a device: graphs, training steps, and their memory; on the CPU, the same calls without a graph."""

import gc
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "captured",
    "captured_step",
    "parameter_bytes",
    "peak_bytes",
    "synchronize",
    "training_step",
    "whole_step",
]


def captured(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """Records a call without gradients as a CUDA graph.

    Args:
        call: reads and writes the same memory each time.
        device: on the CPU nothing is recorded, and a replay is a call.

    Returns:
        What replays it, and the tensor that a replay writes.
    """
    with torch.no_grad():
        _warm_up(call, device)
        if device.type != "cuda":
            out = call().clone()
            return lambda: out.copy_(call()), out
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
    return graph.replay, out


def captured_step(
    step: Callable[[], object], parameters: Iterable[nn.Parameter], device: torch.device
) -> Callable[[], object]:
    """Records a whole training step as a CUDA graph, after steps that are taken as they are.

    Args:
        step: forward, backward and the optimizer's step, on the same memory each time.
        parameters: those whose gradients the step makes.
        device: on the CPU nothing is recorded, and a replay is a step.

    Returns:
        What replays it.
    """
    parameters = list(parameters)
    whole = whole_step(step, parameters)
    _warm_up(whole, device)
    if device.type != "cuda":
        return whole
    graph = torch.cuda.CUDAGraph()
    for parameter in parameters:  # so that the graph owns the gradients, and writes them instead of adding
        parameter.grad = None
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def whole_step(step: Callable[[], object], parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Returns the step without what earlier gradients would add."""
    parameters = list(parameters)

    def whole() -> None:
        for parameter in parameters:
            parameter.grad = None
        step()

    return whole


def _warm_up(call: Callable[[], object], device: torch.device) -> None:
    """Calls three times, aside from the present stream as the capture will be."""
    if device.type != "cuda":
        call()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Returns how many bytes the second of two calls has allocated at most, by torch's own count of the device's memory.

    On the CPU the profiler writes down each piece that is taken or given back; what a library takes for itself is not in it.
    """
    call()
    if device.type != "cuda":
        return _cpu_peak_bytes(call)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak_bytes(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    pieces = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return max(itertools.accumulate((size for _, size in pieces), initial=0))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def training_step(model: nn.Module, x: Tensor) -> None:
    """Takes the gradients of all parameters and of the input, and lets them go; the gradient of the output is all ones."""
    out = model(x.detach().requires_grad_())
    out.backward(torch.ones_like(out))
    model.zero_grad()


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
