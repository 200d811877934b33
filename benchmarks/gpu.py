"""Everything there is to measure on a GPU, unattended, one JSON file a shape.

    python -m benchmarks.gpu --output benchmarks/results

Runs the loss head in bf16 at the head shapes of Qwen2.5 (0.5B, 1.5B, 7B, 14B), trained, frozen and forward
only, against the cuBLAS time of the same products in the same run. A shape that fails is reported and the
others go on.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import loss_head

SHAPES = ("8192,896,151936", "8192,1536,151936", "8192,3584,152064", "8192,5120,152064", "32768,3584,152064")
MODES = ("trained", "frozen", "forward")


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 where any run failed or disagreed with float64."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="benchmarks/results", help="folder for the JSON files")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens,hidden size,vocabulary")
    parser.add_argument("--contenders", default="products,triton,eager,liger")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device found", file=sys.stderr)
        return 2
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for shape in args.shapes:
        for mode in MODES:
            name = f"loss_head_{shape.replace(',', 'x')}_{mode}.json"
            options = ["--device", "cuda", "--dtype", "bfloat16", "--shape", shape, "--mode", mode]
            options += ["--contenders", args.contenders, "--output", str(folder / name)]
            try:
                code = loss_head.main(options)
            except Exception as error:  # one shape out of memory must not cost the others
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                code = 1
            if code:
                failed.append(name)
    print(f"{len(args.shapes) * len(MODES) - len(failed)} runs done, {len(failed)} failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
