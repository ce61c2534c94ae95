"""Modules: they hold parameters and settings and call one function each."""

from implicit_layers.nn.quadratic import QPData as QPData
from implicit_layers.nn.quadratic import QPLayer as QPLayer
from implicit_layers.nn.simplex import Softmax as Softmax
from implicit_layers.nn.vae import SemiAmortizedVAE as SemiAmortizedVAE
from implicit_layers.nn.vae import VAELoss as VAELoss
