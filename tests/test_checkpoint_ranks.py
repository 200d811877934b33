"""Checkpoints written by several processes and by one, and gone on with by any other number: the same to the bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from grpo_fast import state
from grpo_fast.data.prompts import Prompt
from grpo_fast.errors import UserError
from grpo_fast.grpo import update
from grpo_fast.models.lora import LoraSettings
from grpo_fast.models.policy import Policy
from grpo_fast.models.sharded import full
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.parallel.world import ALONE, World
from grpo_fast.run import checkpoint
from grpo_fast.run.saving import Saver
from tests.grpo_cases import config, policy, rollout
from tests.ranks import run_on_ranks

CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("whole", "adamw8bit"): {"family": "llama"},
    ("adapter", "adamw"): {"family": "llama", "lora": LoraSettings(rank=4)},
}


def trained(world: World, settings: dict[str, Any], kind: str) -> tuple[Policy, Optimizer]:
    made = policy(**settings)
    made.shard(world)
    return made, Optimizer(made.trainable_parameters(), lr=0.05, kind=kind)  # type: ignore[arg-type]


def step(made: Policy, optimizer: Optimizer, seed: int) -> None:
    update(made, optimizer, rollout(3, seed=seed), config("dapo", 60), lr=0.05)


def contents(made: Policy, optimizer: Optimizer) -> dict[str, Any]:
    """Weights and both averages, whole and in float32."""
    found = {name: full(p) for name, p in made.model.named_parameters() if p.requires_grad}
    for index, values in optimizer.state_dict()["inner"]["state"].items():
        found |= {f"{index}.{name}": full(value) for name, value in values.items()}
    return {name: value.float().numpy().copy() for name, value in found.items()}


def written(world: World, folder: Path) -> dict[str, Any]:
    """A step on each model, saved; and what the same processes find in what one process has saved."""
    found: dict[str, Any] = {}
    for (name, kind), settings in CASES.items():
        made, optimizer = trained(world, settings, kind)
        fresh, again = trained(world, settings, kind)
        step(made, optimizer, 1)
        for form in ("sharded", "full"):
            place = folder / f"{name}-{kind}-{form}-{world.size}"
            state.save(
                place, 1, made.model, optimizer, keep=1, world=world, form=form, carried={"n": {"a": 0.1}}
            )
        found[f"{name} {kind}"] = contents(made, optimizer)
        own = f"{name}-{kind}-sharded-{world.size}"
        sources = [path for path in sorted(folder.glob(f"{name}-{kind}-*")) if path.name != own]
        for source in [*sources, folder / own]:  # one's own last: it is gone on with
            carried = {"n": {}}
            assert state.restore(source, fresh.model, again, carried, world=world).step == 1
            assert carried == {"n": {"a": 0.1}}
            found[f"read {source.name}"] = contents(fresh, again)
        step(made, optimizer, 2)
        step(fresh, again, 2)
        ours, theirs = contents(made, optimizer), contents(fresh, again)
        found[f"goes on {own}"] = all((ours[key] == theirs[key]).all() for key in ours)
    found["full disk"] = refused(world, folder)
    return found


def refused(world: World, folder: Path) -> list[str]:
    """A process that cannot write ends the save on all of them, and the older checkpoint stays."""
    made, optimizer = trained(world, {"family": "qwen2"}, "adamw")
    place = folder / f"full-{world.size}"
    saver = Saver(aside=True)
    state.save(place, 1, made.model, optimizer, keep=2, world=world, saver=saver)
    saver.wait()
    fsync = os.fsync

    def no_room(descriptor: int) -> None:
        if world.rank == world.size - 1:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    problem = ""
    try:
        os.fsync = no_room
        state.save(place, 2, made.model, optimizer, keep=2, world=world, saver=saver)
        saver.wait()
    except UserError as error:
        problem = str(error)
    finally:
        os.fsync = fsync
    saver.close()
    left = world.first(lambda: sorted(path.name for path in (place / "checkpoints").iterdir()))
    return [problem, *left]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    """Written by one process, read and written by two, read and written by four; one process reads all in the end."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, {
        1: [written(ALONE, folder)],
        2: run_on_ranks(2, written, folder),
        4: run_on_ranks(4, written, folder),
    }


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_any_number_of_processes_reads_what_any_other_wrote(found, name, kind):
    folder, by_size = found
    fresh, again = trained(ALONE, CASES[name, kind], kind)
    for source in sorted(folder.glob(f"{name}-{kind}-*")):
        written_by = int(source.name.rpartition("-")[2])
        wanted = by_size[written_by][0][f"{name} {kind}"]
        state.restore(source, fresh.model, again)
        readings = [contents(fresh, again)]
        readings += [
            rank[key]
            for ranks in by_size.values()
            for rank in ranks
            if (key := f"read {source.name}") in rank
        ]
        assert len(readings) >= 2
        for reading in readings:
            for key, value in wanted.items():
                if ":" not in key and key in reading:  # codes become numbers where they are shared out
                    assert (reading[key] == value).all(), (source.name, key)
        assert all(name in readings[0] for name in wanted if "." not in name or not name[0].isdigit())


