"""What packing and shared prompts save of an update's forward and backward pass, on the CPU.

    python -m benchmarks.packing prefix    # shared prompts against each sequence with its own, G = 8
    python -m benchmarks.packing spread    # packed rows against padded batches, log-normal lengths

The model is a Qwen2 of random weights. `prefix` compares the saving reached with the one that counting tokens
predicts, with and without the loss head, whose work sharing does not change. `spread` runs padded batches under
transformers' SDPA with its mask, in the order given, in several sizes; the fastest counts. Before anything is timed,
losses and gradients of the contenders are held against each other. They take turns; the clock is the CPU seconds of
this process, of which the smallest count, so that other processes of the machine matter little. Raw samples go to
JSON.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from grpo_kernels import linear_logprob
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.loss_head import commit, device_name, versions
from grpo_fast.attention.function import use_packed_attention
from grpo_fast.models.self_check import packed_hidden_states
from grpo_fast.packing import PackedBatch, pack
from grpo_fast.run.allocator import keep_freed_memory
from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.metrics import write_atomically

SHAPES = ((128, 512), (512, 512), (2048, 512))
GROUP = 8
PADDED_BATCHES = (4, 8, 16)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.packing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("prefix", "spread"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=4, help="spread: prompts, with 8 completions each")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    keep_freed_memory()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    record = {
        "benchmark": f"packing-{args.what}",
        "commit": commit(),
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "clock": "process CPU seconds",
        "versions": {"torch": torch.__version__, **versions()},
        "model": {name: vars(args)[name] for name in ("hidden", "layers", "vocabulary")},
        **(prefix if args.what == "prefix" else spread)(args, plain),
    }
    output = args.output or Path("benchmarks/results") / f"packing-{args.what}-cpu.json"
    write_atomically(output, json.dumps(record, indent=1))
    print(json.dumps({key: value for key, value in record.items() if key != "samples_s"}))
    return 0


def prefix(args: Any, plain: Any) -> dict[str, Any]:
    """The saving of shared prompts, as a share of the one predicted by the tokens."""
    model = use_packed_attention(plain)
    draw = random.Random(0)
    results, samples = {}, {}
    for prompt_size, completion_size in SHAPES:
        prompts = [[draw.randrange(args.vocabulary) for _ in range(prompt_size)]]
        completions = [
            [draw.randrange(args.vocabulary) for _ in range(completion_size)] for _ in range(GROUP)
        ]
        owner, shape = [0] * GROUP, f"{prompt_size}/{completion_size}"
        batches = {
            name: pack(
                prompts, completions, prompt_of=owner, token_budget=args.token_budget, share_prefix=share
            )
            for name, share in (("shared", True), ("dense", False))
        }
        tokens = {name: sum(b.plan.length for b in rows) for name, rows in batches.items()}
        hold_equal({name: gradient(model, lambda b=b: packed_loss(model, b)) for name, b in batches.items()})
        times = samples[shape] = take_turns(
            {
                f"{name}{' with head' if head else ''}": lambda b=b, h=head: gradient(
                    model, lambda: packed_loss(model, b, head=h)
                )
                for name, b in batches.items()
                for head in (False, True)
            },
            args.repeats,
        )
        best = {name: min(values) for name, values in times.items()}
        predicted = 1 - tokens["shared"] / tokens["dense"]
        results[shape] = {"tokens": tokens, "predicted_saving": round(predicted, 4)}
        for suffix in ("", " with head"):
            saving = 1 - best[f"shared{suffix}"] / best[f"dense{suffix}"]
            results[shape][f"saving{suffix}"] = round(saving, 4)
            results[shape][f"reached{suffix}"] = round(saving / predicted, 3)
    return {"results": results, "samples_s": samples}


def spread(args: Any, plain: Any) -> dict[str, Any]:
    """Packed rows against padded batches on log-normal lengths."""
    model = use_packed_attention(copy.deepcopy(plain))
    draw = random.Random(0)

    def tokens(median: float, sigma: float, most: int) -> list[int]:
        length = min(most, max(2, round(median * draw.lognormvariate(0, sigma))))
        return [draw.randrange(args.vocabulary) for _ in range(length)]

    prompts = [tokens(64, 0.6, 256) for _ in range(args.prompts)]
    owner = [p for p in range(args.prompts) for _ in range(GROUP)]
    completions = [tokens(96, 0.9, 768) for _ in owner]
    rows = list(zip([prompts[p] for p in owner], completions, strict=True))
    draw.shuffle(rows)  # as a loader gives them: not group by group
    contenders: dict[str, Callable[[], list[Tensor]]] = {}
    for name, share in (("packed", False), ("packed, prompts shared", True)):
        batches = pack(
            prompts, completions, prompt_of=owner, token_budget=args.token_budget, share_prefix=share
        )
        contenders[name] = lambda b=batches: gradient(model, lambda: packed_loss(model, b))
    for size in PADDED_BATCHES:
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        contenders[f"padded {size}"] = lambda p=parts: gradient(plain, lambda: padded_loss(plain, p))
    hold_equal({name: run() for name, run in contenders.items()})
    samples = take_turns(contenders, args.repeats)
    best = {name: min(values) for name, values in samples.items()}
    fastest = min((best[name], name) for name in best if name.startswith("padded"))
    lengths = sorted(len(c) for c in completions)
    return {
        "completion_lengths": {
            "median": lengths[len(lengths) // 2],
            "mean": sum(lengths) / len(lengths),
            "longest": lengths[-1],
        },
        "seconds": {name: round(value, 3) for name, value in best.items()},
        "fastest_padded": fastest[1],
        "speedup": {
            name: round(fastest[0] / value, 2) for name, value in best.items() if name.startswith("packed")
        },
        "samples_s": samples,
    }


def packed_loss(model: Any, batches: list[PackedBatch], *, head: bool = True) -> float:
    """Backward pass of the summed log-probs of packed rows, or (no head) of the hidden states they come from."""
    total = 0.0
    for batch in batches:
        hidden = packed_hidden_states(model, batch).index_select(0, batch.hidden_index)
        loss = (
            hidden.sum() if not head else linear_logprob(hidden, model.lm_head.weight, batch.targets)[0].sum()
        )
        loss.backward()
        total += loss.item()
    return total


def padded_loss(model: Any, parts: list[list[tuple[list[int], list[int]]]]) -> float:
    """The same of batches padded on the right, under transformers' attention and mask."""
    total = 0.0
    for part in parts:
        width = max(len(p) + len(c) for p, c in part)
        ids = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in part])
        mask = torch.tensor([[1] * (len(p) + len(c)) + [0] * (width - len(p) - len(c)) for p, c in part])
        states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = torch.cat(
            [row[len(p) - 1 : len(p) + len(c) - 1] for row, (p, c) in zip(states, part, strict=True)]
        )
        targets = torch.tensor([token for _, c in part for token in c])
        loss = linear_logprob(hidden, model.lm_head.weight, targets)[0].sum()
        loss.backward()
        total += loss.item()
    return total


def gradient(model: Any, loss: Callable[[], float]) -> list[Tensor]:
    """The loss, and the gradient of every weight."""
    model.zero_grad()
    value = loss()
    return [torch.tensor(value), *(p.grad for p in model.parameters())]


def hold_equal(found: dict[str, list[Tensor]]) -> None:
    """Losses and gradients of all contenders must agree to 1e-4 of their size."""
    first = next(iter(found.values()))
    for name, other in found.items():
        for a, b in zip(other, first, strict=True):
            error = ((a - b).norm() / b.norm().clamp(min=1e-6)).item()
            assert error < 1e-4, f"{name} differs by {error}"


def take_turns(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each contender, the first round left out."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            started = time.process_time()
            run()
            if repeat:
                samples[name].append(time.process_time() - started)
    return samples


if __name__ == "__main__":
    run_command(main)
