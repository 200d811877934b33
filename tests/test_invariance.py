"""What must not depend on how a step is cut up: the gradient, the metrics, the completions.

The truth of a gradient is float64, one sequence at a time, through `transformers`' own forward pass and the kernels'
plain twin. Steps are computed in float64 (but for rotary angles) and in float32. How far off is too far: 1e-6 of the
largest entry of what the sequences' own gradients add up to without their signs, since what cancels between sequences
cannot be told from rounding.

`INVARIANCE_EXAMPLES=2000 pytest tests/test_invariance.py` looks longer, at other examples each time.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from grpo_kernels import LossConfig, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_fast import grpo
from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.config.resolve import loss_config
from grpo_fast.config.settings import LossSettings, OptimSettings, RolloutSettings, TrainConfig
from grpo_fast.data.prompts import Prompt
from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.engines.plain import PlainEngine
from grpo_fast.grpo import pack_chosen, step_normalizer, update, with_signal
from grpo_fast.models.policy import Policy
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.rollout import Rollout
from grpo_fast.scoring import Scored
from tests.families import VOCAB, ragged, tiny_model
from tests.grpo_cases import policy

EXAMPLES = os.environ.get("INVARIANCE_EXAMPLES")
ROUNDING = 1e-6
ROUNDING_OF_DISTANCES = 1e-5
"""In float32 with a KL term or an entropy bonus: their derivatives are differences of log-probs of about -6, here
nearly equal ones, and up to 5e-6 off even for a single sequence. In float64 they are held to `ROUNDING`."""
FAMILIES = ["qwen2", "llama", "gemma2"]
PRESETS = ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo", "vespo", "luspo", "rloo", "reinforce_pp"]
WHOLE = 10**6


def examples(count: int) -> Any:
    """So many examples, always the same ones, unless the environment asks for more."""
    return settings(
        max_examples=int(EXAMPLES or count), derandomize=EXAMPLES is None, deadline=None, database=None
    )


# ---- gradients ----


@cache
def policy_of(
    family: str, seed: int = 0, checkpointing: bool = False, dtype: torch.dtype = torch.float32
) -> Policy:
    made = policy(seed, family=family, gradient_checkpointing=checkpointing)
    return made if dtype == torch.float32 else in_float64(made)


def in_float64(made: Any) -> Any:
    """In place, the norms too, which would go through float32."""
    for module in made.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(norm, module)
    return made.double()


def norm(module: Any, hidden: Tensor) -> Tensor:
    gemma = type(module).__name__.startswith("Gemma")
    eps = module.eps if gemma else module.variance_epsilon
    scaled = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return scaled * (1 + module.weight if gemma else module.weight)


@cache
def exact_model(family: str, seed: int) -> Any:
    model = copy.deepcopy(policy_of(family, seed).model)
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    return in_float64(model)


@dataclass(frozen=True)
class Way:
    """One way to compute a step."""

    token_budget: int
    order: list[int]
    share_prefix: bool
    checkpointing: bool
    skipping: bool


def truth(
    family: str, data: Rollout, config: TrainConfig
) -> tuple[dict[str, Tensor], float, dict[str, float]]:
    """Gradient by parameter, its scale (see above), and loss, KL and tokens."""
    loss = loss_config(config)
    everything = list(range(len(data.completions)))
    normalizer = step_normalizer(data, everything, loss, config)
    model = exact_model(family, 0)
    signed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    unsigned = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    total, kl, tokens = 0.0, 0.0, 0
    for i in everything:
        completion = data.completions[i]
        if config.loss.mask_truncated and completion.finish_reason == "length":
            continue
        model.zero_grad()
        own, entropy = exact_logprobs(model, data, i, config)
        given: dict[str, Any] = {"entropy": entropy, "rollout_logprobs": completion.logprobs.double()}
        if loss.kl_coef != 0:
            with torch.no_grad():
                given["ref_logprobs"] = exact_logprobs(exact_model(family, 3), data, i, config)[0]
        value, metrics = reference.grpo_loss(
            own,
            data.advantages[i : i + 1].double(),
            loss,
            cu_seqlens=torch.tensor([0, len(own)]),
            normalizer=normalizer,
            **given,
        )
        value.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                signed[name] += parameter.grad
                unsigned[name] += parameter.grad.abs()
        total += value.item()
        kl += metrics["kl"].item() * len(own) if "kl" in metrics else 0.0
        tokens += len(own)
    scale = max(value.max().item() for value in unsigned.values())
    return signed, scale, {"loss": total, "kl": kl / max(tokens, 1), "tokens": tokens}


def exact_logprobs(model: Any, data: Rollout, i: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    prompt, answer = data.prompts[data.prompt_of[i]].token_ids, data.completions[i].token_ids
    logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
    every = (logits[len(prompt) - 1 : -1] / config.rollout.temperature).log_softmax(-1)
    return every.gather(1, torch.tensor(answer)[:, None])[:, 0], -(every.exp() * every).sum(-1)


def reordered(data: Rollout, order: list[int]) -> Rollout:
    """The same sequences in another order, and their prompts in the order in which they are then met."""
    met = list(dict.fromkeys(data.prompt_of[i] for i in order))
    met += [prompt for prompt in range(len(data.prompts)) if prompt not in met]
    return replace(
        data,
        prompts=[data.prompts[prompt] for prompt in met],
        prompt_of=[met.index(data.prompt_of[i]) for i in order],
        completions=[data.completions[i] for i in order],
        advantages=data.advantages[order],
    )


def computed(
    family: str, data: Rollout, config: TrainConfig, way: Way, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The trainer's gradient and metrics, computed that way."""

    def packed(*args: Any, share_prefix: bool, **kwargs: Any) -> Any:
        return pack_chosen(*args, share_prefix=share_prefix and way.share_prefix, **kwargs)

    def kept(rollout: Rollout, sequences: list[int], loss: LossConfig, *, mask_truncated: bool) -> list[int]:
        chosen = with_signal(rollout, sequences, loss, mask_truncated=mask_truncated)
        if way.skipping or not chosen:  # a step without any signal is never computed
            return chosen
        all_alike = replace(rollout, advantages=torch.ones_like(rollout.advantages))
        return with_signal(all_alike, sequences, loss, mask_truncated=mask_truncated)

    config = replace(config, optim=replace(config.optim, token_budget=way.token_budget))
    model = policy_of(family, checkpointing=way.checkpointing, dtype=dtype)
    frozen = policy_of(family, 3, dtype=dtype) if loss_config(config).kl_coef != 0 else None
    with patch.object(grpo, "pack_chosen", packed), patch.object(grpo, "with_signal", kept):
        caught = Catch(model)
        metrics = update(model, caught, reordered(data, way.order), config, lr=0.0, reference=frozen)  # type: ignore[arg-type]
        return caught.found, metrics


