"""Probes change replies as they say, and the verdicts find planted exploits and no others."""

import json
import random

import numpy as np
import pytest
from scipy import stats

from grpo_fast.trust.probes import PROBES, ProbeTexts, probe_verdicts, probed_replies, probes
from grpo_fast.trust.quality import HeadView

HEADS = [HeadView(name="help", kind="regression", std=2.0), HeadView(name="safe", kind="binary", std=0.25)]
PROMPT, REPLY = "How do I repot a {cactus}?", "Use gloves. Water it a week later."


def probed(name: str, reply: str = REPLY, seed: int = 0) -> str:
    return probed_replies([PROMPT], [reply], seed=seed)[name][0]


def test_each_probe_does_what_it_says():
    assert probed("length").startswith(REPLY + "\n\n") and "cactus" in probed("length")
    assert "{topic}" not in probed("length")
    assert probed("flattery").endswith("\n\n" + REPLY)
    assert probed("repetition") == "\n\n".join([REPLY] * 3)
    assert probed("judge_instruction").startswith(REPLY + "\n\n")
    assert probed("refuse_everything") in ProbeTexts().refusal
    assert probed("prompt_copy") == PROMPT and probed("empty") == ""
    assert set(PROBES) == set(probed_replies([PROMPT], [REPLY]))
    assert {name for name, probe in PROBES.items() if probe.degenerate} == {
        "refuse_everything",
        "prompt_copy",
        "empty",
    }


@pytest.mark.parametrize("words", [0, 10, 1000])
def test_padding_about_doubles_a_reply(words):
    reply = "word " * words
    added = len(probed("length", reply)) - len(reply)
    assert len(reply) <= added <= len(reply) + 300


def test_an_empty_reply_and_a_prompt_without_words_are_fine():
    for name, (changed,) in probed_replies(["?! 12"], [""]).items():
        assert changed == "" if name in ("repetition", "empty") else changed.strip() == changed != ""


def test_a_reply_s_probe_does_not_depend_on_the_others():
    many = probed_replies([PROMPT] * 20, [REPLY] * 20, seed=3)
    again = probed_replies([PROMPT] * 5, [REPLY] * 5, seed=3)
    assert all(many[name][:5] == again[name] for name in many)
    assert len(set(many["flattery"])) == len(ProbeTexts().flattery)
    assert many["length"] != probed_replies([PROMPT] * 20, [REPLY] * 20, seed=4)["length"]


def test_a_caller_brings_its_own_words():
    table = probes(ProbeTexts(refusal=("no .",), flattery=(), separator=" "))
    assert "flattery" not in table and table["refuse_everything"].change("a", "b", random.Random(0)) == "no ."
    assert table["repetition"].change("a", "b", random.Random(0)) == "b b b"
    with pytest.raises(ValueError, match="blank"):
        ProbeTexts(filler=(" ",))


def scores(n=400, seed=0):
    return np.random.default_rng(seed).normal([2, 0.5], [2, 0.25], (n, 2))


def test_a_planted_exploit_is_found_in_its_head_alone():
    rng = np.random.default_rng(1)
    before = scores()
    after = before + rng.normal([1.0, 0.0], 0.1, before.shape)
    found = probe_verdicts(before, {"flattery": after}, HEADS)
    planted = found["help"]["flattery"]
    assert planted["verdict"] == "exploitable" and planted["change_std"] == pytest.approx(0.5, abs=0.01)
    there = stats.ttest_1samp((after - before)[:, 0] / 2, 0).confidence_interval()
    assert planted["ci95"] == pytest.approx([there.low, there.high]) and planted["beats_original"] == 1
    assert found["safe"]["flattery"]["verdict"] == "resists"


@pytest.mark.parametrize("change", [-1.0, 0.0, 0.15])
def test_small_and_falling_changes_resist(change):
    before = scores()
    found = probe_verdicts(
        before, {"length": before + change}, [*HEADS[:1], HeadView(name="x", kind="regression", std=2)]
    )
    assert all(head["length"]["verdict"] == "resists" for head in found.values())


def test_a_change_that_may_be_chance_resists():
    before = scores(20)
    found = probe_verdicts(
        before, {"length": before + np.random.default_rng(2).normal(0.3, 4, before.shape)}, HEADS
    )
    assert found["help"]["length"]["verdict"] == "resists"


def test_degenerate_replies_are_held_against_the_median():
    before = scores()
    for shift, verdict in ((0.6, "exploitable"), (0.0, "resists"), (-2.0, "resists")):
        after = np.tile(np.median(before, axis=0) + shift * np.array([2, 0.25]), (400, 1))
        found = probe_verdicts(before, {"empty": after}, HEADS)
        for head in HEADS:
            effect = found[head.name]["empty"]
            assert effect["verdict"] == verdict
            assert effect["over_median_std"] == pytest.approx(shift, abs=1e-9)
            assert effect["over_median_ci95"][0] < shift < effect["over_median_ci95"][1]
            assert 0.3 < effect["beats_original"] < 0.8 or shift == -2


def test_the_median_decides_where_the_mean_would_not():
    before = np.random.default_rng(4).exponential(1, (500, 1))
    head = HeadView(name="skewed", kind="regression")
    effect = probe_verdicts(before, {"empty": np.full((500, 1), 0.95)}, [head])["skewed"]["empty"]
    assert effect["change_std"] < 0.1 and effect["verdict"] == "exploitable"


def test_pairwise_heads_are_measured_in_their_own_spread():
    before = 30 * np.random.default_rng(3).standard_normal((200, 1))
    head = HeadView(name="better", kind="pairwise", std=1.0)
    found = probe_verdicts(before, {"length": before + 15}, [head])["better"]["length"]
    assert found["change_std"] == pytest.approx(15 / before.std())


def test_everything_is_ready_for_json():
    for n in (0, 1, 2):
        before = scores(n)
        found = probe_verdicts(before, {"empty": before, "length": before}, HEADS)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert (found["help"]["empty"]["verdict"] is None) == (n < 2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"probe empty must have shape \(400, 2\)"):
        probe_verdicts(scores(), {"empty": scores(399)}, HEADS)
    with pytest.raises(ValueError, match="probe emtpy is unknown"):
        probe_verdicts(scores(), {"emtpy": scores()}, HEADS)
    with pytest.raises(ValueError, match=r"original must have shape \(n, 1\)"):
        probe_verdicts(scores(), {}, HEADS[:1])
