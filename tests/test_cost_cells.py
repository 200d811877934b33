"""The ledger, a cell as a whole, and the sweep: what counts, what ends a run, what is kept when one is cut off."""

import inspect
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.cost import __main__ as command
from benchmarks.cost import cell as cost_cell
from benchmarks.cost import sweep
from benchmarks.cost.cell import Job, inputs_of, run
from benchmarks.cost.examiner import Examiner, distinct_pairs, fingerprint
from benchmarks.cost.lab import Lab
from benchmarks.cost.ledger import Budget, Diverged, Ledger
from grpo_fast.engines.choose import builtin_engine
from grpo_fast.errors import UserError
from tests.cost_cases import job, prepared
from tests.tiny import save_policy, write_prompts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("cost"))


def cell_of(world, algorithm, **choice):
    work = job(world, algorithm, **choice)
    config = work.config()
    return run(work, config, inputs_of(config))


def test_evaluating_is_off_the_clock_and_inner_phases_are_taken_out():
    ledger = Ledger(Budget(wall_s=0.1, evaluations=2), CPU, lambda: time.sleep(0.3) or {"mean": 1.0})
    for _ in ledger.steps():
        with ledger.phase("update"):
            time.sleep(0.02)
            with ledger.phase("reference"):
                time.sleep(0.04)
        time.sleep(0.05)  # counting, packing for the count
    assert 0.1 <= ledger.spent.wall_s < 0.25
    assert ledger.spent.wall_s == pytest.approx(sum(ledger.phase_s.values()))
    assert ledger.phase_s["reference"] > ledger.phase_s["update"]
    assert [point["mean"] for point in ledger.curve] == [1.0] * len(ledger.curve) and len(ledger.curve) >= 2
    assert ledger.curve[0]["wall_s"] == 0 and ledger.curve[-1]["step"] == 2


@pytest.mark.parametrize(
    "slow, fast", [("generated_tokens", "training_flops"), ("training_flops", "generated_tokens")]
)
def test_a_run_goes_on_until_all_three_currencies_are_used_up(slow, fast):
    ledger = Ledger(Budget(wall_s=1e-9, longest=1e12, **{slow: 50, fast: 20}), CPU)
    for step in ledger.steps():
        with ledger.phase("update"):
            time.sleep(1e-4)
        ledger.count("update", 10, training=True, generated_tokens=10)
        if slow == "generated_tokens":
            ledger.count("update", 30, training=True)
        else:
            ledger.count("generate", generated_tokens=30)
        assert step < 6
    assert getattr(ledger.spent, slow) == 50


def test_a_run_that_is_slow_in_one_currency_ends_all_the_same():
    ledger = Ledger(Budget(wall_s=0.02, generated_tokens=1e12, longest=1.5), CPU)
    for _ in ledger.steps():
        with ledger.phase("update"):
            time.sleep(0.004)
    assert 0.03 <= ledger.spent.wall_s < 0.06


def test_a_currency_that_is_spent_no_more_is_not_waited_for():
    ledger = Ledger(Budget(wall_s=0.01, generated_tokens=1e12, longest=100), CPU)
    for _ in ledger.steps():
        ledger.exhausted("generated_tokens")
        with ledger.phase("update"):
            time.sleep(0.004)
    assert 0.01 <= ledger.spent.wall_s < 0.1


def test_steps_of_warming_up_cost_nothing():
    ledger = Ledger(Budget(steps=3), CPU, warmup=1)
    for step in ledger.steps():
        with ledger.phase("update"):
            time.sleep(0.2 if step == 0 else 0.01)
        ledger.count("update", 100 if step == 0 else 7, training=True, generated_tokens=5)
    assert ledger.spent.wall_s < 0.1 and ledger.spent.flops == 14 and ledger.spent.generated_tokens == 10


def test_three_steps_in_a_row_that_are_not_finite_end_a_run():
    ledger = Ledger(Budget(), CPU)
    for loss in (1.0, float("nan"), float("nan"), 1.0, float("inf"), float("nan")):
        ledger.took(loss, 1.0)
    with pytest.raises(Diverged):
        ledger.took(0.0, float("nan"))


