"""The multi-head reward model: one backbone, one score for each objective, read at the end of a reply.

On disk it is a standard `AutoModelForSequenceClassification` checkpoint (`id2label` = names of the outputs) with a
small file beside it, `reward_heads.json`, that says how raw outputs become scores in the labels' own unit. Any other
sequence classification checkpoint loads too: each of its outputs is a head, and its score is the output itself.
Dimension letters: S replies, R heads, K members of the ensemble, O outputs, L packed positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_fast.attention.function import packing_obstacle, use_attention
from grpo_fast.errors import UserError
from grpo_fast.models import pretrained
from grpo_fast.models.lora import LoraSettings, add_lora, merged_state
from grpo_fast.models.reward_backbone import (
    check_fits,
    describe,
    fresh_classifier,
    length_limit,
    linear_score,
    name_outputs,
    read_backbone,
)
from grpo_fast.models.reward_data import (
    HEADS_FILE,
    LOG_VARIANCE_LIMIT,
    Head,
    Layout,
    calibration_of,
    read_layout,
    write_layout,
)
from grpo_fast.models.reward_text import Encoded, PromptLike, encode, pack_replies
from grpo_fast.models.self_check import check_causal, hidden_states, packing_fault, run_one_by_one
from grpo_fast.packing import PackedBatch
from grpo_fast.trust.distance import FILE as FEATURES_FILE
from grpo_fast.trust.distance import FeatureStatistics


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a reward model says of S replies, on the CPU."""

    scores: Tensor
    """(S, R) float32 in the labels' unit; of an ensemble the mean of its members"""
    spread: Tensor | None
    """(S, R) float32, same unit: standard deviation between members, and of the predicted variance where there is
    one; None where the model has neither"""
    features: Tensor
    """(S, 2H) float32: what the distance from the training replies is measured in (`read_with_features`)"""
    distance: Tensor | None
    """(S,) float32: that distance, in units of a typical held-out reply's; None where it was not measured"""
    outside: Tensor | None
    """(S,) bool: whether 95% of held-out replies are nearer"""
    truncated: int = 0
    """Replies whose prompt lost its beginning to the length limit"""
    unscored: int = 0
    """Replies longer than the model reads, whose scores are NaN"""


@dataclass(frozen=True, kw_only=True)
class SavedRewardModel:
    """What a saved reward model says of itself before any weight is read."""

    path: str
    """As the user gave it."""
    source: str
    """Folder or hub id."""
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    statistics: FeatureStatistics | None
    describes_itself: bool
    """Whether it has `reward_heads.json`; else it is a plain classifier."""

    @classmethod
    def read(cls, path: str | Path, *, name: str = "") -> SavedRewardModel:
        """A folder or hub id. `name` is the objective of a one-output model without `reward_heads.json`.

        UserError where the folder is not whole or contradicts itself.
        """
        source = pretrained.locate(path, "reward model")
        config = pretrained.load_config(source, "reward model")
        for found in config.architectures or ():
            if not found.endswith("ForSequenceClassification"):
                raise UserError(
                    f"reward model {path}: is a {found}; a ...ForSequenceClassification is needed"
                )
        labels = [str(label) for _, label in sorted((config.id2label or {}).items())]
        heads_file = pretrained.side_file(source, HEADS_FILE)
        if heads_file is not None:
            if name:
                raise UserError(
                    f"reward.model: {path} names its heads itself ({HEADS_FILE}), so {name}= cannot; leave it out"
                )
            layout = read_layout(heads_file, str(path))
            if labels != layout.names:
                raise UserError(
                    f"reward model {path}: {HEADS_FILE} names the outputs {', '.join(layout.names)}, "
                    f"config.json has {', '.join(labels)}"
                )
        else:
            if len(labels) == 1:
                labels = [name or (Path(source).name if labels[0] == "LABEL_0" else labels[0])]
            elif name:
                raise UserError(
                    f"reward model {path}: has {len(labels)} outputs ({', '.join(labels)}), which one name cannot "
                    f"name: leave {name}= out"
                )
            elif all(label == f"LABEL_{i}" for i, label in enumerate(labels)):
                raise UserError(
                    f"reward model {path}: nothing says what its {len(labels)} outputs rate: name them in the id2label "
                    "of its config.json"
                )
            layout = Layout(heads=tuple(Head(name=label) for label in labels))
        tokenizer = pretrained.load_tokenizer(source, "reward model")
        text = pretrained.text_config(config)
        pretrained.check_vocabulary(tokenizer, text.vocab_size, f"reward model {source}")
        statistics_file = pretrained.side_file(source, FEATURES_FILE)
        statistics = FeatureStatistics.load(statistics_file) if statistics_file else None
        if statistics is not None and statistics.width != 2 * text.hidden_size:
            raise UserError(
                f"reward model {path}: its feature statistics are of {statistics.width} features, the model has "
                f"{2 * text.hidden_size}: delete {FEATURES_FILE}, or take the whole folder again"
            )
        return cls(
            path=str(path),
            source=source,
            config=config,
            tokenizer=tokenizer,
            layout=layout,
            statistics=statistics,
            describes_itself=heads_file is not None,
        )


