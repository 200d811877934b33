"""Which engine a run has."""

from __future__ import annotations

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.engines.base import RolloutEngine
from grpo_fast.engines.local import LocalEngine
from grpo_fast.engines.plain import PlainEngine
from grpo_fast.engines.separate import SeparateEngine
from grpo_fast.engines.stops import Decode
from grpo_fast.errors import UserError
from grpo_fast.models.policy import Policy


def builtin_engine(
    policy: Policy,
    *,
    max_rows: int,
    settings: EngineSettings | None = None,
    decode: Decode | None = None,
    separate: bool = False,
) -> RolloutEngine:
    """The engine of this process that can serve the policy: on the weights that are trained, or on `separate` ones."""
    sinks = any(name.endswith(".sinks") for name, _ in policy.model.named_parameters())
    if sinks or not policy.packed:  # the decode step knows no attention sinks
        if separate:
            raise UserError(
                "rollout.ahead: the policy's sequences cannot be packed, so it must generate before it trains"
            )
        return PlainEngine(policy.model, max_rows=max_rows)
    kind = SeparateEngine if separate else LocalEngine
    return kind(policy.model, max_rows=max_rows, settings=settings, decode=decode)
