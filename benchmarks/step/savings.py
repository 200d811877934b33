"""What work that is not done saves: shared prompts, no padding, sequences without signal.

Each compares seconds of the update's forward and backward passes with what counting says. The loss head is the same on
both sides, so only the body's work differs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.contenders import OurStep, random_rollout
from benchmarks.step.passes import (
    cleared,
    fused_loss,
    packed_pass,
    padded_pass,
    positions_of,
    rectangle,
    same_gradients,
)
from benchmarks.step.timing import medians, take_turns
from benchmarks.step.work import TINY, Shape, Size, config_of, model_of, tokenizer_of
from grpo_fast.grpo import update
from grpo_fast.models.policy import Policy
from grpo_fast.packing import pack


def prefix(
    shape: Shape, cases: Sequence[tuple[int, int]], *, repeats: int, group: int = 8
) -> list[dict[str, Any]]:
    """Sharing a prompt of a group's completions, on and off: the saving reached over the one that tokens predict."""
    tokenizer = tokenizer_of(shape.vocabulary)
    policy = Policy.from_model(model_of(shape, tokenizer), tokenizer)
    rows = []
    for prompt, completion in cases:
        draw = torch.Generator().manual_seed(0)
        asked = [torch.randint(shape.vocabulary, (prompt,), generator=draw).tolist()]
        replies = [
            torch.randint(shape.vocabulary, (completion,), generator=draw).tolist() for _ in range(group)
        ]
        advantages = torch.randn(group, generator=draw)
        runs = {
            name: _packed(policy, asked, replies, [0] * group, advantages, share=share)
            for name, share in (("shared", True), ("each its own", False))
        }
        same_gradients({name: (policy.model, run) for name, (run, _) in runs.items()})
        timed = {name: cleared(policy.model, run) for name, (run, _) in runs.items()}
        samples = take_turns(timed, repeats=repeats, warmup=1)
        # The smallest count: some GiB that the system must find again cost a run several times its work.
        least = {name: min(found) for name, found in samples.items()}
        tokens = {name: count for name, (_, count) in runs.items()}
        saved = 1 - least["shared"] / least["each its own"]
        predicted = 1 - tokens["shared"] / tokens["each its own"]
        rows.append(
            {
                "prompt": prompt,
                "completion": completion,
                "tokens": tokens,
                "samples_s": samples,
                "saved": saved,
                "predicted": predicted,
                "reached": saved / predicted,
            }
        )
    return rows


def _packed(
    policy: Policy,
    prompts: list[list[int]],
    completions: list[list[int]],
    owner: list[int],
    advantages: Tensor,
    *,
    share: bool,
) -> tuple[Callable[[], None], int]:
    """A forward and backward pass over everything, and how many positions it has."""
    batches = pack(prompts, completions, prompt_of=owner, token_budget=8192, share_prefix=share)
    run = packed_pass(fused_loss(policy), batches, advantages, float(len(completions)))
    return run, positions_of(batches)


def packing(
    *, prompts: int, group: int, repeats: int, longest: int = 512, shape: Shape = TINY
) -> dict[str, Any]:
    """Log-normal lengths (median 64, sigma 0.8): packed rows against rectangles of several heights.

    `in order`: batches as they come, each padded on the right to its longest sequence; `sorted`: batches of neighbours
    in length, the stronger baseline.
    """
    tokenizer = tokenizer_of(shape.vocabulary)
    policy = Policy.from_model(model_of(shape, tokenizer), tokenizer)
    padded_model = model_of(shape, tokenizer)
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return draw.choices(range(shape.vocabulary - 2), k=count)

    asked = [tokens(draw.randint(16, 96)) for _ in range(prompts)]
    owner = [p for p in range(prompts) for _ in range(group)]
    replies = [tokens(min(longest, max(4, round(draw.lognormvariate(4.16, 0.8))))) for _ in owner]
    advantages = torch.tensor([draw.gauss(0, 1) for _ in owner])
    runs: dict[str, Callable[[], None]] = {}
    positions: dict[str, int] = {}
    for name, share in (("packed", False), ("packed, prompts shared", True)):
        runs[name], positions[name] = _packed(policy, asked, replies, owner, advantages, share=share)
    heights = [height for height in (8, 16, 32) if height <= len(owner)]
    by_length = sorted(range(len(owner)), key=lambda i: len(asked[owner[i]]) + len(replies[i]))
    for order, indices in (("in order", list(range(len(owner)))), ("sorted", by_length)):
        for height in heights:
            parts = [indices[first : first + height] for first in range(0, len(indices), height)]
            name = f"padded {height}, {order}"
            rectangles = [rectangle(asked, replies, owner, part) for part in parts]
            positions[name] = sum(rectangle["ids"].numel() for rectangle in rectangles)
            runs[name] = padded_pass(padded_model, rectangles, advantages, float(len(owner)))
    owners = {name: padded_model if name.startswith("padded") else policy.model for name in runs}
    same_gradients({name: (owners[name], run) for name, run in runs.items()})
    samples = take_turns({name: cleared(owners[name], run) for name, run in runs.items()}, repeats=repeats)
    median = medians(samples)
    best = {
        order: min(value for name, value in median.items() if name.endswith(order))
        for order in ("in order", "sorted")
    }
    return {
        "work": {"prompts": prompts, "group": group, "real_tokens": positions["packed"], "longest": longest},
        "positions": positions,
        "samples_s": samples,
        "median_s": median,
        "speedup": best["in order"] / median["packed"],
        "speedup_over_sorted": best["sorted"] / median["packed"],
        "speedup_with_sharing": best["in order"] / median["packed, prompts shared"],
    }


def skipping(size: Size, *, repeats: int) -> dict[str, Any]:
    """`update` on one rollout with 0, 25, 50 and 75% of its groups without signal.

    `slope`: the share of the time saved for each share skipped, by least squares; 1 is proportional. The optimizer's
    own time cannot be saved and is part of it.
    """
    tokenizer = tokenizer_of(TINY.vocabulary)
    policy = Policy.from_model(model_of(TINY, tokenizer), tokenizer)
    config = config_of(size)
    step = OurStep(policy, size, config)
    full = random_rollout(step.task, size)
    shares = (0.0, 0.25, 0.5, 0.75)
    skipped = {}

    def run(share: float) -> None:
        advantages = full.advantages.clone()
        advantages[: round(share * size.prompts) * size.group] = 0.0
        rollout = replace(full, advantages=advantages)
        skipped[share] = update(policy, step.optimizer, rollout, config, lr=0.0)["skipped_sequences"]

    samples = take_turns(
        {f"{share:.0%}": lambda share=share: run(share) for share in shares}, repeats=repeats
    )
    assert [skipped[share] for share in shares] == [share * size.prompts * size.group for share in shares]
    median = medians(samples)
    whole = median["0%"]
    saved = {share: 1 - median[f"{share:.0%}"] / whole for share in shares}
    slope = sum(share * value for share, value in saved.items()) / sum(share**2 for share in shares)
    return {"samples_s": samples, "median_s": median, "slope": slope}
