"""Reading models and tokenizers of `transformers`, with the mistakes people make turned into one line.

Shared by the policy and the reward model. Everything that can be said from the configuration alone is said
before any weight is read: a missing folder, a tokenizer that does not fit, an architecture that cannot be
trained.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from grpo_fast.attention.function import ATTENTION_NAME, config_obstacle
from grpo_fast.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUND_TRIP_TEXT = "Please answer in 3 short steps: wash, rinse and dry."


def one_line(error: BaseException, limit: int = 240) -> str:
    """The message of `error` without its line breaks, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`"float32"`, `"bfloat16"` or one of these two torch dtypes; UserError for anything else."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise UserError(f"dtype must be float32 or bfloat16, got {dtype}")
    return found


def as_device(device: str | torch.device) -> torch.device:
    """A device that exists on this machine; UserError when a GPU was asked for and there is none."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device must be like cpu, cuda or cuda:0, got {device!r}") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise UserError(
                f"device {device}: this machine has {count} usable CUDA devices; use device = cpu"
            )
    return found


def locate(path: str | Path, what: str, *, needs: tuple[str, ...] = ("config.json",)) -> str:
    """A model folder as an absolute path, or the hub id as it is.

    An existing folder must hold one of the files `needs`. A name that can only be a path (leading `.`, `/`
    or `~`, more than one `/`) and does not exist is refused before the hub is asked.
    """
    text = str(path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in needs):
            raise UserError(f"{what} {text}: the folder has no {' or '.join(needs)}; it is no saved model")
        return str(folder.resolve())
    if folder.exists():
        raise UserError(f"{what} {text}: is a file; give the folder of a saved model or a hub id")
    if isinstance(path, Path) or text[:1] in "./~" or text.count("/") > 1:
        raise UserError(f"{what} {text}: no such folder; give the folder of a saved model or a hub id")
    return text


@contextmanager
def written_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write a model into, which takes its name `path` once the block is through: whole or not at all.

    UserError when the disk refuses; what stood there before is kept then.
    """
    target = Path(path)
    aside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        old = aside.with_suffix(".old")
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot write the model to {target}: {reason}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    state: dict[str, Tensor] | None,
) -> None:
    """A model and its tokenizer in the form `transformers` reads; `state` in place of the model's own weights."""
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Random numbers on the CPU come from `seed` inside; afterwards they go on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def load_config(path: str | Path, what: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a saved model; UserError when it cannot be read."""
    source = locate(path, what)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **overrides)
        _check_config(config)
        return config
    except Exception as error:  # transformers checks little of what is in the file
        _refuse_code(error, f"{what} {path}")
        if isinstance(error, OSError) and not Path(path).exists():
            raise UserError(
                f"{what} {path}: no such folder here, and no model of that id could be read from the hub; give "
                "the folder of a saved model, or a hub id with the network on"
            ) from error
        raise UserError(f"{what} {path}: cannot read its configuration: {one_line(error)}") from error


def _check_config(config: PreTrainedConfig) -> None:
    """ValueError where what is read of every configuration is not of its kind; transformers takes any."""
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"architectures must be a list of names, got {names!r}")
    text = config.get_text_config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
        value = getattr(text, name, None)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")


def load_tokenizer(path: str | Path, what: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a saved model, checked to bring text back (see `check_round_trip`)."""
    if Path(path).is_dir() and not has_tokenizer(path):
        raise UserError(
            f"{what} {path}: the folder has no tokenizer.json; save the tokenizer beside the model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken tokenizer.json
        _refuse_code(error, f"{what} {path}")
        raise UserError(f"{what} {path}: cannot read its tokenizer: {one_line(error)}") from error
    try:
        check_round_trip(tokenizer, f"{what} {path}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} {path}: its tokenizer does not work: {one_line(error)}") from error
    return tokenizer


def _refuse_code(error: Exception, what: str) -> None:
    """UserError where a model was refused because it brings its own program."""
    if "trust_remote_code" in str(error):
        raise UserError(
            f"{what}: brings its own program (auto_map), which is never run here; take a model of a kind that "
            "transformers itself has"
        ) from error


def refuse_pickles(folder: str | Path, what: str) -> None:
    """UserError for a folder whose weights are pickled alone: unpickling runs whatever program is in the file."""
    names = sorted(path.name for path in Path(folder).glob("*.*"))
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    if pickled and not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise UserError(
            f"{what}: its weights are pickled ({pickled[0]}), and a pickle can run any program; save it as safetensors"
        )


def side_file(source: str, name: str) -> Path | None:
    """A file beside a saved model, folder or hub id, as a local path; None where there is none."""
    if Path(source).is_dir():
        return path if (path := Path(source) / name).is_file() else None
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"{source}: cannot look for its {name}: {one_line(error)}") from error
    return Path(found) if found else None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a saved tokenizer lies in the folder, in any of the forms `transformers` reads."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return any((Path(folder) / name).is_file() for name in names)


def check_round_trip(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Refuse a tokenizer that loses text.

    `AutoTokenizer` builds the class it expects for a model type around whatever vocabulary it finds in the
    folder, and the result can turn every text into nothing. Text that passes: a plain sentence, or, for
    small vocabularies that cannot spell it, a text made of the tokenizer's own words.
    """

    def survives(text: str) -> bool:
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(ids, skip_special_tokens=False)
        return bool(ids) and str(back).split() == text.split()

    if survives(ROUND_TRIP_TEXT):
        return
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]
    own = ordinary[:: max(1, len(ordinary) // 16)][:16]
    text = str(tokenizer.decode(own, skip_special_tokens=False)).strip()
    if text and survives(text):
        return
    ids = tokenizer.encode(ROUND_TRIP_TEXT, add_special_tokens=False)
    back = tokenizer.decode(ids, skip_special_tokens=False)
    raise UserError(
        f"{what}: the tokenizer ({type(tokenizer).__name__}) does not bring text back: {ROUND_TRIP_TEXT!r} "
        f"became {len(ids)} tokens and then {back!r}; save it in the form the model type expects"
    )


def decoded(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], *, special: bool = False) -> str:
    """The text of tokens, with or without special ones."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=not special))


def text_config(config: PreTrainedConfig) -> Any:
    """The part of a configuration that is about text; which fields it has depends on the model."""
    return config.get_text_config()


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, what: str) -> None:
    """Every id of the tokenizer needs a row of the embedding. More rows than ids is normal (padding)."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise UserError(
            f"{what}: the tokenizer has ids up to {largest}, the model's embedding has {rows} rows; "
            "use the tokenizer this model was trained with"
        )


def check_architecture(model_class: type, config: PreTrainedConfig, what: str) -> None:
    """Refuse by name what cannot be trained here at all, from the configuration alone."""
    name = model_class.__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{what}: {name} is an encoder-decoder; a decoder-only language model is needed")
    if any("mrope_section" in parameters for parameters in rope_parameters(config)):
        raise UserError(
            f"{what}: {name} has three-dimensional positions (mRoPE), which text alone does not give; take a "
            "language model with plain rotary positions"
        )


def rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of the rotary embedding, one dictionary for all layers or one for each kind of layer."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]


def position_limit(config: PreTrainedConfig) -> tuple[int, str] | None:
    """Positions a sequence may have, and in brackets what limits them to fewer than the model has; None: any number.

    Two kinds of rotary scaling take their frequencies from the longest sequence of the *row*: dynamic NTK, and
    longrope, which switches sets. Up to the length they start from, sequences side by side have the frequencies each
    has alone, and one that grows keeps those of its first token; beyond it they would not.
    """
    text = config.get_text_config()
    size = getattr(text, "max_position_embeddings", None)
    limits = [(size, "")]
    for parameters in rope_parameters(config):
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind in ("dynamic", "longrope"):
            start = parameters.get("original_max_position_embeddings") or size
            limits.append(
                (start, f" (beyond, {kind} rotary scaling depends on the other sequences of a row)")
            )
    return min(((limit, why) for limit, why in limits if limit), default=None)


def load_model(
    auto_class: Any,
    path: str | Path,
    what: str,
    *,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    may_miss: tuple[str, ...] = (),
    quantization: Any = None,
) -> PreTrainedModel:
    """The weights of a saved model with the packed attention switched on where its kind allows it.

    Weights that the files lack, or have in another shape, would be drawn at random: refused, except for names that
    start with one of `may_miss` (a new reward head). `quantization` is what `from_pretrained` takes as
    `quantization_config`; the weights then go to their device one by one, as they are quantised.
    """
    try:
        model_class = auto_class._model_mapping[type(config)]
    except KeyError as error:
        raise UserError(
            f"{what} {path}: model type {config.model_type} has no {auto_class.__name__}"
        ) from error
    check_architecture(model_class, config, f"{what} {path}")
    refuse_pickles(path, f"{what} {path}")
    quantised = (
        {} if quantization is None else {"quantization_config": quantization, "device_map": {"": str(device)}}
    )
    try:
        model, info = auto_class.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=None if config_obstacle(model_class, config) else ATTENTION_NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(may_miss),
            **quantised,
        )
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"{what} {path}: cannot read its weights: {one_line(error)}") from error
    absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    missing = sorted(name for name in absent if not name.startswith(may_miss or ("\0",)))
    if missing:
        raise UserError(
            f"{what} {path}: {len(missing)} weights are not in its files (first: {missing[0]}); "
            "the checkpoint is incomplete or of another kind"
        )
    if quantization is None:
        model = model.to(device)
    finite = {name: torch.isfinite(weight).all() for name, weight in model.named_parameters()}
    broken = next((name for name, fine in finite.items() if not bool(fine)), None)
    if broken is not None:
        raise UserError(f"{what} {path}: the weight {broken} has NaN or infinite values")
    return model


def switch_off_dropout(model: nn.Module) -> None:
    """Set all dropout to 0: before the first update a token's probability ratio must be 1.

    Layers, and the plain numbers that some architectures hand to the functional form.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def enable_gradient_checkpointing(model: PreTrainedModel, what: str) -> None:
    """Recompute each layer in the backward pass (non-reentrant, so frozen inputs and keywords are fine)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"{what}: gradient_checkpointing: {one_line(error)}") from error
