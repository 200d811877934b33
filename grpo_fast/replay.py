"""Compute a skipped optimizer step again, alone: `python -m grpo_fast.replay RUN/dumps/step-000123`.

Says where the first number went wrong that is not finite. Exit code 0: the dump's losses came out again, to the bit on
the same device and in the same dtype; 1: they did not; 2: the dump, or what it refers to, cannot be used.
"""

import argparse
import math
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast.attention.backends import use
from grpo_fast.config.command_line import TRAIN, parse
from grpo_fast.config.resolve import compiles, device_named, loss_config
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.prompts import Prompt
from grpo_fast.dumps import KIND, VERSION, WANTED
from grpo_fast.engines.base import Completion
from grpo_fast.errors import UserError
from grpo_fast.grpo import add_up_gradients, packed
from grpo_fast.models.policy import Policy
from grpo_fast.models.pretrained import decoded, one_line
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.packing import PackedBatch
from grpo_fast.parallel.world import World
from grpo_fast.rollout import Rollout
from grpo_fast.run import checkpoint
from grpo_fast.run.command import Parser, prepare_libraries, run_command
from grpo_fast.scoring import Scored
from grpo_fast.shown import plain_text
from grpo_fast.task import lora_settings
from grpo_fast.typed import floats, integers, is_tuple, named_modules

SHOWN = 10
MOST_PROCESSES = 1 << 16
"""Of a run whose step is replayed: the micro-batches of each are packed"""


@dataclass(frozen=True, kw_only=True)
class Dump:
    """A skipped step as it was kept."""

    path: Path
    facts: dict[str, Any]
    config: TrainConfig
    rollout: Rollout
    """Its sequences alone"""
    known: dict[str, list[Tensor]]
    losses: Tensor
    """(M,) float64: of each micro-batch"""
    norm: float
    weights: dict[str, Tensor]


def read_dump(path: Path) -> Dump:
    """Verify and read a dump; UserError for anything that is none."""
    if problem := checkpoint.verify(path):
        raise UserError(problem.replace("checkpoint", "dump"))
    try:
        groups, state = checkpoint.load(path)
        facts, batch = state["dump"], groups["batch"]
        if facts["version"] != VERSION:
            raise UserError(f"{path}: expected version {VERSION} of a dump, found {facts['version']!r}")
        for name, least in (("step", 1), ("processes", 1), ("token_budget", 1), ("normalizer", 0)):
            most = MOST_PROCESSES if name == "processes" else 2**40
            if not least <= facts[name] < most:
                raise ValueError(f"{name} = {facts[name]!r}")
        known = {
            name: list(torch.split(batch[name], integers(batch["completion_lengths"])))
            for name in WANTED
            if name in batch
        }
        return Dump(
            path=path,
            facts=facts,
            config=_config(facts["config"]),
            rollout=_rollout(batch, known["rollout_logprobs"]),
            known=known,
            losses=batch["losses"],
            norm=batch["grad_norm"].item(),
            weights=groups["model"],
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path}: expected the dump of a skipped step, it does not fit ({what})") from None


def _config(text: str) -> TrainConfig:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(text, encoding="utf-8")
        return parse(["--config", str(file)], TRAIN).config


def _rollout(batch: dict[str, Tensor], sampled: list[Tensor]) -> Rollout:
    prompts = torch.split(batch["prompt_ids"], integers(batch["prompt_lengths"]))
    said = torch.split(batch["completion_ids"], integers(batch["completion_lengths"]))
    size = len(said)
    if not len(batch["prompt_of"]) == len(batch["advantages"]) == size:
        raise ValueError(f"{size} completions, {len(batch['advantages'])} advantages")
    if not all(map(len, [*prompts, *said])) or not 0 <= batch["prompt_of"].min() <= batch[
        "prompt_of"
    ].max() < len(prompts):
        raise ValueError("a prompt or completion that is empty, or missing")
    nothing = torch.empty(size, 0)
    return Rollout(
        prompts=[Prompt("", integers(ids), None, {}) for ids in prompts],
        prompt_of=integers(batch["prompt_of"]),
        completions=[
            Completion(integers(ids), logprobs, "stop", 0)
            for ids, logprobs in zip(said, sampled, strict=True)
        ],
        texts=[""] * size,
        scored=Scored(rewards=nothing, spread=nothing),
        advantages=batch["advantages"],
    )


