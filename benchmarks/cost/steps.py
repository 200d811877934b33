"""One step of each algorithm at a real size, with random weights: seconds and FLOPs by phase, memory by part.

    python -m benchmarks.cost.steps --sizes 0.5b 7b --output benchmarks/results/cost-steps-cuda.json

Every algorithm runs in a process of its own: one step that is not counted, then two that are. A step is as many
sequences for each: 16 prompts x 8 completions; of PPO 128 prompts; of DPO 32 prompts x 4, ranked, and one optimizer
step on the 32 pairs. 0.5B trains every weight; 7B trains adapters, and so does its value network. A reward model of
0.5B with four outputs reads every completion. What a model has learned does not matter to any of this.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerBase

from benchmarks.baselines import ppo
from benchmarks.cost.algorithms import ALGORITHMS
from benchmarks.cost.lab import Lab
from benchmarks.cost.ledger import PHASES, Budget, Ledger
from benchmarks.machine import commit, device_name, versions
from benchmarks.step.work import QWEN, Shape, Size, config_of, model_of, prompts_of, tokenizer_of
from grpo_fast.config.settings import RewardSettings, TrainConfig
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.choose import builtin_engine
from grpo_fast.models.policy import Policy
from grpo_fast.models.pretrained import enable_gradient_checkpointing
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.models.reward_set import RewardSet
from grpo_fast.run.command import Parser, prepare_libraries, run_command
from grpo_fast.run.metrics import write_atomically
from grpo_fast.scoring import Scorer
from grpo_fast.task import Task, lora_settings

OBJECTIVES = ("safety", "politeness", "meaningfulness", "actionability")
CHOICES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo_no_kl": {},
    "ppo": {},
    "ppo_shared": {},
    "dpo_online": {"batches": 1, "samples": 4},
}
LIMIT_S = {"0.5b": 120, "7b": 240}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A size and how it is trained."""

    shape: Shape
    reward: Shape
    size: Size
    lora_rank: int = 0


_WORK = Size(prompts=16, group=8, prompt_tokens=256, new_tokens=256, token_budget=16384)
MODELS = {
    "0.5b": Model(shape=QWEN["0.5b"], reward=QWEN["0.5b"], size=_WORK),
    "7b": Model(shape=QWEN["7b"], reward=QWEN["0.5b"], size=replace(_WORK, token_budget=8192), lora_rank=16),
}


