# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_batch

from diffusers_lsep import LinearProbe, LSEPObjective
from diffusers_lsep.interpolants import get_interpolant, timesteps_from_uniform


@pytest.fixture
def make_objective(tiny_transformer):
    def make(with_probe=True, seed=0, **arguments):
        transformer = tiny_transformer(seed, num_layers=3)
        probe = None
        if with_probe:
            torch.manual_seed(seed)
            probe = LinearProbe(32, 10)
        return LSEPObjective(transformer, probe, **{"probe_depth": 2, **arguments})

    return make


def batch(batch_size=6, seed=0):
    return {
        **make_batch(seed, batch_size),
        "class_dropout_mask": torch.tensor([False, True, False, False, True, False])[:batch_size],
        "probe_dropout_mask": torch.tensor([True, True, False, True, False, False])[:batch_size],
        "crop_window": torch.tensor([[0, 0, 3], [1, 0, 3], [0, 1, 3], [1, 1, 3], [1, 0, 3], [0, 0, 3]])[:batch_size],
    }


def straightforward_losses(objective, draws, path_type="linear", weights=(0.0225, 0.03, 10)):
    """The method written down plainly: two separate streams, and a loop over samples for crop and weight."""
    transformer, probe = objective.transformer, objective.probe
    labels, t, path = draws["class_labels"], draws["timesteps"], get_interpolant(path_type)
    shaped = t[:, None, None, None]
    noisy = path.alpha(shaped) * draws["latents"] + path.sigma(shaped) * draws["noise"]
    target = path.d_alpha(shaped) * draws["latents"] + path.d_sigma(shaped) * draws["noise"]
    main_labels = labels.masked_fill(draws["class_dropout_mask"], 10)
    probe_labels = labels.masked_fill(draws["probe_dropout_mask"], 10)
    denoising = ((transformer(noisy, t, main_labels).sample - target) ** 2).mean()

    tokens = transformer.hidden_states_at(noisy, t, probe_labels, objective.probe_depth)
    table = torch.linspace(*weights)
    probe_loss, hits = 0.0, 0
    for i in range(len(labels)):
        top, left, size = draws["crop_window"][i].tolist()
        grid = tokens[i].reshape(4, 4, -1)[top : top + size, left : left + size]
        logits = probe.linear(probe.norm(grid.reshape(size * size, -1).mean(dim=0)))
        weight = table[min(int(t[i] * weights[2]), weights[2] - 1)]
        probe_loss = probe_loss + weight * F.cross_entropy(logits[None], labels[i : i + 1])
        hits += int(logits.argmax() == labels[i])
    return denoising, probe_loss / len(labels), hits / len(labels)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("probe_depth", [1, 2, 3])
def test_one_pass_equals_two_separate_streams(make_objective, path_type, probe_depth):
    objective = make_objective(path_type=path_type, probe_depth=probe_depth)
    draws = batch()
    output = objective(**draws)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in objective.named_parameters()}

    objective.zero_grad()
    denoising, probe_loss, accuracy = straightforward_losses(objective, draws, path_type)
    (denoising + probe_loss).backward()
    torch.testing.assert_close(output.denoising_loss, denoising.detach())
    torch.testing.assert_close(output.probe_loss, probe_loss.detach())
    torch.testing.assert_close(output.loss, output.denoising_loss + output.probe_loss)
    torch.testing.assert_close(output.denoising_losses.mean(), output.denoising_loss)
    torch.testing.assert_close(output.probe_losses.mean(), output.probe_loss)
    assert output.probe_accuracy.item() == pytest.approx(accuracy)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def watch_widths(objective):
    """How many samples the first block sees, call by call."""
    widths = []
    block = objective.transformer.transformer_blocks[0]
    block.register_forward_hook(lambda _, args, __: widths.append(len(args[0])))
    return widths


def test_the_plain_call_shares_the_streams(make_objective):
    objective, apart = (make_objective(crop_size=(2, 4), share_streams=share) for share in (True, False))
    widths, widths_apart, arguments = watch_widths(objective), watch_widths(apart), make_batch(0, 16)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        output = objective(arguments["latents"], arguments["class_labels"], generator=generator)
        # The same draws in the same order, for the two streams one after the other
        generator.manual_seed(seed)
        noise = torch.randn(16, 4, 8, 8, generator=generator)
        timesteps = torch.rand(16, generator=generator)
        masks = objective.draw_dropout_masks(16, "cpu", generator)[:2]
        window = objective.draw_crop_window(16, "cpu", generator)
        draws = (arguments["latents"], arguments["class_labels"], noise, timesteps, *masks, window)
        torch.testing.assert_close(output.loss, apart(*draws).loss, rtol=1e-5, atol=1e-5)
    assert set(widths) == {16 + 13, 16 + 14} and set(widths_apart) == {16 + 16}, "0.82 * 16 = 13.1 differ on average"


