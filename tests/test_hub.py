# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Pushing to and loading from the Hub: the real client, in processes of its own, against `hub_server.HubServer`."""

import http.client
import json
import re

import numpy as np
import pytest
from client_process import run_client
from diffusers.utils import logging
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from PIL import Image
from tiny_models import make_pipeline, make_vae

from diffusers_lsep import LinearProbe
from diffusers_lsep.hub.gallery import Gallery
from diffusers_lsep.hub.model_card import write_model_card
from diffusers_lsep.hub.push import push_folder


OWNER, STRANGER = "hf_owner", "hf_stranger"
REPO = "lsep/sit-tiny"

# What the clients in other processes share. The client's waits between its attempts are left out.
PRELUDE = """
import os, sys, time
import urllib.request
import numpy as np

time.sleep = lambda seconds: None

def fault(**arguments):
    body = json.dumps(arguments).encode() if arguments else b""
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/faults", data=body, method="POST"))

def report_error(name, function, *arguments, **kwargs):
    try:
        function(*arguments, **kwargs)
    except Exception as error:
        REPORT[name] = [type(error).__name__, str(error), str(error.__cause__)]
    else:
        REPORT[name] = None

def generate(pipe):
    import torch

    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe([3, "b"], num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="np").images
"""


def make_named_pipeline():
    labels = {0: "a, x", 1: "b", 2: "c, x", 3: "d"}
    return make_pipeline(vae=make_vae(), id2label=labels, sample_size=4, num_classes=4)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    tokens = {OWNER: "lsep", STRANGER: "stranger"}
    with HubServer(tmp_path_factory.mktemp("hub"), tokens) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training run's output: a pipeline with a probe, and things that are nobody else's business."""
    folder = tmp_path_factory.mktemp("run") / "sit-tiny"
    make_named_pipeline().save_pretrained(folder)
    LinearProbe(32, 4).save_pretrained(folder / "probe")
    for private in ("checkpoint-10/optimizer.bin", "logs/events.out", "training_state.pt", "notes.txt", ".env"):
        (folder / private).parent.mkdir(exist_ok=True)
        (folder / private).write_bytes(b"private")
    Image.new("RGB", (8, 4)).save(folder / "samples.png")
    write_model_card(folder, source="lsep", gallery=Gallery("samples.png", [3, 1], [1, 2]))
    return folder


PUSH = f"""
import torch
import shutil
from pathlib import Path
from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

import diffusers_lsep
from diffusers_lsep.hub.model_card import update_evaluation
from diffusers_lsep.hub.push import push_folder
from diffusers_lsep.hub.saved_pipeline import SavedPipeline

folder, work = os.environ["FOLDER"], os.environ["WORK"]
pipe = DiffusionPipeline.from_pretrained(folder)
images = {{"main": generate(pipe)}}

# 1. The connection breaks in the middle of the largest file, then in the middle of the commit, then holds.
fault(method="PUT", pattern="/lfs/", after=150_000)
report_error("upload", push_folder, folder, "{REPO}", "apache-2.0", token="{OWNER}")
REPORT["visible after upload"] = HfApi().list_repo_files("{REPO}")
fault()
fault(method="POST", pattern="/commit/", after=100)
report_error("commit", push_folder, folder, "{REPO}", "apache-2.0", token="{OWNER}")
REPORT["visible after commit"] = HfApi().list_repo_files("{REPO}")
fault()
REPORT["oid"] = push_folder(folder, "{REPO}", "apache-2.0", token="{OWNER}").oid
REPORT["again"] = push_folder(folder, "{REPO}", "apache-2.0", token="{OWNER}").oid

# 2. A variant, another revision, a private repository, a pull request
half = DiffusionPipeline.from_pretrained(folder).to(dtype=torch.float16)
half.push_to_hub("{REPO}", variant="fp16", token="{OWNER}")
half.save_pretrained(work + "/fp16", variant="fp16")
images["fp16"] = generate(DiffusionPipeline.from_pretrained(work + "/fp16", variant="fp16"))
for parameter in pipe.transformer.parameters():
    parameter.data.mul_(0.5)
