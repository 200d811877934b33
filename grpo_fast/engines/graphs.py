"""The decoding step as captured CUDA graphs, one for each number of rows that is worth one.

Launching the hundreds of small kernels of a step costs more than they take; replaying a graph launches them at once.
Weights are trained in place, so a graph stays valid from one training step to the next; where storage did move, the
graphs are captured again. The first replay of each is checked against the eager step from the same state, and a graph
that cannot be captured or differs is said to the user and never used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from grpo_fast.engines.base import Sampling
from grpo_fast.engines.decoder import Decoder

log = logging.getLogger(__name__)

Capture = Callable[[Callable[[], object]], Callable[[], object]]
"""Records what a function does on the device and returns what does it again."""
AS_GOOD_AS_EQUAL = {torch.float32: 1e-4}
"""Largest difference of log-probs between a graph and the eager step, by the type of the weights; others: 0.02."""


class CudaCapture:
    """`Capture` by CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], object]) -> Callable[[], object]:
        """Capture `run`; the returned replay reads and writes the same memory."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: a reward model may be working on the same device in a thread of its own
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            run()
        return lambda: graph.replay()  # looked up when called: a profiler may stand in for it


def bucket_of(rows: int, most: int) -> int:
    """Rows are padded to this: a power of two or, beyond 8, three quarters of one, so by a third to a half at most."""
    size = 1
    while size < rows:
        if size >= 8 and size * 3 // 2 >= rows:
            size = size * 3 // 2
            break
        size *= 2
    return min(size, most)


class StepGraphs:
    """`Decoder.step` by graphs; eager for good after the first failure."""

    def __init__(self, decoder: Decoder, capture: Capture) -> None:
        self.decoder, self.capture = decoder, capture
        self.usable = True
        self.replays: dict[Hashable, Callable[[], object]] = {}
        self.weights: tuple[int, ...] = ()

    def check_weights(self, model: nn.Module) -> None:
        """Forget the graphs if any weight has moved to other memory since they were captured."""
        weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
        if weights != self.weights:
            self.replays.clear()
            self.weights = weights

    def step(self, rows: int, sampling: Sampling) -> Tensor:
        """As `Decoder.step`; rows up to the bucket's size are computed and ignored."""
        if not self.usable:
            return self.decoder.step(rows, sampling)
        bucket = bucket_of(rows, self.decoder.max_rows)
        key = (bucket, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        if key not in self.replays:
            return self._first(rows, bucket, key, sampling)
        self.replays[key]()
        return self.decoder.result[:, :rows]

    def _first(self, rows: int, bucket: int, key: Hashable, sampling: Sampling) -> Tensor:
        decoder = self.decoder
        state = (decoder.token, decoder.position, decoder.drawn)
        before = [x.clone() for x in state]

        def rewind() -> None:
            for x, saved in zip(state, before, strict=True):
                x.copy_(saved)

        # The eager step comes first: it also makes the choices (kernels, probes) that may not be made in a capture.
        # The keys it stores are stored again at the same places.
        want = decoder.step(bucket, sampling)[:, :rows].clone()
        rewind()
        try:
            replay = self.capture(lambda: decoder.step(bucket, sampling))
            rewind()
            decoder.result.fill_(float("nan"))  # a replay that does nothing must not pass
            replay()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            problem = _difference(decoder.result[:, :rows], want, decoder.head.weight.dtype)
        if not problem:
            self.replays[key] = replay
            return decoder.result[:, :rows]
        log.warning("decoding goes on without CUDA graphs: %s", problem)
        self.usable = False
        self.replays.clear()
        rewind()
        return decoder.step(rows, sampling)


def _difference(got: Tensor, want: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with a graph's tokens and log-probs (2, rows); empty: nothing.

    The same kernels give the same bits; where a library chose others, a draw near a boundary may fall differently.
    """
    same = got[0] == want[0]
    if not bool(want.isfinite().all()):
        return ""  # the run stops over this; it is no fault of the graph
    if int(same.sum()) * 4 < 3 * len(same):
        return (
            f"a captured step drew {int((~same).sum())} of {len(same)} tokens otherwise than the eager step"
        )
    worst = ((got[1] - want[1]).abs() * same).max().item()
    if not worst <= AS_GOOD_AS_EQUAL.get(dtype, 0.02):
        return f"log-probs of a captured step differ by {worst:.3g} from those of the eager step"
    return ""
