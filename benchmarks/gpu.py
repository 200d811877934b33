"""Everything there is to measure on a GPU, unattended, one JSON file a shape.

    python -m benchmarks.gpu --output benchmarks/results

Runs the loss head in bf16 at the head shapes of Qwen2.5 (0.5B, 1.5B, 7B, 14B), trained, frozen and forward
only, against the cuBLAS time of the same products in the same run; the layers of the same models as they are, compiled
and with Liger; the two elementwise operations against the time of a copy of the same bytes; the memory planner against
the allocator; then whole steps at 0.5B, 1.5B and 7B (`benchmarks.step`), and one of GRPO, PPO and DPO at 0.5B and 7B
(`benchmarks.cost.steps`). What fails is reported and the others go on.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from grpo_kernels import LossConfig, group_advantages, grpo_loss

from benchmarks import body, loss_head, memory
from benchmarks.cost import steps as cost_steps
from benchmarks.machine import device_name
from benchmarks.step import gpu as steps

SHAPES = (
    "8192,896,151936",
    "8192,1536,151936",
    "8192,3584,152064",
    "8192,5120,152064",
    "65536,896,151936",
    "32768,3584,152064",
    "4096,4096,131072",
)
PARTS = ("loss_head", "body", "memory", "elementwise", "step", "cost")
MODES = ("trained", "frozen", "forward")


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 where any run failed or disagreed with float64."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="benchmarks/results", help="folder for the JSON files")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens,hidden size,vocabulary")
    parser.add_argument(
        "--contenders", default="products,triton,fused,eager,compiled,liger,liger_cross_entropy"
    )
    parser.add_argument("--step-cases", nargs="*", default=[], help="whole steps: only these cases")
    parser.add_argument(
        "--step-seconds", type=float, default=480, help="whole steps: they take no longer than this"
    )
    parser.add_argument(
        "--cost-seconds", type=float, default=900, help="a step of each algorithm: no longer than this"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device found", file=sys.stderr)
        return 2
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    if "loss_head" in args.parts:
        failed += loss_heads(folder, args.shapes, args.contenders)
    for suite, run in (("body", body.main), ("memory", memory.main)):
        name = f"{suite}.json"
        if suite in args.parts and _failed(name, run, ["--device", "cuda", "--output", str(folder / name)]):
            failed.append(name)
    if "elementwise" in args.parts:
        (folder / "elementwise.json").write_text(json.dumps(elementwise(), indent=1) + "\n")
    torch.cuda.empty_cache()  # what follows runs in processes of its own
    if "step" in args.parts and steps.run_cases(folder, args.step_cases, args.step_seconds):
        failed.append("step")
    if "cost" in args.parts:
        options = ["--output", str(folder / "cost-steps-cuda.json"), "--seconds", str(args.cost_seconds)]
        if _failed("cost", cost_steps.main, options):
            failed.append("cost")
    print(f"done; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


def loss_heads(folder: Path, shapes: Sequence[str], contenders: str) -> list[str]:
    """Every shape in every mode; the files of those that failed."""
    failed = []
    for shape in shapes:
        for mode in MODES:
            name = f"loss_head_{shape.replace(',', 'x')}_{mode}.json"
            options = ["--device", "cuda", "--dtype", "bfloat16", "--shape", shape, "--mode", mode]
            options += ["--contenders", contenders, "--output", str(folder / name)]
            if _failed(name, loss_head.main, options):
                failed.append(name)
    return failed


def _failed(name: str, run: Callable[[list[str]], int], options: list[str]) -> bool:
    """Whether a benchmark failed; whatever it raises must not cost the others (one shape out of memory)."""
    try:
        return bool(run(options))
    except (Exception, SystemExit) as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return True


def elementwise(device: str = "cuda", *, repeats: int = 30) -> dict[str, Any]:
    """`grpo_loss` forward and backward, and `group_advantages`, beside a copy of the bytes they must move.

    Milliseconds of each repeat, for 2^12, 2^18 and 2^24 tokens, and as many rewards of four heads.
    """
    config = LossConfig.preset("grpo", kl_coef=0.04, aggregation="token_mean")
    record: dict[str, Any] = {
        "benchmark": "elementwise",
        "device": device_name(device),
        "samples_ms": {},
    }
    for power in (12, 18, 24):
        for name, run in _elementwise_runs(2**power, config, device).items():
            record["samples_ms"][f"{name}, {2**power} rows"] = _times(run, repeats)
    for name, samples in record["samples_ms"].items():
        print(f"{name:45}{statistics.median(samples):>10.4f} ms")
    return record


def _elementwise_runs(tokens: int, config: LossConfig, device: str) -> dict[str, Callable[[], object]]:
    logprobs = (-torch.rand(tokens, device=device)).requires_grad_()
    old, ref = logprobs.detach() + 0.1, logprobs.detach() - 0.1
    advantages, rewards = torch.randn(tokens, device=device), torch.randn(tokens, 4, device=device)
    loss_bytes = torch.empty(
        14 * tokens, dtype=torch.uint8, device=device
    )  # of 28: 16 + 4 forward, 8 backward
    reward_bytes = torch.empty(
        10 * tokens, dtype=torch.uint8, device=device
    )  # of 20: four rewards, an advantage

    def loss() -> None:
        value, _ = grpo_loss(logprobs, advantages, config, old_logprobs=old, ref_logprobs=ref)
        torch.autograd.grad(value, logprobs)

    return {
        "grpo_loss": loss,
        "copy for grpo_loss": loss_bytes.clone,
        "group_advantages": lambda: group_advantages(rewards, group_size=8, mode="gdpo"),
        "copy for group_advantages": reward_bytes.clone,
    }


def _times(run: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds between two events around each call, after three calls of warm-up."""
    samples = []
    for repeat in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 3:
            samples.append(start.elapsed_time(end))
    return samples


if __name__ == "__main__":
    sys.exit(main())
