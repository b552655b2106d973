"""Rigid transforms, torsions, and the atoms of the twenty amino acids."""
