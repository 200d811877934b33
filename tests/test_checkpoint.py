"""A checkpoint is whole or not there, and says what is wrong when it is neither."""

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_fast.errors import UserError
from grpo_fast.run import checkpoint


def groups(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((4, 3), value), "step": torch.tensor(7, dtype=torch.int64)},
        "optimizer": {"0.exp_avg": torch.full((4, 3), 2 * value, dtype=torch.bfloat16)},
    }


def files_of(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()
    }


def names_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_round_trip_is_exact_for_every_dtype_and_layout(tmp_path):
    floats = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.bool,
    ]
    named = {str(kind): floats.mul(10).to(kind) for kind in [*kinds, torch.int8, torch.float8_e4m3fn]}
    named |= {
        "0d": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "strided": floats.t(),
        "slice": floats[1:3],
    }
    path = checkpoint.save(tmp_path, 3, {"all": named}, {"loss": 0.1 + 0.2, "names": ["ä", "\u2028"]})
    loaded, state = checkpoint.load(path)
    assert state == {"loss": 0.1 + 0.2, "names": ["ä", "\u2028"]}
    assert loaded["all"].keys() == named.keys()
    for name, tensor in named.items():
        back = loaded["all"][name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert back.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8)), name


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    embedding = torch.randn(100, 8)
    named = {"embed.weight": embedding, "lm_head.weight": embedding, "other": embedding.clone()}
    path = checkpoint.save(tmp_path, 1, {"model": named}, {})
    loaded = checkpoint.load(path)[0]["model"]
    assert loaded["embed.weight"] is loaded["lm_head.weight"]
    assert loaded["other"] is not loaded["embed.weight"]
    assert (path / "model.safetensors").stat().st_size < 2.5 * embedding.numel() * 4


def test_only_the_last_ones_stay_and_latest_is_by_number(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 10, 999_999, 1_000_000):
        checkpoint.save(tmp_path, step, groups(), {}, keep=2)
    assert names_of(tmp_path) == ["step-1000000", "step-999999"]
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and latest.name == "step-1000000"
    checkpoint.save(tmp_path, 1_000_001, groups(), {}, keep=1)
    assert names_of(tmp_path) == ["step-1000001"]


def test_the_same_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 5, groups(1.0), {"n": 1})
    loaded, state = checkpoint.load(checkpoint.save(tmp_path, 5, groups(2.0), {"n": 2}))
    assert state == {"n": 2} and loaded["model"]["w"][0, 0] == 2
    assert names_of(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_goes_on_exactly_as_if_never_stopped(tmp_path, make, fused):
    def build() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, make(model.parameters(), lr=0.1, weight_decay=0.01, fused=fused)

    def train(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()

    whole, optimizer = build()
    train(whole, optimizer, 6)
    first, optimizer = build()
    train(first, optimizer, 3)
    tensors, plain = checkpoint.flatten_optimizer(optimizer.state_dict())
    path = checkpoint.save(
        tmp_path, 3, {"model": first.state_dict(), "optimizer": tensors}, {"optimizer": plain}
    )
    loaded, state = checkpoint.load(path)
    second, optimizer = build()
    second.load_state_dict(loaded["model"])
    optimizer.load_state_dict(checkpoint.unflatten_optimizer(loaded["optimizer"], state["optimizer"]))
    train(second, optimizer, 3)
    assert second.weight.equal(whole.weight) and second.bias.equal(whole.bias)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def put(text: str):
    return lambda path: path.write_text(text)


def swap(old: str, new: str):
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", cut, "bytes, found"),
        ("model.safetensors", flip, "corrupt, expected sha256"),
        ("state.json", Path.unlink, "missing, expected"),
        ("manifest.json", Path.unlink, "missing, so this folder is not a checkpoint"),
        ("manifest.json", put('{"format": "grpo'), "cannot read it"),
        ("manifest.json", lambda path: path.write_bytes(b"\x80\x04\xff"), "cannot read it"),
        ("manifest.json", put("[]"), "another program's file"),
        ("manifest.json", put('{"model": 1}'), "another program's file"),
        ("manifest.json", swap('version": 1', 'version": 9'), "expected format version 1 or 2, found 9"),
        ("manifest.json", swap('"state.json"', '"../../x"'), "expected the files"),
        ("manifest.json", swap('"size"', '"sz"'), "size and sha256"),
    ],
)
def test_damage_is_one_line_with_the_way_out(tmp_path, name, damage, words):
    good = checkpoint.save(tmp_path, 1, groups(), {})
    path = checkpoint.save(tmp_path, 2, groups(), {})
    damage(path / name)
    with pytest.raises(UserError) as raised:
        checkpoint.load(path)
    message = str(raised.value)
    assert "\n" not in message and message.startswith(f"{path / name}: ") and words in message
    assert message.endswith(
        f"{good} is whole: remove {path} and continue from there with --resume {tmp_path}"
    )
    damage(good / name)
    with pytest.raises(UserError, match="no other checkpoint of this run is whole"):
        checkpoint.load(path)


