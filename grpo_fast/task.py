"""What a run works on: the policy, the prompts, the rewards, and for the miniature a judge that knows the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from grpo_fast.attention.backends import check_choice
from grpo_fast.config.resolve import (
    check_packages,
    check_paths,
    compiles,
    loss_config,
    resolve_device,
    resolve_dtype,
)
from grpo_fast.config.settings import RolloutSettings, TrainConfig
from grpo_fast.data.prompts import Prompt, Row, hold_out, read_rows, spaced, tokenize
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.choose import check_engine, check_policy
from grpo_fast.errors import UserError
from grpo_fast.models.lora import LoraSettings
from grpo_fast.models.policy import Policy
from grpo_fast.models.policy_files import SavedPolicy
from grpo_fast.models.pretrained import decoded, position_limit
from grpo_fast.models.reward_model import RewardModel, SavedRewardModel
from grpo_fast.models.reward_set import RewardSet, names_with_spread, read_saved
from grpo_fast.rewards.functions import RewardFunctions, combine_names, objective_weights
from grpo_fast.rewards.overlong import Overlong
from grpo_fast.scoring import Scorer, check_spread

if TYPE_CHECKING:
    from grpo_fast.rewards.http_judge import HttpJudge

Judge = Callable[[Prompt, str], dict[str, float]]
"""True scores of a completion by objective, and under `refusal` 0 or 1 on prompts where refusing is wrong."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything loaded, ready for the loop."""

    policy: Policy
    scorer: Scorer
    sampling: Sampling
    prompts: list[Prompt]
    heldout: list[Prompt]
    judge: Judge | None = None
    reward_report: dict | None = None
    """Held-out quality of the reward model by head (mae, pearson, spearman, n), where it is known."""

    def decode(self, token_ids: list[int]) -> str:
        """A completion's text, special tokens left out."""
        return decoded(self.policy.tokenizer, token_ids)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The user's data and functions, checked as far as is possible before a model is loaded."""

    training: list[Row]
    heldout: list[Row]
    functions: RewardFunctions | None
    reward_models: list[SavedRewardModel]
    judge: HttpJudge | None


def check_inputs(config: TrainConfig, *, own_heads: Sequence[str] = ()) -> Inputs:
    """Read the prompts, import and try the reward functions, hold weights against objectives.

    `own_heads` are the objectives of a run that trains its own reward model. UserError names the first thing that
    is wrong; no model has been loaded by then.
    """
    check_choice(config.policy.attention, resolve_device(config))
    check_packages(config)
    loss_config(config)
    check_paths(config)
    check_engine(config)
    training, heldout = _rows(config) if config.policy.model else ([], [])
    functions = None
    if config.reward.functions:
        functions = RewardFunctions(
            config.reward.functions,
            timeout_s=config.reward.timeout_s,
            workers=config.reward.workers,
            memory_limit_gib=config.reward.memory_limit_gib,
            isolation=config.reward.isolation,
            on_failure=config.reward.on_failure,
        )
        functions.probe(training, system_prompt=config.data.system_prompt)
    saved = read_saved(config.reward.model)
    for model in saved:
        limit, _ = position_limit(model.config) or (None, "")
        if limit is not None and limit <= config.rollout.max_new_tokens:
            raise UserError(
                f"rollout.max_new_tokens = {config.rollout.max_new_tokens}, but reward model {model.path} reads "
                f"{limit} tokens in all: lower it, or take another reward model"
            )
    judge = _judge(config)
    heads = [head.name for model in saved for head in model.layout.heads] if saved else own_heads
    rubrics = judge.names if judge else []
    own = (functions.names or []) if functions else []
    names = combine_names(list(dict.fromkeys(heads)), rubrics, own, config.reward.overlong_buffer > 0)
    lower = [head.name for model in saved for head in model.layout.heads if head.better == "low"]
    objective_weights(names, config.reward, lower)
    check_spread(config.reward, names_with_spread(saved), names)
    _check_reachable(config, saved)
    if judge:
        judge.check()
    return Inputs(training=training, heldout=heldout, functions=functions, reward_models=saved, judge=judge)


def _check_reachable(config: TrainConfig, saved: Sequence[SavedRewardModel]) -> None:
    """Floors and thresholds must lie on the scale of a head that has one."""
    described = [head for model in saved if model.describes_itself for head in model.layout.heads]
    scales = {head.name: (head.low, head.high) for head in described if head.kind != "pairwise"}
    for field in ("floors", "thresholds"):
        for name, number in getattr(config.reward, field).items():
            low, high = scales.get(name, (number, number))
            if not low <= number <= high:
                raise UserError(
                    f"reward.{field}.{name} = {number:g} is off the scale of {name}, {low:g} to {high:g}"
                )


