"""The language model that is trained: packed forward to log-probs and losses, LoRA, saving.

Dimension letters: L packed positions, N completion tokens, S sequences, V vocabulary, H hidden size.
The model runs on one row of packed sequences (`packing.PackedBatch`); only the hidden states that predict a
completion token reach the head, and the N x V logits never exist (`grpo_kernels`).
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from grpo_kernels import LossConfig, grpo_loss, linear_grpo_loss, linear_logprob
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from grpo_fast.attention.function import packing_obstacle, use_attention
from grpo_fast.errors import UserError
from grpo_fast.models import pretrained
from grpo_fast.models.activations import activations_on_host
from grpo_fast.models.compiled import CompiledLayers, check_compiled
from grpo_fast.models.head import head_of
from grpo_fast.models.liger import apply_liger
from grpo_fast.models.lora import LoraSettings, add_lora, merged_parameters, read_lora, refuse_lora_on_head
from grpo_fast.models.policy_files import SavedPolicy, write_policy
from grpo_fast.models.quantized import is_quantised, keep_trainable, nf4
from grpo_fast.models.self_check import (
    check_causal,
    check_head,
    hidden_states,
    packing_fault,
    run_one_by_one,
)
from grpo_fast.models.sharded import logprobs_by_vocabulary, mesh_of, refuse_together, shard
from grpo_fast.packing import PackedBatch
from grpo_fast.parallel.world import ALONE, World
from grpo_fast.typed import is_list, is_tuple


class Policy(nn.Module):
    """A causal language model, its tokenizer and, with LoRA, its adapter.

    `model` is the `transformers` model itself (with LoRA its linear layers are peft's). All its dropout is
    switched off. Parameters have the dtype asked for; float32 master copies belong to the optimizer.
    """

    model: PreTrainedModel
    peft_model: PeftModel | None
    tokenizer: PreTrainedTokenizerBase
    packed: bool
    """Whether sequences share a row; a model in which they would see each other runs one sequence a row."""
    compiled: CompiledLayers | None
    """The compiled decoder layers of packed passes; None where they run as they are."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        peft_model: PeftModel | None = None,
        packed: bool = True,
        compiled: CompiledLayers | None = None,
    ):
        super().__init__()
        self.packed = packed
        self.activations_on_host = False
        self.world = ALONE
        self._mesh: DeviceMesh | None = None
        self._head_by_vocabulary = False
        self._compute_dtype: torch.dtype | None = None
        self.model = model
        self.tokenizer = tokenizer
        self.compiled = compiled
        # The same parameters under other names: kept out of nn.Module's registry.
        self.__dict__["peft_model"] = peft_model

    @classmethod
    def load(
        cls,
        path: str | Path | SavedPolicy,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        lora: LoraSettings | None = None,
        gradient_checkpointing: bool = False,
        liger: bool = False,
        quantize: Literal["none", "nf4"] = "none",
        compiled: bool = False,
    ) -> Policy:
        """A saved model folder, a hub id, or a folder of a saved adapter (then training goes on with it).

        `quantize` puts the base model into 4 bits, which only an adapter can be trained on. Raises UserError for
        what `SavedPolicy.read` refuses, for a checkpoint that is incomplete, and for an architecture that cannot be
        trained.
        """
        saved = path if isinstance(path, SavedPolicy) else SavedPolicy.read(path)
        if saved.adapter and lora is not None:
            raise UserError(
                f"model {saved.path}: holds an adapter already; leave the LoRA settings out to train it on"
            )
        if quantize != "none" and lora is None and not saved.adapter:
            raise UserError(
                f"model {saved.path}: weights in 4 bits cannot be trained; train an adapter on them"
            )
        model = pretrained.load_model(
            AutoModelForCausalLM,
            saved.base,
            "model",
            config=saved.config,
            dtype=pretrained.as_dtype(dtype),
            device=pretrained.as_device(device),
            quantization=nf4(pretrained.as_dtype(dtype)) if quantize == "nf4" else None,
        )
        keep_trainable(model)
        if not saved.adapter:
            return cls.from_model(
                model,
                saved.tokenizer,
                lora=lora,
                gradient_checkpointing=gradient_checkpointing,
                liger=liger,
                compiled=compiled,
            )
        try:
            wrapped = read_lora(model, saved.adapter)
        except Exception as error:  # peft and safetensors raise several unrelated kinds for a broken adapter
            what = pretrained.one_line(error)
            raise UserError(f"model {saved.path}: cannot read the adapter: {what}") from error
        return cls._finish(model, saved.tokenizer, wrapped, gradient_checkpointing, liger, compiled)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        lora: LoraSettings | None = None,
        gradient_checkpointing: bool = False,
        liger: bool = False,
        compiled: bool = False,
    ) -> Policy:
        """A model that is in memory; it is changed in place (attention, dropout, adapters)."""
        pretrained.check_architecture(type(model), model.config, "model")
        rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
        pretrained.check_vocabulary(tokenizer, rows, "model")
        wrapped = None if lora is None else add_lora(model, lora)
        return cls._finish(model, tokenizer, wrapped, gradient_checkpointing, liger, compiled)

    @classmethod
    def _finish(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        peft_model: PeftModel | None,
        gradient_checkpointing: bool,
        liger: bool,
        compiled: bool,
    ) -> Policy:
        if peft_model is not None:
            refuse_lora_on_head(model)
            for parameter in model.parameters():
                if parameter.requires_grad:  # peft makes adapters on 4-bit layers float32
                    parameter.data = parameter.data.to(model.dtype)
        why = packing_obstacle(model)
        if why is not None:
            run_one_by_one(model, why)
        else:
            use_attention(model)
        head_of(model)  # refuses heads whose logits cannot be computed from hidden @ weight
        pretrained.switch_off_dropout(model)
        if liger:
            apply_liger(model)
        if gradient_checkpointing:
            pretrained.enable_gradient_checkpointing(model, "model")
        policy = cls(
            model,
            tokenizer,
            peft_model=peft_model,
            packed=why is None,
            compiled=CompiledLayers() if compiled and why is None else None,
        ).train()
        if policy.compiled is not None:
            policy.compiled.install(model)
            check_compiled(model, policy.compiled)
        return policy

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the products; shared-out weights are held in float32."""
        return self._compute_dtype or self.model.dtype

    @property
    def is_lora(self) -> bool:
        return self.peft_model is not None

    @property
    def is_quantised(self) -> bool:
        return any(is_quantised(module) for module in self.model.modules())

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the generation config's and the tokenizer's end tokens, sorted."""
        generation = getattr(self.model, "generation_config", None)
        ids = getattr(generation, "eos_token_id", None)
        found = [*(ids if is_list(ids) or is_tuple(ids) else [ids]), self.tokenizer.eos_token_id]
        return tuple(sorted({i for i in found if isinstance(i, int)}))

    def news(self) -> list[str]:
        """Lines for the user since the last call."""
        return self.compiled.news() if self.compiled is not None else []

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates: all parameters, with LoRA the adapters only."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What a copy of the model elsewhere needs: every parameter under its plain name, with LoRA the merged one."""
        return merged_parameters(self.model, self.compute_dtype)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """The last hidden state of every position that predicts a completion token: (N, H), model dtype.

        With `activations_on_host` what this saves for the backward pass waits on the host.
        """
        with activations_on_host(self.model.parameters()) if self.activations_on_host else nullcontext():
            states = hidden_states(self.model, batch, packed=self.packed, compiled=self.compiled)
            return states.index_select(0, batch.hidden_index)

    def forward(
        self,
        batch: PackedBatch,
        advantages: Tensor,  # (N,) or (S,)
        loss_config: LossConfig,
        *,
        old_logprobs: Tensor | None = None,  # (N,)
        ref_logprobs: Tensor | None = None,  # (N,)
        rollout_logprobs: Tensor | None = None,  # (N,)
        loss_mask: Tensor | None = None,  # (N,)
        normalizer: float | Tensor | None = None,
        temperature: float = 1.0,
        backend: str = "auto",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The GRPO loss of one micro-batch and its metrics (0-d tensors on the device).

        Per-token inputs are in the batch's order (`batch.gather`). With the `normalizer` of the whole
        optimizer step the losses of its micro-batches add up, whatever the split.
        """
        given: dict[str, Any] = {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "rollout_logprobs": rollout_logprobs,
            "loss_mask": loss_mask,
            "cu_seqlens": batch.cu_seqlens,
            "normalizer": normalizer,
        }
        hidden = self.hidden_states(batch)
        if self._head_by_vocabulary:
            logprobs, entropy = self._look_up(hidden, batch.targets, temperature)
            return grpo_loss(logprobs, advantages, loss_config, entropy=entropy, **given)
        return linear_grpo_loss(
            hidden,
            targets=batch.targets,
            advantages=advantages,
            config=loss_config,
            temperature=temperature,
            backend=backend,
            **given,
            **self.head(),
        )

    @torch.no_grad()
    def logprobs(
        self, batch: PackedBatch, *, temperature: float = 1.0, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(N,) log-prob and (N,) entropy of the completion tokens, float32, without gradients.

        `reference=True` answers for the model before training, the adapter switched off; a fully trained one has
        forgotten it.
        """
        if reference and not self.is_lora:
            raise ValueError(
                "reference=True needs LoRA; a fully trained policy is compared with its frozen_copy()"
            )
        with self.adapter_off() if reference else nullcontext():
            found = self.looked_up(batch, temperature)
        if self.is_sharded:  # no backward pass lets go of the weights gathered last
            cast(FSDPModule, self).reshard()
        return found

    def looked_up(self, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """(N,) log-prob and (N,) entropy: the forward pass of `logprobs`, in which shared-out weights are gathered."""
        return self._look_up(self.hidden_states(batch), batch.targets, temperature)

    def _look_up(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        if self._head_by_vocabulary and self._mesh is not None:
            return logprobs_by_vocabulary(hidden, targets, self.head(), temperature, self._mesh)
        return linear_logprob(hidden, targets=targets, temperature=temperature, **self.head())

    def sft_loss(self, batch: PackedBatch, normalizer: float | Tensor) -> Tensor:
        """Cross entropy of the completion tokens, summed and divided by `normalizer` (tokens of the step)."""
        logprobs, _ = linear_logprob(self.hidden_states(batch), targets=batch.targets, **self.head())
        return -logprobs.sum() / normalizer

    def head(self) -> dict[str, Any]:
        """The head's weight, bias, softcap and logit scale: keyword arguments of the operations on hidden states."""
        head = head_of(self.model)
        return {
            "weight": head.weight,
            "bias": head.bias,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
        }

    @contextmanager
    def adapter_off(self) -> Generator[None, None, None]:
        """The base model, for as long as the context lasts. Needs LoRA."""
        assert self.peft_model is not None
        with self.peft_model.disable_adapter():
            yield

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are shared out over several processes."""
        return self._mesh is not None

    def shard(self, world: World, *, head_by_vocabulary: bool = False) -> None:
        """Share the weights out over `world`'s processes; nothing happens to a policy that is alone.

        Before its optimizer is made, after copies of it are. All processes then call `forward`, `logprobs` and
        `named_weights` equally often, each on its own batches. UserError for what cannot be shared out.
        """
        self.world = world
        if world.size == 1:
            return
        refuse_together(
            {
                "policy.quantize": self.is_quantised,
                "policy.compile": self.compiled is not None,
                "memory.activations_on_host": self.activations_on_host,
            }
        )
        self._compute_dtype = self.model.dtype
        mesh = mesh_of(world, self.device)
        shard(self, self.model, mesh, head_by_vocabulary=head_by_vocabulary)
        self._mesh, self._head_by_vocabulary = mesh, head_by_vocabulary

    def sums_gradients(self, now: bool) -> None:
        """Whether the next backward pass adds the processes' gradients up."""
        if self.is_sharded:
            cast(FSDPModule, self).set_requires_gradient_sync(now)

    def frozen_copy(self) -> Policy:
        """A copy that never changes: the reference of a fully trained policy when kl_coef > 0."""
        if self.is_lora:
            raise ValueError("a LoRA policy needs no frozen copy: logprobs(batch, reference=True)")
        frozen = Policy(copy.deepcopy(self.model), self.tokenizer, packed=self.packed, compiled=self.compiled)
        if self.compiled is not None:
            self.compiled.install(frozen.model)
        frozen.requires_grad_(False)
        return frozen.eval()

    def save(self, path: str | Path, merge: bool = False) -> None:
        """`save_pretrained` of model and tokenizer.

        With LoRA the folder is a `peft` adapter, or with `merge=True` a full model whose weights include it;
        the weights in memory are not touched either way. The folder appears whole or not at all (UserError).
        """
        write_policy(self, Path(path), merge=merge)

    def self_check(self) -> None:
        """Hidden state x head must be the model's logits, and no state depend on later tokens; UserError if not.

        Where packed and one by one differ, sequences are not packed from now on.
        """
        check_head(self.model, self.tokenizer)
        if self.packed and (why := packing_fault(self.model, self.tokenizer)):
            self.packed = False
            run_one_by_one(self.model, why)
        if not self.packed:
            check_causal(self.model, self.tokenizer)
