"""A whole GRPO step against its peers, and the time of its phases: `python -m benchmarks.step`."""
