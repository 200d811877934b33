"""From a record to answers: interpolation, runs that never arrive, intervals, fronts, and what is refused."""

import json
import math

import numpy as np
import pytest
from rich.console import Console

from benchmarks.cost import analysis, curves, tables, terms
from benchmarks.cost.verdicts import choices, comparisons, ratio_text, standing, verdicts
from grpo_fast.errors import UserError
from tests.cost_records import cell, lively_record, point, record_of

LINE = [(0.0, 0.4), (10.0, 0.6), (30.0, 0.8), (100.0, 0.8)]


def paced(algorithm: str, seed: int, pace: float, **others) -> dict:
    """`LINE` at another pace: every cost times `pace`, and the end of the budget reached."""
    curve = [(pace * cost, quality) for cost, quality in LINE[:-1]]
    return cell(algorithm, seed, [*curve, (max(100.0, 30 * pace), 0.8)], **others)


def stuck(algorithm: str, seed: int, **others) -> dict:
    """A run that stays at 0.45."""
    return cell(algorithm, seed, [(0.0, 0.4), (10.0, 0.45), (100.0, 0.45)], **others)


def test_quality_between_evaluations():
    found = cell("grpo", 0, LINE)
    at = [curves.quality_at(found, "wall_s", cost) for cost in (0, 5, 10, 15, 100, 500)]
    assert at == pytest.approx([0.4, 0.5, 0.6, 0.65, 0.8, 0.8])


def test_training_that_generates_nothing_counts_at_its_token_count():
    found = cell("dpo", 0, [(0.0, 0.4), (50.0, 0.4), (50.0, 0.7), (50.0, 0.9)])
    assert curves.quality_at(found, "generated_tokens", 50.0) == pytest.approx(0.9)
    assert curves.quality_at(found, "generated_tokens", 49.0) == pytest.approx(0.4)
    assert curves.cost_to_reach(found, "generated_tokens", 0.8) == pytest.approx(50.0)


def test_cost_of_the_first_crossing():
    found = cell("grpo", 0, [(0.0, 0.4), (10.0, 0.6), (20.0, 0.5), (40.0, 0.7)])
    assert curves.cost_to_reach(found, "wall_s", 0.55) == pytest.approx(7.5)
    assert curves.cost_to_reach(found, "wall_s", 0.65) == pytest.approx(35.0)
    assert curves.cost_to_reach(found, "wall_s", 0.3) == 0.0
    assert curves.cost_to_reach(found, "wall_s", 0.71) == math.inf


def test_of_refusals_less_is_better():
    found = cell("grpo", 0, [])
    found["curve"] = [point(0, 0.0, 0.5, over_refusal=0.3), point(1, 10.0, 0.5, over_refusal=0.1)]
    assert curves.cost_to_reach(found, "wall_s", 0.2, "over_refusal") == pytest.approx(5.0)


def test_a_diverged_run_never_arrives_and_keeps_its_last_measured_quality():
    found = cell("ppo", 0, [*LINE[:3], (40.0, math.nan)], status="diverged")
    found["curve"].append(point(4, 50.0, 0.1) | {"mean": None})
    assert curves.cost_to_reach(found, "wall_s", 0.5) == math.inf
    assert curves.quality_at(found, "wall_s", 90.0) == pytest.approx(0.8)


def test_ratios_of_paired_costs():
    record = record_of(
        [paced(n, s, p) for s, n, p in [(0, "grpo", 1), (0, "ppo", 2), (1, "grpo", 2), (1, "ppo", 1)]]
    )
    target = analysis.Target(name="", quality="mean", level=0.6)
    found = analysis.compare_costs(record, target, "wall_s", "ppo")
    assert [low for low, _ in found.pairs] == pytest.approx([2.0, 0.5])
    assert found.estimate == pytest.approx((1.0, 1.0))
    assert found.interval == pytest.approx((0.5, 2.0)) and not found.certain
    assert standing(found) == "uncertain" and ratio_text(found).endswith("?")


def test_the_interval_of_known_data():
    values = [
        0.0,
        0.0,
        0.0,
        1.0,
    ]  # means of four draws: binomial(4, 1/4) / 4, of which P(0) = 0.316, P(4) = 0.004
    low, high = curves.bootstrap([(value, value) for value in values]) or (None, None)
    assert low == 0.0 and high == 0.75
    assert curves.bootstrap([(1.0, 1.0)]) is None
    assert curves.bootstrap([(2.0, 2.0)] * 5) == (2.0, 2.0)


