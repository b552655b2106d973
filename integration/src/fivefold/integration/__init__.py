"""End-to-end runs of the fivefold packages together."""
