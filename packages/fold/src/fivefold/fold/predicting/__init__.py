"""Predicting structures: inputs of the user, the network, confidence, files and pictures."""
