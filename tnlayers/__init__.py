"""Tensorized drop-in layers for PyTorch: train them from scratch, or compress a trained network."""

from tnlayers.checkpoints import LoadReport, load_checkpoint, save_safetensors
from tnlayers.factorizations import ADTN, CP, MPS, TT, Factorization, LowRank, TTConv, Tucker
from tnlayers.factorized import FactorizedLayer, UnsupportedLayer
from tnlayers.layers import (
    ADTNConv2d,
    ADTNLinear,
    CPConv2d,
    LowRankConv2d,
    MPSConv2d,
    TTConv2d,
    TTLinear,
    TuckerConv2d,
)
from tnlayers.methods import methods_table
from tnlayers.network import Network
from tnlayers.plan import Plan
from tnlayers.ranks import MacsKept, ParamsKept, RelativeError
from tnlayers.rules import Rule, rules_from_plain
from tnlayers.spec import LayerSpec
from tnlayers.structure import CheckpointError
from tnlayers.summary import Summary, summarize
from tnlayers.surgery import resolve, rules_of, tensorize, to_dense
from tnlayers.truncation import fraction_kept, resolve_truncation, truncate

__all__ = [
    "ADTN",
    "CP",
    "MPS",
    "TT",
    "ADTNConv2d",
    "ADTNLinear",
    "CPConv2d",
    "CheckpointError",
    "Factorization",
    "FactorizedLayer",
    "LayerSpec",
    "LoadReport",
    "LowRank",
    "LowRankConv2d",
    "MPSConv2d",
    "MacsKept",
    "Network",
    "ParamsKept",
    "Plan",
    "RelativeError",
    "Rule",
    "Summary",
    "TTConv",
    "TTConv2d",
    "TTLinear",
    "Tucker",
    "TuckerConv2d",
    "UnsupportedLayer",
    "fraction_kept",
    "load_checkpoint",
    "methods_table",
    "resolve",
    "resolve_truncation",
    "rules_from_plain",
    "rules_of",
    "save_safetensors",
    "summarize",
    "tensorize",
    "to_dense",
    "truncate",
]
