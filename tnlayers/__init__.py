"""Tensorized drop-in layers for PyTorch: train them from scratch, or compress a trained network."""

from tnlayers.anyof import AnyOf
from tnlayers.chains import to_chains
from tnlayers.checkpoints import load_checkpoint, save_safetensors
from tnlayers.errors import CheckpointError, UnsupportedLayer, UserError
from tnlayers.exchange import from_layers, from_tensorly, to_tensorly
from tnlayers.factorized import FactorizedLayer
from tnlayers.healing import Healed, heal
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
from tnlayers.methods.blockterm import BlockTerm, BlockTermConv2d
from tnlayers.methods.cp import CP, CPConv2d
from tnlayers.methods.cpmatrix import CPLinear, CPMatrix
from tnlayers.methods.fulltucker import FullTucker, FullTuckerConv2d
from tnlayers.methods.kronecker import Kronecker, KroneckerConv2d
from tnlayers.methods.lowrank import LowRank, LowRankConv2d, LowRankEmbedding, LowRankLinear
from tnlayers.methods.mps import MPS, MPSConv2d
from tnlayers.methods.svd import SVD, SVDConv2d
from tnlayers.methods.tensorring import TensorRing, TensorRingConv2d, TensorRingLinear
from tnlayers.methods.tt import TT, TTEmbedding, TTLinear
from tnlayers.methods.ttconv import TTConv, TTConv2d
from tnlayers.methods.tucker import Tucker, TuckerConv2d
from tnlayers.methods.tuckermatrix import TuckerLinear, TuckerMatrix
from tnlayers.network import Network
from tnlayers.plan import Plan
from tnlayers.ranks import MacsKept, ParamsKept, RelativeError
from tnlayers.rules import Rule, rules_from_plain
from tnlayers.schedule import ByMode, Schedule
from tnlayers.slices import slices_of
from tnlayers.spec import LayerSpec
from tnlayers.summary import Summary, summarize
from tnlayers.surgery import resolve, rules_of, tensorize, to_dense
from tnlayers.table import kinds_table, methods_table
from tnlayers.truncation import fraction_kept, resolve_truncation, truncate
from tnlayers.tuning import autotune

__all__ = [
    "ADTN",
    "CP",
    "MPS",
    "SVD",
    "TT",
    "ADTNConv2d",
    "ADTNLinear",
    "AnyOf",
    "BlockTerm",
    "BlockTermConv2d",
    "ByMode",
    "CPConv2d",
    "CPLinear",
    "CPMatrix",
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
    "FullTucker",
    "FullTuckerConv2d",
    "Healed",
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
    "Schedule",
    "Summary",
    "TTConv",
    "TTConv2d",
    "TTEmbedding",
    "TTLinear",
    "TensorRing",
    "TensorRingConv2d",
    "TensorRingLinear",
    "Tucker",
    "TuckerConv2d",
    "TuckerLinear",
    "TuckerMatrix",
    "UnsupportedLayer",
    "UserError",
    "autotune",
    "fraction_kept",
    "from_layers",
    "from_tensorly",
    "heal",
    "kinds_table",
    "load_checkpoint",
    "methods_table",
    "resolve",
    "resolve_truncation",
    "rules_from_plain",
    "rules_of",
    "save_safetensors",
    "slices_of",
    "summarize",
    "tensorize",
    "to_chains",
    "to_dense",
    "to_tensorly",
    "truncate",
]
