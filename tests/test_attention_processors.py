# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from peft import LoraConfig
from tiny_models import make_transformer
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_lsep.attention_processors import SiTConcatenatedAttnProcessor


class Products(TorchDispatchMode):
    """Counts matrix products; those of attention are in its kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def make_pair(**config):
    models = [make_transformer(**config) for _ in range(2)]
    models[1].set_attn_processor(SiTConcatenatedAttnProcessor())
    return models


def run(model):
    generator = torch.Generator().manual_seed(0)
    return model(torch.randn(3, 4, 8, 8, generator=generator), 0.3, torch.tensor([1, 2, 10]), return_dict=False)[0]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_same_output_and_gradients(qk_norm):
    plain, concatenated = make_pair(qk_norm=qk_norm)
    assert plain.state_dict().keys() == concatenated.state_dict().keys()
    for model in (plain, concatenated):
        run(model).square().sum().backward()
    torch.testing.assert_close(run(concatenated), run(plain))
    gradients = dict(plain.named_parameters())
    for name, parameter in concatenated.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-4)


def test_fifteen_products_in_place_of_twenty_one():
    counts = []
    for model in make_pair():
        block, tokens = model.transformer_blocks[0], torch.randn(3, 16, 32, requires_grad=True)
        condition = torch.randn(3, 32, requires_grad=True)
        with Products() as products:
            block(tokens, condition).sum().backward()
        counts.append(products.count)
    assert counts == [21, 15]


@pytest.mark.parametrize("what", ["LoRA", "casting", "fused"])
def test_projections_that_are_more_than_their_weights_are_called(what):
    models = make_pair()
    for model in models:
        torch.manual_seed(0)
        if what == "LoRA":
            model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        elif what == "casting":
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        else:
            model.fuse_qkv_projections()
    with torch.no_grad():
        outputs = [run(model) for model in models]
    torch.testing.assert_close(outputs[1], outputs[0])
    with torch.no_grad():
        assert (outputs[0] - run(make_transformer())).abs().max() > 1e-3 or what == "fused"
