"""How the network lies over ranks: whole on each of them, where they see other samples."""

from fivefold.parallel_core.styles import Plan, Replicate


def plan() -> Plan:
    """Every module as it is; gradients are summed over the data axes."""
    return {"*": Replicate(sequence=False)}
