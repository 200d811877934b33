"""PPO and DPO trained by the baselines here and by TRL: same start, data and hyper-parameters, one examiner.

What a duel equalises and what it cannot is said in `LIMITS`, which goes into the record.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks.baselines import dpo, ppo
from benchmarks.baselines.dpo import DPO, Pairs, new_pairs
from benchmarks.baselines.ppo import PPO, ValueNetwork
from benchmarks.cost.cell import inputs_of
from benchmarks.cost.examiner import Examiner
from benchmarks.cost.handover import TokenPair, run_peer, with_one_output, write_pairs, write_prompts
from benchmarks.cost.lab import Lab, Reference, by_sequence
from benchmarks.cost.ledger import PHASES, Budget, Diverged, Ledger
from grpo_fast.config.command_line import parse
from grpo_fast.config.resolve import resolve_device
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.queue import PromptQueue
from grpo_fast.engines.choose import engine_of
from grpo_fast.miniature.setup import assemble
from grpo_fast.task import Task

LIMITS = (
    "TRL's PPO clips no gradients, so ours does not either here; DPO clips at 1 on both sides",
    "TRL's PPO gives the score one token after the end token, ours at the end token",
    "TRL scores a completion that was cut off as it is, ours with an end token behind it",
    "DPO's pairs come in the same order; PPO's prompts are the same, but each side samples and shuffles for itself",
    "no warm-up on either side, since the first step of theirs would have a learning rate of 0",
    "PPO's reward is the plain sum of the heads' scores on both sides, DPO's pairs are those of the baseline",
)
AGREEMENT_LIMIT = 1e-4
"""Largest relative deviation between our loss and gradients of one batch of pairs and TRL's (float32)."""
AGREEMENT_PAIRS = 16


@dataclass(frozen=True, kw_only=True)
class Duel:
    """How much is trained, and with what."""

    ppo: PPO = field(default_factory=lambda: PPO(lr_scale=2.0, standardize=False, value_clip=0.0))
    """PPO's settings; a peer's reward model cannot be standardised batch by batch"""
    ppo_steps: int = 30
    """Batches of completions"""
    dpo: DPO = field(default_factory=lambda: DPO(lr_scale=2.0, batches=24))
    """DPO's settings"""
    dpo_epochs: int = 2
    """Passes over the pairs"""
    heldout_pairs: int = 256
    """Held-out prompts of which the start policy samples pairs, to measure the fit on"""
    prompts_per_step: int = 8
    """Times `group_size`: the completions of a step of PPO"""
    group_size: int = 8
    """See there"""
    max_new_tokens: int = 64
    """Longest completion"""
    eval_size: int = 256
    """Held-out prompts each policy is examined on"""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """One seed of one duel: the models it begins with, and where its files go."""

    models: Path
    """Holds start/ and reward_model/"""
    folder: Path
    config: TrainConfig

    @classmethod
    def of(cls, models: Path, folder: Path, duel: Duel, seed: int, *, clip_gradients: bool) -> Ring:
        """The miniature's settings with the duel's own."""
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["--seed", seed, "--device", "cpu", "--optim.warmup-steps", 0]
        flags += ["--optim.max-grad-norm", float(clip_gradients), "--data.eval-size", duel.eval_size]
        flags += ["--rollout.prompts-per-step", duel.prompts_per_step]
        flags += ["--rollout.group-size", duel.group_size, "--rollout.max-new-tokens", duel.max_new_tokens]
        return cls(models=models, folder=folder, config=parse([str(flag) for flag in flags]).config)

    def task(self) -> Task:
        """Everything newly loaded, so that nothing is left of an earlier run."""
        return assemble(self.config, inputs_of(self.config), self.models)

    def lab(self, steps: int = 0, task: Task | None = None) -> Lab:
        """A place to train in for so many steps."""
        task = task or self.task()
        engine = engine_of(self.config, task.policy, self.folder, decode=task.decode, tell=_tell)
        ledger = Ledger(Budget(steps=steps), resolve_device(self.config))
        return Lab.of(self.config, task, engine, ledger, start=self.models / "start")

    def common_spec(self, task: Task) -> dict[str, Any]:
        """What every peer is told."""
        prompt, optim = task.prompts[0], self.config.optim
        text = task.policy.tokenizer.apply_chat_template(
            prompt.messages or [], tokenize=False, add_generation_prompt=True
        )
        return {
            "folder": str(self.models / "start"),
            "output": str(self.folder / "trl"),
            "text": text,
            "token_ids": prompt.token_ids,
            "betas": optim.betas,
            "eps": optim.eps,
            "seed": self.config.seed,
        }