images["v2"] = generate(pipe)
pipe.push_to_hub("{REPO}", revision="v2", license="mit", token="{OWNER}")
pipe.push_to_hub("lsep/private", private=True, token="{OWNER}")
REPORT["pull request"] = pipe.push_to_hub("{REPO}", create_pr=True, commit_message="Halve", token="{OWNER}").pr_url
report_error("pickle", pipe.push_to_hub, "{REPO}", safe_serialization=False)
report_error("stranger", pipe.push_to_hub, "{REPO}", token="{STRANGER}")

# 3. Other shards, and a model card that was edited on the Hub
pipe.save_pretrained(work + "/shards", max_shard_size="50KB", push_to_hub=True, repo_id="lsep/shards", token="{OWNER}")
REPORT["sharded"] = HfApi().list_repo_files("lsep/shards")
card = open(work + "/shards/README.md").read() + "Written by hand.\\n"
HfApi(token="{OWNER}").create_commit(
    "lsep/shards", [CommitOperationAdd("README.md", card.encode())], commit_message="Edit"
)
pipe.push_to_hub("lsep/shards", license="cc-by-4.0", token="{OWNER}")

# 4. Weights with a licence and results, a card that was edited on the Hub, and other weights in their place
results = {{"metrics": {{"fid": 5.7}}, "weights": SavedPipeline(Path(folder)).hashes}}
measured = shutil.copytree(folder, work + "/measured")
Path(measured, "eval_results.json").write_text(json.dumps(results))
update_evaluation(measured)
push_folder(measured, "lsep/again", "cc-by-4.0", token="{OWNER}")
REPORT["measured"] = HfApi().list_repo_files("lsep/again"), ModelCard.load("lsep/again").content
card = REPORT["measured"][1].replace("\\nlibrary_name", "\\nlanguage: en\\nlibrary_name") + "Written by hand.\\n"
HfApi(token="{OWNER}").create_commit(
    "lsep/again", [CommitOperationAdd("README.md", card.encode())], commit_message="Edit"
)
pipe.push_to_hub("lsep/again", token="{OWNER}")

# 5. Other weights in the folder itself
pipe.save_pretrained(measured)
push_folder(measured, "lsep/replaced", None, token="{OWNER}")
np.savez(work + "/images.npz", **images)
"""


@pytest.fixture(scope="module")
def pushed(hub, folder, tmp_path_factory):
    """Pushes everything. Returns the report and the images that the pipelines gave before they were pushed."""
    work = tmp_path_factory.mktemp("push")
    environment = hub.environment(work / "home", FOLDER=str(folder), WORK=str(work))
    report = run_client(PRELUDE + PUSH, environment, work)
    return report, dict(np.load(work / "images.npz"))


LOAD = f"""
from diffusers import DiffusionPipeline
from diffusers.utils import logging

report_error("not imported", DiffusionPipeline.from_pretrained, "{REPO}")
report_error("not imported, local", DiffusionPipeline.from_pretrained, os.environ["FOLDER"])

import diffusers_lsep