class Catch:
    """In the optimizer's place: takes the gradients as they are, where that would make float32 of them."""

    def __init__(self, model: Policy) -> None:
        self.model = model
        self.found: dict[str, Tensor] = {}
        self.discard()

    def discard(self) -> None:
        self.model.zero_grad()

    def step(self, lr: float, **_: object) -> tuple[float, bool]:
        named = self.model.named_parameters()
        self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}
        return 0.0, True


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """Groups of one to four completions, some flat, some cut off, some of one token, some alike."""
    token = st.integers(5, 500)
    prompts, completions, owner, advantages = [], [], [], []
    for index in range(draw(st.integers(1, 4))):
        ids = draw(st.lists(token, min_size=1, max_size=9))
        prompts.append(Prompt(f"p{index}", ids, None, {}))
        flat = draw(st.booleans())
        for _ in range(draw(st.integers(1, 4))):
            answer = draw(
                st.one_of(st.lists(token, min_size=1, max_size=12), st.just([7]), st.just([7, 8, 9]))
            )
            seen = torch.tensor([-(1 + value % 29) / 10 for value in answer])
            cut = draw(st.booleans())
            completions.append(Completion(answer, seen, "length" if cut else "stop", 0))
            owner.append(index)
            advantages.append(0.0 if flat else draw(st.integers(-30, 30)) / 10)
    return Rollout(
        prompts=prompts,
        prompt_of=owner,
        completions=completions,
        texts=[""] * len(owner),
        scored=Scored(rewards=torch.zeros(len(owner), 1), spread=torch.zeros(len(owner), 1)),
        advantages=torch.tensor(advantages),
    )


