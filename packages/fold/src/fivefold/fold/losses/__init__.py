"""What training minimises, term by term (supplement, section 1.9)."""

from fivefold.fold.losses.total import alphafold_loss

__all__ = ["alphafold_loss"]
