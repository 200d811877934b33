"""The experiment of arXiv 2503.21819 as a recipe: `python -m benchmarks.paper`, described in docs/paper.md."""
