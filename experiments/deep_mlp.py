"""Training a deep multi-layer perceptron without normalization

The paper says that bipolar activations alleviate the need for normalization in deep networks. A deep multi-layer
perceptron is trained on the same batches from He weights, once per activation and seed.

For the claim: a faster drop of the training loss, or a lower error, of BReLU and BELU than of their bases. Against: no
difference, or the reverse. The symmetry S f(S x) predicts no difference here but by chance: this network is a chain of
linear maps, whose weights start symmetric about zero.
"""

from __future__ import annotations

from experiments.plots import training_figure as figure
from experiments.tables import training_table as table

__all__ = ["figure", "table"]
