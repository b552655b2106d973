"""The mixers that a layer of a hybrid can have."""