@pytest.mark.parametrize("main", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("probe", [0.0, 0.5, 0.9, 1.0])
def test_masks_that_share_work_are_drawn_independently_in_every_sample(make_objective, main, probe):
    objective = make_objective(class_dropout_prob=main, probe_dropout_prob=probe)
    generator = torch.Generator().manual_seed(0)
    for batch_size in (1, 7, 50):
        counts = torch.zeros(3, batch_size)
        for _ in range(200):
            main_mask, probe_mask, rows = objective.draw_dropout_masks(batch_size, "cpu", generator)
            assert len({mask.shape for mask in (main_mask, probe_mask)} | {(batch_size,)}) == 1
            if rows is not None:
                assert len(rows.unique()) == len(rows) < batch_size
                others = torch.ones(batch_size, dtype=torch.bool)
                others[rows] = False
                assert (main_mask == probe_mask)[others].all(), "all that differ are computed twice"
            counts += torch.stack([main_mask, probe_mask, main_mask & probe_mask])
        # Of each place in the batch within five standard deviations of 200 draws, and of all together closer
        expected = torch.tensor([main, probe, main * probe])
        assert ((counts / 200 - expected[:, None]).abs() < 0.177).all()
        torch.testing.assert_close((counts / 200).mean(dim=1), expected, rtol=0, atol=0.177 / batch_size**0.5)


def test_shared_tokens_give_the_same_loss_and_gradients(make_objective):
    """Where both streams see the same label, the probe may read the main stream's tokens."""
    draws = batch()
    differing = (draws["class_dropout_mask"] != draws["probe_dropout_mask"]).nonzero()[:, 0]
    assert 0 < len(differing) < 6
    padded = torch.cat([differing, (draws["class_dropout_mask"] == draws["probe_dropout_mask"]).nonzero()[:1, 0]])
    results = []
    cases = [(False, None, 6), (True, None, len(differing)), (False, differing, len(differing)), (True, padded, 4)]
    for share_streams, rows, count in cases:
        objective = make_objective(share_streams=share_streams)
        widths = watch_widths(objective)
        output = objective(**draws, separate_rows=rows)
        output.loss.backward()
        assert widths == [6 + count]
        results.append([output.loss.detach(), *(parameter.grad for parameter in objective.parameters())])
    for shared in results[1:]:
        torch.testing.assert_close(shared, results[0], rtol=1e-4, atol=1e-6)


def test_probe_on_a_part_of_the_batch(make_objective):
    objective, draws = make_objective(probe_fraction=0.25), batch()
    whole, rows = objective(**draws), torch.tensor([4, 1, 2])
    part = objective(**draws, probe_rows=rows, separate_rows=rows)
    torch.testing.assert_close(whole.probe_loss, whole.probe_losses.mean())
    torch.testing.assert_close(part.denoising_loss, whole.denoising_loss)
    torch.testing.assert_close(part.probe_losses, whole.probe_losses[rows])
    torch.testing.assert_close(part.probe_loss, whole.probe_losses[rows].sum() / (0.25 * 6))
    torch.testing.assert_close(part.loss, part.denoising_loss + part.probe_loss)


def gradients_of(objective, *batches):
    """Mean over batches, as accumulation and data-parallel processes take it."""
    objective.zero_grad()
    for arguments in batches:
        (objective(**arguments).loss / len(batches)).backward()
    return {name: parameter.grad.clone() for name, parameter in objective.named_parameters()}


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 5], [4], []])
def test_each_sample_of_the_probe_weighs_the_same_in_batches_of_any_size(make_objective, rows):
    objective, draws = make_objective(probe_fraction=0.5), batch()

    def cut(first, last):
        part = {name: value[first:last] for name, value in draws.items()}
        own = torch.tensor([row - first for row in rows if first <= row < last], dtype=torch.int64)
        return part | {"probe_rows": own, "separate_rows": own}

    whole = gradients_of(objective, cut(0, 6))
    for size in (1, 2, 3):
        parts = gradients_of(objective, *(cut(first, first + size) for first in range(0, 6, size)))
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_sample_of_the_probe_is_plain_flow_matching(make_objective):
    nothing, draws = torch.zeros(0, dtype=torch.int64), batch()
    objective = make_objective(probe_fraction=0.1)
    output = objective(**draws, probe_rows=nothing, separate_rows=nothing)
    assert output.probe_loss == 0 and output.probe_accuracy == 0 and output.probe_losses.shape == (0,)
    plain = make_objective(with_probe=False)
    torch.testing.assert_close(output.loss, plain(**draws).loss)
    gradients = gradients_of(objective, draws | {"probe_rows": nothing, "separate_rows": nothing})
    for name, gradient in gradients_of(plain, draws).items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)
    assert all(not gradients[f"probe.{name}"].any() for name, _ in objective.probe.named_parameters())