fault(method="GET", pattern="transformer/.*safetensors", after=50_000)
report_error("download", DiffusionPipeline.from_pretrained, "{REPO}")
fault()
fault(method="GET", pattern="transformer/.*safetensors", after=50_000, times=1)
pipe = DiffusionPipeline.from_pretrained("{REPO}")
fault()
REPORT["class"] = type(pipe).__module__
images = {{"main": generate(pipe)}}
pipe = DiffusionPipeline.from_pretrained("{REPO}", variant="fp16")
images["fp16"] = generate(pipe)
pipe = DiffusionPipeline.from_pretrained("{REPO}", revision="v2")
images["v2"] = generate(pipe)
transformer = diffusers_lsep.SiTTransformer2DModel.from_pretrained("{REPO}", subfolder="transformer", revision="v2")
REPORT["subfolder"] = all(
    (value == pipe.transformer.state_dict()[key]).all().item() for key, value in transformer.state_dict().items()
)
report_error("private", DiffusionPipeline.from_pretrained, "lsep/private")
report_error("private, stranger", DiffusionPipeline.from_pretrained, "lsep/private", token="{STRANGER}")
images["private"] = generate(DiffusionPipeline.from_pretrained("lsep/private", token="{OWNER}"))
images["shards"] = generate(DiffusionPipeline.from_pretrained("lsep/shards"))
np.savez(os.environ["WORK"] + "/images.npz", **images)
"""


@pytest.fixture(scope="module")
def loaded(hub, pushed, folder, tmp_path_factory):
    """Loads everything in a fresh process with an empty cache."""
    work = tmp_path_factory.mktemp("load")
    environment = hub.environment(work / "home", FOLDER=str(folder), WORK=str(work))
    report = run_client(PRELUDE + LOAD, environment, work)
    return report, dict(np.load(work / "images.npz")), work / "home"


def test_server_keeps_connections_after_errors(hub):
    # Clients reuse them: one that closed unannounced fails the request after, now and then.
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=30)
    connection.connect()
    socket = connection.sock
    for _ in range(20):
        connection.request("GET", "/api/models/lsep/none")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 401
        assert connection.sock is socket
    connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["upload", "commit"])
def test_push_that_breaks_off_leaves_nothing_and_says_so(pushed, when):
    report, _ = pushed
    kind, message, _ = report[when]
    assert kind == "ConnectionError"
    assert re.search(rf"Pushing .*sit-tiny to {REPO} did not end: .*disconnected.*Push again", message)
    if when == "upload":
        assert "diffusion_pytorch_model.safetensors" in message
    assert report[f"visible after {when}"] == [".gitattributes"]


@pytest.mark.slow
def test_pushing_again_completes_without_sending_twice(hub, pushed):
    report, _ = pushed
    assert report["again"] == report["oid"]  # nothing to do the third time
    sent = [path for method, path, status, _ in hub.requests if method == "PUT" and status == 200]
    assert len(sent) == len(set(sent))


@pytest.mark.slow
def test_pushes_the_pipeline_and_nothing_else(hub, pushed):
    weights = ["transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]
    assert set(hub.files(REPO)) == {
        ".gitattributes",
        "README.md",
        "model_index.json",
        "samples.png",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "vae/config.json",
        *(f"{name}.safetensors" for name in [*weights, "probe/diffusion_pytorch_model"]),
        "probe/config.json",
        *(f"{name}.fp16.safetensors" for name in weights),
    }


@pytest.mark.slow
def test_pushed_index_names_the_package(hub, pushed):
    index = json.loads(hub.files(REPO)["model_index.json"])
    assert index["_class_name"] == "LSEPPipeline"
    assert index["transformer"] == ["diffusers_lsep", "SiTTransformer2DModel"]
    assert index["scheduler"] == ["diffusers_lsep", "FlowMatchSDEScheduler"]


@pytest.mark.slow
def test_push_refuses_pickles(pushed):
    report, _ = pushed
    assert report["pickle"][:2] == ["ValueError", "`safe_serialization` has to be True for uploading, but is False."]


@pytest.mark.slow
def test_push_with_the_wrong_token(pushed):
    report, _ = pushed
    kind, message, _ = report["stranger"]
    assert kind == "HfHubHTTPError"
    assert "403 Forbidden" in message and "rights to write" in message


@pytest.mark.slow
def test_push_as_pull_request_leaves_the_branch(hub, pushed):
    report, _ = pushed
    assert report["pull request"].endswith("/discussions/1")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert hub.files(REPO, "refs/pr/1")[weights] == hub.files(REPO, "v2")[weights] != hub.files(REPO)[weights]


@pytest.mark.slow
def test_push_removes_shards_of_an_earlier_push(hub, pushed):
    report, _ = pushed
    assert any("-00001-of-" in path for path in report["sharded"])
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in report["sharded"]
    weights = [path for path in hub.files("lsep/shards") if path.startswith("transformer/diffusion")]
    assert weights == ["transformer/diffusion_pytorch_model.safetensors"]


@pytest.mark.slow
def test_push_keeps_what_was_written_on_the_hub(hub, pushed):
    card = ModelCard(hub.files("lsep/shards")["README.md"].decode())
    assert card.text.count("Written by hand.") == 1
    assert card.text.count("## Usage") == 1
    assert card.data.license == "cc-by-4.0"
    assert "No licence has been declared" not in card.text


@pytest.mark.slow
def test_push_of_other_weights_forgets_what_was_said_of_the_old_ones(hub, pushed):
    files, content = pushed[0]["measured"]
    measured = ModelCard(content)
    assert "eval_results.json" in files and measured.data.license == "cc-by-4.0"
    assert measured.data.eval_results[0].metric_value == 5.7 and "Trained with LSEP" in measured.text
    for repo in ("lsep/again", "lsep/replaced"):
        assert "eval_results.json" not in hub.files(repo)
        card = ModelCard(hub.files(repo)["README.md"].decode())
        assert card.data.license is None and card.data.eval_results is None
        for old in ("cc-by-4.0", "5.7", "Trained with LSEP", "samples.png"):
            assert old not in card.content
        assert card.text.count("## Usage") == 1 and "No licence has been declared" in card.text
    card = ModelCard(hub.files("lsep/again")["README.md"].decode())
    assert card.text.count("Written by hand.") == 1 and card.data.language == "en"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["main", "v2", "fp16"])
def test_loads_from_the_hub_bit_for_bit(pushed, loaded, name):
    assert np.array_equal(loaded[1][name], pushed[1][name])
    assert not np.array_equal(pushed[1][name], pushed[1]["main" if name != "main" else "v2"])


@pytest.mark.slow
def test_loads_the_installed_class(loaded):
    assert loaded[0]["class"] == "diffusers_lsep.pipeline_lsep"


@pytest.mark.slow
def test_loads_the_transformer_alone(loaded):
    assert loaded[0]["subfolder"] is True


@pytest.mark.slow
def test_loads_what_replaced_the_shards(pushed, loaded):
    assert np.array_equal(loaded[1]["shards"], pushed[1]["v2"])


@pytest.mark.slow
def test_private_repository(pushed, loaded):
    for name in ("private", "private, stranger"):
        kind, message, cause = loaded[0][name]
        assert kind == "OSError" and "Cannot load model lsep/private" in message
        assert "If you are trying to access a private or gated repo" in cause
    assert np.array_equal(loaded[1]["private"], pushed[1]["v2"])


@pytest.mark.slow
def test_download_that_breaks_off(loaded):
    kind, message, _ = loaded[0]["download"]
    assert kind == "RemoteProtocolError"
    assert "peer closed connection without sending complete message body" in message


@pytest.mark.slow
def test_without_the_import_diffusers_cannot_know_the_pipeline(loaded):
    # The card and the README put the import first because this is all that diffusers can say.
    assert loaded[0]["not imported, local"][:2] == ["AttributeError", "module diffusers has no attribute LSEPPipeline"]
    kind, message, _ = loaded[0]["not imported"]
    assert kind == "ValueError"
    assert re.fullmatch(
        rf"(scheduler|transformer)/diffusers_lsep\.py as defined in `model_index\.json` does not exist in {REPO}"
        " and is not a module in 'diffusers/pipelines'.",
        message,
    )


def card_code(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return code


@pytest.mark.slow
def test_offline_after_a_warm_cache_and_the_code_of_the_card(hub, pushed, loaded, tmp_path):
    code = card_code(hub.files(REPO)["README.md"].decode())
    assert code.startswith("import diffusers_lsep")
    assert f'"{REPO}"' in code
    before = len(hub.requests)
    offline = f"""
