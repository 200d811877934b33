"""The reward model against its peers, on the same work in one run.

    python -m benchmarks.reward_model score                                # against padded transformers batches
    python -m benchmarks.reward_model train --peer-python VENV/bin/python  # against TRL's reward trainer, from its venv

`score`: G completions of each prompt, mixed lengths, through the same checkpoint: packed with shared prompts here,
padded batches in the order given there (the fastest of several batch sizes counts). `train`: one epoch on the same
preference pairs from the same weights; accuracy on held-out pairs is measured by one function for both. Contenders
take turns. Raw samples go to JSON.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from benchmarks.machine import commit, device_name, versions
from benchmarks.page import command_line, page_of
from grpo_fast.config.settings import MiniatureWorld
from grpo_fast.data.rated import Comparison, RatedExample
from grpo_fast.miniature import world
from grpo_fast.miniature.judge import judge
from grpo_fast.miniature.setup import tiny_config
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_fit import fit
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.models.reward_text import Encoded
from grpo_fast.run.allocator import keep_freed_memory
from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.metrics import write_atomically

PADDED_BATCHES = (8, 16, 32)
LEARNING_RATE = 1e-3
BATCH = 32


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.reward_model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("score", "train"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=32, help="score: prompts, with 8 completions each")
    parser.add_argument("--pairs", type=int, default=2000, help="train: preference pairs")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--peer-python", help="train: a Python with trl installed")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    if args.what == "train" and not args.peer_python:
        parser.error("train needs --peer-python: a Python with trl installed")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        record = (score if args.what == "score" else train)(args, Path(folder))
    record = {
        "benchmark": f"reward-model-{args.what}",
        "commit": commit(),
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, **versions()},
        **record,
    }
    output = args.output or Path("benchmarks/results") / f"reward-model-{args.what}-cpu.json"
    write_atomically(output, json.dumps(record, indent=1))
    page_of(output, command=command_line())
    print(json.dumps({key: value for key, value in record.items() if key != "samples_s"}))
    return 0


def score(args: Any, folder: Path) -> dict[str, Any]:
    """Scoring throughput, ours against padded batches of the saved checkpoint."""
    settings = MiniatureWorld(hidden=args.hidden, layers=args.layers)
    tokenizer = build_tokenizer()
    heads = tuple(Head(name=name) for name in world.OBJECTIVES)
    ours = RewardModel.from_config(tiny_config(settings, tokenizer), tokenizer, Layout(heads=heads)).eval()
    ours.save(folder / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    draw = random.Random(0)
    size = len(tokenizer)

    def tokens(low: int, high: int) -> list[int]:
        length = round(math.exp(draw.uniform(math.log(low), math.log(high))))
        return [draw.randrange(10, size) for _ in range(length)]

    prompts = [tokens(32, 192) for _ in range(args.prompts)]
    owner = [p for p in range(args.prompts) for _ in range(8)]
    completions = [tokens(8, 256) for _ in owner]
    encoded = Encoded(prompt_ids=prompts, completion_ids=completions, prompt_of=owner)
    rows = [prompts[p] + ids for p, ids in zip(owner, completions, strict=True)]

    def padded(batch: int) -> torch.Tensor:
        parts = []
        for first in range(0, len(rows), batch):
            chosen = rows[first : first + batch]
            width = max(map(len, chosen))
            ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in chosen])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen])
            parts.append(theirs(input_ids=ids, attention_mask=mask).logits)
        return torch.cat(parts)

    with torch.no_grad():
        error = (padded(8) - ours.predict(encoded).scores).abs().max().item()
        assert error < 1e-4, f"scores differ by {error}"
        contenders = {"packed": lambda: ours.predict(encoded)}
        contenders |= {f"padded {batch}": lambda batch=batch: padded(batch) for batch in PADDED_BATCHES}
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for repeat in range(args.repeats + 1):
            for name, run in contenders.items():
                started = time.perf_counter()
                run()
                if repeat:
                    samples[name].append(time.perf_counter() - started)
    median = {name: statistics.median(found) for name, found in samples.items()}
    best = min(median[f"padded {batch}"] for batch in PADDED_BATCHES)
    return {
        "work": {"prompts": args.prompts, "completions": len(rows), "tokens": sum(map(len, rows))},
        "model": {"hidden": args.hidden, "layers": args.layers},
        "largest_difference": error,
        "samples_s": samples,
        "median_s": median,
        "speedup": best / median["packed"],
    }


def preference_pairs(n: int, split: world.Split, seed: int) -> list[dict[str, str]]:
    """Pairs of replies to one prompt of the miniature, the better one by the sum of the judge's scores."""
    rows, found = world.labelled_replies(split, 6 * n, seed), []
    draw = random.Random(seed)
    for ask, reply, _ in rows:
        other = draw.choice(rows)[1]
        good, bad = sum(judge(ask, reply)), sum(judge(ask, other))
        if abs(good - bad) < 0.3 or not reply or not other:
            continue
        chosen, rejected = (reply, other) if good > bad else (other, reply)
        found.append({"prompt": ask.text + "\n", "chosen": chosen, "rejected": rejected})
        if len(found) == n:
            break
    return found


