"""Every objective's reward of every completion: the reward model's heads and the user's Python functions.

Letters: S sequences, R objectives.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.config.settings import RewardSettings
from grpo_fast.data.prompts import Prompt
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.rewards.functions import RewardFunctions, combine_names, objective_weights, with_messages


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores completions on every objective: the reward model's heads first, then the functions' values."""

    names: list[str]  # R objectives, the reward matrix's columns
    weights: Tensor  # (R,) float32, signed: negative where lower is better
    reward_model: RewardModel | None
    functions: RewardFunctions | None
    token_budget: int

    @classmethod
    def create(
        cls,
        settings: RewardSettings,
        reward_model: RewardModel | None,
        functions: RewardFunctions | None,
        *,
        token_budget: int = 16384,
    ) -> "Scorer":
        """Join the two sources; `functions` have been probed, so their values have names.

        UserError where names clash or a weight names no objective.
        """
        heads = reward_model.head_names if reward_model else []
        names = combine_names(heads, (functions.names or []) if functions else [])
        return cls(
            names=names,
            weights=objective_weights(names, settings),
            reward_model=reward_model,
            functions=functions,
            token_budget=token_budget,
        )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Rewards (S, R) float32 of completion i for prompt i, NaN where missing.

        The Python functions run while the reward model scores.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            running = None
            if self.functions:
                texts = [prompt.plain for prompt in prompts]
                columns = [with_messages(prompt.columns, prompt.messages) for prompt in prompts]
                running = pool.submit(self.functions, texts, list(completions), columns)
            parts = []
            if self.reward_model:
                asked = [prompt.messages or prompt.text for prompt in prompts]
                parts.append(self.reward_model.scores(asked, completions, token_budget=self.token_budget))
            if running:
                parts.append(running.result())
        return torch.cat(parts, dim=1)