@st.composite
def configs(draw: st.DrawFn) -> TrainConfig:
    """A preset, and what may be changed of it."""
    loss: dict[str, Any] = {"kl_coef": draw(st.sampled_from([0.0, 0.0, 0.1]))}
    if draw(st.booleans()):
        loss["aggregation"] = draw(st.sampled_from(["sequence_mean", "token_mean", "constant"]))
    if draw(st.integers(0, 3)) == 0:
        loss["mismatch"] = draw(st.sampled_from(["truncate", "mask", "sequence_mask"]))
    if draw(st.integers(0, 3)) == 0:
        loss["entropy_coef"] = 0.01
    preset: Any = draw(st.sampled_from(PRESETS))
    return TrainConfig(
        loss=LossSettings(preset=preset, mask_truncated=draw(st.booleans()), **loss),
        optim=OptimSettings(),
        rollout=RolloutSettings(max_new_tokens=12, temperature=draw(st.sampled_from([1.0, 0.7]))),
        engine=EngineSettings(max_mismatch=0.0),  # the rollouts' log-probs are made up
    )


@st.composite
def ways(draw: st.DrawFn, sequences: int) -> Way:
    return Way(
        token_budget=draw(st.sampled_from([16, 20, 30, 45, 70, WHOLE])),
        order=draw(st.permutations(range(sequences))),
        share_prefix=draw(st.booleans()),
        checkpointing=draw(st.booleans()),
        skipping=draw(st.booleans()),
    )


@examples(25)
@given(data=st.data(), family=st.sampled_from(FAMILIES), rollout=rollouts(), config=configs())
def test_a_step_is_the_same_however_it_is_cut_up(
    data: st.DataObject, family: str, rollout: Rollout, config: TrainConfig
) -> None:
    """Budget, order, shared prompts, checkpointing, skipping: the gradient of one sequence after the other."""
    wanted, scale, told = truth(family, rollout, config)
    loss = loss_config(config)
    in_float32 = ROUNDING_OF_DISTANCES if loss.kl_coef or loss.entropy_coef else ROUNDING
    for dtype, allowed in ((torch.float64, ROUNDING), (torch.float32, in_float32)):
        way = data.draw(ways(len(rollout.completions)))
        found, metrics = computed(family, rollout, config, way, dtype)
        for name, value in wanted.items():
            gradient = (
                found[f"model.{name}"] if found else torch.zeros_like(value)
            )  # none: nothing had signal
            off = (gradient - value).abs().max().item()
            assert off <= allowed * scale, (name, off / scale)
        assert abs(metrics["loss"] - told["loss"]) <= 1e-5 * max(1.0, abs(told["loss"]))
        if loss_config(config).kl_coef != 0:
            assert metrics["trained_tokens"] == told["tokens"]
            assert told["tokens"] == 0 or abs(metrics["kl"] - told["kl"]) <= 1e-4 * max(1.0, told["kl"])


