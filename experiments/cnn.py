"""Training a plain convolutional network without BatchNorm

Claim 4 of the paper: in a convolutional network without BatchNorm a bipolar activation makes the training error drop
faster and the test error lower. The network is trained on the same batches from He weights, once per activation and
seed.

For the claim: a faster drop of the training loss and a lower error of BReLU and BELU than of their bases. Against: no
difference, or the reverse. Of all parts of this network only max pooling breaks the symmetry S f(S x), so only it can
make a real difference, for better or worse.
"""

from __future__ import annotations

from experiments.plots import training_figure as figure
from experiments.tables import training_table as table

__all__ = ["figure", "table"]