from diffusers import DiffusionPipeline

images = {{"main": generate(DiffusionPipeline.from_pretrained("{REPO}"))}}
images["v2"] = generate(DiffusionPipeline.from_pretrained("{REPO}", revision="v2"))
np.savez("images.npz", **images)
"""
    run_client(PRELUDE + code + offline, hub.environment(loaded[2], HF_HUB_OFFLINE="1"), tmp_path)
    assert Image.open(tmp_path / "image_1.png").size == (8, 8)
    images = np.load(tmp_path / "images.npz")
    assert np.array_equal(images["main"], pushed[1]["main"])
    assert np.array_equal(images["v2"], pushed[1]["v2"])
    assert len(hub.requests) == before


@pytest.mark.parametrize(
    ("error", "cause", "is_connection"),
    [
        (httpx.ConnectError("refused"), None, True),
        (httpx.ReadTimeout("too slow"), None, True),
        (ConnectionError("Network error"), None, True),  # of hf_xet, which uploads large files to the Hub
        (RuntimeError("Error while uploading 'x' to the Hub."), httpx.RemoteProtocolError("disconnected"), True),
        (RuntimeError("Error while uploading 'x' to the Hub."), FileNotFoundError("x"), False),
        (RuntimeError("Error while uploading 'x' to the Hub."), None, False),
        (RuntimeError("out of memory"), None, False),
        (httpx.UnsupportedProtocol("ftp"), None, False),
        (OfflineModeIsEnabled("offline"), None, False),
    ],
)
def test_only_failures_of_the_connection_ask_for_another_push(folder, monkeypatch, error, cause, is_connection):
    def fail(*arguments, **options):
        raise error from cause

    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(Exception) as raised:
        push_folder(folder, REPO, "mit")
    if is_connection:
        assert type(raised.value) is ConnectionError and "Push again" in str(raised.value)
        assert str(error) in str(raised.value) and str(cause or "") in str(raised.value)
    else:
        assert raised.value is error


def test_push_folder_checks_before_it_sends(tmp_path):
    # HF_HUB_OFFLINE=1 here: anything sent would be another error.
    with pytest.raises(
        ValueError, match="`folder` has to hold a saved LSEPPipeline, but there is no model_index.json"
    ):
        push_folder(tmp_path, REPO, "mit")
    make_named_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Repo id must"):
        push_folder(tmp_path, "a/b/c", "mit")
    (tmp_path / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"as safetensors, but .*diffusion_pytorch_model.bin is a pickle"):
        push_folder(tmp_path, REPO, "mit")
    (tmp_path / "transformer" / "diffusion_pytorch_model.bin").unlink()
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has to hold the weights of transformer, but there are none in"):
        push_folder(tmp_path, REPO, "mit")


@pytest.mark.parametrize(
    "trick",
    ["absolute image", "image above", "linked image", "linked file", "linked folder", "linked card", "component"],
)
def test_push_uploads_nothing_from_elsewhere(tmp_path, trick):
    folder, secret = tmp_path / "pipeline", tmp_path / "secret.png"
    make_named_pipeline().save_pretrained(folder)
    secret.write_bytes(b"private")
    card = {"absolute image": f"![x]({secret})", "image above": "![x](../secret.png)", "linked image": "![x](a.png)"}
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{card.get(trick, '')}\n")
    if trick == "linked image":
        (folder / "a.png").symlink_to(secret)
    elif trick == "linked file":
        (folder / "scheduler" / "more.txt").symlink_to(secret)
    elif trick == "linked folder":
        (folder / "scheduler").rename(tmp_path / "scheduler")
        (folder / "scheduler").symlink_to(tmp_path / "scheduler")
    elif trick == "linked card":
        (folder / "README.md").rename(tmp_path / "card.md")
        (folder / "README.md").symlink_to(tmp_path / "card.md")
    elif trick == "component":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, str(tmp_path): ["diffusers_lsep", "X"]}))
    # HF_HUB_OFFLINE=1 here: anything sent would be another error.
    with pytest.raises(ValueError, match=r"`folder` has to hold all files to upload, but .* leads to "):
        push_folder(folder, REPO, "mit")


def test_a_card_shows_images_and_uploads_no_other_files(tmp_path, caplog):
    make_named_pipeline().save_pretrained(tmp_path)
    for name in ("a.png", ".env"):
        (tmp_path / name).write_bytes(b"private")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n![x](a.png) ![y](.env)\n")
    logging.enable_propagation()
    try:
        with pytest.raises(OfflineModeIsEnabled):
            push_folder(tmp_path, REPO, "mit")
    finally:
        logging.disable_propagation()
    (listed,) = (record.message for record in caplog.records if "Uploading to" in record.message)
    assert "README.md, model_index.json, a.png, " in listed and ".env" not in listed
