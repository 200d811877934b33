"""Every kernel of the loss head compiles for the GPUs we mean, at the launch tables' settings; no GPU is needed.

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
# the fused product: dtype, mode, of rows done again, bias, soft cap, by descriptors where there are any
PRODUCTS = [
    ("bf16", "STORE_EXPONENTIALS", False, False, False, True),
    ("bf16", "STORE_EXPONENTIALS", False, True, False, False),
    ("bf16", "STORE_EXPONENTIALS", True, True, True, True),
    ("bf16", "NO_STORE", False, True, True, True),
    ("bf16", "MAXIMA", True, False, False, True),
    ("fp16", "STORE_PROBABILITIES", False, True, True, True),
    ("fp32", "STORE_EXPONENTIALS", False, True, True, True),
]
# what nvdisasm shows where the tensor cores work: from registers, from shared memory, into their own memory
TENSOR_CORES = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}


def measure(compiled: Any) -> dict[str, Any]:
    """Registers, stack, shared memory and the instructions that matter, from a kernel's machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", cubin], text=True)
        code = subprocess.check_output([tools / "nvdisasm", "-c", cubin], text=True)
    resources = {name: int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL")}
    return {
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": len(re.findall(r"LDG\.E\S*\.128", code)),
        "wide_stores": len(re.findall(r"STG\.E\S*\.128", code)),
        "descriptor_loads": len(re.findall(r"\bUTMALDG\b", code)),
        **{name: len(re.findall(rf"\b{name}\b", code)) for name in TENSOR_CORES.values()},
        **resources,
    }


def compile_rows(capability: int) -> list[dict[str, Any]]:
    """Each variant of the row kernels, measured."""
    import torch
    import triton
    from grpo_kernels import _row_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
        found.append({"variant": [kernel, stored, bias, softcap, divisible], **measure(compiled)})
    return found


def compile_products(capability: int) -> list[dict[str, Any]]:
    """Each variant of the fused product, measured."""
    import torch
    import triton
    from grpo_kernels import _fused_kernels, _row_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    modes = vars(_row_kernels) | vars(_fused_kernels)
    function = _fused_kernels.fused_rows
    found = []
    for kind, mode, redo, bias, softcap, describable in PRODUCTS:
        tile = _fused_kernels.tile_for(capability // 10, dtypes[kind], describable=describable)
        constants = {
            "hidden_column": 1,
            "weight_column": 1,
            "HAS_BIAS": bias,
            "HAS_SOFTCAP": softcap,
            "MODE": modes[mode].value,
            "SLOPED": softcap,
            "REDO": redo,
            "DESCRIPTORS": tile.descriptors,
            "PRECISION": "tf32x3" if kind == "fp32" else "tf32",
            "BLOCK_ROWS": tile.rows,
            "BLOCK_COLUMNS": tile.columns,
            "BLOCK_DEPTH": tile.depth,
        }
        aligned = ["n", "width", "vocabulary", "padded", "hidden_row", "weight_row"]
        kinds = dict.fromkeys(("hidden", "weight", "bias", "stored"), f"*{kind}")
        kinds |= {"places": "*i32", "overflow": "*i32", "scale": "fp32", "softcap": "fp32"}
        kinds |= dict.fromkeys(aligned, "i32") | dict.fromkeys(constants, "constexpr")
        if tile.descriptors:
            kinds["hidden"] = f"tensordesc<{kind}[{tile.rows}, {tile.depth}]>"
            kinds["weight"] = f"tensordesc<{kind}[{tile.columns}, {tile.depth}]>"
        signature = {name: kinds.get(name, "*fp32") for name in function.arg_names}
        aligned += [name for name, type_ in signature.items() if type_[0] == "*"]
        compiled = triton.compile(
            ASTSource(
                function,
                signature,
                constants,
                {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
        found.append(
            {
                "variant": [kind, mode, redo, bias, softcap, describable],
                "descriptors": tile.descriptors,
                **measure(compiled),
            }
        )
    return found


def results_of(name: str, capability: int) -> list[dict[str, Any]]:
    """What a function of this file returns in a process where Triton compiles."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = subprocess.run(
        [sys.executable, __file__, name, str(capability)], env=environment, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    return json.loads(output.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", MOST_SHARED)
def test_row_kernels_compile_without_spills(capability):
    results = results_of("compile_rows", capability)
    assert [tuple(result["variant"]) for result in results] == VARIANTS
    for result in results:
        assert result["STACK"] == result["LOCAL"] == result["spills"] == 0, result
        assert result["shared"] <= MOST_SHARED[capability], result
        assert 1024 * result["REG"] <= REGISTERS, f"fewer than 1024 threads fit an SM: {result}"
        # what the kernels live by: 16 bytes at once, whatever the vocabulary's remainder
        assert result["wide_loads"] and result["wide_stores"], result


@pytest.mark.parametrize("capability", MOST_SHARED)
def test_fused_product_compiles_to_tensor_cores_without_spills(capability):
    results = results_of("compile_products", capability)
    assert [tuple(result["variant"]) for result in results] == PRODUCTS
    for result in results:
        assert result["STACK"] == result["LOCAL"] == result["spills"] == 0, result
        assert result["shared"] <= MOST_SHARED[capability], result
        assert result[TENSOR_CORES[capability]], result
        assert bool(result["descriptor_loads"]) == result["descriptors"], result
        assert bool(result["wide_stores"]) == result["variant"][1].startswith("STORE"), result


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](int(sys.argv[2]))))
