"""The spectrum: features of a delta against numpy on the full matrix, and what is unlike an agent's own history."""

from __future__ import annotations

import numpy as np
import pytest

from cltrain.config_gate import DetectorsConfig
from cltrain.gate.spectrum import Delta, features_of, look_at_spectrum, minus
from cltrain.records import Code, Verdict

CONFIG = DetectorsConfig()
MODULES = ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.0.mlp.up_proj")


def _update(rng: np.random.Generator, size: float = 1.0, rank: int = 8) -> dict[str, Delta]:
    return {m: (rng.normal(size=(rank, 24)), size * rng.normal(size=(32, rank))) for m in MODULES}


def test_features_are_those_of_the_full_matrices() -> None:
    update = _update(np.random.default_rng(1))
    features = features_of(update)
    full = [b @ a for a, b in update.values()]
    sigmas = [np.linalg.svd(matrix, compute_uv=False) for matrix in full]
    assert features["q_proj top singular value"] == pytest.approx(np.log([s[0] for s in sigmas[:2]]).mean())
    assert features["up_proj energy concentration"] == pytest.approx(sigmas[2][0] ** 2 / (sigmas[2] ** 2).sum())
    tails = [((m - m.mean()) ** 4).mean() / m.var() ** 2 - 3 for m in full]
    assert features["up_proj kurtosis"] == pytest.approx(tails[2])


def test_a_step_is_the_difference_of_two_adapters() -> None:
    rng = np.random.default_rng(2)
    one, other = _update(rng), _update(rng)
    for module, (a, b) in minus(one, other).items():
        expected = one[module][1] @ one[module][0] - other[module][1] @ other[module][0]
        assert np.allclose(b @ a, expected)
    assert minus(one, {}) == one


def test_an_update_unlike_all_accepted_ones_holds_and_one_like_them_passes() -> None:
    rng = np.random.default_rng(3)
    history = [features_of(_update(rng)) for _ in range(20)]
    assert look_at_spectrum(features_of(_update(rng)), history, CONFIG).verdict is Verdict.PROMOTE
    spiked = {
        m: (np.concatenate([a, a[:1]]), np.concatenate([b, 60 * b[:, :1]], axis=1))
        for m, (a, b) in _update(rng).items()
    }
    check = look_at_spectrum(features_of(spiked), history, CONFIG)
    assert (check.verdict, check.code) == (Verdict.HOLD, Code.SPECTRUM)


def test_too_little_history_is_said_and_passes() -> None:
    check = look_at_spectrum({}, [{}] * (CONFIG.spectrum_history - 1), CONFIG)
    assert check.verdict is Verdict.PROMOTE
    assert "11 accepted updates, 12 are needed" in check.reason


def test_one_sound_update_in_a_hundred_at_most_is_called_odd() -> None:
    """The shortest history there may be, features of normal spread: the worst case for a median of deviations."""
    rng = np.random.default_rng(4)
    names = [f"{kind} {feature}" for kind in "qkvogud" for feature in ("top", "share", "tail")]
    odd = 0
    for _ in range(500):
        values = rng.normal(size=(CONFIG.spectrum_history + 1, len(names)))
        rows = [dict(zip(names, row, strict=True)) for row in values]
        odd += look_at_spectrum(rows[0], rows[1:], CONFIG).verdict is Verdict.HOLD
    assert odd / 500 <= 0.01


def test_a_weight_that_is_no_number_is_odd() -> None:
    history = [{"q_proj kurtosis": float(i)} for i in range(20)]
    assert look_at_spectrum({"q_proj kurtosis": float("nan")}, history, CONFIG).verdict is Verdict.HOLD
