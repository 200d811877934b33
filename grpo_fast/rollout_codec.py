"""Completions and their scores as tensors and plain JSON, and back, to the bit.

So processes send each other what they have generated, and a checkpoint keeps a batch that was generated ahead.

Letters: S sequences, R objectives, T tokens of all completions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from grpo_fast.engines.base import Completion
from grpo_fast.scoring import Scored, joined


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What some prompts were answered, group after group."""

    completions: list[Completion]  # (S)
    texts: list[str]  # (S)
    scored: Scored

    def tensors(self) -> dict[str, Tensor]:
        """Token ids and log-probs one after another (T,), `lengths` (S,), and the scores' tensors."""
        found = {
            "token_ids": torch.tensor([i for c in self.completions for i in c.token_ids], dtype=torch.int64),
            "logprobs": torch.cat([torch.empty(0), *(c.logprobs for c in self.completions)]),
            "lengths": torch.tensor([len(c.token_ids) for c in self.completions], dtype=torch.int64),
            "rewards": self.scored.rewards,
            "spread": self.scored.spread,
            "distance": self.scored.distance,
            "outside": self.scored.outside,
        }
        return {name: value.contiguous() for name, value in found.items() if value is not None}

    def plain(self) -> dict[str, Any]:
        """Everything that is no tensor; survives JSON."""
        return {
            "texts": self.texts,
            "finish_reasons": [completion.finish_reason for completion in self.completions],
            "versions": [completion.version for completion in self.completions],
            "truncated": self.scored.truncated,
            "unscored": self.scored.unscored,
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor], plain: dict[str, Any]) -> Answers:
        """The reverse of `tensors` and `plain`."""
        lengths = tensors["lengths"].tolist()
        return cls(
            completions=[
                Completion(token_ids=ids.tolist(), logprobs=logprobs, finish_reason=reason, version=version)
                for ids, logprobs, reason, version in zip(
                    tensors["token_ids"].split(lengths),
                    tensors["logprobs"].split(lengths),
                    plain["finish_reasons"],
                    plain["versions"],
                    strict=True,
                )
            ],
            texts=plain["texts"],
            scored=Scored(
                rewards=tensors["rewards"],
                spread=tensors["spread"],
                distance=tensors.get("distance"),
                outside=tensors.get("outside"),
                truncated=plain["truncated"],
                unscored=plain["unscored"],
            ),
        )

    def to_bytes(self) -> bytes:
        """One message: the JSON's length (8 bytes, little-endian), the JSON, a safetensors file."""
        text = json.dumps(self.plain()).encode()
        return len(text).to_bytes(8, "little") + text + save(self.tensors())

    @classmethod
    def from_bytes(cls, message: bytes) -> Answers:
        """The reverse of `to_bytes`; the messages of a run's own processes, and of nobody else."""
        end = 8 + int.from_bytes(message[:8], "little")
        return cls.of(load(message[end:]), json.loads(message[8:end]))

    def __add__(self, other: Answers) -> Answers:
        return Answers(
            completions=self.completions + other.completions,
            texts=self.texts + other.texts,
            scored=joined(self.scored, other.scored),
        )