class LetterTask(Task):
    """A completion's text has a letter for each token, so that a reward model reads as many."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(LETTERS[i % len(LETTERS)] for i in token_ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a step could not be measured, 2 without a CUDA device."""
    parser = Parser(
        prog="python -m benchmarks.cost.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--algorithms", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cost-steps-cuda.json"))
    parser.add_argument("--seconds", type=float, default=900, help="all of it takes no longer than this")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "ALGORITHM"), help="this one, in this process")
    args = parser.parse_args(argv)
    if args.one:
        prepare_libraries(0)
        print(json.dumps(measure(MODELS[args.one[0]], args.one[1], "cuda")))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.cost.steps: no CUDA device found", file=sys.stderr)
        return 2
    record = {
        "benchmark": "cost-steps",
        "device": device_name("cuda"),
        "versions": {"torch": torch.__version__, **versions()},
        "commit": commit(),
        "steps": [],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for size in args.sizes:
        for name in args.algorithms:
            left = args.seconds - (time.monotonic() - started)
            record["steps"].append({"size": size, "algorithm": name, **_alone(size, name, left)})
            print(line(record["steps"][-1]), flush=True)
            write_atomically(args.output, json.dumps(record, indent=1) + "\n")
    return 1 if any(row["error"] for row in record["steps"]) else 0


def _alone(size: str, name: str, left: float) -> dict[str, Any]:
    """`measure` in a process of its own, or why there is nothing."""
    if left <= 0:
        return {"error": "not run: the time was up"}
    words = [sys.executable, "-m", "benchmarks.cost.steps", "--one", size, name]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=min(LIMIT_S[size], left), check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {min(LIMIT_S[size], left):.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return {"error": None, **json.loads(done.stdout.splitlines()[-1])}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['size']:6}{row['algorithm']:12}"
    if row["error"]:
        return f"{head}{row['error']}"
    phases = " ".join(f"{name} {seconds:.2f}" for name, seconds in row["phase_s"].items() if seconds)
    return f"{head}{row['seconds']:8.2f} s  {row['memory']['peak'] / 2**30:7.2f} GiB  ({phases})"


def measure(model: Model, algorithm: str, device: str) -> dict[str, Any]:
    """Seconds, FLOPs and memory of a step, the mean of two."""
    lab, value = build(model, algorithm, device)
    settings = ALGORITHMS[algorithm].chosen(CHOICES[algorithm])
    ledger = Ledger(Budget(steps=3), lab.policy.device, warmup=1)
    place = replace(lab, ledger=ledger)
    if isinstance(settings, ppo.PPO):
        ppo.train(place, settings, value)
    else:
        ALGORITHMS[algorithm].train(place, settings)
    spent = ledger.spent
    return {
        "seconds": spent.wall_s / 2,
        "phase_s": {name: ledger.phase_s[name] / 2 for name in PHASES},
        "flops": {name: ledger.flops[name] // 2 for name in PHASES},
        "generated_tokens": spent.generated_tokens // 2,
        "trained_tokens": spent.trained_tokens // 2,
        "memory": ledger.memory(),
    }


def build(model: Model, algorithm: str, device: str) -> tuple[Lab, ppo.ValueNetwork | None]:
    """A lab with random weights, and for PPO its value network."""
    shape, dtype = model.shape, torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = tokenizer_of(shape.vocabulary)
    config = replace(
        config_of(model.size, device=device, lora_rank=model.lora_rank, checkpointing=True),
        reward=RewardSettings(overlap="off"),
    )
    policy = Policy.from_model(
        model_of(shape, tokenizer, dtype=dtype, device=device),
        tokenizer,
        lora=lora_settings(config),
        gradient_checkpointing=True,
    )
    reader = tokenizer_of(model.reward.vocabulary)
    layout = Layout(heads=tuple(Head(name=name) for name in OBJECTIVES))
    reward = RewardModel(
        classifier(model.reward.config(reader), layout, dtype, device), reader, layout
    ).eval()
    sequences = model.size.prompts * model.size.group
    task = LetterTask(
        policy=policy,
        scorer=Scorer.create(config.reward, RewardSet.of([reward]), None),
        sampling=Sampling(max_new_tokens=model.size.new_tokens),
        prompts=prompts_of(tokenizer, sequences, model.size.prompt_tokens),
        heldout=[],
    )
    engine = builtin_engine(policy, max_rows=sequences, settings=config.engine)
    lab = Lab.of(config, task, engine, Ledger(Budget(), policy.device), start=Path())
    return lab, value_network(shape, tokenizer, config, dtype, device) if algorithm == "ppo" else None


def value_network(
    shape: Shape, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, dtype: torch.dtype, device: str
) -> ppo.ValueNetwork:
    """Of the policy's shape, with random weights."""
    trunk = classifier(shape.config(tokenizer), ppo.VALUE, dtype, device)
    network = ppo.ValueNetwork(RewardModel(trunk, tokenizer, ppo.VALUE, lora=lora_settings(config)), config)
    enable_gradient_checkpointing(trunk, "value network")
    return network


def classifier(config: PreTrainedConfig, layout: Layout, dtype: torch.dtype, device: str) -> Any:
    """A decoder with as many outputs as the layout has, made where it will run."""
    config.num_labels = len(layout.names)
    torch.manual_seed(1)
    with torch.device(device):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


if __name__ == "__main__":
    run_command(main)