def test_few_seeds_and_close_calls_make_no_order():
    def found(ratios):
        pairs = {seed: ((1.0, 1.0), (ratio, ratio)) for seed, ratio in enumerate(ratios)}
        return curves.compared("wall_s", "grpo", "ppo", pairs, ratio=True)

    assert not found([2.0, 2.1, 2.2, 2.1]).certain, "four seeds"
    assert found([2.0, 2.1, 2.2, 2.1, 1.9]).certain
    close = found([1.01, 1.02, 1.6, 1.01, 1.02])  # the bootstrap leaves 1 out, Student's interval does not
    assert close.interval is not None and close.interval[0] > 1 and not close.certain
    assert curves.student([0.0, 2.0]) == pytest.approx((1 - 12.706, 1 + 12.706), rel=1e-3)


def test_one_seed_gives_no_interval_and_no_order():
    record = record_of([paced("grpo", 0, 1), paced("ppo", 0, 3)])
    found = comparisons(record, "ppo")["wall_s"]
    assert (
        found.estimate == pytest.approx((3.0, 3.0))
        and found.interval is None
        and standing(found) == "uncertain"
    )
    assert any("no interval" in line for line in terms.warnings(record))
    assert any("one seed gives no interval" in line for line in verdicts(record))


def test_a_run_that_never_arrives_is_a_bound_not_a_gap():
    cells = [paced("grpo", seed, 1) for seed in range(5)] + [stuck("dpo", seed) for seed in range(5)]
    record = record_of(cells)
    target = analysis.Target(name="", quality="mean", level=0.6)
    found = analysis.compare_costs(record, target, "wall_s", "dpo")
    assert found.pairs[2] == pytest.approx((10.0, math.inf))  # 100 spent in vain against 10
    assert found.estimate == pytest.approx((10.0, math.inf)) and found.certain and standing(found) == "ahead"
    assert ratio_text(found) == "≥ 10.00 [≥ 10.00]"
    other_way = analysis.compare_costs(record, target, "wall_s", "grpo", first="dpo")
    assert ratio_text(other_way) == "≤ 0.10 [≤ 0.10]" and standing(other_way) == "behind"
    nobody = analysis.Target(name="", quality="mean", level=0.99)
    assert not analysis.compare_costs(record, nobody, "wall_s", "dpo").known


def test_one_grpo_seed_that_never_arrives_makes_the_order_uncertain():
    cells = [paced("grpo", 0, 1), paced("grpo", 1, 1), stuck("grpo", 2)]
    record = record_of(cells + [paced("ppo", seed, 3) for seed in range(3)])
    target = analysis.Target(name="", quality="mean", level=0.6)
    assert not analysis.compare_costs(record, target, "wall_s", "ppo").certain


def test_differences_of_quality_at_equal_cost():
    cells = [paced("grpo", seed, 1) for seed in range(5)] + [stuck("dpo", seed) for seed in range(5)]
    found = analysis.compare_qualities(record_of(cells, budget=20.0), "wall_s", "mean", "dpo")
    assert found.estimate == pytest.approx((-0.25, -0.25)) and standing(found) == "ahead"


def test_a_run_that_ended_before_the_budget_is_compared_where_it_ended():
    short = cell("dpo", 0, [(0.0, 0.4), (10.0, 0.5)])
    record = record_of([paced("grpo", 0, 1), short])
    found = analysis.compare_qualities(record, "generated_tokens", "mean", "dpo")
    assert found.estimate == pytest.approx((-0.1, -0.1))
    broken = short | {
        "status": "diverged"
    }  # that one is not coming back: what GRPO does with the budget counts
    record = record_of([paced("grpo", 0, 1), broken])
    found = analysis.compare_qualities(record, "generated_tokens", "mean", "dpo")
    assert found.estimate == pytest.approx((-0.3, -0.3))


def test_without_a_judge_what_it_would_measure_is_left_out():
    cells = [paced(name, seed, 1, quality="reward") for name in ("grpo", "ppo") for seed in range(2)]
    for found in cells:
        for entry in found["curve"]:
            del entry["over_refusal"]
    record = record_of(cells)
    assert "over_refusal" not in comparisons(record, "ppo") and "mean" in comparisons(record, "ppo")
    assert any("no judge" in line for line in terms.warnings(record))
    assert not any("over-refusal" in name for table in tables.tables(record) for name in table.head)


