"""From logits to tokens."""

import torch

from fivefold.parallel_core.sampling import draw, filter_logits, penalise_repetition

NONE = -torch.inf


def test_filters_leave_what_they_should() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    assert filter_logits(logits, 1.0, 1, None)[0].isfinite().tolist() == [True] + [False] * 3
    assert (
        filter_logits(logits, 1.0, None, 0.6)[0].isfinite().tolist() == [True, True] + [False] * 2
    )
    assert filter_logits(logits, 1.0, None, 1e-9)[0].isfinite().sum() == 1
    assert filter_logits(logits, 1.0, 9, 1.0).isfinite().all()
    torch.testing.assert_close(filter_logits(logits, 2.0, None, None), logits / 2)
    assert filter_logits(logits.bfloat16(), 1.0, None, None).dtype == torch.float32


def test_penalties_make_what_was_there_less_likely() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]
    assert penalise_repetition(logits, seen, 1.0).tolist() == logits.tolist()


def test_draws_have_the_probabilities() -> None:
    logits = torch.tensor([0.7, 0.3, 0.0]).log().expand(40000, 3)
    drawn = draw(logits, torch.Generator().manual_seed(0))
    assert not (drawn == 2).any()
    assert abs(float((drawn == 0).float().mean()) - 0.7) < 0.01
