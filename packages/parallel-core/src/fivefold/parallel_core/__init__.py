"""Five-dimensional parallelism for torch, from rank arithmetic to the training loop."""
