"""The kernels of grpo_loss and group_advantages compile for the GPUs we mean, as their callers launch them.

In a process of its own, since in the test session the kernels belong to the interpreter: there the public
functions run on CPU tensors up to each launch, which compiles and is not carried out. No GPU is needed.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

MOST_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may have
REGISTERS = 65_536  # of an SM


def call_all() -> None:
    """Every kernel, with few and with all rows of the table at work, in blocks of every size."""
    import torch
    from grpo_kernels import LossConfig, group_advantages, grpo_loss

    busy: dict[str, Any] = {
        "kl": "k3_corrected",
        "kl_coef": 0.1,
        "entropy_coef": 0.1,
        "entropy_quantile": 0.5,
    }
    busy |= {"dual_clip": 3.0, "ratio_cap": 4.0}
    coupled = busy | {"mismatch": "sequence_mask", "off_policy_threshold": 0.2}
    for config, sequences, length in (
        (LossConfig.preset("dapo"), 1, 4096),
        (LossConfig.preset("dapo", mismatch="mask", **busy), 1, 4096),
        (LossConfig.preset("vespo"), 16, 100),
        (LossConfig.preset("gspo", **coupled), 4, 400),
        (LossConfig.preset("gspo", **coupled), 2, 5000),
    ):
        count = sequences * length
        given = dict.fromkeys(
            ("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy"), torch.zeros(count)
        )
        if config == LossConfig.preset("dapo"):
            given = {"old_logprobs": given["old_logprobs"]}
        given |= {"loss_mask": torch.ones(count, dtype=torch.bool)}
        given |= {"cu_seqlens": length * torch.arange(sequences + 1, dtype=torch.int32)}
        grpo_loss(torch.zeros(count), torch.zeros(count), config, backend="triton", **given)
    for mode, scale, sizes in (
        ("gdpo", "group", [8] * 64),
        ("per_head", "batch", [1024, 900]),
        ("dvao", "batch", [9] * 32),
        ("scalarized", "batch", [64] * 16),
        ("leave_one_out", "none", [16] * 64),
    ):
        rewards = torch.zeros(sum(sizes), 3)
        options: dict[str, Any] = {"mode": mode, "scale": scale, "weights": [1.0, 2.0, 0.5]}
        group_advantages(rewards, group_sizes=sizes, backend="triton", **options)


def compile_all(capability: int) -> list[dict[str, Any]]:
    """Name, registers, stack, shared memory and local accesses of each kernel that the calls ask for."""
    import torch
    import triton
    from grpo_kernels import _advantage_kernels, _triton_loss
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class Device:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    launched: dict[str, tuple[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel: Any = run(self, *args, grid=grid, warmup=True, **options)
        launched[kernel.hash] = (self.fn.__name__, kernel)
        return kernel

    driver.set_active(Device())  # type: ignore[arg-type]
    JITFunction.run = compile_only
    _triton_loss.require_gpu = _advantage_kernels.require_gpu = lambda device: None
    torch.manual_seed(0)
    call_all()

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = []
    for name, kernel in launched.values():
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", cubin], text=True)
            code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
        resources = {key: int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL")}
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
        shape = {"threads": 32 * kernel.metadata.num_warps, "shared": kernel.metadata.shared}
        found.append({"kernel": name, "code": len(code), "spills": spills, **shape, **resources})
    return found


@pytest.mark.parametrize("capability", MOST_SHARED)
def test_kernels_compile_without_spills(capability):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = subprocess.run(
        [sys.executable, __file__, str(capability)], env=environment, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    results = json.loads(output.stdout.splitlines()[-1])
    kernels = {"token_losses", "combine_partials", "group_rows", "batch_spread", "standardise"}
    assert {result["kernel"] for result in results} == kernels
    assert sum(result["kernel"] == "token_losses" for result in results) == 5
    for result in results:
        assert result["code"] and result["LOCAL"] == 0, result
        if (
            result["kernel"] == "group_rows"
        ):  # float64 roots and divisions are calls, which may need a word or two
            assert result["STACK"] <= 16, result
        else:
            assert result["STACK"] == result["spills"] == 0, result
        assert result["shared"] <= MOST_SHARED[capability], result
        assert result["threads"] * result["REG"] <= REGISTERS, f"does not fit an SM: {result}"
        if result["kernel"] == "token_losses":
            assert 640 * result["REG"] <= REGISTERS, f"fewer than 640 threads fit an SM: {result}"


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
