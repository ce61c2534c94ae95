"""Modules: they hold parameters and settings and call one function each."""

from implicit_layers.nn.losses import EntmaxLoss as EntmaxLoss
from implicit_layers.nn.losses import FenchelYoungLoss as FenchelYoungLoss
from implicit_layers.nn.losses import SoftTopKLoss as SoftTopKLoss
from implicit_layers.nn.losses import SparsemaxLoss as SparsemaxLoss
from implicit_layers.nn.polytope import EntropicLP as EntropicLP
from implicit_layers.nn.programs import PerturbedArgmax as PerturbedArgmax
from implicit_layers.nn.programs import SPOPlusLoss as SPOPlusLoss
from implicit_layers.nn.projections import Projection as Projection
from implicit_layers.nn.projections import SoftRank as SoftRank
from implicit_layers.nn.projections import SoftSort as SoftSort
from implicit_layers.nn.quadratic import QPData as QPData
from implicit_layers.nn.quadratic import QPLayer as QPLayer
from implicit_layers.nn.regularized import RegularizedLP as RegularizedLP
from implicit_layers.nn.regularized import RegularizedLPLoss as RegularizedLPLoss
from implicit_layers.nn.simplex import Entmax as Entmax
from implicit_layers.nn.simplex import Softmax as Softmax
from implicit_layers.nn.simplex import SoftTopK as SoftTopK
from implicit_layers.nn.simplex import Sparsemax as Sparsemax
from implicit_layers.nn.transport import Sinkhorn as Sinkhorn
from implicit_layers.nn.vae import SemiAmortizedVAE as SemiAmortizedVAE
from implicit_layers.nn.vae import VAELoss as VAELoss