def policy_of(dump: Dump, *, model: str, dtype: str, device: torch.device) -> Policy:
    """The policy with the dump's weights."""
    config = dump.config
    own = dump.path.resolve().parent.parent / "start"
    source = model or dump.facts["model"] or str(own)
    use(config.policy.attention)
    policy = Policy.load(
        source,
        dtype=dtype,
        device=device,
        lora=lora_settings(config),
        gradient_checkpointing=config.policy.gradient_checkpointing,
        liger=config.policy.liger and device.type == "cuda",
        quantize=config.policy.quantize,
        compiled=compiles(config, device),
    )
    if config.policy.model:
        policy.self_check()
    tokens = [i for ids in dump.rollout.prompt_ids for i in ids]
    tokens += [i for completion in dump.rollout.completions for i in completion.token_ids]
    rows = policy.head()["weight"].shape[0]
    if not 0 <= min(tokens, default=0) <= max(tokens, default=0) < rows:
        raise UserError(f"{dump.path}: has a token that {source}, of {rows} tokens, does not know")
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            saved = dump.weights.get(name)
            if saved is None or saved.shape != parameter.shape:
                raise UserError(
                    f"{dump.path}: the weight {name} of {source} has shape {tuple(parameter.shape)}, the dump's "
                    f"{'is missing' if saved is None else f'has {tuple(saved.shape)}'}; name its model with --model"
                )
            parameter.copy_(saved)
    return policy.train()


def micro_batches(dump: Dump, policy: Policy) -> list[PackedBatch]:
    """The micro-batches of all processes, in the order of `dump.losses`."""
    kept, size = list(range(len(dump.rollout.completions))), int(dump.facts["processes"])
    found: list[PackedBatch] = []
    for rank in range(size):
        policy.world = World(rank, size)  # what this rank was dealt; nobody is there to talk to
        found += packed(dump.rollout, kept, policy, int(dump.facts["token_budget"]))
    return [batch for batch in found if batch.counts]


