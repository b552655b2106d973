"""Training: chains to samples, steps with clipped samples, moving averages, held-out scores."""
