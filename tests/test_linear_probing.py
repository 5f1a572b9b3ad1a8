# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest
import torch
from hub_server import HubServer
from tiny_models import make_pipeline, make_vae
from warm_python import warm_environment

from diffusers_lsep import FlowMatchSDEScheduler, LinearProbe, LSEPPipeline
from diffusers_lsep.cli import main
from diffusers_lsep.data.draws import keyed_generator
from diffusers_lsep.data.sources import hash_labels
from diffusers_lsep.evaluation import linear_probing
from diffusers_lsep.evaluation.linear_probing import (
    NOISE_PURPOSES,
    HiddenStates,
    NormalEquations,
    draw_heat_map,
    find_hits,
    fit_mae,
    probe_layers,
)
from diffusers_lsep.files import make_temporary_array


IMAGENET = 1_281_167  # training images


def clusters(count, num_classes=3, dim=6, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.arange(count) % num_classes
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


def fit_ridge(features, labels, num_classes, regularization=0.01, batch_size=13):
    equations = NormalEquations(num_classes)
    for batch in zip(features.split(batch_size), labels.split(batch_size)):
        equations.add(*batch)
    return equations.solve(regularization)


def accuracy(probe, features, labels):
    return find_hits(probe, features, labels).mean()


class TestRidge:
    def test_equals_a_plain_solution(self):
        x, labels = clusters(50, spread=3.0)
        x = x * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0, 1.0]) + 5
        probe = fit_ridge(x, labels, 3, regularization=0.2)
        # Standardised features, and as many rows more as there are features to shrink the weights
        z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
        y = torch.eye(3, dtype=torch.float64)[labels]
        rows = torch.cat([z, (0.2 * 50) ** 0.5 * torch.eye(6, dtype=torch.float64)])
        targets = torch.cat([y - y.mean(0), torch.zeros(6, 3, dtype=torch.float64)])
        weight = np.linalg.lstsq(rows.numpy(), targets.numpy(), rcond=None)[0]
        torch.testing.assert_close(probe(x).double(), z @ torch.from_numpy(weight) + y.mean(0), atol=1e-5, rtol=1e-5)

    def test_constant_features_do_no_harm(self):
        x, labels = clusters(60)
        x[:, 2] = 7.0
        probe = fit_ridge(x, labels, 3)
        assert torch.isfinite(probe.weight).all()
        assert accuracy(probe, *clusters(60, seed=1)) > 0.9

    def test_far_from_zero_nothing_cancels(self):
        """Features of which float32 has but three digits beside their mean."""
        x, labels = clusters(200)
        moved = x + 1e4
        far = fit_ridge(moved, labels, 3)
        near = fit_ridge((moved.double() - 1e4).float(), labels, 3)
        torch.testing.assert_close(far.weight, near.weight, rtol=1e-5, atol=1e-6)

    def test_nothing_to_solve(self):
        with pytest.raises(ValueError, match="`add` has to be called with features before `solve`"):
            NormalEquations(3).solve()


