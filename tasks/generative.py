"""Variational autoencoders: of images, and of bags of words (a neural topic model)."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from tasks import data
from tasks.data import Batch
from tasks.mlp import mlp
from tasks.task import Problem


class Variational(nn.Module):
    """Encoder -> a Gaussian code, reparametrised -> decoder.

    The input is [B, features + code]: the example, then the standard normal noise of its code, so that the model is a
    function. The output is what the decoder gives, then mean and log variance of the code, concatenated.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, code: int) -> None:
        super().__init__()
        self.code, self.encoder, self.decoder = code, encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x[..., : -self.code]).chunk(2, -1)
        z = mean + torch.exp(log_variance / 2) * x[..., -self.code :]
        return torch.cat([self.decoder(z), mean, log_variance], -1)


def gaussian_kl(mean: Tensor, log_variance: Tensor, prior_variance: float = 1.0) -> Tensor:
    """KL(N(mean, variance) || N(0, prior_variance)), summed over the last axis."""
    spread = (mean.square() + log_variance.exp()) / prior_variance
    return (spread - 1 - log_variance + math.log(prior_variance)).sum(-1) / 2


def image_vae(
    name: str, source: data.Crops, *, hidden: int, code: int, activation: str, batch_size: int, steps: int
) -> Problem:
    """Kingma & Welling 2014, "Auto-Encoding Variational Bayes", appendix C: binary pixels, Bernoulli decoder.

    The loss is the negative evidence lower bound in nats per pixel. A pixel is white if it is above half of the
    brightest.
    """
    pixels = math.prod(source.shape)
    threshold = (float(source.canvas.max()) / 2 - source.mean) / source.std

    def build() -> nn.Module:
        return Variational(
            mlp([pixels, hidden, hidden, 2 * code], activation), mlp([code, hidden, hidden, pixels], activation), code
        )

    def noisy(images: Tensor, generator: Generator) -> Batch:
        white = (images > threshold).float().flatten(1)
        return torch.cat([white, torch.randn(len(images), code, generator=generator)], 1), white

    def sample(generator: Generator, count: int) -> Batch:
        return noisy(source.sample(generator, count)[0], generator)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits, mean, log_variance = model(x).split([pixels, code, code], -1)
        error = functional.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(-1)
        return (error + gaussian_kl(mean, log_variance)).mean() / pixels

    def held_out() -> Batch:
        return noisy(source.held_out()[0], Generator().manual_seed(1))

    return Problem(name, build, sample, loss, batch_size=batch_size, steps=steps, held_out=held_out)


class Topics(nn.Module):
    """log p(word | z) of a product of experts: log softmax(norm(softmax(z) beta))."""

    def __init__(self, topics: int, words: int) -> None:
        super().__init__()
        self.beta = nn.Linear(topics, words, bias=False)
        self.norm = nn.BatchNorm1d(words, affine=False, track_running_stats=False)

    def forward(self, z: Tensor) -> Tensor:
        return functional.log_softmax(self.norm(self.beta(z.softmax(-1))), -1)


def topic_model(
    name: str, source: data.Rows, *, hidden: int, topics: int, batch_size: int, steps: int, alpha: float = 1.0
) -> Problem:
    """ProdLDA (Srivastava & Sutton 2017, "Autoencoding Variational Inference for Topic Models") without its dropout.

    source: bags of words [n, words]. The code is a logistic normal; the prior is the Laplace approximation of a
    symmetric Dirichlet(alpha) (their section 3.2). The loss is the negative evidence lower bound in nats per word.
    """
    words = source.shape[0]
    length = float(source.x.sum(1).mean())
    prior = (1 - 2 / topics) / alpha + 1 / (topics * alpha)

    def build() -> nn.Module:
        norm = nn.BatchNorm1d(2 * topics, track_running_stats=False)
        return Variational(
            nn.Sequential(
                mlp([words, hidden, hidden], "softplus"), nn.Softplus(), nn.Linear(hidden, 2 * topics, bias=False), norm
            ),
            Topics(topics, words),
            topics,
        )

    def noisy(bags: Tensor, generator: Generator) -> Batch:
        return torch.cat([bags, torch.randn(len(bags), topics, generator=generator)], 1), bags

    def sample(generator: Generator, count: int) -> Batch:
        return noisy(source.sample(generator, count)[0], generator)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        log_p, mean, log_variance = model(x).split([words, topics, topics], -1)
        return (gaussian_kl(mean, log_variance, prior) - (y * log_p).sum(-1)).mean() / length

    def held_out() -> Batch:
        return noisy(source.held_out()[0], Generator().manual_seed(1))

    return Problem(name, build, sample, loss, batch_size=batch_size, steps=steps, held_out=held_out)