@pytest.mark.parametrize("name", ["grpo", "ppo", "dpo_online"])
def test_the_judge_is_asked_by_the_examiner_alone(world, monkeypatch, name):
    asked = []

    def judge(prompt, text):
        frames = [frame.function for frame in inspect.stack(0)]
        asked.append("_judged" in frames)
        return {"safety": 1.0, "politeness": 0.5, "meaningfulness": 0.0, "actionability": 0.5}

    real = cost_cell.assemble
    monkeypatch.setattr(cost_cell, "assemble", lambda *words: replace(real(*words), judge=judge))
    labs = []
    of = Lab.of
    monkeypatch.setattr(Lab, "of", lambda *a, **k: labs.append(of(*a, **k)) or labs[-1])
    cell = cell_of(world, name)
    assert all(asked) and len(asked) == 12 * len(cell["curve"])
    assert labs[0].task.judge is None
    assert cell["curve"][-1]["mean"] == 0.5 and cell["curve"][-1]["worst"] == 0.0


def test_the_most_memory_is_seen_whenever_it_was():
    ledger, kept = Ledger(Budget(steps=3), CPU), []
    for step in ledger.steps():
        with ledger.phase("update"):
            if step == 1:
                torch.ones(96 << 18)  # 96 MiB, gone at once
            if step == 2:
                kept.append(torch.ones(16 << 18))
    working = ledger.memory()["parts"]["working"]
    assert 90 << 20 <= working <= 125 << 20


def test_rewards_stand_in_for_a_judge_turned_and_scaled(world):
    work = job(world, "grpo")
    config = work.config()
    task = replace(cost_cell.assemble(config, inputs_of(config), world / "seed-0"), judge=None)
    weights = torch.tensor([1.0, -2.0, 0.0, 1.0])
    task = replace(task, scorer=replace(task.scorer, weights=weights))
    examiner = Examiner(task, builtin_engine(task.policy, max_rows=64), config)
    first = examiner()
    assert list(first["judge"]) == [
        "safety",
        "politeness",
        "actionability",
    ]  # what has no weight does not count
    assert first["mean"] == pytest.approx(0, abs=1e-9) and first["score"] == pytest.approx(0, abs=1e-9)
    assert not examiner.worse()
    scorer = task.scorer

    def better(*words):
        scored = scorer(*words)
        return replace(scored, rewards=scored.rewards + torch.tensor([1.0, -1.0, -9.0, 1.0]))

    better.names, better.weights = scorer.names, scorer.weights
    fake: Any = SimpleNamespace(**{**vars(task), "scorer": better, "decode": task.decode})
    examiner._task = fake
    second = examiner()
    assert min(second["judge"].values()) > 0 and second["score"] > 0 and not examiner.worse()


def test_memory_by_part(world):
    cell = cell_of(world, "ppo")
    parts = cell["memory"]["parts"]
    policy = parts["policy"]
    assert parts["reference"] == policy and parts["gradients"] > 1.9 * policy  # policy and value network
    assert parts["optimizer"] == pytest.approx(2 * parts["gradients"], rel=1e-3)  # two moments and a counter
    shared = cell_of(world, "ppo_shared")["memory"]["parts"]
    assert shared["value_model"] == 4 * (32 + 1) and shared["optimizer"] < 0.6 * parts["optimizer"]


def test_a_cell_tells_what_it_cost_and_what_came_of_it(world):
    cell = cell_of(world, "grpo")
    assert cell["status"] == "finished" and cell["quality"] == "judge"
    first, last = cell["curve"][0], cell["curve"][-1]
    assert first["step"] == 0 and first["flops"] == 0 and abs(first["kl"]) < 1e-3
    assert last["step"] == 2 and last["kl"] > 0
    assert last["mean"] == pytest.approx(sum(last["judge"].values()) / 4)
    assert last["worst"] == min(last["judge"].values())
    assert last["flops"] == sum(cell["flops"].values())
    assert last["reward_calls"] == 2 * 16
    assert json.loads(json.dumps(cell)) == cell


def test_the_same_seed_gives_the_same_curve(world):
    def but_time(cell):
        return [{k: v for k, v in point.items() if k not in ("wall_s", "cpu_s")} for point in cell["curve"]]

    first, second = cell_of(world, "ppo"), cell_of(world, "ppo")
    assert but_time(first) == but_time(second) and first["fingerprint"] == second["fingerprint"]


def test_a_run_that_diverges_is_recorded_and_not_dropped(world):
    work = replace(job(world, "grpo", lr_scale=1e33), budget={"steps": 9})
    config = work.config()
    cell = run(work, config, inputs_of(config))
    assert cell["status"] == "diverged" and "finite" in cell["why"]
    assert len(cell["curve"]) == 1  # what was measured before stays


def test_distinct_pairs_and_fingerprints():
    assert distinct_pairs([[1, 2, 1, 2], [1, 2]]) == 2 / 4
    assert distinct_pairs([[1]]) == 0
    layer = torch.nn.Linear(2, 2)
    before = fingerprint(layer)
    assert before == fingerprint(layer)
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert fingerprint(layer) != before


