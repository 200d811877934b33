"""The benchmark of a whole step: a quick run of everything, the clock of its phases, and what must stop it."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.step import __main__ as command
from benchmarks.step import agreement, gpu, picture
from benchmarks.step.contenders import OurStep, padded_loss
from benchmarks.step.phases import PHASES, Clock, watched
from benchmarks.step.work import QWEN, TINY, Shape, Size, config_of, model_of, prompts_of, tokenizer_of
from grpo_fast.models.policy import Policy
from grpo_fast.packing import pack

SMALL = replace(TINY, hidden=32, layers=2, inner=64, vocabulary=512)
SIZE = Size(prompts=2, group=3, prompt_tokens=6, new_tokens=5)


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("step") / "step-cpu.json"
    assert command.main(["--quick", "--threads", "1", "--output", str(path)]) == 0
    return json.loads(path.read_text()) | {"folder": path.parent}


def small_policy(shape: Shape = SMALL) -> Policy:
    tokenizer = tokenizer_of(shape.vocabulary)
    return Policy.from_model(model_of(shape, tokenizer), tokenizer)


def test_a_quick_run_has_every_row(record):
    assert record["benchmark"] == "step" and record["commit"]
    assert set(record["step"]["median_s"]) == {"grpo_fast", "plain"}
    assert all("no --peer-python" in why for why in record["step"]["missing"].values())
    assert {"engine", "generate"} <= set(record["generation"]["median_s"])
    ratios = [*record["step"]["speedup"].values(), *record["generation"]["speedup"].values()]
    ratios += [
        record["packing"]["tiny"]["speedup"],
        record["packing"]["tiny"]["speedup_over_sorted"],
        record["skipping"]["slope"],
    ]
    ratios += [row["reached"] for rows in record["prefix"].values() for row in rows]
    assert all(math.isfinite(ratio) for ratio in ratios)
    assert all(len(samples) == 2 for samples in record["step"]["samples_s"].values())
    assert "packing, times padded" in record["bars"] and "step, times TRL" not in record["bars"]


def test_contenders_were_compared_before_they_were_timed(record):
    errors = record["agreement"]["errors"]
    assert {"padded, whole logits", "packed to 8192, prompts shared", "packed to 100"} <= set(errors)
    assert all(0 <= error < 1e-5 for row in errors.values() for error in row.values())


def test_phases_add_up_to_the_step(record):
    phases = record["phases"]
    assert set(phases["median_s"]) == set(PHASES)
    busy = set(PHASES) - {"prefill"}
    assert all(phases["median_s"][phase] > 0 for phase in busy)
    for found in phases["rounds_s"]:
        assert sum(found[phase] for phase in PHASES) == pytest.approx(found["wall"], rel=0.05)


def test_the_record_becomes_a_picture_and_a_table(record, capsys):
    assert picture.main([str(record["folder"])]) == 0
    [path] = record["folder"].glob("*.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    lines = command.table(record).splitlines()
    assert any("grpo_fast" in line for line in lines) and any("not measured" in line for line in lines)


def test_a_folder_without_records_makes_no_picture(tmp_path, capsys):
    assert picture.main([str(tmp_path)]) == 2
    assert "no record" in capsys.readouterr().err


def test_a_contender_with_other_gradients_stops_the_run():
    policy, plain = small_policy(), model_of(SMALL, tokenizer_of(SMALL.vocabulary))
    fixed = agreement.fixed_batch(plain, prompts=2, group=2, width=8)
    agreement.compare(policy, plain, fixed)
    with torch.no_grad():
        policy.model.get_submodule("model.norm").get_parameter("weight").mul_(1.001)
    with pytest.raises(AssertionError, match="packed to 8192, prompts shared differs from float64"):
        agreement.compare(policy, plain, fixed)
    wrong = {name: torch.zeros_like(parameter) for name, parameter in plain.named_parameters()}
    with pytest.raises(AssertionError, match="TRL differs"):
        agreement.compare(small_policy(), plain, fixed, (0.0, wrong))


def test_the_plain_loss_ignores_padding_and_clips():
    model = model_of(SMALL, tokenizer_of(SMALL.vocabulary))
    fixed = agreement.fixed_batch(model, prompts=2, group=2, width=8)
    rows, mask = fixed.rows, fixed.mask
    arguments = (rows[:, 8:], fixed.advantages, mask, fixed.padded_old)
    loss = padded_loss(model, rows, *arguments)
    changed = rows.clone()
    changed[:, 8:][mask == 0] = 7
    assert padded_loss(model, changed, *arguments).item() == pytest.approx(loss.item(), abs=1e-6)
    assert abs(padded_loss(model, rows, *arguments, clip=0.01).item() - loss.item()) > 1e-4


def test_the_clock_sees_recomputation_and_leaves_nothing_behind():
    policy = Policy.from_model(
        model_of(SMALL, tokenizer_of(SMALL.vocabulary)),
        tokenizer_of(SMALL.vocabulary),
        gradient_checkpointing=True,
    )
    step = OurStep(policy, SIZE)
    before = step()
    with watched(step.policy, step.optimizer) as clock:
        clock.enter("other")
        step(clock.timer)
        clock.enter("other")
        calls = [phase for phase, _ in clock._marks]
        found = clock.seconds()
    # every layer's attention: forward, forward again, backward
    assert calls.count("attention") == 3 * SMALL.layers
    assert calls.count("decode") == SIZE.new_tokens - 1 and calls.count("prefill") == 1
    assert all(found[phase] > 0 for phase in PHASES)
    step.taken = 0  # the same seeds again, without the clock
    assert step()["generated_tokens"] == before["generated_tokens"]
    assert clock.seconds() == dict.fromkeys(PHASES, 0.0)


def test_a_clock_watches_without_changing_the_gradient():
    gradients = []
    for watching in (False, True):
        policy = small_policy()
        step = OurStep(policy, SIZE, config_of(SIZE))
        if watching:
            with watched(step.policy, step.optimizer) as clock:
                metrics = step(clock.timer)
        else:
            metrics = step()
        gradients.append(metrics["grad_norm"])
    assert gradients[0] == gradients[1] > 0


def test_marks_belong_to_the_phase_they_begin(monkeypatch):
    times = iter([1.0, 2.0, 4.0, 7.0])
    monkeypatch.setattr("benchmarks.step.timing.clock", lambda: next(times))
    clock = Clock("cpu")
    with clock.timer("generate"):
        assert clock.generating
        clock.enter("decode")
    clock.enter("other")
    found = clock.seconds()
    assert found["sampling"] == 1.0 and found["decode"] == 2.0 and found["other"] == 3.0


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_gpu_case_measures_every_part(lora_rank):
    case = gpu.Case(
        shape=SMALL, size=SIZE, lora_rank=lora_rank, checkpointing=lora_rank > 0, repeats=1, peer_rows=2
    )
    found = dict(gpu.measure(case, "cpu", "", {"here": 1e12}))
    assert set(found) == {"memory", "generation", "update", "step", "trl"}
    assert "not installed" in found["trl"]["missing"]
    update = found["update"]
    assert update["positions"] == 2 * (6 + 3 * 4) and update["completion_tokens"] == 2 * 3 * 5
    assert update["mfu"]["here"] == pytest.approx(update["model_flops"] / update["unwatched_s"] / 1e12)
    assert update["median_s"]["decode"] == 0 and update["median_s"]["attention"] > 0


def test_model_flops_are_counted_by_hand():
    case = gpu.Case(shape=SMALL, size=SIZE)
    shared = pack([[1] * 6], [[2] * 5] * 3, prompt_of=[0] * 3, token_budget=100)
    width = SMALL.hidden // SMALL.heads
    layer = SMALL.hidden * (2 * SMALL.heads * width + 2 * SMALL.key_heads * width + 3 * SMALL.inner)
    model = model_of(SMALL, tokenizer_of(SMALL.vocabulary))
    linear = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(m.weight.numel() for m in linear) == SMALL.layers * layer
    pairs = 6 * 7 // 2 + 3 * (4 * 6 + 4 * 5 // 2)
    wanted = 6 * (18 * SMALL.layers * layer + 15 * 512 * 32) + 12 * pairs * SMALL.layers * 32
    assert gpu.model_flops(case, shared) == wanted
    frozen = gpu.model_flops(replace(case, lora_rank=4), shared)
    assert frozen == wanted - 2 * (18 * SMALL.layers * layer + 15 * 512 * 32)


def test_the_architectures_have_their_sizes():
    sizes = {}
    for name, shape in QWEN.items():
        with torch.device("meta"):
            model = model_of(shape, tokenizer_of(1024), device="meta")
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes == {"0.5b": 494032768, "1.5b": 1543714304, "7b": 7615616512, "14b": 14770033664}


def test_gpu_cases_need_a_gpu_and_known_names(tmp_path, capsys):
    assert gpu.run_cases(tmp_path, ["3b"], 1.0) == 2
    assert "unknown case '3b'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu.run_cases(tmp_path, [], 1.0) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_a_case_that_cannot_fit_is_refused_before_it_loads(monkeypatch):
    from types import SimpleNamespace

    small = SimpleNamespace(total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: small)
    parts = gpu.measure(gpu.CASES["7b-full"], "cuda", "", {})
    assert next(parts)[1]["weights_gradients_states_gib"] == pytest.approx(18 * 7.6155 / 1.0737, rel=1e-3)
    with pytest.raises(ValueError, match="does not fit: 128 GiB"):
        next(parts)


def test_prompts_have_the_tokens_asked_for():
    tokenizer = tokenizer_of(512)
    assert len(tokenizer) == 512 and tokenizer.pad_token_id == 510
    assert [len(prompt.token_ids) for prompt in prompts_of(tokenizer, 3, 17)] == [17] * 3
