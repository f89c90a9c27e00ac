"""Neural functional networks: equivariant layers on the weights of other networks, and the papers' models."""

from learned_opt.nfn.baselines import FlatWeights, GraphPool, StatNN, statistics
from learned_opt.nfn.chain import Chain, ChainLayer, Features
from learned_opt.nfn.encodings import ChannelDropout, FourierFeatures, IOSinusoidal, LearnedScale
from learned_opt.nfn.features import features_of, map_features, split_channels, stack, unstack
from learned_opt.nfn.fit import (
    Fit,
    WeightSpaceEditor,
    WeightSpacePredictor,
    kendall_tau,
    network_outputs,
    r2,
)
from learned_opt.nfn.general import Framed, GeneralLinear, GeneralPool, frame_of
from learned_opt.nfn.magep import MAGEPInvariant, MAGEPLinear
from learned_opt.nfn.models import EquivariantNFN, InvariantNFN, inr_classifier
from learned_opt.nfn.monomial import GradientGate, MonomialLinear, MonomialSignLinear
from learned_opt.nfn.permutation import HNPLinear, NPLinear
from learned_opt.nfn.pools import HNPPool, Magnitude, MonomialPool, NPPool, Pointwise, UnitPool, pointwise
from learned_opt.nfn.sine import SineCanonical, SineEditor, SineFeatures, SineMessages, SineNFN
from learned_opt.nfn.transformer import TransformerInvariant, TransformerLinear, TransformerNFN, TransformerReLU
from learned_opt.nfn.transformer_space import TransformerFeatures, TransformerSpec, task_spec, zoo_spec

HNPSLinear = MonomialLinear  # their names in the papers' code
HNPSSirenLinear = MonomialSignLinear

__all__ = [
    "Chain",
    "ChainLayer",
    "ChannelDropout",
    "EquivariantNFN",
    "Features",
    "Fit",
    "FlatWeights",
    "FourierFeatures",
    "Framed",
    "GeneralLinear",
    "GeneralPool",
    "GradientGate",
    "GraphPool",
    "HNPLinear",
    "HNPPool",
    "HNPSLinear",
    "HNPSSirenLinear",
    "IOSinusoidal",
    "InvariantNFN",
    "LearnedScale",
    "MAGEPInvariant",
    "MAGEPLinear",
    "Magnitude",
    "MonomialLinear",
    "MonomialPool",
    "MonomialSignLinear",
    "NPLinear",
    "NPPool",
    "Pointwise",
    "SineCanonical",
    "SineEditor",
    "SineFeatures",
    "SineMessages",
    "SineNFN",
    "StatNN",
    "TransformerFeatures",
    "TransformerInvariant",
    "TransformerLinear",
    "TransformerNFN",
    "TransformerReLU",
    "TransformerSpec",
    "UnitPool",
    "WeightSpaceEditor",
    "WeightSpacePredictor",
    "features_of",
    "frame_of",
    "inr_classifier",
    "kendall_tau",
    "map_features",
    "network_outputs",
    "pointwise",
    "r2",
    "split_channels",
    "stack",
    "statistics",
    "task_spec",
    "unstack",
    "zoo_spec",
]
