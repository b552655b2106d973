"""Ops of this package, one folder each."""