@contextmanager
def first_nonfinite(policy: Policy) -> Generator[list[str], None, None]:
    """Fills a list with the names of modules whose output is not finite, in the order they run."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            tensors = output if is_tuple(output) else (output,)
            values = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
            if not all(bool(t.detach().isfinite().all()) for t in values):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in named_modules(policy.model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def computed(
    dump: Dump, policy: Policy, optimizer: Optimizer, batches: list[PackedBatch]
) -> tuple[list[Tensor], float]:
    """Losses of the micro-batches, and the norm of their gradient, which stays in `optimizer`."""
    size = policy.world.size
    losses, _ = add_up_gradients(
        policy,
        dump.rollout.advantages,
        dump.known,
        loss_config(dump.config),
        dump.config,
        batches,
        normalizer=float(dump.facts["normalizer"]),
    )
    return [(loss / size).double().cpu() for loss in losses], optimizer.gradient_norm().item() / size


def worst_tokens(dump: Dump, policy: Policy, batches: list[PackedBatch]) -> list[str]:
    """A table of the tokens that are not finite, then those furthest from the old policy."""
    rows: list[tuple[tuple[bool, float], str]] = []
    old = dump.known.get("old_logprobs") or dump.known["rollout_logprobs"]
    for batch in batches:
        logprobs, _ = policy.logprobs(batch, temperature=dump.config.rollout.temperature)
        before = batch.gather(old).float()
        lengths = integers(batch.cu_seqlens.diff())
        sequences = batch.sequence_index.repeat_interleave(torch.tensor(lengths, device=policy.device))
        places = [place for length in lengths for place in range(length)]
        for token, sequence, place, now, then in zip(
            integers(batch.targets),
            integers(sequences),
            places,
            floats(logprobs),
            floats(before),
            strict=True,
        ):
            advantage = dump.rollout.advantages[sequence].item()
            sound = math.isfinite(now) and math.isfinite(then) and math.isfinite(advantage)
            ratio = math.exp(min(now - then, 80.0)) if sound else math.nan
            text = plain_text(repr(decoded(policy.tokenizer, [token], special=True)), one_line=True)[:20]
            line = f"{sequence:>8} {place:>6}  {text:<20} {now:>10.4g} {then:>10.4g} {ratio:>10.4g} {advantage:>10.4g}"
            rows.append(((sound, -abs(now - then) if sound else 0.0), line))
    rows.sort(key=lambda row: row[0])
    head = f"{'sequence':>8} {'token':>6}  {'text':<20} {'log-prob':>10} {'old':>10} {'ratio':>10} {'advantage':>10}"
    return [head, *(line for _, line in rows[:SHOWN])]


def replay(dump: Dump, asked: argparse.Namespace) -> int:
    """Compute the step, print what is found; the exit code."""
    facts = dump.facts
    device = device_named(asked.device or str(facts["device"]))
    dtype = asked.dtype or str(facts["dtype"])
    exact = (device.type, dtype, facts["processes"]) == (facts["device"], facts["dtype"], 1)
    policy = policy_of(dump, model=asked.model, dtype=dtype, device=device)
    batches = micro_batches(dump, policy)
    if len(batches) != len(dump.losses):
        raise UserError(f"{dump.path}: packs into {len(batches)} micro-batches, {len(dump.losses)} were kept")
    chosen = list(range(len(batches)))
    if asked.micro_batch is not None:
        if not 1 <= asked.micro_batch <= len(batches):
            raise UserError(f"--micro-batch must be within 1 and {len(batches)}, got {asked.micro_batch}")
        chosen = [asked.micro_batch - 1]
    batches, then = [batches[i] for i in chosen], dump.losses[chosen]
    print(
        f"step {facts['step']} of {plain_text(str(facts['run']), one_line=True)}: {len(dump.rollout.completions)} "
        f"sequences in {len(dump.losses)} micro-batches, {facts['device']} {facts['dtype']}; now {device.type} {dtype}"
    )
    optimizer = Optimizer(policy.trainable_parameters(), lr=0.0)
    if asked.anomaly:
        _look_for_anomaly(dump, policy, optimizer, batches)
    with first_nonfinite(policy) as modules:
        losses, norm = computed(dump, policy, optimizer, batches)
    now = torch.stack(losses)
    for place, a, b in zip(chosen, floats(now), floats(then), strict=True):
        print(f"micro-batch {place + 1}: loss {a:.6g} (then {b:.6g})")
    print(
        f"loss {now.sum().item():.6g} (then {then.sum().item():.6g}), gradient norm {norm:.6g} (then {dump.norm:.6g})"
    )
    if modules:
        print(f"first module with an output that is not finite: {modules[0]}")
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    for name, count, weight in zip(
        names, optimizer.count_nonfinite(), policy.trainable_parameters(), strict=True
    ):
        unsound = int((~weight.isfinite()).sum())
        if count or unsound:
            print(f"  {name}: {count:,} of {weight.numel():,} gradients not finite, {unsound:,} weights")
    print("\n".join(worst_tokens(dump, policy, batches)))
    same = _same(now, then, exact) and (asked.micro_batch is not None or _same_norm(norm, dump.norm, exact))
    what = "losses to the bit" if exact else "finite and non-finite losses (on other terms than the run's)"
    print(f"reproduced: the same {what}" if same else "NOT reproduced: the run found something else")
    return 0 if same else 1


def _look_for_anomaly(dump: Dump, policy: Policy, optimizer: Optimizer, batches: list[PackedBatch]) -> None:
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            computed(dump, policy, optimizer, batches)
        print("anomaly: no backward function gave a NaN")
    except RuntimeError as error:
        print(f"anomaly: {one_line(error)}")
    optimizer.discard()


def _same(now: Tensor, then: Tensor, exact: bool) -> bool:
    if exact:
        return torch.allclose(now, then, rtol=0.0, atol=0.0, equal_nan=True)
    return torch.equal(now.isfinite(), then.isfinite())


def _same_norm(now: float, then: float, exact: bool) -> bool:
    """A finite norm may differ in its last places: a GPU adds up in any order."""
    if exact and math.isfinite(then):
        return math.isclose(now, then, rel_tol=1e-4)
    return math.isfinite(now) == math.isfinite(then)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run_command(lambda: _command(argv))


def _command(argv: list[str] | None) -> int:
    parser = Parser(prog="python -m grpo_fast.replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dump", type=Path, help=f"folder of a skipped step, RUN/{KIND}/step-000123")
    parser.add_argument("--model", default="", help="the model it was trained from, where that has moved")
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (the run's)")
    parser.add_argument("--dtype", default="", choices=["", "float32", "bfloat16"], help="the run's")
    parser.add_argument("--micro-batch", type=int, help="this one alone, counted from 1")
    parser.add_argument("--anomaly", action="store_true", help="name the backward function that gives NaN")
    asked = parser.parse_args(argv)
    dump = read_dump(asked.dump)
    prepare_libraries(dump.config.threads)
    return replay(dump, asked)


if __name__ == "__main__":
    main()
