"""Tensorized drop-in layers for PyTorch: train them from scratch, or compress a trained network."""

from tnlayers.chains import to_chains
from tnlayers.checkpoints import load_checkpoint, save_safetensors
from tnlayers.errors import CheckpointError, UnsupportedLayer, UserError
from tnlayers.factorized import FactorizedLayer
from tnlayers.layers import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
    FactorizedEmbedding,
    FactorizedLinear,
)
from tnlayers.matching import LoadReport
from tnlayers.method import Factorization
from tnlayers.methods.adtn import ADTN, ADTNConv2d, ADTNLinear
from tnlayers.methods.cp import CP, CPConv2d
from tnlayers.methods.kronecker import Kronecker, KroneckerConv2d
from tnlayers.methods.lowrank import LowRank, LowRankConv2d, LowRankEmbedding, LowRankLinear
from tnlayers.methods.mps import MPS, MPSConv2d
from tnlayers.methods.svd import SVD, SVDConv2d
from tnlayers.methods.tt import TT, TTEmbedding, TTLinear
from tnlayers.methods.ttconv import TTConv, TTConv2d
from tnlayers.methods.tucker import Tucker, TuckerConv2d
from tnlayers.network import Network
from tnlayers.plan import Plan
from tnlayers.ranks import MacsKept, ParamsKept, RelativeError
from tnlayers.rules import Rule, rules_from_plain
from tnlayers.spec import LayerSpec
from tnlayers.summary import Summary, summarize
from tnlayers.surgery import resolve, rules_of, tensorize, to_dense
from tnlayers.table import methods_table
from tnlayers.truncation import fraction_kept, resolve_truncation, truncate

__all__ = [
    "ADTN",
    "CP",
    "MPS",
    "SVD",
    "TT",
    "ADTNConv2d",
    "ADTNLinear",
    "CPConv2d",
    "CheckpointError",
    "Factorization",
    "FactorizedConv1d",
    "FactorizedConv2d",
    "FactorizedConv3d",
    "FactorizedConvTranspose1d",
    "FactorizedConvTranspose2d",
    "FactorizedConvTranspose3d",
    "FactorizedEmbedding",
    "FactorizedLayer",
    "FactorizedLinear",
    "Kronecker",
    "KroneckerConv2d",
    "LayerSpec",
    "LoadReport",
    "LowRank",
    "LowRankConv2d",
    "LowRankEmbedding",
    "LowRankLinear",
    "MPSConv2d",
    "MacsKept",
    "Network",
    "ParamsKept",
    "Plan",
    "RelativeError",
    "Rule",
    "SVDConv2d",
    "Summary",
    "TTConv",
    "TTConv2d",
    "TTEmbedding",
    "TTLinear",
    "Tucker",
    "TuckerConv2d",
    "UnsupportedLayer",
    "UserError",
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
    "to_chains",
    "to_dense",
    "truncate",
]
