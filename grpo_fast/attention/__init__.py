"""Attention over ragged packed segments, shared prompts and the engine's cache."""
