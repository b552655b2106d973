"""The feed-forward layer of Nemotron: two matrices and a squared ReLU between them."""

from torch import Tensor, nn

from fivefold.hybrid_ssm.memory import ALONE, Context
from fivefold.hybrid_ssm.norm import is_small
from fivefold.kernels import Linear, relu2


class MLP(nn.Module):
    """``down(relu(up(x))²)``, arXiv 2504.03624, section 2.1.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width between.
        bias: whether the matrices have biases.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_bsh: Tensor, context: Context = ALONE, name: str = "") -> Tensor:
        """Hidden states (..., H) to (..., H); each token by itself."""
        inner = self.up_proj(x_bsh)
        return self.down_proj(inner.relu().square_() if is_small(inner) else relu2(inner))
