"""What a rank sends in a block, in closed form.

Of S sequences, N residues and n ranks that divide both, a block of a main or extra MSA stack sends
in its forward pass, and as much in its backward pass, elements of

    all-to-all     (n-1)/n² · (2·S·N·c_m + 2·N²·c_z + N²·c_triangle)
    all-gather     (n-1)/n · (N²·(num_msa_heads + 2·num_pair_heads + 2·c_triangle) + S·N·c_outer)

where the backward pass has a reduce-scatter for each all-gather. A block of templates sends for
each of them the same without the terms of the MSA. Where n does not divide, an all-to-all sends
what there is, and what is gathered is padded to ceil(N / n) a rank.
"""

from dataclasses import dataclass

from fivefold.fold.config import StackConfig
from fivefold.parallel_core.shares import share_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Elements that one rank sends in one pass.

    Attributes:
        all_to_all: in exchanges of one layout for another.
        all_gather: in gathers; in backward in reduce-scatters.
    """

    all_to_all: int
    all_gather: int

    def __mul__(self, count: int) -> "Traffic":
        return Traffic(all_to_all=count * self.all_to_all, all_gather=count * self.all_gather)


def pair_traffic(
    config: StackConfig, c_z: int, *, num_residues: int, num_ranks: int, rank: int = 0
) -> Traffic:
    """Of a template's pair representation in one block.

    Args:
        config: of the stack.
        c_z: channels of its pair representation.
        num_residues: N.
        num_ranks: that share the sample.
        rank: among them.
    """
    sizes = share_sizes(num_residues, num_ranks)
    switched = sizes[rank] * (num_residues - sizes[rank])
    gathered = 2 * (config.num_pair_heads + config.c_triangle)
    return Traffic(
        all_to_all=switched * (2 * c_z + config.c_triangle),
        all_gather=(num_ranks - 1) * sizes[0] * num_residues * gathered,
    )


def block_traffic(
    config: StackConfig,
    c_m: int,
    c_z: int,
    *,
    num_sequences: int,
    num_residues: int,
    num_ranks: int,
    rank: int = 0,
) -> Traffic:
    """Of one block of a main or extra MSA stack.

    Args:
        config: of the stack.
        c_m: channels of its MSA representation.
        c_z: of the pair representation.
        num_sequences: S, with the rows of templates.
        num_residues: N.
        num_ranks: that share the sample.
        rank: among them.
    """
    pairs = pair_traffic(config, c_z, num_residues=num_residues, num_ranks=num_ranks, rank=rank)
    sequences, residues = (share_sizes(x, num_ranks) for x in (num_sequences, num_residues))
    there = sequences[rank] * (num_residues - residues[rank])
    back = residues[rank] * (num_sequences - sequences[rank])
    gathered = num_residues * config.num_msa_heads + num_sequences * config.c_outer
    return Traffic(
        all_to_all=pairs.all_to_all + (there + back) * c_m,
        all_gather=pairs.all_gather + (num_ranks - 1) * residues[0] * gathered,
    )