def test_more_refusals_are_worse():
    cells = [paced(name, seed, 1) for name in ("grpo", "dpo") for seed in range(5)]
    for found in cells:
        for entry in found["curve"]:
            entry["over_refusal"] = 0.1 if found["algorithm"] == "dpo" else 0.3
    found = analysis.compare_qualities(record_of(cells), "wall_s", "over_refusal", "dpo")
    assert found.estimate == pytest.approx((-0.2, -0.2)) and standing(found) == "behind"


def test_targets_are_shares_of_what_the_best_wins_within_every_budget():
    fast = [paced("grpo", seed, 1) for seed in range(2)]
    record = record_of(fast + [stuck("dpo", seed) for seed in range(2)])
    found = {
        target.name.split(":")[0]: target.level
        for target in analysis.targets(record)
        if target.quality == "mean"
    }
    assert found["50% of the best gain"] == pytest.approx(0.6)
    assert found["75% of the best gain"] == pytest.approx(0.7)
    assert found["mean 0.6"] == 0.6
    record["budget"]["generated_tokens"] = 10  # used up first: 0.6 is what can be had
    head = analysis.headline(record)
    assert head is not None and head.level == pytest.approx(0.55)


def test_nobody_gained():
    flat = [cell(name, seed, [(0.0, 0.5), (100.0, 0.4)]) for name in ("grpo", "ppo") for seed in range(2)]
    record = record_of(flat)
    assert analysis.targets(record) == []
    assert "No algorithm was better" in verdicts(record)[0]
    assert tables.tables(record)[0].title == "By what counts"


def test_points_that_nobody_beats():
    points = [(1.0, 0.5), (2.0, 0.5), (2.0, 0.7), (3.0, 0.6), (4.0, 0.9), (4.0, 0.9), (0.5, 0.1)]
    assert curves.pareto(points) == [6, 0, 2, 4, 5]


def test_fronts_name_who_is_on_them():
    cells = [paced("grpo", 0, 1), paced("ppo", 0, 3, memory={"parts": {}, "peak": 6e7})]
    fronts = analysis.fronts(record_of(cells, budget=60.0))
    assert {row["algorithm"] for row in fronts["wall_s"]["points"] if row["front"]} == {"grpo"}
    assert [row["front"] for row in fronts["memory"]["points"]] == [True, False]
    assert set(fronts) == {"wall_s", "flops", "memory", "kl", "over_refusal"}


def test_mixed_devices_and_commits_are_flagged():
    clean = [paced(name, seed, 1) for name in ("grpo", "ppo") for seed in range(5)]
    assert terms.warnings(record_of(clean)) == []
    mixed = record_of([*clean[:-1], clean[-1] | {"device": "Xeon", "commit": "b" * 40 + "+"}])
    text = " ".join(terms.warnings(mixed))
    assert (
        "different devices (AMD EPYC, Xeon)" in text and "different commits (aaaaaaaaaa, bbbbbbbbbb+)" in text
    )
    assert "in no commit" in text
    assert "1 or 2 threads" in terms.mixed(record_of([*clean[:-1], clean[-1] | {"threads": 2}]))[0]
    other = record_of(clean) | {"device": "Xeon"}
    assert "different devices" in terms.mixture([record_of(clean), other])[0]
    assert terms.mixture([record_of(clean)] * 2) == []


def test_a_missing_cell_and_an_early_end_are_said():
    record = record_of([paced("grpo", 0, 1), paced("grpo", 1, 1), paced("ppo", 0, 1)])
    record["algorithms"]["dpo"] = {"title": "DPO", "family": "dpo", "settings": {}}
    record["budget"]["wall_s"] = 500.0
    text = " ".join(terms.warnings(record))
    assert "PPO: not measured with seed 1." in text and "DPO offline: not measured." in text
    assert "GRPO ended before the budget of wall time was used up (seeds 0, 1)" in text


def test_unequal_terms_are_refused_by_name():
    cells = [paced("grpo", 0, 1), paced("ppo", 0, 1), paced("ppo", 1, 1)]
    terms.check_equal_terms(record_of(cells))
    cells[1]["fingerprint"] = cells[1]["fingerprint"] | {"reward_model": "another"}
    with pytest.raises(UserError, match=r"ppo, seed 0 had another reward model than grpo"):
        terms.check_equal_terms(record_of(cells))
    with pytest.raises(UserError, match="grpo, seed 0 is in the record twice"):
        terms.check_equal_terms(record_of([cells[0], cells[0]]))


