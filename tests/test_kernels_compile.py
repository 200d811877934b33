"""Every row kernel compiles for the GPUs we mean, at the launch table's settings; no GPU is needed.

Compilation happens in a process of its own: in the test session the kernels belong to the interpreter.
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
# kernel, dtype of what is stored, bias, soft cap, V a multiple of 16
VARIANTS = [
    ("softmax_rows", "bf16", False, False, True),
    ("softmax_rows", "bf16", True, True, False),
    ("softmax_rows", "fp16", True, True, True),
    ("softmax_rows", "fp32", True, True, True),
    ("entropy_rows", "bf16", False, True, True),
]


def compile_all(capability: int) -> list[dict[str, Any]]:
    """Registers, stack, shared memory and the loads and stores of each variant, from its machine code."""
    import torch
    import triton
    from grpo_kernels import _row_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    found = []
    for kernel, stored, bias, softcap, divisible in VARIANTS:
        function = getattr(_row_kernels, kernel)
        launch = _row_kernels.launch_for(capability // 10, dtypes[stored], 151_936)
        constants = {
            "HAS_BIAS": bias,
            "HAS_SOFTCAP": softcap,
            "STORE": _row_kernels.STORE_PROBABILITIES
            if stored == "fp16"
            else _row_kernels.STORE_EXPONENTIALS,
            "SLOPED": softcap,
            "PROBABILITIES": stored == "fp16",
            "BLOCK": launch.block,
        }
        constants = {
            name: getattr(value, "value", value)
            for name, value in constants.items()
            if name in function.arg_names
        }
        kinds = {"out": f"*{stored}", "stored": f"*{stored}", "bias": f"*{stored}", "targets": "*i64"}
        kinds |= {"padded": "i32", "vocabulary": "i32", "scale": "fp32", "softcap": "fp32"}
        kinds |= dict.fromkeys(constants, "constexpr")
        signature = {name: kinds.get(name, "*fp32") for name in function.arg_names}
        aligned = [name for name, kind in signature.items() if kind[0] == "*"] + ["padded"]
        aligned += ["vocabulary"] if divisible else []
        attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        compiled = triton.compile(
            ASTSource(function, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": launch.warps},
        )
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", cubin], text=True)
            code = subprocess.check_output([tools / "nvdisasm", "-c", cubin], text=True)
        resources = {name: int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL")}
        found.append(
            {
                "variant": [kernel, stored, bias, softcap, divisible],
                "threads": launch.warps * 32,
                "shared": compiled.metadata.shared,
                "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
                "wide_loads": len(re.findall(r"LDG\.E\S*\.128", code)),
                "wide_stores": len(re.findall(r"STG\.E\S*\.128", code)),
                **resources,
            }
        )
    return found


@pytest.mark.parametrize("capability", MOST_SHARED)
def test_row_kernels_compile_without_spills(capability):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = subprocess.run(
        [sys.executable, __file__, str(capability)], env=environment, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    results = json.loads(output.stdout.splitlines()[-1])
    assert [tuple(result["variant"]) for result in results] == VARIANTS
    for result in results:
        assert result["STACK"] == result["LOCAL"] == result["spills"] == 0, result
        assert result["shared"] <= MOST_SHARED[capability], result
        assert 1024 * result["REG"] <= REGISTERS, f"fewer than 1024 threads fit an SM: {result}"
        # what the kernels live by: 16 bytes at once, whatever the vocabulary's remainder
        assert result["wide_loads"] and result["wide_stores"], result


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
