"""Which idea pays: one step with one idea removed at a time: `python -m benchmarks.ablations`."""
