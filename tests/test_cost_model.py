"""The cost model: what must hold between its numbers, its command, and a real step at a tiny size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import config_of

from benchmarks.cost import flops, model
from benchmarks.cost.architecture import Architecture
from benchmarks.cost.check import CHECKED, job_of, measure
from benchmarks.cost.job import ALGORITHMS, Job, Load, packed
from benchmarks.cost.memory import memory
from benchmarks.cost.model import cost, load_seconds
from benchmarks.cost.rates import H200, Rates, measure_rates
from benchmarks.memory_cases import Case
from grpo_fast.models.lora import LoraSettings
from grpo_fast.packing import pack

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "vocab_size": 512,
}
JOB = Job(
    policy=config_of("qwen2", **SHAPE), prompts=4, group=3, prompt_tokens=16, new_tokens=12, token_budget=256
)


def total(algorithm: str, job: Job) -> float:
    return sum(load.total for load in ALGORITHMS[algorithm](job, 1, 1).values())


@pytest.mark.parametrize(("budget", "group"), [(256, 3), (40, 3), (30, 5), (8, 2)])
def test_rows_are_laid_out_as_pack_does(budget: int, group: int):
    plan, rows = packed(4, group, 16, 11, budget)
    owner = [i // group for i in range(4 * group)]
    batches = pack([[1] * 16] * 4, [[2] * 12] * (4 * group), prompt_of=owner, token_budget=budget)
    assert plan.length == sum(batch.plan.length for batch in batches)
    assert rows == pytest.approx(len(batches), abs=1)
    size = Architecture.of(JOB.policy)
    assert flops.body_forward(size, plan) == sum(flops.body_forward(size, batch) for batch in batches)


@pytest.mark.parametrize("algorithm", CHECKED)
def test_the_flops_of_a_real_step(algorithm: str):
    case = Case(
        hidden=64, inner=160, layers=2, heads=2, key_heads=1, vocabulary=600, kl=True, budget=256, prompts=2,
        group=3, prompt=16, new=9,
    )  # fmt: skip
    measured = measure(algorithm, case)
    assert total(algorithm, replace(job_of(case), causal=False)) == pytest.approx(measured["flops"], rel=0.03)
    assert measured["memory"] > 0 and measured["seconds"] > 0


def test_what_one_algorithm_does_more_than_another():
    with_kl, without = total("grpo", JOB), total("grpo", replace(JOB, kl=False))
    assert with_kl > without
    once = replace(JOB, epochs=1, minibatches=1)
    assert total("ppo", once) > total("ppo_shared", once) > with_kl  # a value model, prompts not shared
    assert total("dpo_online", JOB) < with_kl  # two of a group are trained on
    # offline: sampling is shared out among the passes
    rounds = ALGORITHMS["dpo_online"](JOB, 1, 1)
    steps = ALGORITHMS["dpo"](JOB, 1, 1)
    assert steps["update"].total == rounds["update"].total
    assert steps["generate"].total == pytest.approx(rounds["generate"].total / JOB.reuse)
    lora = replace(JOB, lora=LoraSettings(rank=4))
    for algorithm in ALGORITHMS:
        assert total(algorithm, lora) < total(algorithm, JOB)


def test_ppo_holds_a_value_model_beside_what_grpo_holds():
    cost_of = {name: memory(name, JOB, device="cuda", dtype=torch.bfloat16) for name in ALGORITHMS}
    value = cost_of["ppo"].value_parameters
    assert value == sum(p.numel() for p in _classifier().parameters())
    assert cost_of["ppo"].parts["value_model"] == 2 * value
    assert cost_of["ppo"].parts["optimizer"] == cost_of["grpo"].parts["optimizer"] + 12 * value
    assert cost_of["ppo"].peak >= cost_of["ppo_shared"].peak + 14 * value
    for found in cost_of.values():
        assert sum(found.parts.values()) == found.peak
        shared = found.shared_out("models", 4)
        assert shared.peak == sum(shared.parts.values()) < found.peak
        assert shared.parts["policy"] == found.parts["policy"]


def _classifier() -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_config(config_of("qwen2", num_labels=1, **SHAPE))


def test_more_gpus_share_the_work_and_pay_for_the_link():
    one, four = (cost("grpo", replace(JOB, gpus=n), H200) for n in (1, 4))
    assert sum(four.flops.values()) == pytest.approx(sum(one.flops.values()), rel=1e-9)
    assert "communication" in four.seconds and "communication" not in one.seconds
    assert four.seconds["update"] < one.seconds["update"]
    small = replace(H200, memory=one.memory.peak - 1)
    assert not cost("grpo", JOB, replace(H200, memory=1.0)).fits
    assert cost("grpo", JOB, small).checkpointing


def test_models_that_are_shared_out_are_gathered():
    job = replace(JOB, prompts=8, gpus=4)
    whole = cost("ppo", job, H200)
    peak = memory("ppo", replace(job.on_one(), checkpointing=True), device="cuda", dtype=torch.bfloat16)
    tight = cost("ppo", job, replace(H200, memory=peak.shared_out("models", 4).peak))
    assert (whole.memory.shards, tight.memory.shards) == ("nothing", "models") and tight.fits
    assert tight.seconds["communication"] > whole.seconds["communication"]


def test_decoding_takes_the_longer_of_arithmetic_and_bytes():
    load = Load(flops={"decode": 1e12}, steps=10, cached=1e6)
    rates = replace(H200, step_s=0.0)
    arithmetic = load_seconds(load, rates, width=64, weights=0, item=2)
    assert arithmetic == pytest.approx(1e12 / rates.decode[0])
    moved = load_seconds(load, rates, width=64, weights=10**12, item=2)
    assert moved == pytest.approx(10 * (10**12 + 2e6) / rates.bandwidth)


def test_rates_between_and_outside_the_widths(tmp_path: Path):
    rates = replace(H200, widths=(128, 512), forward=(1e10, 4e10), training=(3e10, 3e10))
    assert rates.of("forward", 256) == pytest.approx(2e10)
    assert (rates.of("forward", 64), rates.of("forward", 1024)) == (1e10, 4e10)
    assert rates.of("training", 256) == pytest.approx(3e10)
    assert H200.of("head", 896) == H200.of("head", 5120) == H200.head[0]
    rates.save(tmp_path / "rates.json")
    assert Rates.load(tmp_path / "rates.json") == rates


def test_rates_are_measured():
    rates = measure_rates(widths=(64, 128), repeats=1)
    assert rates.measured and rates.widths == (64, 128)
    for kind in ("forward", "training", "head", "head_trained", "decode"):
        assert all(1e7 < rates.of(kind, width) < 1e13 for width in (64, 96, 128))
    assert 0 <= rates.layer_s < 0.1 and 0 < rates.draw_s < 1e-6
    assert rates.optimizer > 1e7 and rates.bandwidth > 1e7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["--size", "7g"], "--size must be among"),
        (["--model", "nowhere"], "nowhere"),
        (["--rates", "nowhere.json"], "rates nowhere.json"),
        (["--promts", "4"], "did you mean --prompts"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        model.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_the_table_of_a_models_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    JOB.policy.save_pretrained(tmp_path)
    (tmp_path / "rates.json").write_text(json.dumps({"of": "something else"}))
    with pytest.raises(SystemExit) as ended:
        model.main(["--model", str(tmp_path), "--prompts", "8", "--group", "2", "--new-tokens", "8"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "GPU-hours" in out and "ASSUMED" in out
    assert all(word in out for algorithm in ALGORITHMS for word in algorithm.split("_"))
    with pytest.raises(SystemExit):
        model.main(["--rates", str(tmp_path / "rates.json")])
    assert "--measure" in capsys.readouterr().err
