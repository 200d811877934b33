"""Paged attention: the plain twin and the kernels (interpreted where there is no GPU) against float64."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from grpo_fast.attention import paged
from grpo_fast.attention.paged import FP8, reference
from tests.paged_cases import exact, random_case
from tests.test_kernels_compile import MOST_SHARED, measure

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
# grouped, single and full key heads; widths that are no power of two; a value width of its own
CASES = [
    ((4, 2, 16, None), None, None),
    ((6, 1, 24, None), 1, None),
    ((3, 3, 32, 16), 70, None),
    ((4, 2, 16, None), None, 2.0),
    ((6, 1, 24, None), 140, 2.0),
]


@pytest.mark.parametrize(("shape", "window", "softcap"), CASES)
def test_the_plain_twin(shape, window, softcap) -> None:
    heads, key_heads, dim, value_dim = shape
    options = {"scale": 0.4, "window": window, "softcap": softcap}
    q, pages = random_case(heads, key_heads, dim, torch.float64, value_dim=value_dim)
    torch.testing.assert_close(reference(q, pages, **options), exact(q, pages, **options))


@needs_triton
@pytest.mark.parametrize(("dtype", "parts"), [(torch.float32, 4), (torch.float16, 1)])
@pytest.mark.parametrize(("shape", "window", "softcap"), CASES)
def test_kernel(shape, window, softcap, parts: int, dtype: torch.dtype) -> None:
    """No further from float64 than the rounding of its operands."""
    from grpo_fast.attention.paged_kernel import paged_attention_triton

    heads, key_heads, dim, value_dim = shape
    options = {"scale": 0.4, "window": window, "softcap": softcap}
    q, pages = random_case(heads, key_heads, dim, dtype, value_dim=value_dim)
    got = paged_attention_triton(q, pages, parts=parts, **options)
    assert got.dtype == dtype and got.shape == (len(q), heads, value_dim or dim)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got.double(), exact(q, pages, **options), atol=tolerance, rtol=tolerance)


@needs_triton
@pytest.mark.parametrize("parts", [1, 4])
def test_kernel_of_eight_bits(parts: int) -> None:
    """Keys and values of eight bits are read as they are stored: exact but for the rounding of q and p."""
    from grpo_fast.attention.paged_kernel import paged_attention_triton

    q, pages = random_case(4, 2, 16, torch.float32, fp8=True)
    assert pages.keys.dtype == FP8
    options = {"scale": 0.4, "window": 140, "softcap": None}
    want = exact(q, pages, **options)
    torch.testing.assert_close(reference(q, pages, **options).double(), want, atol=1e-5, rtol=1e-5)
    got = paged_attention_triton(q, pages, parts=parts, **options)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize(
    ("stored", "windowed", "softcap"),
    [(torch.float16, False, None), (torch.float16, True, 3.0), (FP8, True, None)],
)
def test_the_probe_takes_a_kernel_that_is_right_and_no_other(
    stored, windowed, softcap, monkeypatch, caplog
) -> None:
    from grpo_fast.attention import paged_kernel

    arguments = (torch.device("cpu"), torch.float16, stored, (4, 2, 32, 32), windowed, softcap)
    probe = paged._kernel_works.__wrapped__
    assert probe(*arguments) and not caplog.records
    monkeypatch.setattr(paged_kernel, "paged_attention_triton", lambda q, pages, **_: q * 0.9)
    assert not probe(*arguments) and "differs from the reference" in caplog.text
    monkeypatch.setattr(paged_kernel, "paged_attention_triton", lambda q, pages, **_: 1 / 0)
    assert not probe(*arguments) and "division by zero" in caplog.text


@needs_triton
def test_parts_fill_the_device_and_no_more() -> None:
    from grpo_fast.attention.paged_kernel import MOST_PARTS, parts_for

    assert parts_for(264, 132, 64) == 1
    assert parts_for(8, 132, 64) == MOST_PARTS
    assert parts_for(8, 132, 3) == 2
    assert parts_for(100, 132, 64) == 4


# dtype of q, of what is stored, head width, query heads a key head, softcap and window
VARIANTS = [
    ("bf16", "bf16", 128, 7, False),
    ("bf16", "bf16", 256, 2, True),
    ("bf16", "fp8e4nv", 128, 8, False),
    ("fp32", "fp32", 64, 4, True),
    ("fp32", "fp32", 256, 2, True),
]


def compile_paged(capability: int) -> list[dict]:
    """Both kernels at their launch settings, measured."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from grpo_fast.attention import paged_kernel

    found = []
    for dtype, stored, dim, group, special in VARIANTS:
        if stored.startswith("fp8") and capability < 89:
            continue  # no conversion there: the probe says so and the plain way is taken
        chosen = paged_kernel.constants(
            4 * group,
            4,
            dim,
            dim,
            parts=8,
            window=special,
            softcap=special,
            scales=stored.startswith("fp8"),
            exact=dtype == "fp32",
        )
        kinds = {"q": f"*{dtype}", "out": f"*{dtype}", "keys": f"*{stored}", "values": f"*{stored}"}
        kinds |= {"table": "*i32", "prompt_lens": "*i32", "own_lens": "*i32", "width": "i32", "window": "i32"}
        kinds |= {"scale": "fp32", "softcap": "fp32"}
        stages = paged_kernel.stages_for(dim, dim, 4 if dtype == "fp32" else 2)
        for function, warps in (
            (paged_kernel.attend_pages, paged_kernel.WARPS),
            (paged_kernel.merge_parts, 1),
        ):
            constants = {name: value for name, value in chosen.items() if name in function.arg_names}
            signature = {
                name: "constexpr" if name in constants else kinds.get(name, "*fp32")
                for name in function.arg_names
            }
            aligned = [name for name, kind in signature.items() if kind[0] == "*"]
            compiled = triton.compile(
                ASTSource(
                    function,
                    signature,
                    constants,
                    {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
                ),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": warps, "num_stages": stages},
            )
            found.append({"variant": [function.__name__, dtype, stored, dim], **measure(compiled)})
    return found


@needs_triton
@pytest.mark.parametrize("capability", MOST_SHARED)
def test_kernels_compile_without_spills(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_kernels_decode", str(capability)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    results = json.loads(output.stdout.splitlines()[-1])
    assert len(results) == 2 * (len(VARIANTS) - (capability < 89))
    for result in results:
        assert result["STACK"] == result["LOCAL"] == result["spills"] == 0, result
        programs = 1 if result["variant"][1:] == ["fp32", "fp32", 256] else 2
        assert programs * result["shared"] <= MOST_SHARED[capability], f"too few fit an SM: {result}"


if __name__ == "__main__":
    print(json.dumps(compile_paged(int(sys.argv[1]))))
