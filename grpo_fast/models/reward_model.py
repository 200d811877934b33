"""The multi-head reward model: one backbone, one score for each objective, read at the end of a reply.

On disk it is a standard `AutoModelForSequenceClassification` checkpoint (`id2label` = head names) with a
small file beside it, `reward_heads.json`, that says how raw outputs become scores in the labels' own unit.
Dimension letters: S replies, R heads, L packed positions, H hidden size.

Where it reads. `transformers` classifies a decoder's row at its rightmost token that is not the padding
token, and so does this module: trailing padding tokens are cut off before packing, which changes nothing for
the token that is read, since attention is causal. Packed scores therefore equal the checkpoint's own output
on single rows and on padded batches. When the padding token *is* the end token, neither ever sees the end of
a reply: both read at the token before, and a finished reply scores as the same reply cut off there. Use a
tokenizer with a padding token of its own where that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_fast.attention.function import ATTENTION_NAME
from grpo_fast.errors import UserError
from grpo_fast.models import pretrained
from grpo_fast.models.reward_data import HEADS_FILE, Head, PromptLike, read_heads, write_heads
from grpo_fast.models.self_check import check_packing, packed_hidden_states
from grpo_fast.packing import PackedBatch, pack


class RewardModel(nn.Module):
    """A decoder with one linear output for each head; `forward` gives the normalised outputs of a batch.

    Making one checks that the model computes the same packed and unpacked (UserError if not).
    """

    mean: Tensor  # (R,)
    std: Tensor  # (R,)
    binary: Tensor  # (R,) bool

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heads: Sequence[Head]):
        super().__init__()
        score = getattr(model, "score", None)
        name = type(model).__name__
        if not isinstance(score, nn.Linear):
            raise UserError(f"reward model: {name} has no linear `score` over its last token; use a decoder")
        if score.out_features != len(heads):
            raise UserError(f"reward model: {name} has {score.out_features} outputs for {len(heads)} heads")
        if model.config._attn_implementation != ATTENTION_NAME:
            model.set_attn_implementation(ATTENTION_NAME)
        pretrained.switch_off_dropout(model)
        self.model = model
        self.tokenizer = tokenizer
        self.heads = tuple(heads)
        self.register_buffer("mean", torch.tensor([h.mean for h in heads]), persistent=False)
        self.register_buffer("std", torch.tensor([h.std for h in heads]), persistent=False)
        self.register_buffer("binary", torch.tensor([h.kind == "binary" for h in heads]), persistent=False)
        self.to(model.device)
        check_packing(model, tokenizer)

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        heads: Sequence[Head],
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> RewardModel:
        """A new model with random float32 weights drawn from `seed`."""
        model_class = _model_class(config, config.model_type)
        pretrained.check_architecture(model_class, config, "reward model")
        pretrained.check_vocabulary(tokenizer, config.get_text_config().vocab_size, "reward model")
        _describe(config, tokenizer, heads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=torch.float32, attn_implementation=ATTENTION_NAME
            )
        return cls(model.to(pretrained.as_device(device)), tokenizer, heads)

    @classmethod
    def from_backbone(
        cls,
        path: str | Path,
        heads: Sequence[Head],
        *,
        seed: int = 0,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        gradient_checkpointing: bool = False,
    ) -> RewardModel:
        """A language model (folder or hub id) whose head is replaced by new outputs drawn from `seed`."""
        source = pretrained.locate(path, "reward model backbone")
        config = pretrained.load_config(source, "reward model backbone")
        tokenizer = pretrained.load_tokenizer(source, "reward model backbone")
        _describe(config, tokenizer, heads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls._load(source, config, tokenizer, heads, dtype, device, may_miss=("score.",))
        if gradient_checkpointing:
            pretrained.enable_gradient_checkpointing(made.model, "reward model")
        return made

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
    ) -> RewardModel:
        """A reward model saved by `save`. UserError where the folder is not whole or contradicts itself."""
        return cls._load(*cls.inspect(path), dtype, device).eval()

    @staticmethod
    def inspect(
        path: str | Path,
    ) -> tuple[str, PreTrainedConfig, PreTrainedTokenizerBase, Sequence[Head]]:
        """Folder, configuration, tokenizer and heads of a saved reward model, checked before any weight is read."""
        source = pretrained.locate(path, "reward model")
        heads = read_heads(source, str(path))
        config = pretrained.load_config(source, "reward model")
        names = [name for _, name in sorted((config.id2label or {}).items())]
        if names != [head.name for head in heads]:
            raise UserError(
                f"reward model {path}: {HEADS_FILE} names the heads {', '.join(h.name for h in heads)}, "
                f"config.json has {', '.join(map(str, names))}"
            )
        tokenizer = pretrained.load_tokenizer(source, "reward model")
        pretrained.check_vocabulary(tokenizer, config.get_text_config().vocab_size, f"reward model {source}")
        return source, config, tokenizer, heads

    @classmethod
    def _load(
        cls,
        source: str,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        heads: Sequence[Head],
        dtype: str | torch.dtype,
        device: str | torch.device,
        may_miss: tuple[str, ...] = (),
    ) -> RewardModel:
        pretrained.check_vocabulary(tokenizer, config.get_text_config().vocab_size, f"reward model {source}")
        model = pretrained.load_model(
            AutoModelForSequenceClassification,
            source,
            "reward model",
            config=config,
            dtype=pretrained.as_dtype(dtype),
            device=pretrained.as_device(device),
            may_miss=may_miss,
        )
        return cls(model, tokenizer, heads)

    def save(self, path: str | Path) -> None:
        """The checkpoint, its tokenizer and `reward_heads.json`: the folder appears whole or not at all (UserError)."""
        with pretrained.written_folder(path) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            write_heads(folder, self.heads)

    @property
    def head_names(self) -> list[str]:
        return [head.name for head in self.heads]

    def forward(self, batch: PackedBatch) -> Tensor:
        """Normalised outputs of a batch packed with `keep_last=True`, in its order: (S, R) float32."""
        hidden = packed_hidden_states(self.model, batch)
        score = cast(nn.Linear, self.model.score)
        bias = None if score.bias is None else score.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden[batch.last_index].float(), score.weight.float(), bias)

    def to_units(self, outputs: Tensor) -> Tensor:
        """Normalised outputs (S, R) in the labels' unit; for a binary head the probability of 1."""
        return torch.where(self.binary, torch.sigmoid(outputs), outputs * self.std + self.mean)

    def loss(self, batch: PackedBatch, labels: Tensor, normalizer: Tensor | float) -> Tensor:
        """Mean over the heads of (sum of the observed labels' losses / normalizer).

        `labels` (S, R) in the batch's order (`all_labels[batch.sequence_index]`), NaN where missing, in their
        own unit. `normalizer`: the observed labels of the whole optimizer step, for each head (R,) or one
        number; then the losses of micro-batches add up, however the step is split.
        """
        outputs = self(batch)
        observed = ~torch.isnan(labels)
        # NaN is replaced before the loss: 0 * NaN would still be NaN in the gradient.
        known = torch.where(observed, labels, self.mean)
        squared = (outputs - (known - self.mean) / self.std).square()
        if any(head.kind == "binary" for head in self.heads):
            entropy = F.binary_cross_entropy_with_logits(outputs, known.clamp(0.0, 1.0), reduction="none")
            squared = torch.where(self.binary, entropy, squared)
        counts = torch.as_tensor(normalizer, dtype=torch.float32, device=outputs.device).clamp_min(1.0)
        return ((squared * observed).sum(dim=0) / counts).sum() / len(self.heads)

    @torch.no_grad()
    def scores(
        self, prompts: Sequence[PromptLike], completions: Sequence[str], token_budget: int = 8192
    ) -> Tensor:
        """Scores of `completions[i]` as the answer to `prompts[i]`: (S, R) float32, CPU, labels' unit."""
        prompt_ids, completion_ids, prompt_of = self.encode(prompts, completions)
        return self.score_ids(prompt_ids, completion_ids, prompt_of, token_budget)

    @torch.no_grad()
    def score_ids(
        self,
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
        prompt_of: Sequence[int] | None = None,
        token_budget: int = 8192,
    ) -> Tensor:
        """`scores` for token ids of this model's own tokenizer; `prompt_of[i]` is completion i's prompt."""
        result = torch.empty(len(completion_ids), len(self.heads))
        was_training = self.training
        self.eval()
        for batch in self.pack(prompt_ids, completion_ids, prompt_of, token_budget):
            outputs = self.to_units(self(batch.to(self.model.device)))
            result[batch.sequence_index.cpu()] = outputs.cpu()
        self.train(was_training)
        return result

    def encode(
        self, prompts: Sequence[PromptLike], completions: Sequence[str]
    ) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Token ids of the different prompts, of every completion, and each completion's prompt.

        Messages go through the tokenizer's chat template, the reply as the assistant's turn. Without a
        template, and for plain text, prompt and reply are put one after the other and the end token follows.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
        end = str(self.tokenizer.eos_token or "")
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            if isinstance(prompt, str):
                rows.append((prompt, completion + end))
            elif self.tokenizer.chat_template is None:
                rows.append(("\n".join(str(turn["content"]) for turn in prompt) + "\n", completion + end))
            else:
                rows.append(self._render(prompt, completion))
        index: dict[str, int] = {}
        prompt_of = [index.setdefault(prompt, len(index)) for prompt, _ in rows]
        start = self._start_token()
        prompt_ids = [
            ids if start is None or ids[:1] == [start] else [start, *ids]
            for ids in self._token_ids(list(index))
        ]
        return prompt_ids, self._token_ids([reply for _, reply in rows]), prompt_of

    def _render(self, messages: list[dict[str, Any]], completion: str) -> tuple[str, str]:
        template = self.tokenizer.apply_chat_template
        asked = str(template(messages, tokenize=False, add_generation_prompt=True))
        turn = {"role": "assistant", "content": completion}
        whole = str(template([*messages, turn], tokenize=False))
        # Where the template writes the past otherwise than the open turn, the reply starts at the difference.
        differs = (k for k, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b)
        cut = next(differs, min(len(asked), len(whole)))
        return whole[:cut], whole[cut:]

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return cast(list[list[int]], self.tokenizer(texts, add_special_tokens=False)["input_ids"])

    def _start_token(self) -> int | None:
        """The token this tokenizer puts before every text, if it does."""
        start = self.tokenizer.bos_token_id
        ids = self.tokenizer.encode("a")
        return cast(int, start) if start is not None and ids[:1] == [start] else None

    def pack(
        self,
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
        prompt_of: Sequence[int] | None,
        token_budget: int,
    ) -> list[PackedBatch]:
        """Pack so that `last_index` is the position `transformers` reads (see the module's docstring)."""
        prompts = list(prompt_ids)
        owner = list(range(len(completion_ids))) if prompt_of is None else list(prompt_of)
        padding = self.model.config.get_text_config().pad_token_id
        kept: list[list[int]] = []
        for i, ids in enumerate(completion_ids):
            prompt = prompts[owner[i]]
            if not prompt and not ids:
                raise UserError(f"reward model: prompt {owner[i]} and its reply {i} are both empty")
            kept.append(_without_padding(ids, padding))
            if not prompt or (not kept[i] and prompt[-1] == padding):
                row = _without_padding(prompt + ids, padding) or [padding]
                owner[i] = len(prompts)
                prompts.append(row[:1])
                kept[i] = row[1:]
        return pack(prompts, kept, prompt_of=owner, token_budget=token_budget, keep_last=True)


def _without_padding(ids: list[int], padding: int | None) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == padding:
        end -= 1
    return ids[:end]


def _model_class(config: PreTrainedConfig, name: str) -> type:
    try:
        return cast(type, AutoModelForSequenceClassification._model_mapping[type(config)])
    except KeyError as error:
        raise UserError(
            f"reward model: model type {name} has no sequence classification in transformers"
        ) from error


def _describe(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, heads: Sequence[Head]) -> None:
    """Write the heads, and the padding token where the model has none, into a configuration."""
    if not heads:
        raise UserError("reward model: at least one head is needed")
    config.num_labels = len(heads)
    config.id2label = {i: head.name for i, head in enumerate(heads)}
    config.label2id = {head.name: i for i, head in enumerate(heads)}
    config.problem_type = "regression"
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