def test_probe_weight_is_piecewise_constant_in_time(make_objective):
    objective = make_objective(probe_weight_start=0.1, probe_weight_end=0.4, num_probe_weights=4)
    draws = batch(5)
    draws["timesteps"] = torch.tensor([0.0, 0.2499, 0.25, 0.99, 1.0])
    with torch.no_grad():
        torch.nn.init.zeros_(objective.probe.linear.weight)  # cross-entropy ln 10 everywhere
    output = objective(**draws)
    expected = torch.tensor([0.1, 0.1, 0.2, 0.4, 0.4]) * math.log(10)
    torch.testing.assert_close(output.probe_losses, expected)
    halved = objective(**draws, probe_weight_scale=torch.tensor(0.5))
    assert torch.equal(objective(**draws, probe_weight_scale=torch.tensor(1)).loss, objective(**draws).loss)
    torch.testing.assert_close(halved.probe_losses, expected / 2)
    torch.testing.assert_close(halved.loss, halved.denoising_loss + output.probe_loss / 2)


def test_times_of_any_precision(make_objective):
    objective, draws = make_objective(), batch(3)
    draws["timesteps"] = torch.tensor([0.25, 0.5, 0.75])
    single = objective(**draws)
    double = objective(**{**draws, "timesteps": draws["timesteps"].double()})
    assert double.loss.dtype == torch.float32 and torch.equal(double.loss, single.loss)


def test_constant_weight(make_objective):
    objective = make_objective(probe_weight_start=0.03, probe_weight_end=0.03, num_probe_weights=1)
    with torch.no_grad():
        torch.nn.init.zeros_(objective.probe.linear.weight)
    torch.testing.assert_close(objective(**batch()).probe_loss, torch.tensor(0.03 * math.log(10)))


def test_without_a_probe_it_is_plain_flow_matching(make_objective):
    objective = make_objective(with_probe=False)
    draws = batch()
    output = objective(**draws)
    expected = straightforward_losses(make_objective(), draws)[0]
    torch.testing.assert_close(output.loss, expected)
    assert output.probe_loss == 0 and output.probe_accuracy is None and output.probe_losses is None
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"transformer"}


