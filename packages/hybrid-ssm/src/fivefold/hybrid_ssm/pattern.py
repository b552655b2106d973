"""What each layer of a hybrid is, in the spellings that configurations have for it.

A pattern has one letter for each layer: ``M`` Mamba-2, ``*`` attention, ``-`` feed-forward (MLP),
``E`` mixture of experts.
"""

from collections.abc import Sequence
from typing import Any

from fivefold.hybrid_ssm.errors import HybridConfigError

MAMBA, ATTENTION, MLP, EXPERTS = "M", "*", "-", "E"
LETTERS = {MAMBA: "Mamba-2", ATTENTION: "attention", MLP: "MLP", EXPERTS: "experts"}

# transformers' names before version 5 and since.
_WORDS = {
    "mamba": MAMBA,
    "linear_attention": MAMBA,
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "mlp": MLP,
    "moe": EXPERTS,
}
_PIPELINE, _MTP = "|", "/"


def parse_pattern(text: str) -> tuple[str, str]:
    """Read a pattern string, with or without Megatron's marks.

    Args:
        text: letters, with ``|`` where Megatron cuts pipeline stages, and after the first ``/``
            the pattern of each multi-token-prediction depth (all of them equal).

    Returns:
        The pattern of the layers, and that of one prediction depth ("" for none).

    Raises:
        HybridConfigError: a letter that is none, no layer, or depths that differ.

    >>> parse_pattern("M-|M*/*E/*E")
    ('M-M*', '*E')
    """
    main, *depths = text.replace(_PIPELINE, "").split(_MTP)
    for part in (main, *depths):
        check_pattern(part)
    if len(set(depths)) > 1:
        raise HybridConfigError(
            f"pattern {text!r} has prediction depths {', '.join(depths)}; they must be equal"
        )
    return main, depths[0] if depths else ""


def check_pattern(pattern: str) -> None:
    """Check that a pattern has layers, each of a known kind.

    Raises:
        HybridConfigError: with the letter and its place.
    """
    legal = ", ".join(f"{letter!r} {word}" for letter, word in LETTERS.items())
    if not pattern:
        raise HybridConfigError(f"the pattern of the layers is empty; it needs letters: {legal}")
    for index, letter in enumerate(pattern):
        if letter not in LETTERS:
            raise HybridConfigError(
                f"layer {index} of pattern {pattern!r} is {letter!r}; there are {legal}"
            )


def pattern_of_words(words: Any, key: str) -> str:
    """The pattern of a list such as ``["mamba", "mlp"]`` or ``["linear_attention", "mlp"]``.

    Raises:
        HybridConfigError: it is no list of known names.
    """
    if not isinstance(words, Sequence) or isinstance(words, str):
        raise HybridConfigError(f"{key} is {words!r} in config.json; it must be a list of names")
    unknown = [word for word in words if not isinstance(word, str) or word not in _WORDS]
    if unknown:
        raise HybridConfigError(
            f"{key} has {unknown[0]!r} in config.json; legal names: {', '.join(_WORDS)}"
        )
    return "".join(_WORDS[word] for word in words)
