"""The benchmark of the loss head where a contender does not live to the end."""

import json
import threading
from multiprocessing import Pipe
from typing import Any

import pytest
import torch

from benchmarks import loss_head

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 19.90 GiB.\nGPU 0 has 1 GiB free.")


def failing(error: BaseException, calls: int) -> Any:
    """A contender without results whose call fails after so many."""

    def contender(problem: Any, mode: str) -> Any:
        done = []

        def run() -> tuple[()]:
            done.append(1)
            if len(done) > calls:
                raise error
            return ()

        return run

    return contender


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch):
    """Contenders of this test instead of processes that would not know them; a thread that fails hangs up."""

    def start(name: str, spec: dict[str, Any]) -> Any:
        here, there = Pipe()

        def work() -> None:
            try:
                loss_head._worker(name, spec, there)
            except SystemExit:
                pass
            finally:
                there.close()

        thread = threading.Thread(target=work)
        thread.start()
        return thread, here

    contenders = {
        "products": failing(FULL, 10**9),
        "eager": failing(FULL, 4),  # the second of the timed calls: two come before, and one to warm up
        "liger": failing(RuntimeError("DefaultCPUAllocator: can't allocate memory: 3 bytes"), 1),
        "torch": failing(SystemExit(), 3),  # as if ended by the system
    }
    monkeypatch.setattr(loss_head, "CONTENDERS", contenders)
    monkeypatch.setattr(loss_head, "_start", start)


def test_a_contender_out_of_memory_loses_the_others_nothing(in_threads, tmp_path, capsys):
    path = tmp_path / "record.json"
    flags = ["--shape", "8,4,11", "--repeats", "3", "--warmup", "1", "--output", str(path)]
    assert loss_head.main([*flags, "--contenders", "products,eager,liger,torch"]) == 0
    record = json.loads(path.read_text())
    rows = record["contenders"]
    assert rows["products"]["error"] is None and len(rows["products"]["samples_s"]) == 3
    assert rows["eager"]["error"] == rows["liger"]["error"] == "out of memory"
    assert rows["torch"]["error"] == "its process ended"
    assert rows["eager"]["samples_s"] == rows["torch"]["samples_s"] == []
    assert set(record["median_s"]) == {"products"}
    assert "eager                    -  out of memory" in capsys.readouterr().out


def test_the_end_of_a_process_is_noticed():
    spec = {"threads": 1, "device": "cpu", "shape": (8, 4, 11), "sequences": 1, "dtype": "float32"}
    process, link = loss_head._start("products", spec | {"mode": "forward"})
    process.kill()
    process.join()
    assert link.poll(30), "nobody hangs up"
    assert loss_head._answer(link)["error"] == "its process ended"
