"""The comparison in float32 on the tiny Qwen2 (hidden 128, 4 layers, 1.8M parameters, tied, vocabulary 8192).

Per step 8 prompts of 32 tokens, 8 completions each of exactly 32 tokens, one Python reward, the GRPO loss without a KL
term, AdamW; the same weights at the start. Shared prompts are measured at hidden 512 as well, where attention is no
larger a part of the work than in the models people train.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.step import agreement, savings, timing
from benchmarks.step.contenders import (
    KEPT_MEMORY,
    Generate,
    GenerateBatch,
    OurStep,
    Peer,
    PlainStep,
    batching,
)
from benchmarks.step.phases import watched
from benchmarks.step.timing import medians, seconds, take_turns
from benchmarks.step.work import LEARNING_RATE, MIDDLE, SMALL, TINY, Size, save, texts
from grpo_fast.models.policy import Policy

PREFIX_CASES = ((128, 512), (512, 512), (2048, 512))
PEERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "TRL": ({}, {}),
    "TRL, freed memory kept": ({}, KEPT_MEMORY),
    "TRL, continuous batching": ({"continuous_batching": batching("cpu", 64)}, {}),
}
"""TRL's ways to take a step: its settings beside the common ones, and its environment. `freed memory kept` is no
setting of TRL's: it lends it what our commands ask of the C library, so that the rest can be compared."""
PARTS = ("step", "generation", "phases", "packing", "skipping", "prefix")
BARS = {
    "step, times TRL": 3.0,
    "step, times TRL with freed memory kept": 3.0,
    "generation, times generate": 1.5,
    "packing, times padded": 1.8,
    **{f"shared prefix {p}/{c}, of the predicted saving": 0.8 for p, c in PREFIX_CASES},
}


