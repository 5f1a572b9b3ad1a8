# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of all scripts and commands: one line that says what is wrong, exit code 2, and nothing written."""

import logging
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import save_class_folders
from tiny_models import make_pipeline, make_vae

from diffusers_lsep import LinearProbe, cli
from diffusers_lsep.command_line import run_script


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the calls below name: in braces."""
    root = tmp_path_factory.mktemp("wrong_calls")
    pipeline = make_pipeline(in_channels=3, id2label=dict(enumerate("abcdefghij")))
    pipeline.save_pretrained(root / "pipe")
    LinearProbe(32, 10).save_pretrained(root / "other")
    make_vae(scaling_factor=0.5).save_pretrained(root / "vae")
    save_class_folders(root / "images", ["ant", "bee"], [(9, 8)] * 6)
    save_class_folders(root / "broken_images", ["ant", "bee"], [(9, 8)] * 6)
    for path in (root / "broken_images").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:40])
    (root / "flat").mkdir()
    (root / "flat" / "0.png").write_bytes((root / "images" / "ant" / "0.png").read_bytes())
    (root / "empty").mkdir()
    (root / "file").write_text("no folder\n")
    (root / "junk").write_bytes(bytes(range(256)))
    (root / "junk.npz").write_bytes(b"no archive")
    np.savez(root / "samples.npz", arr_0=np.zeros((6, 8, 8, 3), np.uint8))
    np.savez(root / "small.npz", arr_0=np.zeros((6, 4, 4, 3), np.uint8))
    np.savez(root / "wrong.npz", images=np.zeros((6, 8, 8, 3), np.uint8))
    np.savez(root / "floats.npz", arr_0=np.zeros((6, 8, 8, 3), np.float32))
    torch.save({"a": torch.zeros(2)}, root / "other.pt")
    (root / "labels.json").write_text('{"a": ')
    (root / "recipe").write_text("--max_train_stepz 4")
    (root / "run").mkdir()
    (root / "run" / "training_args.json").write_text("{}")
    (root / "run" / "metrics.jsonl").write_text("")
    (root / "vae-sd").mkdir()
    (root / "vae-sd" / "dataset.json").write_text('{"labels": [["img-mean-std-00000000.npy", 0]]}')
    np.save(root / "vae-sd" / "img-mean-std-00000000.npy", np.zeros((3, 4, 4), np.float32))
    (root / "grid").mkdir()
    (root / "grid" / "grid.png").write_bytes(b"")
    (root / "grid" / "guidance-sweep.png").write_bytes(b"")
    (root / "grid" / "eval_results.json").write_text("{}")
    (root / "grid" / "probe_results.json").write_text("{}")
    return root


PIPE = "--pretrained_model_name_or_path {root}/pipe"
CALLS = {
    "sample.py": [
        ("--output_dir {out} --num_images 1", "--pretrained_model_name_or_path"),
        (f"{PIPE} --output_dir {{out}}", "one of the arguments --class_labels --num_images is required"),
        (f"{PIPE} --output_dir {{out}} --num_images 0", "argument --num_images: has to be at least 1, but is 0"),
        (f"{PIPE} --output_dir {{out}} --num_images x", "argument --num_images: invalid int value: 'x'"),
        (f"{PIPE} --output_dir {{out}} --num_image 4", "is --num_image meant to be --num_images?"),
        (f"{PIPE} --output_dir {{out}} --num_images 4 --class_labels 1", "not allowed with argument"),
        (f"{PIPE} --output_dir {{out}} --class_labels 99", "99"),
        (f"{PIPE} --output_dir {{out}} --class_labels zebra", "zebra"),
        (f"{PIPE} --output_dir {{out}} --class_labels 1 --guidance_interval 0.7 0.2", "has to be LOW HIGH"),
        (f"{PIPE} --output_dir {{out}} --class_labels 1 --guidance_scale nan", "guidance_scale"),
        (f"{PIPE} --output_dir {{out}} --class_labels 1 --guidance_scale x", "guidance_scale"),
        (f"{PIPE} --output_dir {{out}} --class_labels 1 --internal_guidance_scale 2", "internal_guidance_scale"),
        (f"{PIPE} --output_dir {{out}} --class_labels 1 --scheduler best", "argument --scheduler: invalid choice"),
        (f"{PIPE} --output_dir {{out}} --class_labels 1 --num_inference_steps 0", "argument --num_inference_steps"),
        (f"{PIPE} --output_dir {{out}} --class_labels 1 --label_sampling none", "--label_sampling needs"),
        (f"{PIPE} --output_dir {{out}} --class_labels 1 --seed -1", "argument --seed: has to be at least 0"),
        (f"{PIPE} --output_dir {{out}} --class_labels 1 --variant fp16", "fp16"),
        (f"{PIPE} --output_dir {{root}}/file --class_labels 1", "cannot be written"),
        (f"{PIPE} --output_dir {{root}}/file/under --class_labels 1", "cannot be written"),
        (f"{PIPE} --output_dir {{root}}/grid --class_labels 1", "already has grid.png"),
        ("--pretrained_model_name_or_path {root}/absent --output_dir {out} --class_labels 1", "absent"),
        ("--pretrained_model_name_or_path {root}/empty --output_dir {out} --class_labels 1", "empty"),
        ("--pretrained_model_name_or_path {root}/file --output_dir {out} --class_labels 1", "/file' cannot be loaded"),
        ("--pretrained_model_name_or_path {root}/other --output_dir {out} --class_labels 1", "other"),
        ("--pretrained_model_name_or_path no/such/id --output_dir {out} --class_labels 1", "no/such/id"),
        ("--pretrained_model_name_or_path ?? --output_dir {out} --class_labels 1", "??"),
    ],
    "figures.py": [
        ("", "FIGURE"),
        ("fancy-figure", "invalid choice: 'fancy-figure'"),
        (f"denoising-strip {PIPE} --output_dir {{out}}", "--class_labels"),
        (f"denoising-strip {PIPE} --output_dir {{out}} --class_labels 10", "`--class_labels` has to lie in 0..9"),
        (f"denoising-strip {PIPE} --output_dir {{out}} --class_labels 1 --num_columns 1", "argument --num_columns"),
        (f"denoising-strip {PIPE} --output_dir {{out}} --class_labels 1 --guidance_scale inf", "guidance_scale"),
        (f"guidance-sweep {PIPE} --output_dir {{out}} --reference {{root}}/absent", "absent"),
        (f"guidance-sweep {PIPE} --output_dir {{out}} --reference {{root}}/junk.npz --features pixels", "junk.npz"),
        (
            f"guidance-sweep {PIPE} --output_dir {{out}} --reference {{root}}/small.npz --features pixels",
            "but they are 4 x 4",
        ),
        (f"guidance-sweep {PIPE} --output_dir {{root}}/grid --reference {{root}}/samples.npz", "already has"),
        (f"guidance-sweep {PIPE} --output_dir {{out}} --reference {{root}}/samples.npz --num_images 2", "num_images"),
        (f"cache-sweep {PIPE} --output_dir {{out}} --reference {{root}}/samples.npz --cache NoCache 1", "NoCache"),
        (f"cache-sweep {PIPE} --output_dir {{out}} --reference {{root}}/samples.npz --cache MagCache x", "SETTING"),
    ],
    "demo.py": [
        ("", "--pretrained_model_name_or_path"),
        ("--pretrained_model_name_or_path {root}/absent", "absent"),
        (f"{PIPE} --num_inference_steps 100000", "--num_inference_steps has to be in 1.."),
        (f"{PIPE} --guidance_scale -1", "--guidance_scale has to be in 1.."),
    ],
    "train_lsep.py": [
        ("--train_data_dir {root}/absent", "absent"),
        ("--train_data_dir {root}/empty", "empty"),
        ("--train_data_dir {root}/file", "`--train_data_dir` has to be a folder"),
        ("--train_data_dir {root}/flat --resolution 8", "label"),
        ("--train_data_dir {root}/broken_images --resolution 8 --preset SiT-S/2", "cannot be read"),
        ("--train_data_dir {root}/images --latents_dir {root}/vae-sd", "only one source of data can be given"),
        ("--train_data_dir {root}/images --resolution 7", "`--resolution` has to be divisible by"),
        ("--train_data_dir {root}/images --resolution 8 --image_channels 2", "argument --image_channels"),
        ("--train_data_dir {root}/images --resolution 8 --label_column species", "species"),
        ("--train_data_dir {root}/images --resolution 8 --image_column photo", "photo"),
        ("--train_data_dir {root}/images --resolution 8 --num_classes 1", "`num_classes` has to be at least 2"),
        ("--train_data_dir {root}/images --resolution 8 --validation_split 1.5", "`--validation_split`"),
        ("--train_data_dir {root}/images --resolution 8 --validation_split test", "has no split 'test'"),
        ("--latents_dir {root}/empty", "`--latents_dir` has to be written by examples/encode_latents.py"),
        ("--latents_dir {root}/vae-sd --pretrained_vae_model_name_or_path {root}/vae", "img-mean-std-00000000.npy"),
        ("--latents_dir {root}/vae-sd", "`--latents_dir` has to hold moments"),
        ("--dataset_name no/such/id", "no/such/id"),
        ("--validation_labels zebra", "zebra"),
        ("--repa_weight 1", "--repa_weight needs --repa_encoder"),
        ("--num_train_images 5", "--num_train_images needs --streaming"),
        ("--train_data_dir {root}/images --dataset_config_name x", "--dataset_config_name needs --dataset_name"),
        ("--sra_weight 1 --regularizers layersync", "--sra_weight needs --regularizers sra"),
        ("--num_layers 2 --probe_depth 3", "probe_depth"),
        ("--crop_size_min 99", "`--crop_size_min`"),
        ("--report_to paper", "`--report_to` has to be"),
        ("--learning_rate fast", "argument --learning_rate"),
        ("--learning_rate nan", "argument --learning_rate"),
        ("--max_skipped_steps -1", "argument --max_skipped_steps"),
        ("--pretrained_model_name_or_path {root}/absent", "absent"),
        ("--pretrained_model_name_or_path {root}/other", "other"),
        ("--model_config_name_or_path {root}/junk", "junk"),
        ("--pretrained_vae_model_name_or_path {root}/pipe --train_data_dir {root}/images", "pipe"),
        ("--repa_encoder {root}/absent", "absent"),
        ("--push_to_hub", "--push_to_hub needs --license"),
        ("--lora_rank 4", "--lora_rank needs a model"),
        ("--resume_from_checkpoint checkpoint-7", "checkpoint-7"),
        ("--resume_from_checkpoint latest --overwrite_output_dir", "give one of them"),
        ("@{root}/recipe", "is --max_train_stepz meant to be --max_train_steps?"),
        ("@{root}/absent", "absent"),
        ("--output_dir {root}/file/under", "cannot be written"),
        ("--output_dir {root}/run", "already holds a run"),
        ("--output_dir {root}/run --resume_from_checkpoint latest", "run"),
    ],
    "encode_latents.py": [
        ("--output_dir {out}", "one of the arguments --train_data_dir --dataset_name is required"),
        ("--train_data_dir {root}/images", "--output_dir"),
        ("--train_data_dir {root}/absent --output_dir {out}", "absent"),
        ("--train_data_dir {root}/empty --output_dir {out}", "empty"),
        ("--train_data_dir {root}/junk --output_dir {out}", "junk"),
        ("--train_data_dir {root}/images --output_dir {root}/images --resolution 8", "`--output_dir`"),
        ("--train_data_dir {root}/images --output_dir {root}/file --resolution 8", "`--output_dir`"),
        ("--train_data_dir {root}/images --output_dir {out} --resolution 9", "`--resolution`"),
        ("--train_data_dir {root}/images --output_dir {out} --resolution 8 --dtype fp8", "argument --dtype"),
        ("--train_data_dir {root}/broken_images --output_dir {out} --resolution 8", "unreadable images"),
    ],
    "diffusers-lsep": [
        ("", "COMMAND"),
        ("paint", "invalid choice: 'paint'"),
        ("convert --output_dir {out}", "--checkpoint"),
        ("convert --checkpoint {root}/absent --output_dir {out}", "absent"),
        ("convert --checkpoint {root}/junk --output_dir {out}", "junk"),
        ("convert --checkpoint {root}/other.pt --output_dir {out}", "other.pt"),
        ("convert --checkpoint {root}/other.pt --output_dir {root}/images", "is not empty"),
        ("convert --checkpoint {root}/other.pt --output_dir {root}/file", "is a file"),
        ("convert --checkpoint {root}/other.pt --output_dir {out} --vae {root}/absent", "absent"),
        ("convert --checkpoint {root}/other.pt --output_dir {out} --id2label {root}/labels.json", "labels.json"),
        ("convert --checkpoint {root}/other.pt --output_dir {out} --push_to_hub a/b", "`--license`"),
        ("evaluate {root}/samples.npz", "--reference"),
        ("evaluate --reference {root}/samples.npz --output_dir {out}", "exactly one of `SAMPLES`"),
        ("evaluate {root}/absent --reference {root}/samples.npz --output_dir {out}", "absent"),
        ("evaluate {root}/samples.npz --reference {root}/junk.npz --output_dir {out}", "junk.npz"),
        ("evaluate {root}/wrong.npz --reference {root}/samples.npz --output_dir {out}", "wrong.npz"),
        ("evaluate {root}/floats.npz --reference {root}/samples.npz --output_dir {out}", "floats.npz"),
        ("evaluate {root}/empty --reference {root}/samples.npz --output_dir {out}", "empty"),
        ("evaluate {root}/samples.npz --reference {root}/samples.npz --output_dir {root}/grid", "already holds"),
        ("evaluate {root}/samples.npz --reference {root}/samples.npz --output_dir {out} --metrics fud", "--metrics"),
        ("evaluate --checkpoints {root}/empty --reference {root}/samples.npz --output_dir {out}", "empty"),
        (
            "evaluate {root}/samples.npz --reference {root}/samples.npz --output_dir {out} --metrics fid"
            " --inception_weights {root}/junk",
            "junk",
        ),
        ("probe {root}/pipe --output_dir {out}", "--data"),
        ("probe {root}/absent --data {root}/images --output_dir {out}", "absent"),
        ("probe {root}/pipe --data {root}/absent --output_dir {out}", "`--data` "),
        ("probe {root}/pipe --data {root}/images --output_dir {root}/grid", "already holds"),
        ("probe {root}/pipe --data {root}/images --output_dir {out} --timesteps 2", "argument --timesteps"),
        ("probe {root}/pipe --data {root}/images --output_dir {out} --unseen_data --layers 9", "layers"),
        ("space --output_dir {out}", "--pretrained_model_name_or_path"),
        ("space --pretrained_model_name_or_path {root}/absent --output_dir {out}", "absent"),
        ("space --pretrained_model_name_or_path {root}/pipe --output_dir {root}/images", "is not empty"),
        ("space --pretrained_model_name_or_path {root}/pipe --output_dir {out} --push_to_hub a/b/c", "a/b/c"),
    ],
}
DEFAULTS = {
    "train_lsep.py": "--report_to none --output_dir {out} --max_train_steps 1 --validation_inference_steps 1",
    "encode_latents.py": "--pretrained_vae_model_name_or_path {root}/vae --dataloader_num_workers 0",
}


def words_of(script, call, files, out):
    words = f"{DEFAULTS.get(script, '')} {call}".split()
    return [word.replace("{root}", str(files)).replace("{out}", str(out)) for word in words]


@pytest.fixture(params=[(script, *call) for script, calls in CALLS.items() for call in calls])
def wrong_call(request, files, tmp_path):
    script, call, message = request.param
    return script, words_of(script, call, files, tmp_path / "out"), message


def test_a_wrong_call_ends_in_one_line(wrong_call, load_example, tmp_path, monkeypatch, capsys):
    from accelerate.state import AcceleratorState, GradientState

    script, words, message = wrong_call
    if script == "diffusers-lsep":
        main = cli.main
    else:
        module = load_example(script.removesuffix(".py"))
        monkeypatch.setitem(vars(module), "__name__", "__main__")  # as where it is run
        main = module.main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", [script, *words])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as end:
            run_script(lambda: main(words), script)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        logging.getLogger().handlers = [h for h in logging.getLogger().handlers if "pytest" in type(h).__module__]
    said = capsys.readouterr().err
    assert end.value.code == 2
    last = said.splitlines()[-1]
    assert "error: " in last and message in last, said
    assert "Traceback" not in said and len(last) < 1000
