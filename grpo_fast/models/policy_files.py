"""A policy on disk: what a saved one says of itself before any weight is read, and writing one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from grpo_fast.errors import UserError
from grpo_fast.models import pretrained
from grpo_fast.models.lora import merged_state
from grpo_fast.models.quantized import shell_of
from grpo_fast.models.sharded import full

if TYPE_CHECKING:
    from grpo_fast.models.policy import Policy


@dataclass(frozen=True, kw_only=True)
class SavedPolicy:
    """What a saved policy says of itself before any weight is read."""

    path: str
    """As the user gave it."""
    base: str
    """Folder or hub id of the model itself."""
    adapter: str | None
    """Folder of a LoRA adapter that is put on it."""
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def read(cls, path: str | Path) -> SavedPolicy:
        """A saved model folder, a hub id, or the folder of a saved adapter.

        Raises UserError for a folder that is no model, a reward model, and a tokenizer that does not fit.
        """
        source = pretrained.locate(path, "model", needs=("config.json", "adapter_config.json"))
        adapter = source if (Path(source) / "adapter_config.json").is_file() else None
        base = _base_of(source, str(path)) if adapter else source
        config = pretrained.load_config(base, "model")
        for name in config.architectures or ():
            if name.endswith("ForSequenceClassification"):
                raise UserError(f"model {path}: is a {name}; a causal language model is needed")
        tokenizer = pretrained.load_tokenizer(source if pretrained.has_tokenizer(source) else base, "model")
        pretrained.check_vocabulary(tokenizer, config.get_text_config().vocab_size, f"model {path}")
        return cls(path=str(path), base=base, adapter=adapter, config=config, tokenizer=tokenizer)


def _base_of(adapter: str, shown: str) -> str:
    pretrained.refuse_pickles(adapter, f"model {shown}")
    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except Exception as error:  # peft checks little of what is in the file
        reason = pretrained.one_line(error)
        raise UserError(f"model {shown}: cannot read its adapter_config.json: {reason}") from error
    if not isinstance(base, str) or not base.strip():
        raise UserError(
            f"model {shown}: its adapter_config.json must name base_model_name_or_path, got {base!r}"
        )
    return base


def write_policy(policy: Policy, path: Path, *, merge: bool) -> None:
    """The folder of `Policy.save`: all processes gather the weights, the first one writes them."""
    if policy.peft_model is not None and not merge:
        state = _adapter(policy)
    elif policy.is_sharded or policy.is_quantised or merge:
        state = merged_state(policy.model, policy.compute_dtype, keep=policy.world.is_first)
    else:
        state = None  # the model writes itself
    policy.world.first(lambda: _write(policy, path, state, merge))


def _adapter(policy: Policy) -> dict[str, Tensor] | None:
    if not policy.is_sharded:
        return None
    assert policy.peft_model is not None
    state: dict[str, Tensor] = {}
    for name, parameter in policy.peft_model.named_parameters():
        if parameter.requires_grad:
            whole = full(parameter, policy.compute_dtype)
            if policy.world.is_first:
                state[name] = whole.cpu()
    return state


def _write(policy: Policy, path: Path, state: dict[str, Tensor] | None, merge: bool) -> None:
    with pretrained.written_folder(path) as folder:
        policy.tokenizer.save_pretrained(folder)
        if policy.peft_model is not None and not merge:
            # False: the base model's embedding is not part of the adapter, and no hub is asked about it
            given: dict[str, Any] = {} if state is None else {"state_dict": state}
            policy.peft_model.save_pretrained(str(folder), save_embedding_layers=False, **given)
        elif state is None:
            policy.model.save_pretrained(folder)
        else:
            as_it_is = not (policy.is_sharded or policy.is_quantised)
            shell = policy.model if as_it_is else shell_of(policy.model, policy.compute_dtype)
            shell.save_pretrained(folder, state_dict=state)
