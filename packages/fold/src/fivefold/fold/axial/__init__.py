"""Dynamic axial parallelism: the ranks that share a sample hold rows or columns of it in turn."""
