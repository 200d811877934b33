"""What is asked of a vLLM server for one group of completions, and what its answer says."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.faults import EngineError

NO_LOGPROB = -9999.0  # vLLM's number for minus infinity


def group_seed(seed: int, prompt: int) -> int:
    """The seed of a group; the server adds the completion's place in it, whoever else is generated beside it."""
    digest = hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2  # room to add within 63 bits


def request(model: str, token_ids: list[int], n: int, sampling: Sampling, seed: int) -> dict[str, Any]:
    """The body of a `/v1/completions` request for `n` completions of one prompt.

    Everything that shapes the distribution is said, so that no default of the server's or the model's takes part. A
    greedy group is asked for once: its completions are the same.
    """
    greedy = sampling.temperature == 0
    stop_strings = tuple(sampling.stop_strings)
    return {
        "model": model,
        "prompt": token_ids,
        "n": 1 if greedy else n,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": 0 if greedy else sampling.top_k,
        "top_p": 1.0 if greedy else sampling.top_p,
        "min_p": 0.0 if greedy else sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # the end tokens are among stop_token_ids
        "logprobs": 0,  # the sampled token's alone
        "return_token_ids": True,
        "return_weight_versions": True,
    } | ({"stop": list(stop_strings), "include_stop_str_in_output": True} if stop_strings else {})


def largest_answer(token_ids: list[int], n: int, sampling: Sampling) -> int:
    """Bytes that the answer to such a request cannot reach."""
    return (1 << 20) + n * (1024 * sampling.max_new_tokens + 32 * len(token_ids))


def read(
    answer: dict[str, Any], token_ids: list[int], n: int, sampling: Sampling, version: int
) -> list[Completion]:
    """The group in an answer; EngineError for one that is not what was asked for.

    `version` is the server's, by its own account after the answer; completions that say theirs carry that.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        asked = 1 if sampling.temperature == 0 else n
        if [choice["index"] for choice in choices] != list(range(asked)):
            raise EngineError(f"{len(choices)} completions came back where {asked} were asked for")
        group = [_completion(choice, token_ids, version) for choice in choices]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise EngineError(f"an answer without what vLLM's completions hold ({error!r})") from None
    return group * (n // asked)


def _completion(choice: dict[str, Any], prompt: list[int], version: int) -> Completion:
    if choice["prompt_token_ids"] != prompt:
        raise EngineError(
            "the server read another prompt than it was sent: its tokenizer is another, or it cut it"
        )
    reason, tokens = choice["finish_reason"], choice["token_ids"]
    if reason not in ("stop", "length"):
        raise EngineError(f"a completion ended by {reason!r}")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise EngineError("token_ids that are no whole numbers")
    numbers = choice["logprobs"]["token_logprobs"]
    logprobs = [float("nan") if value is None or value <= NO_LOGPROB else value for value in numbers]
    spans = choice.get("weight_versions")  # said from vLLM 0.33 on
    said = {span["version"] for span in spans or ()}
    return Completion(
        token_ids=tokens,
        logprobs=torch.tensor(logprobs, dtype=torch.float32),
        finish_reason=reason,
        version=_as_version(said.pop()) if len(said) == 1 else -1 if said else version,
    )


def _as_version(label: Any) -> int:
    """The number we gave the weights; -1 for a label that is none of ours."""
    return int(label) if isinstance(label, str) and label.isdecimal() else -1
