"""The ablations: every contender gives the same gradients, an idea removed is more work, the record is whole."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.ablations import __main__ as command
from benchmarks.ablations import contenders as ways
from benchmarks.ablations import memory
from benchmarks.ablations.contenders import CONTENDERS, compare
from benchmarks.ablations.ideas import ABLATIONS, STEP
from benchmarks.ablations.record import quality
from benchmarks.ablations.work import WARM_UP, World
from benchmarks.step.passes import SAME
from benchmarks.step.timing import ratio_interval
from grpo_fast.errors import UserError


@pytest.fixture(scope="module")
def built() -> dict:
    world = World(WARM_UP)
    return {name: build(world) for name, build in CONTENDERS.items()}


def test_every_contender_gives_the_same_answer(built):
    errors = compare(built, SAME)
    assert errors.keys() == CONTENDERS.keys() and max(errors.values()) < 1e-5
    gradients = [built[name].answer()[0] for name in built if name.startswith("update")]
    assert len(gradients) == 8 and all(len(found) == len(gradients[0]) > 10 for found in gradients)
    scores = built["scoring"].answer()[0]["scores"]
    assert scores.shape == (4, 4) and float(scores.std()) > 0


def test_a_contender_that_computes_something_else_stops_the_run(built, monkeypatch):
    with torch.no_grad():
        world = World(WARM_UP)
        world.padded.get_submodule("model.norm").get_parameter("weight").mul_(1.01)
    wrong = {"update": built["update"], "update, padded": CONTENDERS["update, padded by length"](world)}
    with pytest.raises(AssertionError, match="update, padded: another answer"):
        compare(wrong, SAME)
    other = replace(ways.LOSS, aggregation="token_mean")
    monkeypatch.setattr(ways, "LOSS", other)  # another loss where log-probs come first
    built_anew = World(WARM_UP)
    with pytest.raises(AssertionError, match="update, separate: another answer"):
        compare(
            {
                "update": CONTENDERS["update"](built_anew),
                "update, separate": CONTENDERS["update, log-probs then loss"](built_anew),
            },
            SAME,
        )


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: f"{ablation.idea}, {ablation.removed}")
def test_removing_an_idea_is_more_counted_work(built, ablation):
    kept, without = built[ablation.kept].counted, built[ablation.without].counted
    if ablation.kept == "advantages":
        assert kept == without  # nothing is saved: it is there for what it does to quality
    elif ablation.removed.startswith("whole logits"):
        assert without["stored_logits"] > kept["stored_logits"] == 0
        assert without["matrix_flops"] == kept["matrix_flops"]
    else:
        assert without["matrix_flops"] > kept["matrix_flops"]
        assert without["positions"] >= kept["positions"]


def test_counted_work_is_what_the_rollout_says(built):
    made = World(WARM_UP).made
    kept = made.kept
    assert 0 < len(kept) < len(made.completions) and built["update"].counted["sequences"] == len(kept)
    asked = {made.prompt_of[i] for i in kept}
    shared = sum(len(made.prompts[p]) for p in asked) + sum(len(made.completions[i]) - 1 for i in kept)
    assert built["update"].counted["positions"] == shared
    own = sum(len(made.prompts[made.prompt_of[i]]) + len(made.completions[i]) - 1 for i in kept)
    assert built["update, prompts not shared"].counted["positions"] == own
    tokens = sum(len(made.completions[i]) for i in kept)
    weights = WARM_UP.shape.layers * WARM_UP.shape.layer_weights
    wanted = 6 * shared * weights + 6 * tokens * WARM_UP.shape.vocabulary * WARM_UP.shape.hidden
    assert built["update"].counted["matrix_flops"] == wanted


@pytest.mark.skipif(not memory.Path("/proc/self/clear_refs").exists(), reason="Linux's high-water mark")
def test_memory_of_a_contender_that_keeps_logits_is_larger():
    from dataclasses import replace

    scale = replace(WARM_UP, shape=replace(WARM_UP.shape, vocabulary=16000), prompts=4, group=4, median=48)
    found = memory.measure(["update", "update, whole logits", "nothing"], scale, repeats=1)
    assert found["nothing"]["error"].startswith("KeyError") and not found["nothing"]["samples"]
    tokens = CONTENDERS["update"](World(scale)).counted["head_tokens"]
    logits = 4 * tokens * scale.shape.vocabulary
    more = found["update, whole logits"]["extra_bytes"] - found["update"]["extra_bytes"]
    assert more > logits > 5e6


def test_the_record_the_picture_and_the_page(tmp_path, monkeypatch, capsys):
    found = {"error": None, "samples": [{}], "held_bytes": 2**20, "extra_bytes": 2**21}
    asked = []

    def measured(names, scale, *, repeats):
        asked.append((list(names), repeats))
        return {name: dict(found) for name in names}

    monkeypatch.setattr(memory, "measure", measured)
    monkeypatch.setattr(command, "QUICK", WARM_UP)
    output = tmp_path / "folder" / "ablations.json"
    threads = torch.get_num_threads()
    assert (
        command.main(["--quick", "--repeats", "2", "--threads", str(threads), "--output", str(output)]) == 0
    )
    record = json.loads(output.read_text())
    assert asked == [(list(CONTENDERS), 1)]
    for key in ("benchmark", "device", "threads", "versions", "commit", "date", "command", "work", "quality"):
        assert record[key]
    assert record["work"]["without_signal"] == 2 and record["quick"]
    assert all(len(row["samples_s"]) == 2 for row in record["contenders"].values())
    assert len(record["ablations"]) == len(ABLATIONS)
    for row in record["ablations"]:
        assert math.isfinite(row["time"]) and row["time_ci95"][0] <= row["time"] <= row["time_ci95"][1]
        assert row["memory"][0] == {"held_bytes": 2**20, "extra_bytes": 2**21}
    whole = sum(record["contenders"][name]["median_s"] for name in STEP)
    assert record["whole_step"]["median_s"] == pytest.approx(whole)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = output.with_suffix(".html").read_text()
    assert all(ablation.removed in page for ablation in ABLATIONS) and "data:image/png;base64," in page
    assert "What removing an idea costs" in capsys.readouterr().out


def test_quality_comes_from_committed_records_or_is_said_to_be_missing(tmp_path):
    rows = quality(tmp_path)
    assert len(rows) == 3 and all(".json there yet" in row["missing"] for row in rows)
    runs = [
        {"variant": name, "seed": seed, "judged": [[0.5, 0.5], [0.6 + gain, 0.7]]}
        for name, gain in (("gdpo", 0.1), ("scalarized", 0.0))
        for seed in (0, 1)
    ]
    (tmp_path / "advantage-modes.json").write_text(json.dumps({"runs": runs, "commit": "abc"}))
    cells = [
        {
            "algorithm": name,
            "seed": 0,
            "status": status,
            "curve": [{"wall_s": 0.0, "judge": {"a": 0.0}}, {"wall_s": 20.0, "judge": {"a": end}}],
        }
        for name, status, end in (("grpo", "finished", 0.5), ("grpo_no_kl", "diverged", 0.9))
    ]
    (tmp_path / "cost-cpu.json").write_text(json.dumps({"cells": cells, "budget": {"wall_s": 10.0}}))
    first, second, third = quality(tmp_path)
    assert first["mean"]["mean"] == pytest.approx(0.05) and first["worst"]["mean"] == pytest.approx(0.1)
    assert first["seeds"] == [0, 1] and first["mean"]["ci95"] == pytest.approx([0.05, 0.05])
    assert "no seed with" in second["missing"]
    # after equal time, half way; what diverged counts with what it had reached
    assert third["mean"]["mean"] == pytest.approx(0.9 / 2 - 0.5 / 2) and third["seeds"] == [0]


def test_ratios_of_rounds():
    slower = [2.0 + 0.1 * i for i in range(9)]
    base = [1.0 + 0.05 * i for i in range(9)]
    ratio, low, high = ratio_interval(slower, base, paired=True)
    assert ratio == pytest.approx(2.0) and low == pytest.approx(2.0) and high == pytest.approx(2.0)
    _, low, high = ratio_interval(slower, base, paired=False)
    assert low < 1.9 and high > 2.1
    with pytest.raises(ValueError, match="9 samples against 8 in pairs"):
        ratio_interval(slower, base[1:], paired=True)
    with pytest.raises(ValueError, match="0 samples"):
        ratio_interval([], base, paired=False)


def test_mistakes_are_refused_before_anything_is_built(tmp_path):
    for words, said in (
        (["--repeats", "-1"], "must not be negative"),
        (["--output", str(tmp_path / "x.txt")], "must be a .json file"),
        (["--quik"], "did you mean --quick"),
    ):
        with pytest.raises(UserError, match=said):
            command.main(words)
