# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline
from hub_server import HubServer
from huggingface_hub import ModelCard
from tiny_models import make_autoencoder, make_vae

from diffusers_lsep import LinearProbe, __version__, convert_original_checkpoint
from diffusers_lsep.cli import COMMANDS, SCRIPTS, main


REFERENCE = Path(__file__).parent / "reference"
LSEP, SIT = REFERENCE / "lsep_tiny.pt", REFERENCE / "sit_tiny.pt"


def convert(output_dir, *flags, checkpoint=LSEP):
    main(["convert", "--checkpoint", str(checkpoint), "--output_dir", str(output_dir), *map(str, flags)])


def convert_tiny(output_dir, *flags, checkpoint=LSEP):
    convert(output_dir, "--num_attention_heads", 4, *flags, checkpoint=checkpoint)


def error_of(function, *args, **kwargs):
    """The message with which a command refuses."""
    with pytest.raises((ValueError, OSError)) as error:
        function(*args, **kwargs)
    return str(error.value)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    make_vae().save_pretrained(folder)
    return folder


# The command


def test_usage_and_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"diffusers-lsep {__version__}\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert {*COMMANDS, *SCRIPTS} <= set(capsys.readouterr().out.split())
    for argv, message in (([], "COMMAND"), (["draw"], "invalid choice: 'draw'"), (["convert"], "--checkpoint")):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "a.npz", "--reference", "b.npz", "--num_images", "9"], "--num_images needs --checkpoints"),
        (["evaluate", "a.npz", "--reference", "b.npz", "--dtype", "bfloat16"], "--dtype needs --checkpoints"),
        (
            ["evaluate", "--checkpoints", "run", "--reference", "b.npz", "--samples_split", "test"],
            "--samples_split needs SAMPLES",
        ),
        (
            ["evaluate", "a.npz", "--reference", "b.npz", "--dinov2_model", "a/b"],
            "--dinov2_model needs --metrics fd_dinov2",
        ),
        (
            ["likelihood", "pipe", "--data", "images", "--trace", "exact", "--num_directions", "2"],
            "--num_directions needs --trace hutchinson",
        ),
        (["probe", "pipe", "--data", "images", "--method", "ridge", "--epochs", "9"], "--epochs needs --method mae"),
        (
            ["encode", "--train_data_dir", "images", "--dataset_config_name", "full"],
            "--dataset_config_name needs --dataset_name",
        ),
        (
            ["encode", "--train_data_dir", "images", "--unconditional", "--label_column", "digit"],
            "--unconditional reads no labels: leave out --label_column",
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else value.split()[0].strip("-"),
)
def test_flags_that_would_do_nothing_are_refused(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*argv, "--output_dir", str(tmp_path / "out")])
    assert end.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_help_of_convert_names_its_flags(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    for flag in (
        "checkpoint",
        "output_dir",
        "vae",
        "id2label",
        "source",
        "license",
        "push_to_hub",
        "weights",
        "dtype",
    ):
        assert f"--{flag}" in text


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["draw"]], ids=["help", "version", "wrong"])
def test_what_needs_no_library_imports_none(argv):
    code = (
        "import sys; from diffusers_lsep.cli import main\n"
        f"try: main({argv})\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'diffusers', 'transformers', 'accelerate', 'huggingface_hub'} & {*sys.modules})"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_only_the_module_of_the_command_is_imported():
    code = (
        "import sys; from diffusers_lsep.cli import main\n"
        "try: main(['convert', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('datasets', 'evaluate', 'matplotlib', 'diffusers_lsep.evaluation')"
        " if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


# convert


def test_convert_writes_a_pipeline_that_diffusers_loads(tmp_path, vae, capsys):
    output_dir = tmp_path / "new" / "pipeline"
    names = tmp_path / "names.json"
    names.write_text(json.dumps([f"digit {i}, n{i}" for i in range(10)]))
    convert_tiny(output_dir, "--vae", vae, "--id2label", names)

    assert {path.name for path in output_dir.parent.iterdir()} == {"pipeline"}, "nothing temporary is left"
    assert {path.name for path in output_dir.iterdir()} == {
        "README.md",
        "model_index.json",
        "probe",
        "scheduler",
        "transformer",
        "vae",
    }
    assert output_dir.stat().st_mode == (tmp_path / "new").stat().st_mode
    for path in output_dir.rglob("*.json"):
        assert "pipeline/" not in path.read_text(), f"{path.name} holds the temporary path"

    expected = convert_original_checkpoint(LSEP, num_attention_heads=4)
    pipe = DiffusionPipeline.from_pretrained(output_dir)
    probe = LinearProbe.from_pretrained(output_dir / "probe")
    for ours, theirs in ((pipe.transformer, expected.transformer), (probe, expected.probe)):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
    images = pipe(["digit 3", "n7"], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(16, 16)] * 2, "latents of 8, decoded twice as large"
    output = capsys.readouterr().out
    assert "lsep checkpoint, weights 'ema', " in output and "has no VAE" not in output


def test_convert_without_a_vae_says_how_to_give_one(tmp_path, vae, capsys):
    convert_tiny(tmp_path / "pipeline", checkpoint=SIT)
    output = capsys.readouterr().out
    assert "sit checkpoint" in output and "The pipeline has no VAE" in output
    assert not (tmp_path / "pipeline" / "probe").exists()

    code = output.splitlines()[1].rpartition(": ")[2]
    assert code.startswith("DiffusionPipeline.from_pretrained(")
    pipe = eval(code, {"DiffusionPipeline": DiffusionPipeline, "vae": AutoencoderKL.from_pretrained(vae)})
    assert pipe([1], num_inference_steps=1).images[0].size == (16, 16)


def test_convert_weights_dtype_and_shards(tmp_path):
    convert_tiny(tmp_path / "pipeline", "--weights", "model", "--dtype", "bfloat16", "--max_shard_size", "200KB")
    expected = convert_original_checkpoint(LSEP, weights="model", num_attention_heads=4)
    transformer = DiffusionPipeline.from_pretrained(tmp_path / "pipeline").transformer
    probe = LinearProbe.from_pretrained(tmp_path / "pipeline" / "probe")
    assert torch.equal(probe.linear.weight, expected.probe.linear.weight.bfloat16().to(probe.dtype))

    files = list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 250_000 for file in files)
    from safetensors.torch import load_file

    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    for name, tensor in expected.transformer.state_dict().items():
        assert torch.equal(saved[name], tensor.bfloat16()), name
        assert torch.equal(transformer.state_dict()[name], tensor.bfloat16().to(transformer.dtype)), name


def test_convert_names_imagenet_classes_by_default(tmp_path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(SIT, weights_only=True)
    weights["y_embedder.embedding_table.weight"] = torch.randn(1001, 64)
    torch.save(weights, tmp_path / "sit.pt")
    convert_tiny(tmp_path / "pipeline", checkpoint=tmp_path / "sit.pt")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.get_label_ids(["golden retriever", "n02012849"]) == [207, 134]

    convert_tiny(tmp_path / "ten", checkpoint=SIT)
    assert DiffusionPipeline.from_pretrained(tmp_path / "ten").config.id2label is None


def test_convert_path_type_and_source(tmp_path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(LSEP, weights_only=True)["ema"]
    torch.save({name: w for name, w in weights.items() if "classifier" not in name}, tmp_path / "bare.pt")
    message = error_of(convert_tiny, tmp_path / "pipeline", checkpoint=tmp_path / "bare.pt")
    assert "`--source`" in message
    convert_tiny(tmp_path / "p", "--source", "repa", "--path_type", "cosine", checkpoint=tmp_path / "bare.pt")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert pipe.scheduler.config.path_type == pipe.config.path_type == "cosine"


def test_convert_with_code_loads_as_remote_code(tmp_path):
    convert_tiny(tmp_path / "pipeline", "--with_code")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LSEPPipeline"]
    assert (tmp_path / "pipeline" / "pipeline.py").is_file()


def test_the_model_card_claims_a_licence_only_if_it_is_given(tmp_path):
    convert_tiny(tmp_path / "silent")
    assert ModelCard.load(tmp_path / "silent" / "README.md").data.license is None
    convert_tiny(tmp_path / "open", "--license", "mit")
    card = ModelCard.load(tmp_path / "open" / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "diffusers"
    assert 'from_pretrained("open"' in card.text and str(tmp_path) not in card.content


# convert refuses


def test_convert_replaces_nothing_unasked(tmp_path):
    output_dir = tmp_path / "pipeline"
    output_dir.mkdir()
    convert_tiny(output_dir)  # an empty folder is fine
    weights = (output_dir / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    message = error_of(convert_tiny, output_dir, "--weights", "model")
    assert f"`--output_dir` {output_dir} is not empty. `--overwrite_output_dir`" in message
    assert (output_dir / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == weights

    # A failure leaves the old one, success has no trace of it.
    error_of(convert, output_dir, "--overwrite_output_dir")
    assert (output_dir / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    convert_tiny(output_dir, "--overwrite_output_dir", checkpoint=SIT)
    assert (output_dir / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() != weights
    assert not (output_dir / "probe").exists()
    assert list(tmp_path.iterdir()) == [output_dir]


def test_convert_replaces_only_what_it_wrote(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    message = error_of(convert_tiny, tmp_path, "--overwrite_output_dir")
    assert "`--overwrite_output_dir` replaces a converted pipeline only" in message and "thesis.txt" in message
    convert_tiny(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "checkpoint-500").mkdir()
    assert "checkpoint-500" in error_of(convert_tiny, tmp_path / "pipeline", "--overwrite_output_dir")
    assert "is a file" in error_of(convert_tiny, tmp_path / "thesis.txt")


def test_convert_leaves_nothing_half_written(tmp_path, monkeypatch):
    output_dir = tmp_path / "pipeline"
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(LSEP.read_bytes()[:-100])
    assert str(truncated) in error_of(convert_tiny, output_dir, checkpoint=truncated)
    assert "`num_attention_heads`" in error_of(convert, output_dir)

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("diffusers_lsep.LinearProbe.save_pretrained", fail)
    assert "No space left on device" in error_of(convert_tiny, output_dir)
    assert list(tmp_path.iterdir()) == [truncated]


def test_convert_refuses_before_any_work(tmp_path, vae):
    output_dir, names = tmp_path / "pipeline", tmp_path / "names.json"
    names.write_text("{}")
    for flags, message in (
        (("--push_to_hub", "me/model"), "`--push_to_hub` needs `--license`"),
        (("--id2label", tmp_path / "absent.json"), "absent.json"),
        (("--id2label", names), "has to name the classes 0..9 of the model, but has 0 names"),
        (("--vae", tmp_path / "absent"), "absent"),
    ):
        assert message in error_of(convert_tiny, output_dir, *flags)
    cosine = REFERENCE / "lsep_tiny_cosine.pt"
    assert "nowhere.pt" in error_of(convert, output_dir, checkpoint=tmp_path / "nowhere.pt")
    names.write_text(json.dumps(["a", "b"]))
    message = error_of(convert, output_dir, "--id2label", names, checkpoint=cosine)
    assert "0..6 of the model, but has 2 names for the ids 0..1" in message
    assert list(tmp_path.iterdir()) == [names]


def test_convert_refuses_folders_that_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = error_of(convert, tmp_path / "file" / "a" / "b", checkpoint="nowhere.pt")
    assert "`--output_dir`" in message and f"{str(tmp_path / 'file')!r} is no such folder" in message
    assert "/proc is a mount point" in error_of(convert, "/proc", checkpoint="nowhere.pt")


def test_convert_through_a_link_replaces_what_it_leads_to(tmp_path):
    convert_tiny(tmp_path / "pipeline")
    (tmp_path / "link").symlink_to(tmp_path / "pipeline")
    convert_tiny(tmp_path / "link", "--overwrite_output_dir", checkpoint=SIT)
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "pipeline" / "probe").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipeline"]


def test_convert_refuses_a_vae_of_other_latents(tmp_path, vae):
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(SIT, weights_only=True)
    weights["x_embedder.proj.weight"] = torch.randn(64, 3, 2, 2)
    weights["final_layer.linear.weight"], weights["final_layer.linear.bias"] = torch.randn(24, 64), torch.randn(24)
    torch.save(weights, tmp_path / "sit.pt")
    message = error_of(convert_tiny, tmp_path / "pipeline", "--vae", vae, checkpoint=tmp_path / "sit.pt")
    assert "`--vae` has 4 latent channels (AutoencoderKL), but `transformer` has `in_channels=3`" in message
    assert not (tmp_path / "pipeline").exists()


def test_convert_with_an_autoencoder_of_another_class(tmp_path):
    make_autoencoder("DC").save_pretrained(tmp_path / "vae")
    convert_tiny(tmp_path / "pipeline", "--vae", tmp_path / "vae")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipe.vae) is AutoencoderDC and pipe.vae_scale_factor == 2
    assert "| Autoencoder | `AutoencoderDC`, 4 channels" in (tmp_path / "pipeline" / "README.md").read_text()


@pytest.mark.slow
def test_convert_as_a_process(tmp_path, warm_python):
    command = [warm_python, "-m", "diffusers_lsep.cli", "convert", "--output_dir", tmp_path / "pipeline"]
    bad = subprocess.run([*command, "--checkpoint", "nowhere.pt"], capture_output=True, text=True)
    assert bad.returncode == 2
    (line,) = bad.stderr.splitlines()
    assert line.startswith("diffusers-lsep convert: error: `checkpoint_path` has to be a file")


@pytest.mark.slow
def test_convert_pushes(tmp_path):
    command = [sys.executable, "-m", "diffusers_lsep.cli", "convert", "--checkpoint", str(LSEP)]
    command += ["--output_dir", str(tmp_path / "pipeline"), "--num_attention_heads", "4"]
    command += ["--push_to_hub", "me/model", "--license", "mit"]
    with HubServer(tmp_path / "hub", {"secret": "me"}) as server:
        # The client reads these once, when it is imported.
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": "secret", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, env={**env, "HF_HOME": str(tmp_path)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"Pushed: {server.url}/me/model" in done.stdout
        uploads = [path for method, path, status, _ in server.requests if method == "PUT" and status == 200]
    assert len(uploads) == 2, "the weights of the transformer and of the probe"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which only Linux has")
def test_the_benchmark_of_full_size_runs_on_a_small_preset(load_example, tmp_path, monkeypatch, capsys):
    benchmark = load_example("convert_full_size", "benchmarks")
    # The interpreter alone is larger than these weights, so the ratio says nothing here.
    monkeypatch.setattr(benchmark, "ALLOWED_RATIO", float("inf"))
    monkeypatch.setattr(sys, "argv", ["convert_full_size.py", "--preset", "SiT-S/8", "--work_dir", str(tmp_path)])
    benchmark.main()
    assert "33,043,456 (expected 33,043,456)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