def dpo_duel(
    models: Path, folder: Path, duel: Duel, seed: int, python: str, threads: int, *, ours_first: bool
) -> dict[str, Any]:
    """Both sides on the pairs that our offline DPO samples from the start policy and ranks by the reward model."""
    ring = Ring.of(models, folder, duel, seed, clip_gradients=True)
    settings, task = duel.dpo, ring.task()
    lab = ring.lab(task=task)
    pairs, size = sampled_pairs(lab, settings), dpo.per_step(lab, settings)
    batches = [
        list(dpo.orders(len(pairs), settings, size, lab.seed(epoch))) for epoch in range(duel.dpo_epochs)
    ]
    steps = sum(map(len, batches))
    spec = _dpo_spec(ring, task, settings, size, [[*chain(*epoch)] for epoch in batches])
    write_pairs(token_pairs(pairs), folder / "pairs.jsonl")

    def ours() -> dict[str, Any]:
        # the seed gives it the same pairs, and a peer does not sample
        return _ours(ring.lab(steps), dpo.train, settings, folder, phases=("reference", "update"))

    def theirs() -> dict[str, Any]:
        return run_peer(python, "trl_dpo.py", spec, threads=threads)

    sides = _in_turn(ours, theirs, ours_first)
    heldout = sampled_pairs(
        ring.lab(task=replace(task, prompts=task.heldout)),
        replace(settings, batches=max(1, duel.heldout_pairs // size)),
    )

    def of_pairs(task: Task) -> dict[str, float]:
        return _fit(ring.lab(task=task), heldout, settings.beta)

    found = _examined(ring, task, sides, of_pairs) | {"pairs": len(pairs), "steps": steps}
    if sides["trl"]["status"] == "finished":
        found["agreement"] = agreement(ring, pairs, settings, spec, python)
    return found


def ppo_duel(
    models: Path, folder: Path, duel: Duel, seed: int, python: str, threads: int, *, ours_first: bool
) -> dict[str, Any]:
    """Both sides on the same prompts, against the same weighted sum of the reward model's heads."""
    ring = Ring.of(models, folder, duel, seed, clip_gradients=False)
    settings, task, batch = duel.ppo, ring.task(), duel.prompts_per_step * duel.group_size
    queue = PromptQueue(len(task.prompts), seed)
    taken = [index for _ in range(duel.ppo_steps) for index in queue.take(batch)]
    write_prompts((task.prompts[index].token_ids for index in taken), folder / "prompts.jsonl")
    lab = ring.lab(task=task)
    reward, constant = with_one_output(lab.reward_models[0], task.scorer.weights)
    for name, model in (("reward", reward), ("value", ValueNetwork.of(lab, settings).model.model)):
        model.save_pretrained(folder / name)
    spec = ring.common_spec(task) | {
        "reward": str(folder / "reward"),
        "constant": constant,
        "value": str(folder / "value"),
        "prompts": str(folder / "prompts.jsonl"),
        "completions": len(taken),
        "batch": batch,
        "new_tokens": ring.config.rollout.max_new_tokens,
        "temperature": ring.config.rollout.temperature,
        "value_coef": 1.0,  # as a network of its own has it here
        **{
            name: getattr(settings, name)
            for name in ("epochs", "minibatches", "kl_coef", "gamma", "lam", "clip")
        },
        "lr": settings.lr_scale * ring.config.optim.lr,
        "value_lr": settings.value_lr_scale * ring.config.optim.lr,
        "value_clip": 1e9,  # theirs is in another unit and cannot be switched off
    }

    def ours() -> dict[str, Any]:
        return _ours(ring.lab(duel.ppo_steps), ppo.train, settings, folder, phases=PHASES)

    def theirs() -> dict[str, Any]:
        return run_peer(python, "trl_ppo.py", spec, threads=threads)

    sides = _in_turn(ours, theirs, ours_first)
    return _examined(ring, task, sides) | {"completions": len(taken), "steps": duel.ppo_steps}


def sampled_pairs(lab: Lab, settings: DPO) -> Pairs:
    """What the baseline's first round samples and ranks in this lab."""
    return new_pairs(lab, settings, PromptQueue(len(lab.task.prompts), lab.config.seed), Reference(lab), 0)


def token_pairs(pairs: Pairs) -> list[TokenPair]:
    """The pairs as a peer reads them."""
    rows = pairs.sequences
    return [
        TokenPair(
            prompt_ids=rows.prompts[rows.prompt_of[2 * i]].token_ids,
            chosen_ids=rows.completions[2 * i].token_ids,
            rejected_ids=rows.completions[2 * i + 1].token_ids,
        )
        for i in range(len(pairs))
    ]


def agreement(ring: Ring, pairs: Pairs, settings: DPO, spec: dict[str, Any], python: str) -> dict[str, Any]:
    """Relative deviations of TRL's loss and gradients from ours on one batch; AssertionError past the limit.

    The policy is the start policy moved at random, so that the margins are not 0.
    """
    lab, draw = ring.lab(), torch.Generator().manual_seed(0)
    chosen = list(range(min(AGREEMENT_PAIRS, len(pairs))))
    moved, batch = ring.folder / "moved", ring.folder / "batch.jsonl"
    with torch.no_grad():
        for weight in lab.policy.parameters():
            noise = torch.randn(weight.shape, generator=draw)
            weight += 0.05 * weight.std().nan_to_num() * noise
    lab.policy.save(moved)
    loss, _ = dpo.add_up_gradients(lab, settings, pairs, chosen)
    own = {name: weight.grad for name, weight in lab.policy.model.named_parameters()}
    write_pairs(token_pairs(pairs)[: len(chosen)], batch)
    found = run_peer(python, "trl_dpo.py", spec | {"folder": str(moved), "batch": str(batch)}, threads=1)
    if found["status"] != "finished":
        return found
    theirs = torch.load(f"{batch}.trl")
    assert set(own) == set(theirs)
    scale = sum(gradient.square().sum().item() for gradient in theirs.values())
    off = sum((own[name] - gradient).square().sum().item() for name, gradient in theirs.items())
    errors = {"loss": abs(loss - found["loss"]) / abs(found["loss"]), "gradient": math.sqrt(off / scale)}
    assert max(errors.values()) <= AGREEMENT_LIMIT, f"our DPO differs from TRL's: {errors}"
    return {
        "status": "finished",
        "limit": AGREEMENT_LIMIT,
        "pairs": AGREEMENT_PAIRS,
        "our_loss": loss,
    } | errors


def _dpo_spec(ring: Ring, task: Task, settings: DPO, size: int, orders: list[list[int]]) -> dict[str, Any]:
    return ring.common_spec(task) | {
        "reference": str(ring.models / "start"),
        "pairs": str(ring.folder / "pairs.jsonl"),
        "batch": None,
        "beta": settings.beta,
        "lr": settings.lr_scale * ring.config.optim.lr,
        "orders": orders,
        "pairs_per_step": size,
        "max_grad_norm": ring.config.optim.max_grad_norm,
    }


def _ours(
    lab: Lab, train: Callable[[Lab, Any], None], settings: Any, folder: Path, *, phases: Sequence[str]
) -> dict[str, Any]:
    """Our side trained and saved, and the seconds of the phases that a peer has too."""
    try:
        train(lab, settings)
    except (Diverged, FloatingPointError) as error:
        return {"status": "diverged", "why": str(error)}
    lab.policy.save(folder / "ours")
    seconds, cpu_s = (
        sum(spent[name] for name in phases) for spent in (lab.ledger.phase_s, lab.ledger.phase_cpu_s)
    )
    return {"status": "finished", "seconds": seconds, "cpu_s": cpu_s}


def _in_turn(
    ours: Callable[[], dict[str, Any]], theirs: Callable[[], dict[str, Any]], ours_first: bool
) -> dict[str, dict[str, Any]]:
    """Both sides trained, the one that begins by turns."""
    order = [("ours", ours), ("trl", theirs)]
    return {name: train() for name, train in (order if ours_first else reversed(order))}


def _examined(
    ring: Ring,
    task: Task,
    sides: dict[str, dict[str, Any]],
    also: Callable[[Task], dict[str, float]] = lambda task: {},
) -> dict[str, Any]:
    """The start policy's results and each side's, by the same examiner with the same random numbers."""
    examiner = Examiner(task, ring.lab(task=task).engine, ring.config)
    found: dict[str, Any] = {"seed": ring.config.seed, "start": examiner() | also(task)}
    for name in ("ours", "trl"):
        found[name] = sides[name]
        if sides[name]["status"] == "finished":
            trained = AutoModelForCausalLM.from_pretrained(ring.folder / name, dtype=torch.float32)
            task.policy.model.load_state_dict(trained.state_dict())
            found[name] = sides[name] | examiner() | also(task)
    return found


@torch.no_grad()
def _fit(lab: Lab, pairs: Pairs, beta: float) -> dict[str, float]:
    """DPO's loss on pairs, and the share whose better completion gained more over the reference (tied: half)."""
    found = by_sequence(pairs.sequences.packed(lab), lambda batch: lab.policy.logprobs(batch)[0])
    gains = torch.stack(
        [(logprobs - ref).sum() for logprobs, ref in zip(found, pairs.ref_logprobs, strict=True)]
    )
    margins = beta * (gains[0::2] - gains[1::2])
    return {
        "pair_loss": -F.logsigmoid(margins).mean().item(),
        "pair_accuracy": (0.5 + 0.5 * margins.sign()).double().mean().item(),
    }


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
