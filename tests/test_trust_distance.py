"""Feature-space distance: who is outside, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grpo_fast.errors import UserError
from grpo_fast.trust import distance
from grpo_fast.trust.distance import FILE, FeatureStatistics


def drawn(n: int, size: int = 24, *, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated Gaussian features whose directions have very different variances."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=torch.Generator().manual_seed(99))
    mixing = torch.linalg.qr(square)[0] * torch.logspace(0, -1, size)
    return torch.randn(n, size, generator=generator) @ mixing.T + shift


def test_the_distance_is_mahalanobis_of_the_shrunk_covariance():
    training, held_out = drawn(20000, seed=0), drawn(1000, seed=1)
    found = FeatureStatistics.fit(training, held_out)
    x = training.double()
    exact = torch.linalg.inv(torch.cov(x.T, correction=0))
    centred = held_out.double() - x.mean(0)
    expected = torch.einsum("ni,ij,nj->n", centred, exact, centred).sqrt()
    # 20,000 samples of 24 directions leave next to nothing to shrink
    torch.testing.assert_close(found.distance(held_out).double(), expected, rtol=0.02, atol=0)


def test_one_in_twenty_of_the_same_distribution_is_outside_and_most_of_a_shifted_one():
    found = FeatureStatistics.fit(drawn(3000, seed=0), drawn(3000, seed=1))
    same = found.outside(drawn(5000, seed=2)).float().mean().item()
    assert 0.03 < same < 0.07
    assert found.outside(drawn(500, seed=3, shift=1.0)).float().mean() > 0.95
    assert found.quantiles[0] < found.quantiles[1] < found.quantiles[2]


def test_wide_features_are_projected_and_still_tell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distance, "MOST_DIMENSIONS", 8)
    found = FeatureStatistics.fit(drawn(2000, seed=0), drawn(2000, seed=1))
    assert found.whitening.shape == (8, 8) and found.width == 24
    assert 0.03 < found.outside(drawn(2000, seed=2)).float().mean() < 0.07
    assert found.outside(drawn(500, seed=3, shift=1.0)).float().mean() > 0.9


@pytest.mark.parametrize(("n", "size"), [(2, 1), (5, 24), (2, 3)])
def test_few_replies_and_small_models_give_finite_distances(n: int, size: int):
    found = FeatureStatistics.fit(torch.randn(n, size), torch.randn(3, size))
    assert found.distance(torch.randn(7, size)).isfinite().all()


def test_replies_that_are_all_alike_give_finite_distances():
    found = FeatureStatistics.fit(torch.ones(5, 3), torch.ones(2, 3))
    assert found.distance(torch.zeros(1, 3)).isfinite().all() and found.outside(torch.zeros(1, 3)).item()


def test_what_is_saved_is_loaded(tmp_path: Path):
    found = FeatureStatistics.fit(drawn(300, seed=0), drawn(100, seed=1))
    found.save(tmp_path)
    again, x = FeatureStatistics.load(tmp_path / FILE), drawn(50, seed=2)
    assert torch.equal(again.distance(x), found.distance(x)) and again.quantiles == found.quantiles


def test_unsound_files_are_refused(tmp_path: Path):
    FeatureStatistics.fit(drawn(300, seed=0), drawn(100, seed=1)).save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:50])
    with pytest.raises(UserError, match="cannot be read"):
        FeatureStatistics.load(tmp_path / FILE)
    save_file({"mean": torch.zeros(3)}, tmp_path / FILE)
    with pytest.raises(UserError, match="cannot be read"):
        FeatureStatistics.load(tmp_path / FILE)
    bad = {"mean": torch.zeros(3), "whitening": torch.zeros(3, 2)}
    save_file(bad, tmp_path / FILE, metadata={"quantiles": "[1, 2, 3]"})
    with pytest.raises(UserError, match="does not hold"):
        FeatureStatistics.load(tmp_path / FILE)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"got \(1, 3\) and \(2, 3\)"):
        FeatureStatistics.fit(torch.zeros(1, 3), torch.zeros(2, 3))