def run(
    folder: Path, *, peer_python: str | None, repeats: int, quick: bool = False, parts: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Yields the record after every part asked for (all without `parts`): raw samples, medians, ratios, bars.

    `folder` is scratch space. AssertionError where contenders disagree about loss or gradients.
    """
    save(folder, TINY)
    record: dict[str, Any] = {"quick": quick}
    wanted = parts or PARTS
    size = Size(prompts=2, group=4, prompt_tokens=8, new_tokens=8) if quick else Size()
    for part in wanted:
        print(f"{part} ...", file=sys.stderr, flush=True)
        if part == "step":
            record |= _steps(folder, size, peer_python, repeats)
        elif part == "generation":
            record["generation"] = _generation(folder, size, repeats, quick)
        elif part == "phases":
            record["phases"] = phases(OurStep(_policy(folder), size), repeats=repeats)
        elif part == "prefix":
            cases = ((16, 16),) if quick else PREFIX_CASES
            names = {"tiny": TINY} if quick else {"hidden 512": MIDDLE, "tiny": TINY}
            record["prefix"] = {
                name: savings.prefix(shape, cases, repeats=min(repeats, 3)) for name, shape in names.items()
            }
        elif part == "packing":
            prompts, group, longest = (2, 4, 64) if quick else (8, 8, 512)
            shapes = {"tiny": TINY} if quick else {"hidden 256": SMALL, "tiny": TINY}
            record["packing"] = {
                name: savings.packing(
                    prompts=prompts, group=group, repeats=repeats, longest=longest, shape=shape
                )
                for name, shape in shapes.items()
            }
        elif part == "skipping":
            many = Size(prompts=4, group=2, new_tokens=8) if quick else Size(prompts=16, new_tokens=64)
            record["skipping"] = savings.skipping(many, repeats=repeats)
        yield record | {"bars": _bars(record)}


def _policy(folder: Path) -> Policy:
    return Policy.from_model(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    )


def _steps(folder: Path, size: Size, peer_python: str | None, repeats: int) -> dict[str, Any]:
    """Agreement on a fixed batch, then whole steps in turns."""
    policy, plain = _policy(folder), AutoModelForCausalLM.from_pretrained(folder)
    fixed = agreement.fixed_batch(plain)
    agreement.save_for_trl(fixed, folder / "batch.pt")
    peers: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, (settings, environment) in PEERS.items():
        if not peer_python:
            missing[name] = "not measured: no --peer-python"
            continue
        spec = peer_spec(folder, size) | settings | {"batch": None if peers else str(folder / "batch.pt")}
        try:
            peers[name] = Peer(peer_python, spec, environment)
        except RuntimeError as error:
            missing[name] = str(error)
    first = next(iter(peers.values()), None)
    trl = None if first is None else (first.ready["loss"], torch.load(folder / "batch.pt.trl"))
    errors = agreement.compare(policy, plain, fixed, trl)

    ours = OurStep(policy, size)
    by_hand = PlainStep(plain, policy.tokenizer, size)
    prompt_ids = torch.tensor([prompt.token_ids for prompt in ours.task.prompts])
    contenders: dict[str, Callable[[], Any]] = {"grpo_fast": ours, "plain": lambda: by_hand(prompt_ids)}
    for name, peer in list(peers.items()):
        try:
            peer.step()  # its first steps are warm-up
            contenders[name] = peer.step
        except RuntimeError as error:
            missing[name] = str(error)
            peer.close()
            del peers[name]
    try:
        samples = take_turns(contenders, repeats=repeats)
    finally:
        for peer in peers.values():
            peer.close()
    median = medians(samples)
    skipped = ours()["skipped_sequences"]
    assert not skipped, f"{skipped} of ours had no signal: the work was not the same"
    return {
        "agreement": {"limit": agreement.LIMIT, "errors": errors},
        "step": {
            "work": vars(size) | {"model": vars(TINY)},
            "peer": first.ready["versions"] | {"threads": first.ready["threads"]} if first else None,
            "samples_s": samples,
            "median_s": median,
            "missing": missing,
            "speedup": {
                name: value / median["grpo_fast"] for name, value in median.items() if name != "grpo_fast"
            },
        },
    }


def peer_spec(folder: Path, size: Size) -> dict[str, Any]:
    """What TRL is told; no gradient checkpointing, fused AdamW and one batch for the whole step are its best."""
    return {
        "folder": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "prompts": size.prompts,
        "group": size.group,
        "new_tokens": size.new_tokens,
        "micro_batch": size.prompts * size.group,
        "texts": texts(size.prompts, size.prompt_tokens),
        "lr": LEARNING_RATE,
        "checkpointing": False,
        "continuous_batching": None,
        "batch": None,
        "clock": "cpu" if timing.clock is time.process_time else "wall",
    }


def _generation(folder: Path, size: Size, repeats: int, quick: bool) -> dict[str, Any]:
    """The engine, `generate`, and transformers' continuous batching (few repeats: it is slow without a GPU)."""
    ours = OurStep(_policy(folder), size)
    asked = [prompt.token_ids for prompt in ours.task.prompts]
    prompt_ids = torch.tensor(asked)
    plain = Generate(AutoModelForCausalLM.from_pretrained(folder), size)
    samples = take_turns(
        {
            "engine": lambda: len(ours.engine.generate(asked, size.group, ours.task.sampling, 0)),
            "generate": lambda: len(plain(prompt_ids)),
        },
        repeats=repeats,
    )
    missing = {}
    try:
        batched = GenerateBatch(AutoModelForCausalLM.from_pretrained(folder), size)
        samples |= take_turns(
            {"generate_batch": lambda: len(batched(prompt_ids))}, repeats=1 if quick else min(repeats, 3)
        )
    except Exception as error:  # it does not run everywhere, and says so in many ways
        missing["generate_batch"] = f"{type(error).__name__}: {error}".splitlines()[0]
    median = medians(samples)
    tokens = size.prompts * size.group * size.new_tokens
    return {
        "samples_s": samples,
        "median_s": median,
        "tokens_per_s": {name: tokens / value for name, value in median.items()},
        "missing": missing,
        "speedup": {name: value / median["engine"] for name, value in median.items() if name != "engine"},
    }


def phases(step: Any, *, repeats: int, warmup: int = 1) -> dict[str, Any]:
    """Seconds by phase of a step (medians), beside the same step without the clock.

    `step` is called with a timer or without one, and has a `policy` and an `optimizer`.
    """
    device = step.policy.device.type
    whole = [seconds(step, device) for _ in range(warmup + repeats)][warmup:]
    rounds = []
    with watched(step.policy, step.optimizer) as clock:
        for _ in range(repeats):
            clock.enter("other")
            wall = seconds(lambda: step(clock.timer), device)
            clock.enter("other")
            rounds.append(clock.seconds() | {"wall": wall})
    median = medians({name: [found[name] for found in rounds] for name in rounds[0]})
    wall = median.pop("wall")
    return {
        "rounds_s": rounds,
        "median_s": median,
        "watched_s": wall,
        "unwatched_s": medians({"": whole})[""],
        "share_found": sum(median.values()) / wall,
    }


def _bars(record: dict[str, Any]) -> dict[str, dict[str, float | bool]]:
    """What was reached of what is wanted, of the parts that were measured."""
    reached: dict[str, float] = {}
    rows = record.get("step", {}).get("speedup", {})
    own_settings = [
        rows[name] for name, (_, environment) in PEERS.items() if name in rows and not environment
    ]
    if own_settings:
        reached["step, times TRL"] = min(own_settings)
    if "TRL, freed memory kept" in rows:
        reached["step, times TRL with freed memory kept"] = rows["TRL, freed memory kept"]
    if "generation" in record:
        reached["generation, times generate"] = record["generation"]["speedup"]["generate"]
    for row in list(record.get("packing", {}).values())[:1]:
        reached["packing, times padded"] = row["speedup"]
    for row in next(iter(record.get("prefix", {}).values()), []):
        reached[f"shared prefix {row['prompt']}/{row['completion']}, of the predicted saving"] = row[
            "reached"
        ]
    return {
        name: {"reached": value, "wanted": BARS[name], "met": value >= BARS[name]}
        for name, value in reached.items()
        if name in BARS
    }
