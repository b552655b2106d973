"""Which mapping to train with, from arithmetic alone: memory, FLOPs, messages, time. No torch."""
