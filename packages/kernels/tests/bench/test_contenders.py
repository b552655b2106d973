"""Who takes part."""

import torch

from fivefold.kernels.bench.contenders import (
    choices,
    libraries_of,
    other_backends,
    others,
    our_name,
)
from fivefold.kernels.op import Op
from fivefold.kernels.ops.rms_norm import rms_norm
from fivefold.kernels.ops.rms_norm.samples import SAMPLES
from fivefold.kernels.samples import Peer

from .parts import samples


def test_choices_are_noted_forward_and_backward() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    choose = Op.choose
    with choices() as made:
        rms_norm(x, (4,), backend="reference").sum().backward()
    assert made == {
        "fivefold_kernels::rms_norm_forward": "reference",
        "fivefold_kernels::rms_norm_backward": "reference",
    }
    assert Op.choose is choose
    assert our_name(made) == "ours (reference)"


def test_name_of_ours_has_all_backends() -> None:
    assert our_name({"a": "triton", "b": "reference", "c": "triton"}) == "ours (triton+reference)"
    assert our_name({}) == "ours (no op)"


def test_the_interpreter_is_no_contender() -> None:
    made = {"fivefold_kernels::rms_norm_forward": "reference"}
    names = [each.name for each in other_backends(SAMPLES, made, "cpu")]
    assert "ours (triton)" not in names
    assert "ours (reference)" not in names
    made = {"fivefold_kernels::rms_norm_forward": "triton"}
    on_gpu = {each.name: each for each in other_backends(SAMPLES, made, "cuda")}
    assert "ours (triton)" not in on_gpu
    x = torch.ones(1, 2)
    y = on_gpu["ours (reference)"].make()(input=x, normalized_shape=(2,), eps=0.0)
    assert torch.equal(y, x)


def test_torch_and_peers() -> None:
    def peer(x):
        import nothing_of_this_name.part
        from torch.nn import functional

        return nothing_of_this_name.part(functional.relu(x))

    op = samples(Peer(name="other", function=peer))
    assert [each.name for each in others(op, compiled=False)] == ["eager", "other"]
    assert [each.name for each in others(op, compiled=True)] == ["eager", "compile", "other"]
    assert libraries_of(op) == {"torch", "nothing_of_this_name"}
