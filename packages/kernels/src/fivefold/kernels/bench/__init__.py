"""``fivefold-kernels bench``: ops against torch and other libraries, beside the roofline floor."""
