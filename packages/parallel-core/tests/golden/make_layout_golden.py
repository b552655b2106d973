"""Write layout.json: digests of the rank groups that Megatron-Core makes.

Needs megatron-core (made with 0.16.1: ``pip install --no-deps megatron-core==0.16.1``, plus torch,
numpy and packaging), and takes some seconds. The tests read only the digests:

    python packages/parallel-core/tests/golden/make_layout_golden.py

A digest is the sha256 over the legal layouts (tp, cp, pp, ep, etp) of one world and order in
ascending order: little-endian uint16 of the five degrees, then of every group of every token in
TOKENS, each group closed by 65535. Legal means what Megatron-Core asserts at initialisation: the
pp groups of the dense and the expert generator are equal lists.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from itertools import permutations
from pathlib import Path

from megatron.core.parallel_state import RankGenerator

DENSE_TOKENS = ("tp", "cp", "dp", "pp", "dp-cp", "tp-cp", "tp-pp")
EXPERT_TOKENS = {"ep": "ep", "etp": "tp", "edp": "dp", "etp-ep": "tp-ep", "tp-ep-pp": "tp-ep-pp"}
ORDERS = ("tp-cp-ep-dp-pp", "tp-cp-pp-ep-dp")
LARGE = [
    (128, (2, 1, 4, 8, 1), ORDERS[0]),
    (256, (2, 2, 2, 64, 1), ORDERS[0]),
    (384, (4, 3, 2, 12, 2), ORDERS[0]),
    (1000, (5, 2, 4, 25, 1), ORDERS[0]),
    (1024, (8, 1, 16, 16, 2), ORDERS[0]),
    (1024, (2, 2, 4, 8, 4), ORDERS[1]),
    (1536, (2, 4, 3, 32, 8), ORDERS[1]),
    (2048, (4, 2, 8, 64, 1), "pp-tp-cp-ep-dp"),
    (6144, (2, 1, 8, 64, 1), ORDERS[0]),
    (8192, (8, 16, 16, 8, 1), ORDERS[0]),
    (10_000, (4, 5, 5, 20, 2), ORDERS[0]),
    (10_752, (8, 4, 12, 7, 4), ORDERS[0]),
]

Degrees = tuple[int, int, int, int, int]


def all_degrees(world: int) -> Iterator[Degrees]:
    """Every (tp, cp, pp, ep, etp) whose two products divide ``world``, ascending."""
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    for tp in divisors:
        for cp in divisors:
            for pp in [d for d in divisors if world % (tp * cp * d) == 0]:
                for ep in divisors:
                    for etp in [d for d in divisors if world % (pp * ep * d) == 0]:
                        yield tp, cp, pp, ep, etp


@lru_cache(maxsize=100_000)
def groups(token: str, order: str, tp: int, cp: int, ep: int, dp: int, pp: int) -> bytes:
    """Megatron-Core's groups, packed."""
    ranks = RankGenerator(tp=tp, cp=cp, ep=ep, dp=dp, pp=pp, order=order).get_ranks(token)
    return b"".join(struct.pack(f"<{len(group) + 1}H", *group, 65535) for group in ranks)


def packed(world: int, degrees: Degrees, order: str) -> bytes | None:
    """The bytes that one layout adds to a digest; None for an illegal layout."""
    tp, cp, pp, ep, etp = degrees
    dense = (tp, cp, 1, world // (tp * cp * pp), pp)
    expert = (etp, 1, ep, world // (etp * ep * pp), pp)
    if groups("pp", order, *dense) != groups("pp", order, *expert):
        return None
    parts = [struct.pack("<5H", *degrees)]
    parts += [groups(token, order, *dense) for token in DENSE_TOKENS]
    parts += [groups(token, order, *expert) for token in EXPERT_TOKENS.values()]
    return b"".join(parts)


def digest(world: int, order: str) -> dict[str, int | str]:
    """Counts and digest of one world and order."""
    sha, total, legal = hashlib.sha256(), 0, 0
    for degrees in all_degrees(world):
        data = packed(world, degrees, order)
        total += 1
        if data is not None:
            legal += 1
            sha.update(data)
    return {"total": total, "legal": legal, "sha256": sha.hexdigest()}


def large(world: int, degrees: Degrees, order: str) -> dict[str, object]:
    """Digest of one large layout."""
    data = packed(world, degrees, order)
    if data is None:
        raise ValueError(f"{world} {degrees} {order} is illegal; choose a legal one")
    sha = hashlib.sha256(data).hexdigest()
    return {"world_size": world, "degrees": degrees, "order": order, "sha256": sha}


def main() -> None:
    """Write layout.json beside this file."""
    names = ORDERS[0].split("-")
    golden = {
        "oracle": f"megatron-core {version('megatron-core')} RankGenerator",
        "tokens": [*DENSE_TOKENS, *EXPERT_TOKENS],
        "worlds": {o: {str(w): digest(w, o) for w in range(1, 65)} for o in ORDERS},
        "every_order_of_8": {"-".join(o): digest(8, "-".join(o)) for o in permutations(names)},
        "large": [large(*case) for case in LARGE],
    }
    path = Path(__file__).with_name("layout.json")
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
