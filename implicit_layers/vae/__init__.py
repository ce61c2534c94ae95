"""The semi-amortised variational autoencoder: an encoder's first guess, an inner optimisation, a gradient through it.

Everything is per datum: λ holds the parameters of one Gaussian q(z) a datum, (*B, size), and every energy has the batch
shape (*B,). Sums over the batch are the caller's, and nothing here averages.
"""

from implicit_layers.vae.anchors import Anchor as Anchor
from implicit_layers.vae.families import DiagonalGaussian as DiagonalGaussian
from implicit_layers.vae.families import FullGaussian as FullGaussian
from implicit_layers.vae.gauss_newton import GaussNewton as GaussNewton
from implicit_layers.vae.inner import InnerProblem as InnerProblem
from implicit_layers.vae.likelihoods import Bernoulli as Bernoulli
from implicit_layers.vae.likelihoods import Categorical as Categorical
from implicit_layers.vae.likelihoods import Gaussian as Gaussian
from implicit_layers.vae.model import LatentModel as LatentModel
from implicit_layers.vae.noise import Noise as Noise
from implicit_layers.vae.outer import ELBO as ELBO
from implicit_layers.vae.outer import IWAE as IWAE
from implicit_layers.vae.outer import FreeBits as FreeBits
from implicit_layers.vae.outer import HeldOut as HeldOut
from implicit_layers.vae.solve import Descent as Descent
from implicit_layers.vae.solve import refine as refine