def fake(folder: Path, name: str, body: str, monkeypatch) -> dict[Path, Job]:
    """A sweep of one job whose process runs `body`."""
    script = folder / f"{name}.py"
    script.write_text(f"import sys, json, time\n{body}\n")

    def start(words, **options):
        return subprocess.Popen([sys.executable, script, *words[3:]], **options)

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT))
    return {folder / f"{name}.json": job(folder, "grpo")}


CELL = "{'status': 'finished', 'why': None, 'curve': [{'wall_s': 1, 'mean': 0.5}]}"
DONE = f"open(sys.argv[2], 'w').write(json.dumps({CELL}))"


def test_what_is_finished_is_not_run_again_and_what_changed_is(tmp_path, monkeypatch):
    lines = []
    jobs = fake(tmp_path, "a", DONE, monkeypatch)
    sweep.run_all(jobs, parallel=2, tell=lines.append)
    assert len(lines) == 1 and "finished at 0.500" in lines[0]
    sweep.run_all(jobs, parallel=2, tell=lines.append)
    assert lines[1:] == ["1 of 1 are finished already"]
    changed = {path: replace(work, choice={"lr": 1.0}) for path, work in jobs.items()}
    sweep.run_all(changed, parallel=2, tell=lines.append)
    assert len(lines) == 3 and "finished" in lines[2]


def test_a_process_that_dies_is_recorded_and_tried_again(tmp_path, monkeypatch):
    lines = []
    jobs = fake(tmp_path, "a", "print('the last word'); sys.exit(7)", monkeypatch)
    sweep.run_all(jobs, parallel=1, tell=lines.append)
    cell = json.loads(next(iter(jobs)).read_text())
    assert cell["status"] == "failed" and "the last word" in cell["why"] and "failed" in lines[0]
    fake(tmp_path, "a", DONE, monkeypatch)
    sweep.run_all(jobs, parallel=1, tell=lines.append)
    assert json.loads(next(iter(jobs)).read_text())["status"] == "finished"


def test_refused_settings_end_the_sweep_in_one_line(tmp_path, monkeypatch):
    jobs = fake(tmp_path, "a", "print('error: lr must be positive'); sys.exit(2)", monkeypatch)
    with pytest.raises(UserError, match="grpo, seed 0: lr must be positive"):
        sweep.run_all(jobs, parallel=1, tell=lambda _: None)


def test_an_interrupted_sweep_loses_no_finished_cell(tmp_path, monkeypatch):
    jobs = fake(tmp_path, "first", DONE, monkeypatch)
    slow = fake(tmp_path, "second", f"time.sleep(0 if 'first' in sys.argv[2] else 60); {DONE}", monkeypatch)

    def interrupted(line):
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep.run_all(jobs | slow, parallel=2, tell=interrupted)
    first, second = next(iter(jobs)), next(iter(slow))
    assert first.is_file() and not second.is_file()
    before, lines = first.stat().st_mtime_ns, []
    fake(tmp_path, "second", DONE, monkeypatch)
    sweep.run_all(jobs | slow, parallel=2, tell=lines.append)
    assert first.stat().st_mtime_ns == before and second.is_file()
    assert lines[0] == "1 of 2 are finished already" and time.monotonic() - started < 30


