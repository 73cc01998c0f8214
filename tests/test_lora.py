"""The adapter layer: what it computes, and what it does not allocate."""

import bench
import pytest
import torch
import torch.nn.functional as F

import models


def layer(names, rank=4, wide=512):
    """A transformer of one wrapped Linear, 48 in and `wide` out, whose adapters are not zero."""
    transformer = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(48, wide)))
    models.prepare_for_lora(transformer, ["0"])
    for i, name in enumerate(names):
        models.add_adapter(transformer, name, rank, generator=models.seeded(i))
        torch.nn.init.normal_(transformer[0][0].lora_B[name], std=0.1, generator=models.seeded(i, "B"))
    return transformer


@pytest.mark.parametrize("active", ((), ("a",), ("a", "b")))
@pytest.mark.parametrize("shape", ((7, 48), (2, 5, 48)))
def test_a_layer_is_its_formula_and_so_are_its_gradients(active, shape):
    transformer, x = layer(("a", "b")), torch.randn(shape, generator=models.seeded("x"), requires_grad=True)
    m, before = transformer[0][0], x.detach().clone()
    with models.adapters(transformer, *active):
        y = transformer(x)
    want = F.linear(x, m.base.weight, m.base.bias)
    for name in active:
        want = want + models.LORA_SCALE * (x @ m.lora_A[name].T) @ m.lora_B[name].T
    ours, of = (y, want), [x, *(p for name in active for p in (m.lora_A[name], m.lora_B[name]))]
    grads = [torch.autograd.grad(out.square().sum(), of) for out in ours]
    for a, b in ((y, want), *zip(*grads, strict=True)):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    assert torch.equal(x, before)  # the base's output is written over, never the input


def test_adapters_are_added_without_a_second_wide_tensor():
    transformer, x = layer(("a", "b")), torch.randn(300, 48)
    with models.adapters(transformer, "a", "b"), bench.LiveBytes(transformer) as live:
        y = transformer(x)
    assert y.nbytes <= live.peak < 1.2 * y.nbytes
