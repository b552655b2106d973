"""Mixture-of-experts language models under MoE Parallel Folding."""
