"""Is a text inside the distribution a reward model was trained on? Asked in the model's own feature space.

A Gaussian with a shrunk covariance is fitted to the features of training replies (`RewardModel.features` says which);
a reply is outside when its Mahalanobis distance is larger than that of 95% of held-out replies (Lee et al.,
arXiv 1807.03888; shrinkage: Ledoit and Wolf, J. Multivariate Analysis 88, 2004). One reply in twenty is outside by
definition; a policy whose replies are outside far more often has left what the scores were learned on. Letters: n
replies, F features, D dimensions after the projection.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_fast.errors import UserError

FILE = "feature_statistics.safetensors"
QUANTILES = (0.5, 0.95, 0.99)
MOST_DIMENSIONS = 512
"""Wider features are projected at random to so many dimensions, which keeps distances (Johnson and Lindenstrauss,
1984) and files small."""


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """A Gaussian over features, and how far held-out replies lie from its centre."""

    mean: Tensor
    """(D,) float32"""
    whitening: Tensor
    """(D, D) float32: (features - mean) @ whitening has the identity as its covariance"""
    projection: Tensor | None
    """(F, D) float32; None where F = D"""
    quantiles: tuple[float, float, float]
    """Distances that 50, 95 and 99% of held-out replies do not exceed"""

    @classmethod
    def fit(cls, features: Tensor, held_out: Tensor, *, seed: int = 0) -> FeatureStatistics:
        """From `features` (n, F) of training replies and of `held_out` ones (m, F), n >= 2 and m >= 1."""
        if (
            features.ndim != 2
            or len(features) < 2
            or held_out.shape[1:] != features.shape[1:]
            or not len(held_out)
        ):
            raise ValueError(
                "features and held_out must have shapes (n >= 2, F) and (m >= 1, F), got "
                f"{tuple(features.shape)} and {tuple(held_out.shape)}"
            )
        projection = None
        if features.shape[1] > MOST_DIMENSIONS:
            drawn = torch.Generator().manual_seed(seed)
            projection = torch.randn(features.shape[1], MOST_DIMENSIONS, generator=drawn)
            features = features.float().cpu() @ projection
        x = features.double().cpu()
        mean = x.mean(dim=0)
        values, vectors = torch.linalg.eigh(_shrunk(x - mean))
        found = cls(
            mean=mean.float(),
            whitening=(vectors * values.clamp_min(1e-12).rsqrt()).float().contiguous(),
            projection=projection,
            quantiles=(0.0, 0.0, 0.0),
        )
        distances = found.distance(held_out.float().cpu()).double()
        half, most, nearly_all = torch.quantile(
            distances, torch.tensor(QUANTILES, dtype=torch.float64)
        ).tolist()
        return cls(**{**vars(found), "quantiles": (half, most, nearly_all)})

    @property
    def width(self) -> int:
        """F, the number of features."""
        return len(self.mean if self.projection is None else self.projection)

    def distance(self, features: Tensor) -> Tensor:
        """Mahalanobis distance of `features` (n, F), on their device: (n,) float32."""
        x, device = features.float(), features.device
        if self.projection is not None:
            x = x @ self.projection.to(device)
        return ((x - self.mean.to(device)) @ self.whitening.to(device)).norm(dim=1)

    def outside(self, features: Tensor) -> Tensor:
        """Whether each of `features` (n, F) lies further out than 95% of held-out replies: (n,) bool."""
        return self.distance(features) > self.quantiles[1]

    def save(self, folder: str | Path) -> None:
        """Write one safetensors file into an existing folder."""
        tensors = {"mean": self.mean, "whitening": self.whitening}
        tensors |= {} if self.projection is None else {"projection": self.projection}
        save_file(tensors, Path(folder) / FILE, metadata={"quantiles": json.dumps(self.quantiles)})

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """What `save` wrote into the file `path`; UserError for a file that is unsound."""
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as opened:
                quantiles = tuple(float(q) for q in json.loads((opened.metadata() or {})["quantiles"]))
            mean, whitening, projection = tensors["mean"], tensors["whitening"], tensors.get("projection")
            shapes = mean.ndim == 1 and whitening.shape == (len(mean), len(mean))
            shapes = shapes and (projection is None or projection.shape[1:] == mean.shape)
            numbers = all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors.values())
            sound = shapes and numbers and len(quantiles) == 3 and all(map(math.isfinite, quantiles))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not sound:
            raise UserError(f"{path} does not hold the statistics of features")
        half, most, nearly_all = quantiles
        return cls(mean=mean, whitening=whitening, projection=projection, quantiles=(half, most, nearly_all))


def _shrunk(centred: Tensor) -> Tensor:
    """The covariance (D, D) of `centred` (n, D), drawn towards a multiple of the identity.

    Ledoit and Wolf's optimal share: b² / d², where d² is how far the sample covariance is from that multiple and b²
    how far a single sample's outer product is from the covariance on average, over n.
    """
    n, size = centred.shape
    covariance = centred.T @ centred / n
    level = covariance.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(size, dtype=covariance.dtype)
    distance = (covariance - level * identity).square().sum()
    # sum over samples of |x xᵀ - S|² = sum |x|⁴ - n |S|²
    noise = (centred.square().sum(dim=1).square().mean() - covariance.square().sum()) / n
    share = (noise.clamp_min(0) / distance).clamp(0, 1) if distance > 0 else torch.ones_like(distance)
    return (1 - share) * covariance + share * level * identity
