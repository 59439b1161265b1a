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
    quick = bench.CONFIG.model_copy(update={"max_uses": 2, "track_record": 3})
    monkeypatch.setattr(bench.Production, "config", quick)
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


def test_a_short_run_has_a_row_per_stream_and_its_exit_code_says_what_broke(tmp_path, capsys):
    file = tmp_path / "rows.json"
    code = bench.main(["--gates", "12", "--seeds", "1", "--nulls", "40", "--processes", "1", "--json", str(file),
                "--policies", "cltrain", "strict >, fixed 200"])  # fmt: skip
    found = bench.json.loads(file.read_text())
    assert [(row["policy"], row["regime"]) for row in found["rows"]] == [
        (name, regime) for name in ("cltrain", "strict >, fixed 200") for regime in bench.REGIMES
    ]
    assert set(found["null"]) == {"better", "not worse"}
    said = capsys.readouterr().out
    assert "true final" in said
    assert code == 1
    assert "honest: true_final >= 0.95 in every seed" in found["broken"], "not in twelve gates"
    assert all(f"broken: {name}" in said for name in found["broken"])


def test_the_ratchet_of_better_on_average_loses_and_believes_what_the_production_gate_does_not():
    strict = {regime: bench.simulate("strict >, fixed 200", regime, 0, 300) for regime in bench.REGIMES}
    assert strict["eroding"]["true_final"] < 0.67
    assert strict["honest"]["reading"] - strict["honest"]["true_final"] > 0.05
    ours = bench.simulate("cltrain", "eroding", 0, 40)
    same = bench.simulate("strict >, fixed 200", "eroding", 0, 40)
    assert ours["true_final"] > 0.695 > same["true_final"]


def test_the_defaults_are_those_of_the_product_and_ask_for_a_gain_on_what_was_taught():
    rng = np.random.default_rng(0)
    policy = bench.Defaults(rng, start_of())
    assert policy.config == bench.GateConfig()
    assert not policy.look(bench.next_candidate(rng, policy.incumbent, 0.0))
    assert "gain in simulated: not shown" in " ".join(policy.decision.reasons)
    assert policy.num_asked == bench.GateConfig().items_per_gate
    assert policy.look(bench.next_candidate(rng, policy.incumbent, 0.06))


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