def test_what_was_read_goes_on_as_if_it_had_never_stopped(found):
    _, by_size = found
    goes_on = {
        key: value
        for ranks in by_size.values()
        for r in ranks
        for key, value in r.items()
        if "goes on" in key
    }
    assert len(goes_on) == 3 * len(CASES) and all(goes_on.values()), goes_on


def test_shards_are_listed_with_their_checksums_and_none_is_pickled(found):
    folder, _ = found
    for size in (2, 4):
        path = checkpoint.latest(folder / f"whole-adamw8bit-sharded-{size}")
        assert path is not None and checkpoint.verify(path) is None
        names = {file.name for file in path.iterdir()}
        listed = json.loads((path / "manifest.json").read_text())["files"]
        assert names == {*listed, "manifest.json"}
        assert len([name for name in names if name.endswith(".safetensors")]) == size
        shard = sorted(path.glob("*.safetensors"))[-1]
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
        problem = checkpoint.verify(path)
        assert problem is not None and shard.name in problem and "corrupt" in problem


def test_a_disk_that_is_full_for_one_process_stops_the_save_for_all(found):
    _, by_size = found
    for size in (2, 4):
        for rank in by_size[size]:
            problem, *left = rank["full disk"]
            assert "No space left" in problem and "step-000001" in problem
            assert left == ["step-000001"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": 2}, "its state is that of step 2"),
        ({"step": -3}, "its state is that of step -3"),
        ({"step": 1.0}, "its state is that of step 1.0"),
        ({"carried": {"budget": {"tokens": float("nan")}}}, "carries what is no number"),
        ({"carried": {"budget": {"tokens": "many"}}}, "carries what is no number"),
    ],
)
def test_a_whole_checkpoint_with_an_impossible_state_is_refused(tmp_path, changed, message):
    made, optimizer = trained(ALONE, {"family": "llama"}, "adamw")
    step(made, optimizer, 1)
    state.save(tmp_path, 1, made.model, optimizer, keep=1)
    groups, plain = checkpoint.load(tmp_path / "checkpoints" / "step-000001")
    checkpoint.save(tmp_path, 1, groups, plain | changed)
    with pytest.raises(UserError, match=message):
        state.restore(tmp_path, made.model, optimizer)


def test_what_a_checkpoint_rests_on_is_on_the_disk_before_it(tmp_path):
    made, optimizer = trained(ALONE, {"family": "llama"}, "adamw")

    def refuses() -> None:
        assert checkpoint.latest(tmp_path) is None
        raise UserError("the log does not reach the disk")

    saver = Saver(aside=True)
    with pytest.raises(UserError, match="the log does not"):
        state.save(tmp_path, 1, made.model, optimizer, keep=1, saver=saver, before=refuses)
        saver.wait()
    saver.close()
    assert checkpoint.latest(tmp_path) is None


def test_other_prompts_than_the_run_began_with_are_refused():
    def prompts(*texts: str) -> list[Prompt]:
        return [Prompt(text, [1], None, {}) for text in texts]

    known: dict[str, float] = {}
    state.check_data(known, training=prompts("a", "b"), heldout=prompts("c"))
    state.check_data(known, training=prompts("a", "b"), heldout=prompts("c"))
    assert known.keys() == {"training", "heldout"}
    for name, changed in (("training", prompts("b", "a")), ("heldout", prompts("c", "d"))):
        given = {"training": prompts("a", "b"), "heldout": prompts("c"), name: changed}
        with pytest.raises(UserError, match=f"the {name} prompts are not those"):
            state.check_data(dict(known), **given)
