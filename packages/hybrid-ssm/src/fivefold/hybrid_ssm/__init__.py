"""Mamba-2, attention and MLP hybrids: Nemotron-H (arXiv 2504.03624)."""
