# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import inspect
import math

import pytest
import torch
from diffusers.models.attention import AttentionMixin

from diffusers_lsep import SIT_PRESETS, SiTTransformer2DModel


# Trainable parameters for 4 channels and 1,000 classes; the table of position embeddings is not one of them.
PARAMETERS = {
    "SiT-S/2": 32_858_896,
    "SiT-S/4": 32_895_808,
    "SiT-S/8": 33_043_456,
    "SiT-B/2": 130_303_504,
    "SiT-B/4": 130_377_280,
    "SiT-B/8": 130_672_384,
    "SiT-L/2": 457_824_272,
    "SiT-L/4": 457_922_624,
    "SiT-L/8": 458_316_032,
    "SiT-XL/2": 674_816_272,
    "SiT-XL/4": 674_926_912,
    "SiT-XL/8": 675_369_472,
}


def inputs(model, batch_size=3):
    config = model.config
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "timestep": torch.rand(batch_size, generator=generator),
        "class_labels": torch.randint(0, config.num_classes + 1, (batch_size,), generator=generator),
    }


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset):
    with torch.device("meta"):
        model = SiTTransformer2DModel(**SIT_PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[preset]
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}, "a buffer would be saved"


def test_presets_are_the_twelve_of_the_papers():
    assert set(SIT_PRESETS) == set(PARAMETERS)
    assert set(SIT_PRESETS["SiT-XL/2"]) <= set(inspect.signature(SiTTransformer2DModel).parameters)


@pytest.mark.parametrize("preset", PARAMETERS)
def test_every_preset_goes_forward_and_backward_at_a_small_width(preset):
    arguments = {**SIT_PRESETS[preset], "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4}
    model = SiTTransformer2DModel(**arguments, num_classes=3, in_channels=3)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    output = model(**inputs(model)).sample
    assert output.shape == (3, 3, 32, 32)
    output.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_initial_weights_have_the_scales_of_sit():
    model = SiTTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=32, num_classes=999
    )
    width = 128
    block = model.transformer_blocks[1]

    def bound(weight):
        return weight.abs().max().item()

    # Uniform in +-sqrt(6 / (fan_in + fan_out)); of many draws the largest comes close to the bound.
    for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v):  # rows of one [3 D, D] matrix
        assert bound(projection.weight) == pytest.approx(math.sqrt(6 / (4 * width)), rel=0.01)
    assert bound(block.attn.to_out[0].weight) == pytest.approx(math.sqrt(6 / (2 * width)), rel=0.01)
    assert bound(block.ff.net[0].proj.weight) == pytest.approx(math.sqrt(6 / (5 * width)), rel=0.01)
    assert bound(block.ff.net[2].weight) == pytest.approx(math.sqrt(6 / (5 * width)), rel=0.01)
    assert bound(model.pos_embed.proj.weight) == pytest.approx(math.sqrt(6 / (4 * 2 * 2 + width)), rel=0.01)
    for weight in (
        model.class_embedding.weight,
        model.time_embedding.linear_1.weight,
        model.time_embedding.linear_2.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03) and weight.abs().max() > 0.06
    for module in (block.norm1.linear, model.norm_out.linear, model.proj_out):
        assert not module.weight.any()
    assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))


def test_output_channels_and_patches_go_where_they_belong():
    """With all weights zero the output is the bias of `proj_out`, one value for each (row, column, channel)."""
    model = SiTTransformer2DModel(
        sample_size=6,
        patch_size=3,
        in_channels=2,
        out_channels=5,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=8,
    )
    with torch.no_grad():
        model.proj_out.bias.copy_(torch.arange(45.0))
    output = model(**inputs(model)).sample
    patch = torch.arange(45.0).reshape(3, 3, 5).permute(2, 0, 1)
    torch.testing.assert_close(output, patch.repeat(1, 2, 2).expand(3, -1, -1, -1))


