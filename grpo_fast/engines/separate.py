"""The in-process engine on weights of its own: for generating while the policy is trained, or where its weights are
shared out over processes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_fast.engines.local import LocalEngine
from grpo_fast.models.sharded import full


class SeparateEngine(LocalEngine):
    """A `LocalEngine` on a copy of the model, which `push` brings up to date: one more set of weights in memory."""

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        super().__init__(copy.deepcopy(model).requires_grad_(False), **options)
        self._trained = model

    @torch.no_grad()
    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the trained model's weights, adapters as such; nothing may be generated meanwhile.

        Shared-out ones are gathered in the compute type, one after another, so all processes push together. What is
        frozen is here already.
        """
        for own, trained in zip(self.model.parameters(), self._trained.parameters(), strict=True):
            if trained.requires_grad:
                own.copy_(full(trained, own.dtype))
        super().push(named_parameters, version)
