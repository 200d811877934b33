"""Multi-objective GRPO for language models: `python -m grpo_fast.train`."""

__version__ = "0.1.0"
