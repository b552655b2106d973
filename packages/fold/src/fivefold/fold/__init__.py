"""AlphaFold 2, trained as in ScaleFold (arXiv 2404.11068)."""