class RewardModel(nn.Module):
    """A decoder with a linear output for each head; `forward` gives the raw outputs of a batch.

    Making one checks that the model computes the same packed and unpacked; one that does not reads one sequence a
    row.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        *,
        statistics: FeatureStatistics | None = None,
        lora: LoraSettings | None = None,
    ):
        super().__init__()
        score, name = linear_score(model), type(model).__name__
        if score.out_features != len(layout.names):
            raise UserError(
                f"reward model: {name} has {score.out_features} outputs, {len(layout.names)} are needed for "
                f"{', '.join(layout.names)}"
            )
        why = packing_obstacle(model)
        if why is None:
            use_attention(model)
        pretrained.switch_off_dropout(model)
        self.model = model
        self.tokenizer = tokenizer
        self.statistics = statistics
        self._layout = layout
        self.cuts = nn.ParameterList(
            nn.Parameter(torch.tensor(head.cuts)) for head in layout.heads if head.kind == "ordinal"
        )
        self.log_noise = nn.Parameter(torch.zeros(len(layout.heads)), requires_grad=False)
        """(R,) learned by uncertainty weighting; of no use once the model is trained"""
        self.__dict__["peft_model"] = (
            None if lora is None else add_lora(model, lora, trained_whole=("score",))
        )
        self.to(model.device)
        why = why or packing_fault(model, tokenizer)
        self.packed = why is None
        if why is not None:
            run_one_by_one(model, why)
            check_causal(model, tokenizer)

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        *,
        seed: int = 0,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
    ) -> RewardModel:
        """A new model with random weights drawn from `seed`."""
        check_fits(config, tokenizer, "reward model")
        describe(config, tokenizer, layout)
        with pretrained.drawn_from(seed):
            model = fresh_classifier(config, pretrained.as_device(device), pretrained.as_dtype(dtype))
        return cls(model, tokenizer, layout)

    @classmethod
    def from_backbone(
        cls,
        path: str | Path,
        layout: Layout,
        *,
        seed: int = 0,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        lora: LoraSettings | None = None,
        gradient_checkpointing: bool = False,
    ) -> RewardModel:
        """A model (folder or hub id) with new outputs drawn from `seed`.

        A saved reward model keeps its own outputs, and the unit each is in, when they are named as the new ones.
        """
        source, config, tokenizer = read_backbone(path)
        going_on = layout.names == [str(label) for _, label in sorted((config.id2label or {}).items())]
        if going_on and (file := pretrained.side_file(source, HEADS_FILE)):
            layout = read_layout(file, str(path))
        describe(config, tokenizer, layout)
        with pretrained.drawn_from(seed):
            model = pretrained.load_model(
                AutoModelForSequenceClassification,
                source,
                "reward model",
                config=config,
                dtype=pretrained.as_dtype(dtype),
                device=pretrained.as_device(device),
                may_miss=() if going_on else ("score.",),
            )
            score = getattr(model, "score", None)
            if not going_on and isinstance(score, nn.Linear):
                # A classifier of as many outputs has kept those of its own heads.
                nn.init.normal_(
                    score.weight, std=getattr(pretrained.text_config(config), "initializer_range", 0.02)
                )
        made = cls(model, tokenizer, layout, lora=lora)
        if gradient_checkpointing:
            pretrained.enable_gradient_checkpointing(made.model, "reward model")
        return made

    @classmethod
    def load(
        cls,
        saved: str | Path | SavedRewardModel,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
    ) -> RewardModel:
        """A reward model saved by `save`, or another classification checkpoint (`SavedRewardModel.read`)."""
        if not isinstance(saved, SavedRewardModel):
            saved = SavedRewardModel.read(saved)
        model = pretrained.load_model(
            AutoModelForSequenceClassification,
            saved.source,
            "reward model",
            config=saved.config,
            dtype=pretrained.as_dtype(dtype),
            device=pretrained.as_device(device),
        )
        name_outputs(model.config, saved.layout)
        return cls(model, saved.tokenizer, saved.layout, statistics=saved.statistics).eval()

    def save_measured(self, folder: str | Path) -> None:
        """Write what was learned of a model that is saved already: units, calibration, verdicts, statistics."""
        write_layout(folder, self.layout)
        if self.statistics is not None:
            self.statistics.save(folder)

    def save(self, path: str | Path) -> None:
        """The checkpoint (a LoRA adapter merged), its tokenizer, `reward_heads.json` and the feature statistics.

        The folder appears whole or not at all (UserError).
        """
        with pretrained.written_folder(path) as folder:
            adapted: PeftModel | None = self.__dict__["peft_model"]
            state = merged_state(self.model, self.model.dtype) if adapted else None
            pretrained.write_model(self.model, self.tokenizer, folder, state=state)
            self.save_measured(folder)

    @property
    def layout(self) -> Layout:
        """Heads and outputs, with the cuts as they are trained by now."""
        cuts = iter(self.cuts)
        heads = tuple(
            replace(head, cuts=tuple(next(cuts).tolist())) if head.kind == "ordinal" else head
            for head in self._layout.heads
        )
        return replace(self._layout, heads=heads)

    def set_heads(self, heads: Sequence[Head]) -> None:
        """Replace what is known of the heads' units (statistics, calibration); names and kinds stay."""
        assert [(h.name, h.kind) for h in heads] == [(h.name, h.kind) for h in self._layout.heads]
        self._layout = replace(self._layout, heads=tuple(heads))

    @property
    def heads(self) -> tuple[Head, ...]:
        return self.layout.heads

    @property
    def head_names(self) -> list[str]:
        return [head.name for head in self._layout.heads]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates: all parameters, with LoRA the adapters and the heads."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def read(self, batch: PackedBatch) -> Tensor:
        """The hidden state each reply is scored from, in the batch's order: (S, H), model dtype."""
        return hidden_states(self.model, batch, packed=self.packed)[batch.last_index]

    @torch.no_grad()
    def read_with_features(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """`read` (S, H), and what tells whether a reply is like those of training: (S, 2H) float32.

        The features are the mean of the middle layer's hidden states over the reply, which sees its words and style
        whatever the heads make of them, beside the state that is scored.
        """
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            kept.append(output if isinstance(output, Tensor) else output[0])

        hook = _middle_layer(self.model).register_forward_hook(keep)
        try:
            read = self.read(batch)
        finally:
            hook.remove()
        sizes = (
            (batch.plan.length,) if self.packed else batch.plan.q_lens
        )  # what each call adds behind its prefix
        parts = [x.reshape(-1, read.shape[1])[-size:] for x, size in zip(kept, sizes, strict=True)]
        middle = torch.cat(parts).float()  # (L, H)
        lengths = batch.cu_seqlens.diff().long()
        means = torch.segment_reduce(middle[batch.hidden_index], "mean", lengths=lengths, initial=0.0)
        means = torch.where(lengths[:, None] > 0, means, middle[batch.last_index])  # of an empty reply
        return read, torch.cat([means, read.float()], dim=1)

    def outputs(self, read: Tensor) -> Tensor:
        """Raw outputs (S, O) float32 of the hidden states `read` (S, H)."""
        score = cast(nn.Linear, self.model.score)
        bias = cast(Tensor | None, score.bias)
        with torch.autocast(read.device.type, enabled=False):
            return F.linear(read.float(), score.weight.float(), None if bias is None else bias.float())

    def forward(self, batch: PackedBatch) -> Tensor:
        """Raw outputs of a batch packed with `keep_last=True`, in its order: (S, O) float32."""
        return self.outputs(self.read(batch))

    def scores(
        self, prompts: Sequence[PromptLike], completions: Sequence[str], token_budget: int = 8192
    ) -> Tensor:
        """Scores of `completions[i]` as the answer to `prompts[i]`: (S, R) float32, CPU, labels' unit."""
        return self.predict(self.encode(prompts, completions), token_budget).scores

    @torch.no_grad()
    def predict(self, encoded: Encoded, token_budget: int = 8192, *, calibrated: bool = False) -> Prediction:
        """Scores, spread and distance of replies; they do not depend on which replies are asked about together.

        `calibrated` scores are put through what was fitted on held-out labels, where the model has that.
        """
        size, layout = len(encoded.completion_ids), self.layout
        outputs = torch.empty(size, len(layout.names))
        features = torch.empty(size, 2 * cast(nn.Linear, self.model.score).in_features)
        was_training = self.training
        self.eval()
        for batch in self.pack(encoded, token_budget):
            read, described = self.read_with_features(batch.to(self.device))
            features[batch.sequence_index.cpu()] = described.cpu()
            outputs[batch.sequence_index.cpu()] = self.outputs(read).cpu()
        self.train(was_training)
        members, log_variance = layout.split(outputs)
        scores = layout.to_units(members)  # (S, K, R)
        known = self.statistics
        mean, spread = scores.mean(dim=1), _spread(scores, log_variance, layout)
        for k, head in enumerate(layout.heads if calibrated else ()):
            if head.calibration is not None:
                mean[:, k] = torch.as_tensor(calibration_of(head).apply(mean[:, k].numpy()))
        unread = list(encoded.too_long)
        mean[unread] = torch.nan
        if spread is not None:
            spread[unread] = torch.nan
        return Prediction(
            scores=mean,
            spread=spread,
            features=features,
            distance=None if known is None else known.distance(features) / max(known.quantiles[0], 1e-12),
            outside=None if known is None else known.outside(features),
            truncated=encoded.truncated,
            unscored=len(unread),
        )

    def encode(
        self,
        prompts: Sequence[PromptLike],
        completions: Sequence[str],
        *,
        max_tokens: int | None = None,
        skip_long: bool = False,
    ) -> Encoded:
        """Token ids (`reward_text.encode`); `max_tokens` or the model's own number of positions is the limit."""
        limit = length_limit(self.model.config, max_tokens)
        return encode(self.tokenizer, prompts, completions, max_tokens=limit, skip_long=skip_long)

    def pack(
        self, encoded: Encoded, token_budget: int, together: Sequence[int] | None = None
    ) -> list[PackedBatch]:
        """Batches in which each reply is read where `transformers` reads it (`reward_text.pack_replies`)."""
        return pack_replies(
            encoded.prompt_ids,
            encoded.completion_ids,
            encoded.prompt_of,
            padding=pretrained.text_config(self.model.config).pad_token_id,
            token_budget=token_budget,
            together=together,
            share_prefix=self.packed,
        )


def _middle_layer(model: PreTrainedModel) -> nn.Module:
    """The layer after which half of a decoder is done."""
    depth = pretrained.text_config(model.config).num_hidden_layers
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return layers[(depth - 1) // 2]


def _spread(scores: Tensor, log_variance: Tensor, layout: Layout) -> Tensor | None:
    """(S, R): by the law of total variance, members' disagreement and the mean predicted variance."""
    if layout.members == 1 and not layout.noisy:
        return None
    variance = scores.var(dim=1) if layout.members > 1 else torch.zeros_like(scores[:, 0])
    std = scores.new_tensor([layout.heads[r].std for r in layout.noisy])
    log_variance = log_variance.clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)  # as in the loss
    variance[:, layout.noisy] += log_variance.exp() * std.square()
    return variance.sqrt()