def test_position_table_is_sin_cos_with_the_width_axis_first():
    model = SiTTransformer2DModel(sample_size=6, num_layers=1, num_attention_heads=1, attention_head_dim=8)
    table = model.pos_embed.pos_embed[0].reshape(3, 3, 8)
    frequencies = torch.tensor([1.0, 0.01])  # 10000 ** -(i / 2)
    for row in range(3):
        for column in range(3):
            expected = torch.cat([f(axis * frequencies) for axis in (column, row) for f in (torch.sin, torch.cos)])
            torch.testing.assert_close(table[row, column], expected)


def test_position_table_follows_the_sample_size(tiny_transformer, tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    model = SiTTransformer2DModel.from_pretrained(tmp_path, sample_size=16)
    expected = SiTTransformer2DModel(sample_size=16, num_layers=1, num_attention_heads=4, attention_head_dim=8)
    torch.testing.assert_close(model.pos_embed.pos_embed, expected.pos_embed.pos_embed, rtol=0, atol=0)
    assert model(**inputs(model)).sample.shape == (3, 4, 16, 16)


def test_forward_takes_a_scalar_timestep_and_returns_a_tuple_on_request(tiny_transformer):
    model = tiny_transformer()
    arguments = inputs(model)
    arguments["timestep"] = torch.full((3,), 0.25)
    expected = model(**arguments).sample
    for timestep in (0.25, torch.tensor(0.25)):
        arguments["timestep"] = timestep
        torch.testing.assert_close(model(**arguments, return_dict=False)[0], expected, rtol=0, atol=0)


def test_timestep_keeps_its_precision_in_a_bfloat16_model(tiny_transformer):
    """0.9 and 0.901 are one number in bfloat16."""
    model = tiny_transformer().to(torch.bfloat16)
    labels = torch.zeros(2, dtype=torch.long)
    embedded = model.time_proj(torch.tensor([0.9, 0.901]))
    assert not torch.equal(embedded[0], embedded[1])
    condition = model.embed_condition(torch.tensor([0.9, 0.901]), labels, torch.bfloat16)
    assert condition.dtype == torch.bfloat16 and not torch.equal(condition[0], condition[1])


def test_modes_are_the_same_function(tiny_transformer):
    """No randomness inside: label dropout belongs to the objective."""
    model = tiny_transformer()
    arguments = inputs(model)
    torch.testing.assert_close(model.train()(**arguments).sample, model.eval()(**arguments).sample, rtol=0, atol=0)


def test_hidden_states_at_gives_one_or_several_depths_in_one_pass(tiny_transformer):
    model = tiny_transformer(num_layers=3)
    arguments = inputs(model)
    calls = []
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))

    one, three, zero = model.hidden_states_at(**arguments, num_layers=[1, 3, 0])
    assert calls == [0, 1, 2]
    assert one.shape == (3, 16, 32)
    torch.testing.assert_close(zero, model.embed_patches(arguments["hidden_states"]), rtol=0, atol=0)
    calls.clear()
    torch.testing.assert_close(model.hidden_states_at(**arguments, num_layers=1), one, rtol=0, atol=0)
    assert calls == [0]
    condition = model.embed_condition(arguments["timestep"], arguments["class_labels"], torch.float32)
    torch.testing.assert_close(model.project_out(three, condition), model(**arguments).sample, rtol=0, atol=0)


@pytest.mark.parametrize("depth", [-1, 4])
def test_hidden_states_at_refuses_depths_outside_the_model(tiny_transformer, depth):
    model = tiny_transformer(num_layers=3)
    with pytest.raises(
        ValueError, match=f"`num_layers` has to lie between 0 and the model's 3 blocks, but is {depth}"
    ):
        model.hidden_states_at(**inputs(model), num_layers=depth)


def test_gradient_checkpointing_changes_nothing(tiny_transformer):
    model = tiny_transformer().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**inputs(model)).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_fused_projections_and_processors_are_diffusers(tiny_transformer):
    model = tiny_transformer()
    arguments = inputs(model)
    expected = model(**arguments).sample
    assert isinstance(model, AttentionMixin)
    assert list(model.attn_processors) == [
        "transformer_blocks.0.attn.processor",
        "transformer_blocks.1.attn.processor",
    ]
    model.fuse_qkv_projections()
    assert all(block.attn.fused_projections for block in model.transformer_blocks)
    torch.testing.assert_close(model(**arguments).sample, expected, rtol=1e-5, atol=1e-5)
    model.unfuse_qkv_projections()
    model.set_attention_backend("native")
    torch.testing.assert_close(model(**arguments).sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_autocast_computes_close_to_float32(tiny_transformer, qk_norm):
    model = tiny_transformer(qk_norm=qk_norm)
    arguments = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**arguments).sample
    torch.testing.assert_close(output.float(), model(**arguments).sample, rtol=0.05, atol=0.05)