def _judge(config: TrainConfig) -> HttpJudge | None:
    if not config.judge.url:
        return None
    from grpo_fast.rewards.http_judge import HttpJudge  # its HTTP client is needed here alone

    return HttpJudge(config.judge)


def load(config: TrainConfig, inputs: Inputs) -> Task:
    """Load the user's policy and reward model, and tokenize the prompts.

    The policy's packed path is compared with its own forward before anything is trained on it.
    """
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    saved = SavedPolicy.read(config.policy.model)
    prompts, heldout = (
        tokenize(
            rows,
            saved.tokenizer,
            max_prompt_tokens=config.data.max_prompt_tokens,
            system_prompt=config.data.system_prompt,
        )
        for rows in (inputs.training, inputs.heldout)
    )
    tokens_to_ids(saved.tokenizer, config.rollout.stop_tokens)  # before the weights are read
    _check_length(saved, [*prompts, *heldout], config.rollout.max_new_tokens)
    policy = Policy.load(
        saved,
        dtype=dtype,
        device=device,
        lora=lora_settings(config),
        gradient_checkpointing=config.policy.gradient_checkpointing,
        liger=config.policy.liger,
        quantize=config.policy.quantize,
        compiled=compiles(config, device),
    )
    policy.self_check()
    check_policy(config, policy)
    return Task(
        policy=policy,
        scorer=scorer_of(
            config, inputs, [RewardModel.load(m, device=device, dtype=dtype) for m in inputs.reward_models]
        ),
        sampling=sampling_of(config.rollout, policy),
        prompts=prompts,
        heldout=heldout,
    )


def scorer_of(config: TrainConfig, inputs: Inputs, models: Sequence[RewardModel]) -> Scorer:
    """Every source of rewards of a run, joined."""
    overlong = None
    if buffer := config.reward.overlong_buffer:
        overlong = Overlong(limit=config.rollout.max_new_tokens, buffer=buffer)
    return Scorer.create(
        config.reward,
        RewardSet.of(models) if models else None,
        inputs.functions,
        inputs.judge,
        overlong=overlong,
    )


def sampling_of(rollout: RolloutSettings, policy: Policy) -> Sampling:
    """How a policy is sampled: its own end tokens and `rollout.stop_tokens` end a completion."""
    return Sampling.of(
        rollout, [*policy.stop_token_ids, *tokens_to_ids(policy.tokenizer, rollout.stop_tokens)]
    )


def lora_settings(config: TrainConfig) -> LoraSettings | None:
    """The adapter asked for, None for full fine-tuning."""
    settings = config.policy
    if settings.lora_rank == 0:
        return None
    every = settings.lora_targets == ("all-linear",)
    return LoraSettings(
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        target_modules="all-linear" if every else settings.lora_targets,
        seed=config.seed,
    )


def _rows(config: TrainConfig) -> tuple[list[Row], list[Row]]:
    data = config.data
    rows = read_rows(data.prompts, prompt_column=data.prompt_column, split=data.split)
    if data.eval_prompts:
        held = read_rows(data.eval_prompts, prompt_column=data.prompt_column, split=data.eval_split)
        held = spaced(held, data.eval_size)
    else:
        rows, held = hold_out(rows, data.eval_size)
    if len(rows) < config.rollout.prompts_per_step:
        raise UserError(
            f"rollout.prompts_per_step = {config.rollout.prompts_per_step}, but there are only {len(rows)} prompts "
            "to train on: lower it, or give more prompts"
        )
    return rows, held


def tokens_to_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Ids of `rollout.stop_tokens`; UserError for what is not one token."""
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise UserError(f"rollout.stop_tokens: {token!r} is not one token of the policy's tokenizer")
    return [vocabulary[token] for token in tokens]


def _check_length(saved: SavedPolicy, prompts: list[Prompt], max_new_tokens: int) -> None:
    limit, why = position_limit(saved.config) or (None, "")
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"rollout.max_new_tokens = {max_new_tokens} and the longest prompt's {longest} tokens make more than the "
            f"policy's {limit} positions{why}: at most {max(0, limit - longest)} new tokens fit"
        )