def train(args: Any, folder: Path) -> dict[str, Any]:
    """One epoch on the same pairs: seconds of the training itself, and accuracy on held-out pairs."""
    settings = MiniatureWorld(hidden=args.hidden, layers=args.layers)
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(settings, tokenizer)).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    pairs, held = preference_pairs(args.pairs, "train", 0), preference_pairs(500, "heldout", 0)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    examples = [
        RatedExample(
            prompt=pair["prompt"],
            replies=(pair["chosen"], pair["rejected"]),
            labels=({}, {}),
            comparisons=(Comparison(head="preference", better=0, worse=1),),
        )
        for pair in pairs
    ]
    samples: dict[str, list[float]] = {"grpo_fast": [], "trl": []}
    accuracy: dict[str, list[float]] = {"grpo_fast": [], "trl": []}
    for repeat in range(args.repeats):
        layout = Layout(heads=(Head(name="preference", kind="pairwise"),))
        model = RewardModel.from_backbone(folder / "backbone", layout, seed=repeat)
        started = time.perf_counter()
        fit(model, examples, epochs=1, batch_size=BATCH, lr=LEARNING_RATE, seed=repeat)
        samples["grpo_fast"].append(time.perf_counter() - started)
        model.save(folder / "ours")
        accuracy["grpo_fast"].append(pair_accuracy(folder / "ours", held))
        command = [
            args.peer_python, str(Path(__file__).parent / "peers" / "trl_reward.py"), str(folder), str(repeat),
            str(BATCH), str(LEARNING_RATE),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: TRL failed: {done.stderr.strip()[-400:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        samples["trl"].append(found["seconds"])
        accuracy["trl"].append(pair_accuracy(folder / "theirs", held))
    median = {name: statistics.median(found) for name, found in samples.items()}
    return {
        "work": {"pairs": len(pairs), "held_out": len(held), "batch": BATCH, "lr": LEARNING_RATE},
        "model": {"hidden": args.hidden, "layers": args.layers},
        "peer": {key: found[key] for key in ("trl", "torch", "transformers")},
        "samples_s": samples,
        "median_s": median,
        "accuracy": accuracy,
        "speedup": median["trl"] / median["grpo_fast"],
    }


@torch.no_grad()
def pair_accuracy(folder: Path, pairs: Sequence[dict[str, str]]) -> float:
    """Share of held-out pairs a saved checkpoint ranks right, through plain transformers one row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token or ""

    def rated(text: str) -> float:
        return model(**tokenizer(text + end, return_tensors="pt")).logits.item()

    right = [rated(p["prompt"] + p["chosen"]) > rated(p["prompt"] + p["rejected"]) for p in pairs]
    return sum(right) / len(right)


if __name__ == "__main__":
    run_command(main)