def test_lora_adapter_starts_as_the_model_and_scales(tiny_transformer):
    from peft import LoraConfig

    model = tiny_transformer()
    arguments = inputs(model)
    expected = model(**arguments).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    changed = model(**arguments).sample
    assert not torch.allclose(changed, expected, atol=1e-4)
    off = model(**arguments, attention_kwargs={"scale": 0.0}).sample
    torch.testing.assert_close(off, expected, rtol=1e-5, atol=1e-5)


def test_layerwise_casting_and_group_offloading_run(tiny_transformer):
    model = tiny_transformer()
    arguments = inputs(model)
    expected = model(**arguments).sample
    offloaded = tiny_transformer()
    offloaded.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    torch.testing.assert_close(offloaded(**arguments).sample, expected, rtol=1e-5, atol=1e-5)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.class_embedding.weight.dtype == torch.float32
    torch.testing.assert_close(model(**arguments).sample, expected, rtol=0.2, atol=0.2)


def test_wrong_shape_is_refused(tiny_transformer):
    model = tiny_transformer()
    arguments = inputs(model)
    arguments["hidden_states"] = torch.zeros(3, 4, 10, 10)
    with pytest.raises(
        ValueError, match=r"`hidden_states` has to be of shape \[batch, 4, 8, 8\], but is of shape \[3"
    ):
        model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_size": 9}, "`sample_size` has to be divisible by `patch_size`, but 9 is not divisible by 2"),
        ({"attention_head_dim": 5, "num_attention_heads": 3}, r"divisible by 4 .* 3 \* 5 = 15"),
        ({"num_layers": 0}, "`num_layers` has to be at least 1, but is 0"),
        ({"num_classes": 0}, "`num_classes` has to be at least 1, but is 0"),
        ({"out_channels": 0}, "`out_channels` has to be at least 1, but is 0"),
    ],
)
def test_impossible_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SiTTransformer2DModel(**arguments)


def test_tokens_stay_in_float32_under_autocast(tiny_transformer):
    """They are a sum over all blocks. Without autocast they are in the dtype of the latents."""
    model, depths = tiny_transformer(num_layers=3), [0, 1, 2, 3]
    arguments = (torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 2]))
    seen = []
    model.norm_out.register_forward_hook(lambda _, args, __: seen.extend(x.dtype for x in args))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.hidden_states_at(*arguments, depths)
        assert model(*arguments).sample.dtype == torch.bfloat16
    assert seen == [torch.float32, torch.float32], "the tokens and the condition"
    assert all(one.dtype == torch.float32 for one in tokens)
    position = model.pos_embed.pos_embed
    assert torch.equal(tokens[0], (tokens[0] - position).bfloat16() + position), "added without rounding"
    model.to(torch.bfloat16)
    tokens = model.hidden_states_at(arguments[0].bfloat16(), *arguments[1:], depths)
    assert all(one.dtype == torch.bfloat16 for one in tokens)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_class_labels_of_any_integers(tiny_transformer, dtype):
    model, latents = tiny_transformer(num_layers=1), torch.randn(2, 4, 8, 8)
    labels = torch.tensor([1, 3])
    assert torch.equal(model(latents, 0.5, labels.to(dtype)).sample, model(latents, 0.5, labels).sample)


def test_a_timestep_may_lie_on_the_host(tiny_transformer):
    """Such as `scheduler.sigmas[i]`."""
    model = tiny_transformer(num_layers=1).to("meta")
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    latents = torch.empty(2, 4, 8, 8, device="meta")
    assert model(latents, torch.tensor(0.5, dtype=torch.float64), labels).sample.shape == latents.shape