@examples(6)
@given(
    family=st.sampled_from(FAMILIES), rollout=rollouts(), config=configs(), budget=st.sampled_from([20, 60])
)
def test_the_same_step_twice_is_the_same_to_the_bit(
    family: str, rollout: Rollout, config: TrainConfig, budget: int
) -> None:
    config = replace(config, optim=OptimSettings(token_budget=budget, minibatches=2, updates_per_rollout=2))
    frozen = policy_of(family, 3) if loss_config(config).kl_coef != 0 else None
    results = []
    for _ in range(2):
        model = copy.deepcopy(policy_of(family))
        optimizer = Optimizer(model.trainable_parameters(), lr=1e-2)
        metrics = update(model, optimizer, rollout, config, lr=1e-2, reference=frozen)
        results.append((metrics, [p.detach().clone() for p in model.model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


# ---- completions ----

PROMPTS = ragged(groups=5)[0]
SAMPLINGS = [
    Sampling(max_new_tokens=16, stop_token_ids=(3, 4, 5)),
    Sampling(max_new_tokens=16, stop_token_ids=(3, 4, 5), temperature=0.0),
    Sampling(max_new_tokens=16, stop_token_ids=(3, 4, 5), temperature=0.8, top_p=0.9, top_k=20),
]
SAMPLES = 3


@cache
def engine_model(family: str) -> Any:
    return tiny_model(family)


@cache
def alone(kind: type, family: str, prompt: int, way: int, seed: int) -> list[Completion]:
    """The completions of one prompt that nothing else is generated beside."""
    engine = kind(engine_model(family), max_rows=1)
    return engine.generate([PROMPTS[prompt]], SAMPLES, SAMPLINGS[way], seed, places=[prompt])


@examples(12)
@given(
    kind=st.sampled_from([LocalEngine, LocalEngine, LocalEngine, PlainEngine]),
    family=st.sampled_from(["qwen2", "gemma2"]),
    chosen=st.permutations(range(len(PROMPTS))),
    count=st.integers(1, len(PROMPTS)),
    samples=st.integers(1, SAMPLES),
    rows=st.sampled_from([1, 2, 3, 5, 256]),
    prefill=st.sampled_from([1, 9, 30, 16384]),
    way=st.integers(0, len(SAMPLINGS) - 1),
    seed=st.integers(0, 1),
    paged=st.booleans(),
)
def test_company_never_changes_a_completion(
    kind: type,
    family: str,
    chosen: list[int],
    count: int,
    samples: int,
    rows: int,
    prefill: int,
    way: int,
    seed: int,
    paged: bool,
) -> None:
    """Whatever else is generated, in whatever order, rows and parts: the same tokens, log-probs to 1e-5.

    Products of different sizes round differently, by some 1e-7: a token could only change where the number that draws
    it lies that near to the border between two tokens.
    """
    batch = chosen[:count]
    engine = kind(engine_model(family), max_rows=rows)
    if kind is LocalEngine:
        engine.prefill_tokens, engine._paged = prefill, paged
    found = engine.generate([PROMPTS[p] for p in batch], samples, SAMPLINGS[way], seed, places=batch)
    wanted = [alone(kind, family, p, way, seed)[sample] for p in batch for sample in range(samples)]
    for got, want in zip(found, wanted, strict=True):
        assert got.token_ids == want.token_ids and got.finish_reason == want.finish_reason
        torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-5, rtol=0)


def test_places_are_what_completions_are_drawn_from() -> None:
    """A batch generated in parts is the batch; the same prompt at another place is another completion."""
    engine, sampling = LocalEngine(engine_model("qwen2")), SAMPLINGS[0]
    whole = [c.token_ids for c in engine.generate(PROMPTS, 2, sampling, 5)]
    parts = [
        completion.token_ids
        for first, last in ((0, 2), (2, 3), (3, 5))
        for completion in engine.generate(PROMPTS[first:last], 2, sampling, 5, places=range(first, last))
    ]
    assert parts == whole
    assert [c.token_ids for c in engine.generate(PROMPTS[2:3], 2, sampling, 5)] != whole[4:6]
    assert max(max(tokens) for tokens in whole) < VOCAB
