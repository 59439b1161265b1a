"""The gate simulator: what it does to a candidate is what it says, and its own policy is the production decision."""

import numpy as np
import pytest

from scripts import bench_gate as bench


def start_of(share=0.7):
    answers = np.zeros(bench.WORLD, dtype=bool)
    answers[: round(share * bench.WORLD)] = True
    return answers


@pytest.mark.parametrize("gain", [-0.02, 0.0, 0.013])
def test_a_candidate_is_truly_better_by_its_gain_and_flips_six_percent(gain):
    start = start_of()
    candidate = bench.next_candidate(np.random.default_rng(1), start, gain)
    assert candidate.mean() - start.mean() == pytest.approx(gain, abs=1e-4)
    assert (candidate != start).mean() == pytest.approx(0.06, abs=1e-3)


def test_where_little_is_wrong_a_candidate_still_has_its_loss():
    start = start_of(0.99)
    candidate = bench.next_candidate(np.random.default_rng(1), start, -0.01)
    assert candidate.mean() - start.mean() == pytest.approx(-0.01, abs=1e-4)


def test_the_production_policy_asks_the_production_decision_and_retires_what_is_worn(monkeypatch):
    monkeypatch.setattr(bench, "CONFIG", bench.CONFIG.model_copy(update={"max_uses": 2, "track_record": 3}))
    rng = np.random.default_rng(0)
    policy = bench.Production(rng, start_of())
    much_better = bench.next_candidate(rng, policy.incumbent, 0.05)
    assert policy.look(much_better)
    assert policy.decision.verdict == "promote"
    assert not policy.look(bench.next_candidate(rng, policy.incumbent, -0.05))
    assert len(policy.record) == 2
    for _ in range(12):
        policy.look(bench.next_candidate(rng, policy.incumbent, 0.0))
    assert policy.uses[policy.pool].max() < 2
    assert policy.uses.max() == 2
    assert len(set(policy.pool.tolist())) == bench.POOL


def test_a_short_run_has_a_row_per_stream_and_the_ratchet_holds(tmp_path, capsys):
    file = tmp_path / "rows.json"
    bench.main(["--gates", "12", "--seeds", "1", "--nulls", "40", "--processes", "1", "--json", str(file),
                "--policies", "cltrain", "strict >, fixed 200"])  # fmt: skip
    found = bench.json.loads(file.read_text())
    assert [(row["policy"], row["regime"]) for row in found["rows"]] == [
        (name, regime) for name in ("cltrain", "strict >, fixed 200") for regime in bench.REGIMES
    ]
    assert set(found["null"]) == {"better", "not worse"}
    assert "true final" in capsys.readouterr().out


def test_looks_that_are_left_out_would_have_changed_nothing(monkeypatch):
    def decisions(asks_always):
        rng = np.random.default_rng(4)
        policy = bench.Production(rng, start_of())
        policy.record = [bench.Outcome(*rng.normal(0, 0.02, 2).repeat(2)[:2], 800) for _ in range(40)]
        if asks_always:
            policy.may_end = lambda candidate, asked: True
        found = []
        for gain in (0.02, -0.03, -0.005, 0.01, -0.02, 0.0):
            policy.look(bench.next_candidate(rng, policy.incumbent, gain))
            found.append((policy.decision.verdict, policy.num_asked))
        return found

    assert decisions(asks_always=False) == decisions(asks_always=True)