@pytest.mark.slow
def test_the_whole_command(world, tmp_path):
    folder = tmp_path / "runs"
    shutil.copytree(world / "seed-0", folder / "seed-0")
    choices = {name: {"choice": {"lr_scale": 2.0}} for name in ("grpo", "dpo_online")}
    (tmp_path / "choices.json").write_text(json.dumps({"algorithms": choices}))
    words = f"--config {world / 'tiny.toml'} --algorithms grpo dpo_online --seeds 0 --search off --jobs 2"
    words += f" --choices {tmp_path / 'choices.json'} --budget-wall 0.3 --eval-size 8 --folder {folder}"
    words += f" --output {tmp_path / 'record.json'}"
    with pytest.raises(UserError, match="holds something else"):
        command.main(words.split())  # a folder that is not its own is left alone
    shutil.move(folder / "seed-0", tmp_path / "seed-0")
    command.claim(command.arguments(words.split()), command.budget_of(command.arguments(words.split())))
    shutil.move(tmp_path / "seed-0", folder / "seed-0")
    assert command.main(words.split()) == 0
    with pytest.raises(UserError, match="of other settings"):
        command.main([*words.split(), "--threads", "2"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert [cell["algorithm"] for cell in record["cells"]] == ["grpo", "dpo_online"]
    assert all(cell["status"] == "finished" for cell in record["cells"])
    assert record["cells"][0]["fingerprint"] == record["cells"][1]["fingerprint"]
    assert record["cells"][0]["settings"]["lr_scale"] == 2.0
    assert (folder / "report.html").is_file()


REWARD = """
def even(prompts, completions, **columns):
    return [{"even": sum(c in "aeiou" for c in text) / (1 + len(text))} for text in completions]
"""


@pytest.mark.parametrize("name", ["grpo", "ppo", "dpo_online"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_users_own_model_prompts_and_reward(tmp_path, monkeypatch, name, lora_rank):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    save_policy(tmp_path / "policy", "llama")
    write_prompts(tmp_path / "prompts.jsonl", 24)
    settings = f"""
[policy]
model = "{tmp_path / "policy"}"
lora_rank = {lora_rank}
[data]
prompts = "{tmp_path / "prompts.jsonl"}"
eval_size = 4
[reward]
functions = ["my_rewards:even"]
[rollout]
prompts_per_step = 4
group_size = 2
max_new_tokens = 6
[optim]
lr = 1e-3
"""
    (tmp_path / "mine.toml").write_text(settings)
    work = Job(
        algorithm=name,
        seed=0,
        choice={"batches": 1, "samples": 2} if name == "dpo_online" else {},
        flags=["--config", "mine.toml"],
        budget={"steps": 2},
        folder=str(tmp_path / "runs"),
        threads=1,
    )
    config = work.config()
    cell = run(work, config, inputs_of(config))
    assert cell["status"] == "finished", cell["why"]
    assert cell["quality"] == "reward" and list(cell["curve"][-1]["judge"]) == ["even"]
    assert "over_refusal" not in cell["curve"][-1] and cell["curve"][-1]["kl"] != 0
    parts = cell["memory"]["parts"]
    assert (parts["reference"] == 0) == bool(lora_rank) and parts["reward_model"] == 0
    assert (parts["optimizer"] < parts["policy"]) == bool(lora_rank)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--seeds 1 1", "--seeds must differ"),
        ("--seeds 100", "100 is the search's"),
        ("--budget-tokens 100", "--budget-wall is needed"),
        ("--budget-wall -3", "must be positive"),
        ("--jobs 0", "--jobs must be at least 1"),
        ("--threads -1", "--threads must be at least 1"),
        ("--search off --choices none.json", "--choices none.json"),
        ("--search off --choices pyproject.toml", "--choices pyproject.toml"),
        ("--folder tests", "holds something else"),
        ("--config none.toml", "none.toml"),
        ("--algorithms grp", "grp"),
        ("--qick", "--quick"),
    ],
)
def test_bad_input_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        command.main(words.split())


def test_settings_of_the_miniature_are_not_a_users(tmp_path):
    save_policy(tmp_path / "policy", "llama")
    write_prompts(tmp_path / "prompts.jsonl", 24)
    (tmp_path / "mine.toml").write_text(
        f'[policy]\nmodel = "{tmp_path / "policy"}"\n[data]\nprompts = "{tmp_path / "prompts.jsonl"}"\n'
        '[reward]\nfunctions = ["my_rewards:even"]\n'
    )
    mine = command.arguments(["--config", str(tmp_path / "mine.toml"), "--search", "off"])
    choices, source = command.known_choices(mine)
    assert source == "as they are written" and not any(choices.values())
    ours, source = command.known_choices(command.arguments(["--search", "off"]))
    assert source.endswith("cost-cpu.json") and ours["grpo"] == {"lr_scale": 2.0, "minibatches": 2}


def test_the_search_takes_the_best_reward_and_diverged_ones_last():
    def row(lr, status, quality, kl=1.0):
        return {"algorithm": "ppo", "choice": {"lr": lr}, "status": status, "quality": quality, "kl": kl}

    rows = [row(1, "finished", 0.4), row(2, "diverged", 0.9), row(3, "finished", 0.6), row(4, "failed", None)]
    assert command.best_choices(rows) == {"ppo": {"lr": 3}}
    assert command.best_choices(rows[1:2] + rows[3:]) == {"ppo": {"lr": 2}}
    far = [row(5, "finished", 2.0, kl=40.0), row(6, "finished", 1.0, kl=20.0)]
    assert command.best_choices([*rows, *far]) == {"ppo": {"lr": 3}}, "too far from the start policy"
    assert command.best_choices(far) == {"ppo": {"lr": 6}}, "the nearest, where all went too far"


def test_a_job_survives_its_file(world):
    work = job(world, "dpo", prompts=8)
    assert type(work)(**json.loads(json.dumps(asdict(work)))) == work
