"""Methods as values, the protocol for one of your own, and the functions they are made of.

`lip_jax.methods.protocol` tells what a method is.
"""

from lip_jax.methods.calibrated import (
    Calibrated,
    CalibratedHead,
    refine_calibrated,
    refine_calibrated_from,
)
from lip_jax.methods.logistic import Logistic
from lip_jax.methods.logit_scale import fit_logit_scale
from lip_jax.methods.protocol import Fit, Head, HeadPath, HeadStack, Method, Readout, Settled
from lip_jax.methods.published import (
    Published,
    refine,
    refine_from,
    solve_tail_sigma,
    solve_tail_sigma_from,
)
from lip_jax.methods.purified import Purified, PurifiedReadout, purified_readout
from lip_jax.methods.readout import linear_readout, linear_readout_from
from lip_jax.methods.ridge import Ridge

__all__ = [
    "Calibrated",
    "CalibratedHead",
    "Fit",
    "Head",
    "HeadPath",
    "HeadStack",
    "Logistic",
    "Method",
    "Published",
    "Purified",
    "PurifiedReadout",
    "Readout",
    "Ridge",
    "Settled",
    "fit_logit_scale",
    "linear_readout",
    "linear_readout_from",
    "purified_readout",
    "refine",
    "refine_calibrated",
    "refine_calibrated_from",
    "refine_from",
    "solve_tail_sigma",
    "solve_tail_sigma_from",
]