def test_what_is_not_given_is_drawn_from_the_generator(make_objective):
    objective = make_objective(crop_size=(2, 4))
    draws = batch()
    arguments = {name: draws[name] for name in ("latents", "class_labels")}
    first, again, other = (objective(**arguments, generator=torch.Generator().manual_seed(s)).loss for s in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert first != other


@pytest.mark.slow
def test_labels_are_dropped_with_their_probabilities_and_independently(make_objective):
    objective = make_objective(share_streams=False)
    seen = {}
    hook = objective.transformer.class_embedding.register_forward_hook(
        lambda _, inputs, __: seen.update(ids=inputs[0])
    )
    count = 8000
    with torch.no_grad():
        objective(torch.zeros(count, 4, 8, 8), torch.arange(count) % 10, generator=torch.Generator().manual_seed(0))
    hook.remove()
    main, probe = (seen["ids"] == 10).float().split(count)
    assert main.mean().item() == pytest.approx(0.1, abs=0.012)
    assert probe.mean().item() == pytest.approx(0.9, abs=0.012)
    assert (main * probe).mean().item() == pytest.approx(0.09, abs=0.012)


def test_crop_windows_have_one_size_and_reach_every_place(make_objective):
    objective = make_objective(crop_size=(2, 4))
    sizes = set()
    for seed in range(20):
        window = objective.draw_crop_window(200, "cpu", torch.Generator().manual_seed(seed))
        size = window[0, 2].item()
        sizes.add(size)
        assert (window[:, 2] == size).all()
        for starts in (window[:, 0], window[:, 1]):
            assert set(starts.tolist()) == set(range(4 - size + 1))
    assert sizes == {2, 3, 4}


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_integers_of_all_kinds(make_objective, dtype):
    objective, draws = make_objective(), batch()
    rows = {"separate_rows": torch.arange(6), "probe_rows": torch.tensor([1, 4])}
    kinds = {**rows, "class_labels": draws.pop("class_labels")}
    losses = [objective(**draws, **{k: v.to(kind) for k, v in kinds.items()}).loss for kind in (torch.int64, dtype)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_timestep_distributions(path_type):
    path = get_interpolant(path_type)
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    assert timesteps_from_uniform(uniform, path, "uniform") is uniform
    t = timesteps_from_uniform(uniform, path, "logit_normal")
    log_ratio = torch.log(path.sigma(t) / path.alpha(t)).double()
    assert log_ratio.mean().item() == pytest.approx(0, abs=1e-3)
    assert log_ratio.std().item() == pytest.approx(1, abs=1e-3)
    ends = timesteps_from_uniform(torch.tensor([0.0, 1 - 2**-24]), path, "logit_normal")
    assert 0 < ends[0] < ends[1] < 1


def test_logit_normal_is_used_for_the_draws(make_objective):
    objective = make_objective(timestep_sampling="logit_normal")
    seen = {}
    objective.transformer.time_proj.register_forward_hook(lambda _, inputs, __: seen.update(t=inputs[0]))
    with torch.no_grad():
        objective(torch.zeros(4000, 4, 8, 8), torch.zeros(4000, dtype=torch.long))
    t = seen["t"][:4000]
    assert torch.log(t / (1 - t)).std().item() == pytest.approx(1, abs=0.05)


def test_probe_averages_in_float32_and_sees_only_its_window():
    probe = LinearProbe(8, 3)
    tokens = torch.randn(2, 16, 8)
    window = torch.tensor([[1, 2, 2], [0, 0, 4]])
    logits = probe(tokens, window=window)
    grid = tokens[0].reshape(4, 4, 8)[1:3, 2:4].reshape(4, 8).mean(dim=0)
    torch.testing.assert_close(logits[0], probe.linear(probe.norm(grid)))
    torch.testing.assert_close(logits[1], probe(tokens)[1])
    many = torch.full((1, 4096, 8), 0.01, dtype=torch.bfloat16)
    many[0, 0] = 30.0
    expected = probe.linear(probe.norm(many.float().mean(dim=1)))
    torch.testing.assert_close(probe(many), expected)


def test_probe_is_saved_and_loaded(tmp_path):
    probe = LinearProbe(8, 3)
    probe.save_pretrained(tmp_path)
    loaded = LinearProbe.from_pretrained(tmp_path)
    tokens = torch.randn(2, 16, 8)
    torch.testing.assert_close(loaded(tokens), probe(tokens), rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_the_depth_travels_with_the_probe(tmp_path):
    LinearProbe(8, 3, depth=5).save_pretrained(tmp_path)
    assert LinearProbe.from_pretrained(tmp_path).config.depth == 5
    config = json.loads((tmp_path / "config.json").read_text())
    del config["depth"]  # as older versions saved it
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert LinearProbe.from_pretrained(tmp_path).config.depth is None


def test_modes_give_the_same_loss(make_objective):
    objective, draws = make_objective(), batch()
    torch.testing.assert_close(objective.train()(**draws).loss, objective.eval()(**draws).loss, rtol=0, atol=0)


def test_bfloat16_autocast_keeps_losses_in_float32(make_objective):
    objective, draws, seen = make_objective(), batch(), []
    objective.probe.register_forward_hook(lambda _, args, __: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(**draws)
    assert seen == [torch.float32], "the tokens"
    assert output.loss.dtype == output.probe_losses.dtype == torch.float32
    torch.testing.assert_close(output.loss, objective(**draws).loss, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_step_compiles_to_one_graph(make_objective):
    """One graph means that nothing is read back by the host and that no loop depends on the data."""
    objective, draws = make_objective(), batch()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    scale = torch.tensor(1.0)
    loss = compiled(**draws, probe_weight_scale=scale).loss
    loss.backward()
    torch.testing.assert_close(loss, objective(**draws).loss, rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(**batch(seed=1), probe_weight_scale=scale * 0.5)


@pytest.mark.slow
def test_the_plain_call_compiles_to_one_graph(make_objective):
    torch.compiler.reset()  # Other tests leave other batch sizes, after which they are symbols.
    objective, widths, losses = make_objective(crop_size=(2, 4)), set(), []

    def look_at(graph, inputs):
        values = (node.meta.get("example_value") for node in graph.graph.nodes)
        widths.update(value.shape[0] for value in values if torch.is_tensor(value) and value.shape[1:] == (16, 32))
        return graph.forward

    compiled = torch.compile(objective, fullgraph=True, backend=look_at)
    arguments = [{name: make_batch(seed, 16)[name] for name in ("latents", "class_labels")} for seed in range(2)]
    for call in (objective, compiled):
        torch.manual_seed(0)
        losses.append(call(**arguments[0]).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert widths - {1} == {16, 14, 16 + 14}, "the main stream, the probe's, and both"
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(**arguments[1])


@pytest.mark.slow
def test_compiled_step_takes_any_number_of_separate_rows(make_objective):
    objective, draws = make_objective(), batch()
    separate = draws["class_dropout_mask"] != draws["probe_dropout_mask"]
    rows = separate.nonzero()[:, 0]
    others = (~separate).nonzero()[:, 0]
    assert len(rows) >= 2 and len(others) >= 2
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    expected = objective(**draws).loss
    torch.testing.assert_close(compiled(**draws, separate_rows=rows).loss, expected, rtol=1e-5, atol=1e-5)
    # The second number makes their number symbolic; from then on it is one graph for all.
    compiled(**draws, separate_rows=torch.cat([rows, others[:1]]))
    with torch.compiler.set_stance("fail_on_recompile"):
        loss = compiled(**draws, separate_rows=torch.cat([rows, others[:2]])).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(make_objective):
    gradients = []
    for checkpointing in (False, True):
        objective = make_objective().train()
        if checkpointing:
            objective.transformer.enable_gradient_checkpointing()
        objective(**batch()).loss.backward()
        gradients.append([parameter.grad for parameter in objective.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probe_depth": 0}, r"`probe_depth` has to lie in 1\.\.3, .* but is 0"),
        ({"probe_depth": 4}, r"`probe_depth` has to lie in 1\.\.3, .* but is 4"),
        ({"crop_size": (3, 5)}, r"`crop_size` has to be \(low, high\) with 1 <= low <= high <= 4, .* but is \(3, 5\)"),
        ({"crop_size": (3, 2)}, r"`crop_size` has to be .* but is \(3, 2\)"),
        ({"crop_size": (0, 2)}, r"`crop_size` has to be .* but is \(0, 2\)"),
        ({"probe_dropout_prob": 1.1}, r"`probe_dropout_prob` has to lie in \[0, 1\], but is 1.1"),
        ({"class_dropout_prob": -0.1}, r"`class_dropout_prob` has to lie in \[0, 1\], but is -0.1"),
        ({"probe_weight_start": -1.0}, "`probe_weight_start` has to be a number not below 0, but is -1.0"),
        ({"probe_weight_end": math.inf}, "`probe_weight_end` has to be a number not below 0, but is inf"),
        ({"num_probe_weights": 0}, "`num_probe_weights` has to be at least 1, but is 0"),
        ({"num_probe_weights": 1}, "`num_probe_weights=1` is a constant weight .* 0.0225 and 0.03"),
        ({"probe_fraction": 0.0}, r"`probe_fraction` has to lie in \(0, 1\], but is 0.0"),
        ({"timestep_sampling": "beta"}, "`timestep_sampling` has to be one of .*, but is 'beta'"),
        ({"path_type": "vp"}, "`path_type` has to be one of .*, but is 'vp'"),
    ],
)
def test_impossible_settings_are_refused(make_objective, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_objective(**arguments)


def test_probe_and_transformer_have_to_fit(tiny_transformer):
    with pytest.raises(ValueError, match="`probe` has to have `hidden_size=32` and `num_classes=10` .* has 16 and 10"):
        LSEPObjective(tiny_transformer(), LinearProbe(16, 10), probe_depth=1)
    with pytest.raises(ValueError, match="`transformer` has to predict .* `in_channels=4` and `out_channels=8`"):
        LSEPObjective(tiny_transformer(out_channels=8), LinearProbe(32, 10), probe_depth=1)
    with pytest.raises(ValueError, match="`num_classes` has to be at least 1, but is 0"):
        LinearProbe(8, 0)
    with pytest.raises(ValueError, match="`depth` has to be at least 1, but is 0"):
        LinearProbe(8, 3, depth=0)
