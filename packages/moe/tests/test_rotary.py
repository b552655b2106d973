import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralRotaryEmbedding,
    apply_rotary_pos_emb,
)

from fivefold.moe.rotary import Positions, Rotary


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "theta", "start"), [(8, 1e6, 0), (6, 1e4, 3000)])
def test_angles_of_transformers_bit_for_bit_and_one_rounding(
    dtype: torch.dtype, head_dim: int, theta: float, start: int
) -> None:
    """Transformers rounds the table and both products to ``dtype``; here only the result is."""
    config = MixtralConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    q, k = torch.randn(2, 2, 7, 2, head_dim).to(dtype).unbind()
    positions = torch.arange(start, start + 7)
    cos, sin = MixtralRotaryEmbedding(config)(torch.empty(0), positions[None])
    wanted = apply_rotary_pos_emb(
        q.double(), k.double(), cos.double(), sin.double(), unsqueeze_dim=2
    )
    rotate = Rotary(Positions(), start, head_dim, theta)
    close = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps / 8}
    torch.testing.assert_close(rotate(q).double(), wanted[0], **close)
    torch.testing.assert_close(rotate(k).double(), wanted[1], **close)
    assert torch.equal(rotate._tables[0].float(), cos[0, :, : head_dim // 2])
    assert torch.equal(rotate._tables[1].float(), sin[0, :, : head_dim // 2])


def test_positions_are_asked_for_once_and_where_the_length_is_known() -> None:
    class Later(nn.Module):
        asked: list[int] = []  # noqa: RUF012

        def forward(self, length: int, device: torch.device) -> Tensor:
            self.asked.append(length)
            return torch.arange(10, 10 + length, device=device)

    x = torch.randn(1, 4, 2, 8)
    rotate = Rotary(Later(), 0, 8, 1e4)
    assert torch.equal(rotate(x), Rotary(Positions(), 10, 8, 1e4)(x))
    rotate(x)
    assert Later.asked == [4]


def test_rotation_keeps_lengths_and_relative_positions() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8).double().expand(2, 1, 6, 1, 8).unbind()
    rotate = Rotary(Positions(), 0, 8, 100.0)
    q, k = rotate(q)[0, :, 0], rotate(k)[0, :, 0]
    torch.testing.assert_close(q.norm(dim=-1), q.norm(dim=-1)[:1].expand(6), rtol=1e-6, atol=0)
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-5, atol=1e-6)
