"""Proofs that take longer than a test may: killed runs, injected faults, an hour of steps. Each is a command."""