class TestFitMAE:
    def test_equals_a_plain_rewriting(self):
        # 64 rows are 2 batches of 32; 9 epochs have 1 of warm-up
        x, labels = clusters(64, spread=1.0)
        probe = fit_mae(x, labels, 3, epochs=9, seed=5)

        generator = torch.Generator().manual_seed(5)
        weight = torch.nn.init.trunc_normal_(torch.empty(3, 6), std=0.01, generator=generator).double().numpy()
        bias = np.zeros(3)
        momentum_weight, momentum_bias = np.zeros((3, 6)), np.zeros(3)
        mean, variance = np.zeros(6), np.ones(6)
        x, labels = x.double().numpy(), labels.numpy()
        for epoch in range(9):
            order = torch.randperm(64, generator=generator).numpy()
            for step in range(2):
                rows = order[32 * step : 32 * step + 32]
                time = epoch + step / 2
                rate = 6.4 * (time if time < 1 else (1 + np.cos(np.pi * (time - 1) / 8)) / 2)
                batch = x[rows]
                mean = 0.9 * mean + 0.1 * batch.mean(0)
                variance = 0.9 * variance + 0.1 * batch.var(0, ddof=1)
                batch = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-6)
                scores = np.exp(batch @ weight.T + bias)
                error = (scores / scores.sum(1, keepdims=True) - np.eye(3)[labels[rows]]) / 32
                gradient = error.T @ batch
                trust = 0.001 * np.linalg.norm(weight) / np.linalg.norm(gradient)
                momentum_weight = 0.9 * momentum_weight + trust * gradient
                momentum_bias = 0.9 * momentum_bias + error.sum(0)
                weight = weight - rate * momentum_weight
                bias = bias - rate * momentum_bias
        norm, linear = probe
        np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.running_var, variance, rtol=1e-4)
        np.testing.assert_allclose(linear.weight, weight, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(linear.bias, bias, rtol=1e-3, atol=1e-5)
        assert not probe.training

    @pytest.mark.parametrize(("count", "batch_size"), [(2, 2), (20, 20), (64, 32), (7800, 100), (IMAGENET, 16384)])
    def test_batches_keep_imagenet_s_number_of_steps(self, monkeypatch, count, batch_size):
        sizes = []

        def record(logits, labels):
            sizes.append(len(labels))
            return logits.sum()

        monkeypatch.setattr(torch.nn.functional, "cross_entropy", record)
        fit_mae(torch.zeros(count, 1), torch.zeros(count, dtype=torch.int64), 2, epochs=1)
        assert sizes == [batch_size] * (count // batch_size)
        assert count != IMAGENET or len(sizes) == 78

    def test_learns(self):
        assert accuracy(fit_mae(*clusters(300), 3, epochs=20), *clusters(90, seed=1)) > 0.95


class BrightSource:
    """Images `[C, S, S]` of one grey level each, which is their class."""

    kind = "images"

    def __init__(self, count, channels=1, size=8, offset=0.0):
        self.labels = np.arange(count) % 3
        self.shape, self.offset = (channels, size, size), offset

    def load(self, rows, flips):
        assert not flips.any()
        level = torch.from_numpy(self.labels[rows]).float() - 1 + self.offset
        return level.view(-1, 1, 1, 1).expand(-1, *self.shape).contiguous()


@pytest.fixture
def pipe():
    return make_pipeline(in_channels=1, num_layers=3, num_classes=3)


@pytest.fixture
def tiny_vae():
    return make_vae(latent_channels=2, scaling_factor=0.5, shift_factor=0.25)


class TestHiddenStates:
    @pytest.mark.parametrize("path_type", ["linear", "cosine"])
    def test_equal_the_model_s_tokens_without_a_label(self, tiny_transformer, tmp_path, path_type):
        transformer = tiny_transformer(in_channels=1, num_layers=3, num_classes=3)
        pipe = LSEPPipeline(transformer, FlowMatchSDEScheduler(path_type=path_type), path_type=path_type)
        states = HiddenStates(pipe, [0, 2, 3], tmp_path, batch_size=2, seed=4)
        latents = states.encode("training", BrightSource(5))
        np.testing.assert_array_equal(latents[:, 0, 0, 0], [-1, 0, 1, -1, 0])
        features = states.at(0.3, "training", latents)
        assert features.shape == (3, 5, 32)
        for row in range(5):
            key = keyed_generator(4, row, NOISE_PURPOSES["training"])
            noise = torch.from_numpy(key.standard_normal((1, 1, 8, 8), dtype=np.float32))
            alpha, sigma = (0.7, 0.3) if path_type == "linear" else (np.cos(0.15 * np.pi), np.sin(0.15 * np.pi))
            x = alpha * latents[row, 0, 0, 0] + sigma * noise
            with torch.no_grad():
                tokens = transformer.hidden_states_at(x, 0.3, torch.tensor([3]), [0, 2, 3])
            for layer in range(3):
                np.testing.assert_allclose(features[layer, row], tokens[layer].mean(1)[0], rtol=1e-4, atol=1e-4)
        # Other times see the same noise, held-out images another one
        again = states.at(1.0, "training", latents)
        assert not np.allclose(again, states.at(1.0, "held-out", latents))

    def test_latents_are_the_means_of_the_vae(self, tiny_transformer, tiny_vae, tmp_path):
        pipe = LSEPPipeline(tiny_transformer(in_channels=2, num_classes=3), FlowMatchSDEScheduler(), vae=tiny_vae)
        states = HiddenStates(pipe, [1], tmp_path, batch_size=2)
        source = BrightSource(3, channels=3, size=16, offset=0.1)
        images = source.load(np.arange(3), np.zeros(3, bool))
        with torch.no_grad():
            posterior = tiny_vae.encode(images).latent_dist
        expected = (posterior.mean - 0.25) * 0.5
        np.testing.assert_allclose(states.encode("training", source), expected, atol=1e-5)

        class Moments:
            kind, labels = "moments", source.labels

            def load(self, rows, flips):
                return torch.cat([posterior.mean, posterior.std], dim=1)[rows]

        np.testing.assert_allclose(states.encode("held-out", Moments()), expected, atol=1e-5)


class TestProbeLayers:
    @pytest.mark.parametrize("method", ["mae", "ridge"])
    def test_finds_the_class_in_data_and_not_in_noise(self, pipe, method):
        results = probe_layers(
            pipe, BrightSource(90), BrightSource(60), 3, timesteps=[1.0, 0.0], method=method, epochs=20
        )
        assert results["layers"] == [1, 2, 3] and results["timesteps"] == [0.0, 1.0]
        table = np.array(results["accuracy"])
        assert table.shape == (3, 2)
        assert (table[:, 0] == 1.0).all() and (table[:, 1] < 0.6).all()
        halves = {"num_images_chosen_on": 30, "num_images_measured_on": 30}
        assert results["best"] == {"layer": 1, "timestep": 0.0, "accuracy": 1.0, **halves}
        assert results["chance"] == pytest.approx(1 / 3)
        assert results["training_probe"] is None
        assert (results["num_training_images"], results["num_held_out_images"]) == (90, 60)
        assert results["epochs"] == (20 if method == "mae" else None)
        json.dumps(results)

    @pytest.mark.parametrize(("method", "kept"), [("ridge", []), ("mae", [(3, 20, 32)])])
    def test_features_are_not_kept(self, pipe, monkeypatch, method, kept):
        shapes = []

        def record(folder, dtype, shape):
            shapes.append(shape)
            return make_temporary_array(folder, dtype, shape)

        monkeypatch.setattr(linear_probing, "make_temporary_array", record)
        probe_layers(pipe, BrightSource(20), BrightSource(10), 3, timesteps=[0.5], method=method, epochs=1)
        assert shapes == [(20, 1, 8, 8), (10, 1, 8, 8), *kept]

    @pytest.mark.parametrize("method", ["mae", "ridge"])
    def test_bfloat16(self, pipe, method):
        """Products in half precision, means and fits not; and TF32, of which a CPU has none."""
        options = {"timesteps": [0.0, 0.5], "method": method, "epochs": 5}
        results = probe_layers(pipe, BrightSource(60), BrightSource(60), 3, **options)
        pipe.transformer.to(torch.bfloat16)
        rounded = probe_layers(pipe, BrightSource(60), BrightSource(60), 3, **options, allow_tf32=True)
        assert (results["dtype"], results["allow_tf32"]) == ("float32", None)
        assert (rounded["dtype"], rounded["allow_tf32"]) == ("bfloat16", True)
        assert not torch.backends.cuda.matmul.allow_tf32
        np.testing.assert_allclose(rounded["accuracy"], results["accuracy"], atol=0.1)

    @pytest.mark.slow
    def test_the_best_is_not_the_largest_of_many_by_chance(self, pipe):
        """No cell of the table is better than another: half of the images choose one, the other half measures it."""

        class Noise(BrightSource):
            def load(self, rows, flips):
                return torch.randn(len(rows), *self.shape, generator=torch.Generator().manual_seed(self.offset))

        times = np.linspace(0, 0.9, 10).tolist()
        largest, best = [], []
        for seed in range(12):
            results = probe_layers(
                pipe, Noise(30, offset=0), Noise(41, offset=1), 3, None, times, "ridge", batch_size=41, seed=seed
            )
            largest.append(np.max(results["accuracy"]))
            best.append(results["best"]["accuracy"])
            assert (best[-1] * 21) % 1 == pytest.approx(0, abs=1e-9)
            halves = [results["best"][f"num_images_{what}_on"] for what in ("chosen", "measured")]
            assert halves == [20, 21]
        assert np.mean(largest) > 0.4 and min(largest) > 0.36
        assert np.mean(best) == pytest.approx(1 / 3, abs=0.08)

    def test_training_probe_is_measured_on_its_own(self, pipe):
        torch.manual_seed(0)
        probe = LinearProbe(32, 3)
        torch.nn.init.normal_(probe.norm.weight)
        arguments = (pipe, BrightSource(12), BrightSource(30), 3)
        options = {"timesteps": [0.0, 0.5], "method": "ridge"}
        results = probe_layers(*arguments, layers=[3], training_probe=probe, probe_depth=2, **options)
        assert results["layers"] == [3] and np.shape(results["accuracy"]) == (1, 2)
        assert results["accuracy"] == probe_layers(*arguments, layers=[3], **options)["accuracy"]

        x = BrightSource(30).load(np.arange(30), np.zeros(30, bool))
        with torch.no_grad():
            tokens = pipe.transformer.hidden_states_at(x, 0.0, torch.full((30,), 3), 2)
            expected = (probe(tokens).argmax(1).numpy() == np.arange(30) % 3).mean()
        assert results["training_probe"]["layer"] == 2
        assert results["training_probe"]["accuracy"][0] == expected
        assert len(results["training_probe"]["accuracy"]) == 2

    def test_is_reproducible(self, pipe):
        runs = [
            probe_layers(pipe, BrightSource(40), BrightSource(30), 3, [2], [0.9], epochs=2)["accuracy"]
            for _ in range(2)
        ]
        assert runs[0] == runs[1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": [4]}, r"`layers` has to lie in 0..3, but is \[4\]"),
            ({"layers": []}, r"`layers` has to lie in 0..3, but is \[\]"),
            ({"timesteps": [0.5, 1.5]}, r"`timesteps` has to lie in \[0, 1\], but is \[0.5, 1.5\]"),
            ({"method": "svm"}, r"`method` has to be one of \['mae', 'ridge'\], but is 'svm'"),
            ({"epochs": 0}, "`epochs` has to be at least 1, but is 0"),
            ({"batch_size": 0}, "`batch_size` has to be at least 1, but is 0"),
            ({"training_probe": LinearProbe(32, 3)}, "`probe_depth` has to lie in 1..3, but is None"),
        ],
    )
    def test_errors(self, pipe, options, message):
        with pytest.raises(ValueError, match=message):
            probe_layers(pipe, BrightSource(9), BrightSource(9), 3, **options)

    def test_tokens_that_overflow_are_an_error(self, pipe):
        layers = pipe.transformer.transformer_blocks
        handle = layers[1].register_forward_hook(lambda module, inputs, output: output / 0)
        with pytest.raises(ValueError, match="in float32 gives tokens .* no finite numbers after 2 blocks at t = 0.5"):
            probe_layers(pipe, BrightSource(9), BrightSource(9), 3, timesteps=[0.5])
        handle.remove()

    def test_too_few_images(self, pipe):
        for train, held_out in ((1, 9), (9, 1)):
            message = f"has to hold 2 images to fit and 2 to measure, but holds {train} and {held_out}"
            with pytest.raises(ValueError, match=message):
                probe_layers(pipe, BrightSource(train), BrightSource(held_out), 3)


def test_heat_map(tmp_path):
    results = {"accuracy": [[0.0, 1.0], [0.5, 0.25], [0.1, 0.2]], "layers": [1, 2, 3], "timesteps": [0.0, 0.5]}
    results |= {"chance": 0.25, "training_probe": {"layer": 2}}
    draw_heat_map(tmp_path / "map.png", results, title="title")
    with PIL.Image.open(tmp_path / "map.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert ((pixels == (213, 94, 0)).all(axis=1)).sum() > 500, "the frame around the layer of the training's probe"
    # viridis: the largest value is yellow, the smallest dark violet
    for colour in ((253, 231, 36), (68, 1, 84)):
        assert (np.abs(pixels.astype(int) - colour).max(axis=1) <= 2).sum() > 500
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Grey images of three levels in folders of their classes, with a held-out split."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("dark", "grey", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((8, 8), 20 + 100 * label + index % 5, np.uint8)
                PIL.Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture
def arguments(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")

    def make(*args, data=images):
        return [
            *(
                "probe",
                str(tmp_path / "pipeline"),
                "--data",
                str(data),
                "--method",
                "ridge",
                "--timesteps",
                "0",
                "0.5",
            ),
            *("--output_dir", str(tmp_path / "out"), *args),
        ]

    return make


def write_moments(folder, count):
    """Latents of three classes in the layout of EDM2 and REPA, whose mean is their class."""
    rng = np.random.default_rng(count)
    (folder / "00000").mkdir(parents=True)
    labels = []
    for index in range(count):
        name = f"00000/img-mean-std-{index:08d}.npy"
        mean = np.full((2, 8, 8), index % 3 - 1.0)
        np.save(folder / name, np.concatenate([mean, rng.random((2, 8, 8))]).astype(np.float32))
        labels.append([name, index % 3])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def read_results(tmp_path):
    return json.loads((tmp_path / "out" / "probe_results.json").read_text())


class TestCommand:
    def test_writes_results_and_heat_map(self, arguments, tmp_path, capsys):
        main(arguments())
        results = read_results(tmp_path)
        assert results["pipeline"] == str(tmp_path / "pipeline")
        assert (results["num_training_images"], results["num_held_out_images"]) == (36, 12)
        assert (results["layers"], results["timesteps"], results["method"]) == ([1, 2, 3], [0.0, 0.5], "ridge")
        assert results["accuracy"][0][0] == 1.0
        assert results["training_probe"] is None
        with PIL.Image.open(tmp_path / "out" / "probe_heatmap.png") as image:
            assert min(image.size) > 100
        assert results["held_out"] == "the split 'test'"
        assert (
            "best: 1.0000 after 1 blocks at t = 0 (chance 0.3333): chosen on 6 of the 12 held-out images, measured on"
            " the other 6; held out: the split 'test'"
        ) in capsys.readouterr().out

    def test_bfloat16(self, arguments, tmp_path):
        main(arguments("--dtype", "bfloat16", "--allow_tf32"))
        results = read_results(tmp_path)
        assert (results["dtype"], results["allow_tf32"]) == ("bfloat16", True)
        assert results["accuracy"][0][0] == 1.0

    def test_mae_and_fewer_images(self, arguments, tmp_path):
        options = ("--method", "mae", "--epochs", "3", "--layers", "2", "0", "--max_train_images", "10")
        main(arguments(*options))
        results = read_results(tmp_path)
        assert (results["layers"], results["epochs"], results["num_training_images"]) == ([0, 2], 3, 10)

    @pytest.mark.parametrize("source", ["flag", "probe", "training run", "checkpoint"])
    def test_training_probe(self, arguments, source, tmp_path, capsys):
        LinearProbe(32, 3, depth={"probe": 2, "flag": 3}.get(source)).save_pretrained(tmp_path / "pipeline" / "probe")
        if source == "probe":  # it knows best
            (tmp_path / "pipeline" / "training_args.json").write_text(json.dumps({"probe_depth": 1}))
        elif source == "training run":
            (tmp_path / "pipeline" / "training_args.json").write_text(json.dumps({"probe_depth": 2}))
        elif source == "checkpoint":
            (tmp_path / "training_state.json").write_text(json.dumps({"settings": {"probe_depth": 2}}))
        main(arguments(*(("--probe_depth", "2") if source == "flag" else ()), "--layers", "1"))
        results = read_results(tmp_path)
        assert results["training_probe"]["layer"] == 2 and len(results["training_probe"]["accuracy"]) == 2
        assert "the training's own probe, after 2 blocks: 0." in capsys.readouterr().out

    @pytest.mark.slow
    def test_training_probe_of_other_numbers(self, pipe, arguments, tmp_path, caplog):
        """Classes are the same by their names, whatever their numbers are."""
        torch.manual_seed(1)
        probe, accuracies = LinearProbe(32, 3, depth=2), []
        torch.nn.init.normal_(probe.norm.weight)
        index = tmp_path / "pipeline" / "model_index.json"
        for names in (["dark", "grey", "light"], ["grey", "light", "dark"], ["one", "two", "three"]):
            call = arguments("--layers", "1", "--overwrite_output_dir")
            index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": dict(enumerate(names))}))
            if len(accuracies) == 1:
                head = probe.linear
                head.weight.data, head.bias.data = head.weight.data[[1, 2, 0]], head.bias.data[[1, 2, 0]]
            probe.save_pretrained(tmp_path / "pipeline" / "probe")
            main(call)
            found = read_results(tmp_path)["training_probe"]
            accuracies.append(found and found["accuracy"])
        assert accuracies[0] == accuracies[1] and accuracies[2] is None
        assert "is not measured, as it knows other classes" in caplog.text

    @pytest.mark.slow
    def test_pipeline_on_the_hub(self, arguments, images, tmp_path):
        """The probe is found beside the pipeline, with its depth; a pipeline without one says so."""
        torch.manual_seed(0)
        push_folder = """
import sys
from diffusers_lsep.hub.model_card import write_model_card
from diffusers_lsep.hub.push import push_folder

write_model_card(sys.argv[1])
push_folder(sys.argv[1], sys.argv[2], license="mit")
"""
        folder, options = tmp_path / "pipeline", arguments("--layers", "1")[4:]
        python = tmp_path / "bin" / "python"
        with (
            HubServer(tmp_path / "hub", tokens={"hf_owner": "me"}) as hub,
            warm_environment(python.parent, hub.environment(tmp_path / "home", HF_TOKEN="hf_owner")) as environment,
        ):

            def run(*command):
                command = [python, *map(str, command)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, done.stderr
                return done.stdout

            arguments()  # saves the pipeline
            run("-c", push_folder, folder, "me/plain")
            LinearProbe(32, 3, depth=2).save_pretrained(folder / "probe")
            run("-c", push_folder, folder, "me/lsep")
            command = ["-m", "diffusers_lsep.cli", "probe"]
            data = ["--data", images, *options, "--overwrite_output_dir"]
            output = run(*command, "me/plain", *data)
            assert "me/plain has no folder probe/: there is no probe of the training to measure" in output
            assert read_results(tmp_path)["training_probe"] is None
            assert "the training's own probe, after 2 blocks: 0." in run(*command, "me/lsep", *data)
        on_hub = read_results(tmp_path)
        main(arguments("--layers", "1", "--probe_depth", "2", "--overwrite_output_dir"))
        assert on_hub["training_probe"] == read_results(tmp_path)["training_probe"]
        assert on_hub["training_probe"]["layer"] == 2

    def test_training_probe_that_cannot_be_measured(self, arguments, tmp_path, caplog):
        with pytest.raises(ValueError, match="`--probe_depth` 2 was given, but .* has no folder probe/"):
            main(arguments("--probe_depth", "2"))
        LinearProbe(32, 3).save_pretrained(tmp_path / "pipeline" / "probe")
        main(arguments())
        assert "`--probe_depth` is not known, so the training's own probe is not measured" in caplog.text
        with pytest.raises(ValueError, match=r"`probe_depth` has to lie in 1..3, but is 9"):
            main(arguments("--probe_depth", "9", "--overwrite_output_dir"))
        LinearProbe(32, 10).save_pretrained(tmp_path / "pipeline" / "probe")
        main(arguments("--probe_depth", "2", "--overwrite_output_dir"))
        assert "own probe knows 10 classes, the data has 3: it is not measured" in caplog.text
        assert read_results(tmp_path)["training_probe"] is None

    @pytest.mark.slow
    def test_latents_in_place_of_images(self, arguments, tiny_transformer, tiny_vae, tmp_path):
        data, validation_data = (write_moments(tmp_path / name, count) for name, count in (("train", 40), ("val", 12)))
        with pytest.raises(ValueError, match="`--data` .* holds latents, but `PIPELINE` .* has no VAE"):
            main(arguments(data=data))
        transformer = tiny_transformer(in_channels=2, num_classes=3)
        LSEPPipeline(transformer, FlowMatchSDEScheduler(), vae=tiny_vae).save_pretrained(tmp_path / "pipeline")
        with pytest.raises(ValueError, match="no part that is known to be held out: `PIPELINE` .* has no record"):
            main(arguments(data=data))
        for option in ([], ["--validation_split", "0.1"]):
            with pytest.raises(ValueError, match="Give `--validation_data` .*`--validation_split` .*`--unseen_data`"):
                main(arguments(*option, data=data))
        assert not (tmp_path / "out").exists()
        main(arguments("--validation_data", str(validation_data), data=data))
        results = read_results(tmp_path)
        assert (results["num_training_images"], results["num_held_out_images"]) == (40, 12)
        assert results["accuracy"][0][0] == 1.0 and results["held_out"] == str(validation_data)
        main(arguments("--unseen_data", "--overwrite_output_dir", data=data))
        results = read_results(tmp_path)
        assert (results["num_training_images"], results["num_held_out_images"]) == (36, 4)
        assert results["accuracy"][0][0] == 1.0
        assert results["held_out"] == "0.1 of the data, none of which the model saw"
        with pytest.raises(ValueError, match="`--validation_split` of latents has to be a fraction .* but is 'test'"):
            main(arguments("--validation_split", "test", "--overwrite_output_dir", data=data))
        transformer = tiny_transformer(in_channels=2, sample_size=16)
        LSEPPipeline(transformer, FlowMatchSDEScheduler(), vae=tiny_vae).save_pretrained(tmp_path / "pipeline")
        with pytest.raises(ValueError, match=r"holds moments \(4, 8, 8\), `PIPELINE` needs \(4, 16, 16\)"):
            main(arguments("--overwrite_output_dir", data=data))

    def test_images_without_a_split_to_measure_on(self, arguments, images, tmp_path):
        for option in ([], ["--validation_split", "0.25"]):
            with pytest.raises(ValueError, match=r"`--data` .* has no part that is known to be held out"):
                main(arguments(*option, data=images / "train"))
        assert not (tmp_path / "out").exists()
        main(arguments("--unseen_data", "--validation_split", "0.25", data=images / "train"))
        results = read_results(tmp_path)
        assert (results["num_training_images"], results["num_held_out_images"]) == (27, 9)
        # A fraction of data that has a split as well
        with pytest.raises(ValueError, match="no part that is known to be held out"):
            main(arguments("--validation_split", "0.25", "--overwrite_output_dir"))

    @pytest.mark.slow
    def test_other_data_to_measure_on(self, arguments, images, tmp_path, caplog):
        held_out = ("--validation_data", str(images / "test"), "--overwrite_output_dir")
        main(arguments(*held_out, data=images / "train"))
        own_split = read_results(tmp_path)
        assert (own_split["num_training_images"], own_split["num_held_out_images"]) == (36, 12)
        main(arguments("--overwrite_output_dir"))
        assert read_results(tmp_path)["accuracy"] == own_split["accuracy"]
        # The one split of the data that is asked for, or that there is to measure on
        for split in ([], ["--validation_split", "test"], ["--validation_split", "train"]):
            main(arguments("--validation_data", str(images), *split, *held_out[2:], data=images / "train"))
            assert read_results(tmp_path)["num_held_out_images"] == (36 if "train" in split else 12)
        # Classes go by their names
        few = tmp_path / "few"
        for name in ("light", "grey"):
            shutil.copytree(images / "test" / name, few / name)
        main(arguments("--validation_data", str(few), *held_out[2:], data=images / "train"))
        results = read_results(tmp_path)
        assert results["accuracy"][0][0] == 1.0 and results["num_held_out_images"] == 8
        # A run that was trained on as many, with the same labels
        record = {"training_images": 8, "training_labels": hash_labels(np.repeat([1, 2], 4))}
        (tmp_path / "pipeline" / "training_args.json").write_text(json.dumps(record))
        assert "what the model was trained on" not in caplog.text
        main(arguments("--validation_data", str(few), *held_out[2:], data=images / "train"))
        assert "with the same labels in the same order, as what the model was trained on" in caplog.text

        (few / "light").rename(few / "bright")
        with pytest.raises(
            ValueError, match=r"has to have the classes of .*, dark, grey, light, but has bright, grey\."
        ):
            main(arguments("--validation_data", str(few), *held_out[2:], data=images / "train"))
        with pytest.raises(ValueError, match="`--validation_data` has to be other data than `--data`"):
            main(arguments("--validation_data", f"{images}/./train", *held_out[2:], data=images / "train"))
        with pytest.raises(ValueError, match="has to be the name of a split of `--validation_data`, but is 0.1"):
            main(arguments(*held_out, "--validation_split", "0.1", data=images / "train"))
        with pytest.raises(ValueError, match=r"has to name a split .*, one of \['train'\], but is 'val'"):
            main(arguments(*held_out, "--validation_split", "val", data=images / "train"))

    @pytest.mark.slow
    def test_noise_with_random_labels_is_not_recognised(self, train, tmp_path, caplog):
        """The model remembers the labels of its training images. Those that the run held out show that it does."""
        rng, folder, run = np.random.default_rng(0), tmp_path / "noise", tmp_path / "run"
        for index, label in enumerate(rng.permutation(96) % 4):
            path = folder / f"class-{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
        model = ("--patch_size", 4, "--num_layers", 2, "--num_attention_heads", 2, "--attention_head_dim", 32)
        weights = ("--probe_weight_start", 1, "--probe_weight_end", 1, "--num_probe_weights", 1)
        method = ("--probe_depth", 1, "--probe_dropout_prob", 1, "--crop_size_min", 2, "--no-use_ema", *weights)
        length = ("--train_batch_size", 96, "--max_train_steps", 100, "--checkpointing_steps", 100)
        length += ("--learning_rate", 3e-3, "--probe_learning_rate", 3e-3)
        data = ("--train_data_dir", folder, "--resolution", 8, "--image_channels", 1, "--validation_split", 0.5)
        assert train(*model, *method, *length, *data) == 0

        def probe(*options, pipeline=run):
            fixed = ("--method", "ridge", "--timesteps", "0", "0.2", "--overwrite_output_dir")
            out = ("--output_dir", str(tmp_path / "out"))
            main(["probe", str(pipeline), "--data", str(folder), *fixed, *out, *options])
            results = read_results(tmp_path)
            return max(map(max, results["accuracy"])), min(results["training_probe"]["accuracy"]), results

        for pipeline in (run, run / "checkpoint-100" / "pipeline"):
            for options in ([], ["--validation_split", "0.5"]):
                of_fitted, of_training, results = probe(*options, "--seed", "1", pipeline=pipeline)
                assert of_fitted < 0.45 and of_training < 0.4, "chance is 1 in 4"
                assert (results["num_training_images"], results["num_held_out_images"]) == (48, 48)
                assert results["held_out"] == "what the training run held out of the data"
        # Another cut has images of the training among those to measure on: nobody gets it who does not lie.
        assert probe("--unseen_data", "--validation_split", "0.5", "--seed", "1")[1] > 0.45
        with pytest.raises(ValueError, match="its training run held out 0.5 of its data, not 0.1"):
            probe("--validation_split", "0.1")

        settings = json.loads((run / "training_args.json").read_text())
        for change, message in (
            ({"validation_split": None}, r"held out no fraction of its data \(`validation_split` is None\)"),
            ({"seed": 1}, "its training run was trained on other data"),
            ({"training_images": 47}, "its training run was trained on other data"),
            ({"training_labels": None}, "its training run was trained on other data"),
        ):
            (run / "training_args.json").write_text(json.dumps({**settings, **change}))
            with pytest.raises(ValueError, match=f"no part that is known to be held out: .*{message}"):
                probe()
        assert "the run started from" not in caplog.text
        settings["pretrained_model_name_or_path"] = "another/model"
        (run / "training_args.json").write_text(json.dumps(settings))
        probe()
        assert "the run started from 'another/model': whether that has seen these images is not known" in caplog.text

    def test_results_are_replaced_only_on_request(self, arguments, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "probe_results.json").write_text("mine")
        with pytest.raises(ValueError, match="`--output_dir` already holds .*probe_results.json"):
            main(arguments())
        assert (tmp_path / "out" / "probe_results.json").read_text() == "mine"
        main(arguments("--overwrite_output_dir"))
        assert read_results(tmp_path)["method"] == "ridge"
        (tmp_path / "out" / "probe_results.json").unlink()  # as if it was killed after the heat map
        main(arguments())
        assert read_results(tmp_path)["method"] == "ridge"

    def test_a_folder_that_cannot_be_written_is_refused_before_any_work(self, arguments, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match="`--output_dir` .*file/a' cannot be written: .*file' is no such folder"):
            main(arguments("--output_dir", str(tmp_path / "file" / "a"), data="nowhere"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--validation_split", "2"], "`--validation_split` has to be a split or a fraction .* but is 2.0"),
            (["--validation_split", "train"], "`--validation_split` has to be another split than 'train'"),
            (["--validation_split", "other"], r"has no split 'other'; the splits are \['train', 'test'\]"),
            (["--label_column", "class"], "there is no 'class'"),
            (["--data", "absent/data"], "`--data` 'absent/data' cannot be read"),
        ],
    )
    def test_errors(self, arguments, options, message):
        with pytest.raises(ValueError, match=message):
            main(arguments(*options))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--seed", "-1"], "has to be at least 0, but is -1"),
            (["--max_train_images", "1"], "has to be at least 2, but is 1"),
            (["--timesteps", "2"], "has to be in 0..1, but is 2"),
            (["--layers", "-1"], "has to be at least 0, but is -1"),
        ],
    )
    def test_numbers_out_of_range(self, arguments, options, message, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(arguments(*options))
        assert f"argument {options[0]}: {message}" in capsys.readouterr().err

    def test_pipelines_that_are_refused(self, images, tmp_path):
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        data = ("--data", str(images), "--output_dir", str(tmp_path / "out"))
        with pytest.raises(ValueError, match="`PIPELINE` .*absent' cannot be loaded"):
            main(["probe", str(tmp_path / "absent"), *data])
        blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
        unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=2, **blocks)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
        with pytest.raises(ValueError, match="`PIPELINE` has to be an LSEPPipeline, but is a DDPMPipeline"):
            main(["probe", str(tmp_path / "ddpm"), *data])
