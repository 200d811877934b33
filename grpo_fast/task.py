"""What a run works on: the policy, the prompts, the rewards, and for the miniature a judge that knows the truth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo_fast.config.resolve import check_paths, loss_config, resolve_device, resolve_dtype
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.prompts import Prompt, Row, hold_out, read_rows, spaced, tokenize
from grpo_fast.engines.base import Sampling
from grpo_fast.errors import UserError
from grpo_fast.models.policy import LoraSettings, Policy
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.rewards.functions import RewardFunctions, combine_names, objective_weights, reward_model_heads
from grpo_fast.scoring import Scorer

Judge = Callable[[Prompt, str], dict[str, float]]
"""True scores of a completion by objective, and under `refusal` 0 or 1 on prompts where refusing is wrong."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything loaded, ready for the loop."""

    policy: Policy
    scorer: Scorer
    prompts: list[Prompt]
    heldout: list[Prompt]
    judge: Judge | None = None
    reward_report: dict | None = None
    """Held-out quality of the reward model by head (mae, pearson, spearman, n), where it is known."""

    def decode(self, token_ids: list[int]) -> str:
        """A completion's text, special tokens left out."""
        return str(self.policy.tokenizer.decode(token_ids, skip_special_tokens=True))

    def sampling(self, config: TrainConfig) -> Sampling:
        """How completions are drawn, with every token that ends one."""
        rollout = config.rollout
        return Sampling(
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            min_p=rollout.min_p,
            stop_token_ids=(*self.policy.stop_token_ids, *_token_ids(self.policy, rollout.stop_tokens)),
        )


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The user's data and functions, checked as far as is possible before a model is loaded."""

    training: list[Row]
    heldout: list[Row]
    functions: RewardFunctions | None


def check_inputs(config: TrainConfig, *, own_heads: Sequence[str] = ()) -> Inputs:
    """Read the prompts, import and try the reward functions, hold weights against objectives.

    `own_heads` are the objectives of a run that trains its own reward model. UserError names the first thing that
    is wrong; no model has been loaded by then.
    """
    resolve_device(config)
    loss_config(config)
    check_paths(config)
    training, heldout = _rows(config) if config.policy.model else ([], [])
    functions = None
    if config.reward.functions:
        functions = RewardFunctions(
            config.reward.functions, timeout_s=config.reward.timeout_s, workers=config.reward.workers
        )
        functions.probe(training)
    heads = reward_model_heads(config.reward.model) if config.reward.model else own_heads
    objective_weights(combine_names(heads, (functions.names or []) if functions else []), config.reward)
    return Inputs(training=training, heldout=heldout, functions=functions)


def load(config: TrainConfig, inputs: Inputs) -> Task:
    """Load the user's policy and reward model, and tokenize the prompts.

    The policy's packed path is compared with its own forward before anything is trained on it.
    """
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    settings = config.policy
    policy = Policy.load(
        settings.model,
        dtype=dtype,
        device=device,
        lora=lora_settings(config),
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    policy.self_check()
    prompts, heldout = (
        tokenize(
            rows,
            policy.tokenizer,
            max_prompt_tokens=config.data.max_prompt_tokens,
            system_prompt=config.data.system_prompt,
        )
        for rows in (inputs.training, inputs.heldout)
    )
    _token_ids(policy, config.rollout.stop_tokens)
    _check_length(policy, [*prompts, *heldout], config.rollout.max_new_tokens)
    reward_model = (
        RewardModel.load(config.reward.model, device=device, dtype=dtype) if config.reward.model else None
    )
    scorer = Scorer.create(config.reward, reward_model, inputs.functions)
    return Task(policy=policy, scorer=scorer, prompts=prompts, heldout=heldout)


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
    )


def _rows(config: TrainConfig) -> tuple[list[Row], list[Row]]:
    data = config.data
    rows = read_rows(data.prompts, prompt_column=data.prompt_column, split=data.split)
    if not data.eval_prompts:
        return hold_out(rows, data.eval_size)
    held = read_rows(data.eval_prompts, prompt_column=data.prompt_column, split=data.eval_split)
    return rows, spaced(held, data.eval_size)


def _token_ids(policy: Policy, tokens: tuple[str, ...]) -> list[int]:
    vocabulary = policy.tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise UserError(f"rollout.stop_tokens: {token!r} is not one token of the policy's tokenizer")
    return [vocabulary[token] for token in tokens]


def _check_length(policy: Policy, prompts: list[Prompt], max_new_tokens: int) -> None:
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"rollout.max_new_tokens = {max_new_tokens} and the longest prompt's {longest} tokens make more than the "
            f"policy's {limit} positions: at most {max(0, limit - longest)} new tokens fit"
        )