def test_a_file_that_is_no_safetensors_though_its_checksum_fits(tmp_path):
    path = checkpoint.save(tmp_path, 1, groups(), {})
    manifest = json.loads((path / "manifest.json").read_text())
    junk = b"\x80\x04pickled"
    (path / "model.safetensors").write_bytes(junk)
    manifest["files"]["model.safetensors"] = {"size": len(junk), "sha256": hashlib.sha256(junk).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not a readable safetensors file"):
        checkpoint.load(path)


def test_a_missing_checkpoint_names_the_good_one(tmp_path):
    good = checkpoint.save(tmp_path, 1, groups(), {})
    with pytest.raises(UserError, match=f"found nothing; {good} is whole: continue"):
        checkpoint.load(tmp_path / "checkpoints" / "step-000009")


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, groups(), {})
    before = files_of(tmp_path)
    real_fsync = os.fsync
    calls = []

    def full_at_the_second_file(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_second_file)
    with pytest.raises(UserError) as raised:
        checkpoint.save(tmp_path, 2, groups(), {})
    assert "step-000002: No space left on device (needs 0.0 MiB" in str(raised.value)
    assert str(raised.value).endswith(f"intact, newest {tmp_path / 'checkpoints' / 'step-000001'}")
    assert files_of(tmp_path) == before and names_of(tmp_path) == ["step-000001"]


def test_every_name_on_the_way_to_a_checkpoint_reaches_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint, "fsync_folder", synced.append)
    saved = checkpoint.save(tmp_path, 1, groups(), {})
    assert synced == [tmp_path, saved.with_name(".step-000001.tmp"), saved.parent]
    checkpoint.save(tmp_path, 2, groups(), {})
    assert tmp_path not in synced[3:]  # its entry is there already


def test_a_refusal_by_the_system_half_way_through_a_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint.save(tmp_path, 1, groups(), {})
    before = files_of(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            checkpoint.save(tmp_path, 2, {"model": {"big": torch.zeros(200_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_of(tmp_path) == before and names_of(tmp_path) == ["step-000001"]


def test_an_interrupt_while_saving_leaves_nothing_behind(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, groups(), {})
    before = files_of(tmp_path)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, groups(), {})
    assert files_of(tmp_path) == before and names_of(tmp_path) == ["step-000001"]


def test_a_killed_process_leaves_a_hidden_folder_that_the_next_save_removes(tmp_path):
    script = (
        "import os, sys, torch\nfrom grpo_fast.run import checkpoint\n"
        "checkpoint.fsync_folder = lambda path: path.name.endswith('.tmp') and os._exit(9)\n"
        "checkpoint.save(sys.argv[1], 1, {'model': {'w': torch.ones(3)}}, {})\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 9
    assert len(names_of(tmp_path)) == 1 and checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 2, groups(), {})
    assert names_of(tmp_path) == ["step-000002"]


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="group name"):
        checkpoint.save(tmp_path, 1, {"../up": {}}, {})
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, groups(), {"a": object()})
    with pytest.raises(UserError, match="at least 1, got 0"):
        checkpoint.save(tmp_path, 1, groups(), {}, keep=0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="complex64"):
        checkpoint.save(tmp_path, 1, {"model": {"c": torch.zeros(2, dtype=torch.complex64)}}, {})
    assert names_of(tmp_path) == []
