"""Sparse recurrent layers that keep their nonzeros on chip (arXiv 1804.10223)."""