def test_a_process_that_left_nothing_behind():
    died = cell(
        "dpo", 0, [], status="failed", why="its process ended with -9", memory=None, phase_s={}, flops={}
    )
    died |= {"fingerprint": None}
    del died["device"], died["commit"]
    record = record_of([died, *(paced(name, 0, 1) for name in ("grpo", "ppo"))])
    terms.check_equal_terms(record)
    assert len(tables.tables(record)) == 8 and terms.mixed(record) == []
    record["cells"][1]["fingerprint"] = record["cells"][1]["fingerprint"] | {"start": "another"}
    with pytest.raises(UserError, match="ppo, seed 0 had another start than grpo"):
        terms.check_equal_terms(record)


def test_a_currency_without_a_budget_sets_no_target():
    record = record_of([paced(name, seed, 1) for name in ("grpo", "ppo") for seed in range(5)])
    record["budget"] = {"wall_s": 100.0, "generated_tokens": 0.0}
    head = analysis.headline(record)
    assert head is not None and head.level == pytest.approx(0.7)
    assert terms.warnings(record) == [] and analysis.equal_cost(record, "generated_tokens") == 100.0


def test_a_diverged_cell_counts_against_its_algorithm():
    cells = [paced("grpo", seed, 1) for seed in range(5)] + [paced("ppo", seed, 2) for seed in range(4)]
    broken = cell("ppo", 4, LINE[:2], status="diverged", why="loss is not finite")
    record = record_of([*cells, broken])
    found = comparisons(record, "ppo")["wall_s"]
    assert len(found.pairs) == 5 and found.estimate[1] == math.inf and standing(found) == "ahead"
    assert any("seed 4: diverged (loss is not finite)" in line for line in terms.warnings(record))
    assert "PPO reached the target with 4 of 5 seeds." in verdicts(record)[-1]


def test_a_cell_without_any_evaluation_leaves_nothing_certain():
    cells = [paced("grpo", seed, 1) for seed in range(3)] + [stuck("dpo", seed) for seed in range(2)]
    failed = cell("dpo", 2, [], status="failed", why="out of memory", memory=None)
    record = record_of([*cells, failed])
    found = comparisons(record, "dpo")
    assert standing(found["mean"]) == "uncertain" and standing(found["memory"]) == "uncertain"
    assert tables.tables(record) and any("it has no evaluation" in line for line in terms.warnings(record))


def test_the_sentences_say_where_grpo_loses():
    cells = [paced("grpo", seed, 2) for seed in range(5)] + [
        paced("dpo", seed, 1 + seed / 10) for seed in range(5)
    ]
    lines = verdicts(record_of(cells))
    assert any(line.startswith("Wall time") and "GRPO loses to DPO offline" in line for line in lines)
    assert any(line.startswith("Peak memory") and "level with DPO offline" in line for line in lines)
    assert not any("ahead" in line for line in lines)
    chosen = {what: (best, same) for what, best, same in choices(record_of(cells))}
    assert chosen["wall time"] == ("DPO offline", "none")


def test_without_grpo_or_rivals_there_is_no_comparison():
    assert "GRPO was not measured" in verdicts(record_of([paced("ppo", 0, 1)]))[0]
    assert "Neither PPO nor DPO" in verdicts(record_of([paced("grpo", 0, 1)]))[0]


def test_the_search_shows_what_was_varied_and_what_came_of_it():
    [row] = (
        tables.search_table(record_of([paced("grpo", 0, 1)])) or tables.Table(title="", head=(), rows=())
    ).rows
    assert row == ("GRPO", "GRPO", "lr 0.001: 0.600; lr 0.1: diverged", "lr 0.001")


def test_the_terminal_shows_warnings_tables_and_sentences(capsys):
    record = json.loads(json.dumps(lively_record(seeds=5)))
    Console(width=160).print(tables.terminal(record, wide=True))
    text = capsys.readouterr().out
    assert "! PPO shared trunk" in text and "Hyper-parameter search" in text and "GRPO is ahead of" in text
    rows = tables.markdown(tables.tables(record)[1]).splitlines()
    assert len(rows) == 4 + 9 and len({row.count("|") for row in rows[2:]}) == 1


def test_intervals_of_five_seeds_are_narrower_than_they_say():
    draws = np.random.default_rng(1).normal(size=(300, 5))
    intervals = [curves.bootstrap([(x, x) for x in row]) for row in draws.tolist()]
    held = sum(found is not None and found[0] <= 0 <= found[1] for found in intervals) / len(draws)
    assert 0.78 < held < 0.90  # as docs/cost.md says
