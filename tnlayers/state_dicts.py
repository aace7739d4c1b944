"""Where in a checkpoint the weights of a model are: under which keys, and behind which prefix of their own.

A file may hold more than one copy, such as a student's and its teacher's, or the averages of training.
"""

import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["USUAL_KEYS", "Copy", "find_copies", "needed", "prefixes"]

_PREFIX = re.compile(r"(?:(?:module|model|net|_orig_mod|ema_model|ema)\.)*")
USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net")
_AVERAGED = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema")
_DEPTH = 4
_PARTS = 8


@dataclass(frozen=True)
class Copy:
    """A copy of a model's weights, of which some may be missing.

    Attributes:
        keys: what its state dict is nested under.
        prefix: what stands before the model's own keys in it.
        state: the state dict.
        found: how many of the model's keys are there.
        whole: True if that is all of them.
    """

    keys: tuple[str, ...]
    prefix: str
    state: Mapping[str, Tensor]
    found: int
    whole: bool

    def __str__(self) -> str:
        return ".".join((*self.keys, self.prefix))

    @property
    def averaged(self) -> bool:
        """True if a key or prefix marks this copy as averaged weights."""
        return not {*self.keys, *self.prefix.split(".")}.isdisjoint(_AVERAGED)

    @property
    def usual(self) -> bool:
        """True if it is where weights usually are."""
        return {*self.keys} <= {*USUAL_KEYS, *_AVERAGED} and _PREFIX.fullmatch(self.prefix) is not None

    @property
    def preference(self) -> tuple[bool, bool]:
        """Sorts copies with the same keys by their names: plain weights and usual places come first."""
        return self.averaged, not self.usual


def find_copies(content: Mapping[Any, Any], own: Mapping[str, Tensor]) -> list[Copy]:
    """Finds the copies in the usual places, and any other that is whole. The best comes first.

    The best has the most of the model's keys; of equals it is the one that `Copy.preference` puts first.
    """
    every = sum(map(needed, own))
    copies = [
        Copy(keys, prefix, state, found, 0 < found == every)
        for keys, state in _state_dicts(content)
        for prefix, found in prefixes(state, own).items()
    ]
    return sorted((copy for copy in copies if copy.usual or copy.whole), key=_order)


def _order(copy: Copy) -> tuple[int, int, tuple[bool, bool], int]:
    size = 0 if copy.found else len(copy.state)  # of state dicts of other models, the message tells of the largest
    return -copy.found, -size, copy.preference, len(copy.prefix)


def _state_dicts(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yields the mappings of a checkpoint that hold tensors, and the keys that they are nested under."""
    waiting: deque[tuple[tuple[str, ...], Mapping[Any, Any]]] = deque([((), content)])
    seen: set[int] = set()
    while waiting:
        keys, mapping = waiting.popleft()
        if id(mapping) in seen or len(keys) > _DEPTH:
            continue
        seen.add(id(mapping))
        entries = {key: value for key, value in mapping.items() if isinstance(key, str)}
        waiting += [((*keys, key), value) for key, value in entries.items() if isinstance(value, Mapping)]
        if state := {key: value for key, value in entries.items() if isinstance(value, Tensor)}:
            yield keys, state


def prefixes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Counter[str]:
    """Counts how many of the model's keys are in a state dict after each prefix; the empty one is always among them."""
    found = Counter({"": 0})
    for key in state:
        rest = key
        for _ in range(_PARTS):
            if _PREFIX.fullmatch(prefix := key.removesuffix(rest)) or rest in own:
                found[prefix] += rest in own and needed(rest)
            rest = rest.partition(".")[2]
            if not rest:
                break
    return found


def needed(key: str) -> bool:
    """Tells whether a file must have this entry of a model; it may lack BatchNorm's counters."""
    return not key.endswith("num_batches_tracked")
