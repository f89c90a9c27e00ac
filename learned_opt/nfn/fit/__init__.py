"""Fit a model of this package to the weights of many networks: predict a property of each, or edit all of them."""

from learned_opt.nfn.fit.builders import network_outputs
from learned_opt.nfn.fit.editor import WeightSpaceEditor
from learned_opt.nfn.fit.predictor import WeightSpacePredictor
from learned_opt.nfn.fit.scores import kendall_tau, r2
from learned_opt.nfn.fit.training import Fit

__all__ = ["Fit", "WeightSpaceEditor", "WeightSpacePredictor", "kendall_tau", "network_outputs", "r2"]
