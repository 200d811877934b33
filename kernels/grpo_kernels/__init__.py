"""The operations of GRPO as fused kernels."""
