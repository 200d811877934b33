"""The hand-over of weights on a CUDA device: what another process finds in the shared buffer, and the NCCL calls.

The receiving side does what vLLM's weight transfer does with a packed parcel, so no vLLM is needed.
"""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RECEIVER = """
import base64, pickle, sys, torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
torch.cuda.init()
held = None
for line in sys.stdin:
    pickled, *sizes = line.split()
    [(uuid, arguments)] = pickle.loads(base64.b64decode(pickled)).items()
    assert uuid == str(torch.cuda.get_device_properties(0).uuid)
    arguments = list(arguments)
    arguments[6] = 0
    key = tuple(arguments)
    if held is None or held[0] != key:
        held = key, rebuild_cuda_tensor(*arguments)
    parts = held[1][: sum(map(int, sizes))].split([int(size) for size in sizes])
    print(*[part.to(torch.int64).sum().item() for part in parts], flush=True)
"""


def test_another_process_reads_every_chunk(monkeypatch) -> None:
    from grpo_fast.engines import vllm_weights

    monkeypatch.setattr(vllm_weights, "CHUNK_BYTES", 1 << 20)
    device = torch.device("cuda:0")
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(300, 700), (5,), (1000, 1000), (64, 64), (3,)]  # the third is larger than a chunk
    named = [
        (str(i), torch.randn(size, generator=generator, device=device).to(dtype))
        for i, (size, dtype) in enumerate(zip(sizes, [torch.bfloat16] * 4 + [torch.float32], strict=True))
    ]
    transfer = vllm_weights.CudaIpc(device)
    seen = 0
    with subprocess.Popen(
        [sys.executable, "-c", RECEIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as receiver:
        assert receiver.stdin is not None and receiver.stdout is not None
        for _ in range(2):  # a second hand-over exports a buffer of its own
            for chunk in vllm_weights.chunks(named, vllm_weights.CHUNK_BYTES):
                info = transfer.parcel(chunk).info
                assert info["names"] == [name for name, _ in chunk]
                receiver.stdin.write(
                    f"{info['ipc_handles_pickled']} {' '.join(map(str, info['tensor_sizes']))}\n"
                )
                receiver.stdin.flush()
                sums = list(map(int, receiver.stdout.readline().split()))
                want = [tensor.view(-1).view(torch.uint8).to(torch.int64).sum().item() for _, tensor in chunk]
                assert sums == want
                seen += len(chunk)
            transfer.finish()
        receiver.stdin.close()
    assert seen == 2 * len(named)


def test_a_handle_is_pickled_without_this_project() -> None:
    """The server's environment has torch and nothing of ours."""
    from grpo_fast.engines.vllm_weights import CudaIpc

    info = CudaIpc(torch.device("cuda:0")).parcel([("w", torch.ones(4, device="cuda:0"))]).info
    raw = base64.b64decode(info["ipc_handles_pickled"])
    assert b"grpo_fast" not in raw
    [(_, arguments)] = pickle.loads(raw).items()
    assert arguments[6] == 0 and len(arguments) >= 15


def test_nccl_alone() -> None:
    """A group of one: the library is found, and its functions take what they are given."""
    from grpo_fast.engines.nccl import Communicator, new_unique_id

    group = Communicator(new_unique_id(), rank=0, world_size=1, device=torch.device("cuda:0"))
    buffer = torch.arange(256, dtype=torch.uint8, device="cuda:0")
    group.broadcast(buffer)
    assert buffer.tolist() == list(range(256))
    group.abort()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl_between_two_processes() -> None:
    from grpo_fast.engines.nccl import Communicator, new_unique_id

    unique_id = new_unique_id()
    receiver = (
        "import sys, base64, torch; from grpo_fast.engines.nccl import Communicator\n"
        "group = Communicator(base64.b64decode(sys.argv[1]), rank=1, world_size=2, device=torch.device('cuda:1'))\n"
        "buffer = torch.zeros(1 << 20, dtype=torch.uint8, device='cuda:1'); group.broadcast(buffer)\n"
        "print(buffer.to(torch.int64).sum().item())\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    with subprocess.Popen(
        [sys.executable, "-c", receiver, base64.b64encode(unique_id).decode()],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        group = Communicator(unique_id, rank=0, world_size=2, device=torch.device("cuda:0"))
        buffer = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device="cuda:0")
        group.broadcast(buffer)
        said, _ = process.communicate(timeout=120)
    assert int(said) == buffer.to(torch.int64).sum().item()
