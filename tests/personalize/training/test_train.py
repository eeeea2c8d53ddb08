"""`personalize.py train` on tiny random pipelines, through the command line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

METHODS = {
    "lora": ("--train_text_encoder=true", "--images.buckets=true", "--training.batch_size=2", "--prior.images=2"),
    "dora": (
        "--adapter.dora=true",
        "--adapter.targets=attention+feedforward",
        "--training.gradient_checkpointing=true",
    ),
    "full": ("--method=full", "--train_text_encoder=true"),
    "full, bf16": ("--method=full", "--training.precision=bf16"),
    "textual inversion, bf16": (
        "--method=textual_inversion",
        "--subject.token=<ball>",
        "--subject.vectors=2",
        "--training.precision=bf16",
    ),
}
INVERSION = "textual inversion, bf16"
FORMS = {"dora": ("--format=kohya", "--save-precision=bf16"), "full": ("--save-precision=fp16",)}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("sd", method) for method in METHODS),
        *(("sdxl", method) for method in ("lora", "full", INVERSION)),
        *(("sd2", method) for method in ("lora", INVERSION)),
    ],
)
@pytest.mark.usefixtures("no_estimate")
def test_two_steps_of_each_method_and_the_export_of_what_they_learned(
    train, run_script, tiny_bases, tmp_path, kind, method
):
    outcome = train(tiny_bases[kind], "run", "--prior.steps=2", "--watch.class_prompts=[]", *METHODS[method])
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    planned = re.search(r"epochs: (.*)", outcome.out).group(1)
    assert re.search(r"done: (.*)", outcome.out).group(1) == planned
    assert (run / "samples" / "step_0000002.png").is_file()
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    form = (*FORMS.get(method, ()), *(("--format=single-file",) if (kind, method) == ("sdxl", "full") else ()))
    exported = run_script("personalize.py", "export", f"--run={run}", f"--out={tmp_path / 'exported'}", *form)
    assert exported.code == 0, exported.err
    assert "largest difference of a pixel: 0" in exported.out


@pytest.mark.usefixtures("no_estimate")
def test_what_cannot_be_used_of_ones_own_prior_is_said(train, tiny_bases, photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "own")
    (own / "broken.jpg").write_bytes(b"no picture")
    outcome = train(tiny_bases["sd"], "run", f"--prior.path={own}", "--prior.images=2", "--watch.every=null", steps=1)
    assert outcome.code == 0, outcome.err
    assert "skipped of the prior broken.jpg" in outcome.out


@pytest.mark.usefixtures("no_estimate")
def test_what_a_file_in_kohyas_form_says_and_a_run_among_several_adapters(train, run_script, tiny_bases, tmp_path):
    flags = ("--adapter.targets=kohya+convolutions", "--adapter.rank=4", "--text.clip_skip=2", "--watch.every=null")
    outcome = train(tiny_bases["sd"], "run", *flags, "--text.max_token_length=150", steps=1)
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    where = (f"--run={run}", f"--out={tmp_path / 'exported'}")
    outcome = run_script("personalize.py", "export", "--format=kohya", "--no-verify", *where)
    assert "not read back" in outcome.out, outcome.err
    with safe_open(tmp_path / "exported" / "kohya_lora.safetensors", framework="pt") as opened:
        said = opened.metadata()
    wanted = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "8.0",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_steps": "1",
        "ss_max_train_steps": "1",
        "ss_unet_lr": "0.0001",
        "ss_seed": "0",
        "ss_clip_skip": "2",
        "ss_max_token_length": "150",
        "ss_resolution": "(16, 16)",
    }
    assert {key: said.get(key) for key in wanted} == wanted
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "8.0"}
    pictures = []
    ways = {"alone": (), "stacked": ("--adapters", f"{run}:1"), "otherwise": ("--clip-skip=1",)}
    for name, flags in ways.items():
        flags = flags if name == "stacked" else (f"--run={run}", *flags)
        outcome = run_script(
            *("personalize.py", "generate", "a {token} {class}", "--n=1", "--steps=2", f"--out={tmp_path / name}"),
            *flags,
        )
        assert outcome.code == 0, outcome.err
        pictures.append((tmp_path / name / "0000.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("flag", ["--training.adam_8bit=true", "--base_bits=4", "--quantize=int8"])
def test_a_library_that_is_missing_is_named(train, tiny_bases, monkeypatch, flag):
    for name in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)
    outcome = train(tiny_bases["sd"], "run", flag)
    assert outcome.is_one_clear_line(), outcome.err
    assert "is missing: in the checkout, pip install -e '.[few-bits]'" in outcome.err


@pytest.mark.usefixtures("no_estimate")
def test_a_loss_that_is_not_finite_stops_the_run(train, tiny_bases):
    flags = ("--training.lr=1e30", "--training.grad_clip=null", "--watch.every=null")
    outcome = train(tiny_bases["sd"], "run", *flags, steps=9)
    assert outcome.code == 2
    assert re.search(r"error: by update \d the loss or its gradient is not finite; .* lower training.lr", outcome.err)


def test_what_was_skipped_is_said(train, tiny_bases, photos, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in photos.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "broken.jpg").write_bytes((photos / "0.png").read_bytes()[:40])
    (folder / "manual.pdf").write_bytes(b"%PDF-1.4")
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folder / "sticker.png")
    (folder / "1.txt").write_text("sks " * 80)
    outcome = train(tiny_bases["sd"], "run", f"--data={folder}", "--watch.every=null", steps=1)
    assert outcome.code == 0, outcome.err
    assert "skipped broken.jpg: " in outcome.out
    assert "skipped manual.pdf: not an image" in outcome.out
    assert "budget: 6 images" in outcome.out
    assert "1 of 6 texts are cut after 75 tokens, the longest has 80: see text.max_token_length" in outcome.out


@pytest.fixture(scope="module")
def mistaken_data(photos, tmp_path_factory) -> Path:
    """What people give in place of a folder of photos, and a parquet file in which a caption is missing."""
    import pyarrow
    import pyarrow.parquet

    places = tmp_path_factory.mktemp("mistaken")
    (places / "empty").mkdir()
    shutil.make_archive(str(places / "photos"), "zip", photos)
    shutil.copy(photos / "0.png", places / "a.png")
    (places / "masked").mkdir()
    for source, name in ((0, "a.png"), (1, "a.mask.png")):
        shutil.copy(photos / f"{source}.png", places / "masked" / name)
    images = [(photos / f"{number}.png").read_bytes() for number in range(2)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": ["a ball", None]}), places / "a.parquet")
    return places


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data=nowhere",), "there is no folder or parquet file of images at nowhere"),
        (("--data={places}/empty",), "no usable images in"),
        (("--data={places}/photos.zip",), "it is a zip archive: unpack it, and give the folder"),
        (("--data={places}/a.png",), "it is a single picture: give the folder that holds it"),
        (("--data={places}/a.parquet", "--subject.token=null"), "fill in the caption of its row"),
        (("--data={places}/masked", "--images.masked_loss=true"), "a.mask.png is 64 x 96 pixels large, and a.png 96 x"),
        (("--data={places}/a.parquet", "--images.masked_loss=true"), "is no folder of image files, so that no masks"),
        (("--images.masked_loss=true",), "5 of 5 images have no mask, 0.png for one"),
        (("--images.caption_column=en",), "leave out images.caption_column"),
        (("--training.steps=1.5",), "training.steps must be a whole number or null, not 1.5"),
        (("--base=models/dog.safetensors",), "models/dog.safetensors does not exist; give a file"),
        (("--subject.token=null",), "have no caption, the first is 1.png: write 1.txt beside it"),
        (("--base=nowhere",), "the base model nowhere does not exist"),
        (("--subject.token=zwx",), "the token 'zwx' splits into"),
        (("--adapter.rank=0",), "adapter.rank must be at least 1, not 0"),
        (("--training.steps=null",), "how long to train? give training.steps"),
        (("--training.precision=fp16",), "training.precision fp16 needs a CUDA device"),
        (("--watch.offload=true",), "watch.offload needs a CUDA device"),
        (("--training.fused_backward=true",), "never has the whole gradient: set training.grad_clip null"),
        (("--training.epochs=3",), "both given: set one of them to null"),
        (("--watch.loss_timesteps=[1000]",), "watch.loss_timesteps must be below 1000"),
        (("--seed=99999999999999999999",), "seed must be a finite number, and a whole one below 2^63"),
        (("--subject.prompt=a {token.x}",), "only {token} and {class} can be filled in"),
        (("--method=textual_inversion",), "knows 'sks' already"),
        (("--watch.clip=nowhere",), "the CLIP model nowhere does not exist"),
        (('--watch.prompts=["a {colour} ball"]',), "only {token} and {class} can be filled in"),
        (("--images.background=mauvish",), "background 'mauvish' is no colour"),
        (("--images.held_out=5",), "images.held_out is 5, and there are 5 images"),
        (("--trainin.lr=1",), "trainin.lr"),
        (("--text.clip_skip=4",), "the clip skip 4 is too large for"),
        (("--text.max_token_length=100",), "text.max_token_length must be one of 75, 150, 225, not 100"),
        (("--config=nowhere.yaml",), "no config at nowhere.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_clear_line(train, tiny_bases, mistaken_data, flags, message):
    outcome = train(tiny_bases["sd"], "run", *(flag.replace("{places}", str(mistaken_data)) for flag in flags))
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--subject.token=zwx",), "the token 'zwx' splits into"),
        (("--method=textual_inversion",), "knows 'sks' already"),
    ],
    ids=["splits", "known"],
)
def test_a_token_that_will_not_do_is_refused_before_the_weights_are_read(
    train, tiny_bases, tmp_path, monkeypatch, flags, message
):
    from improved_diffusion.personalize.training import start

    monkeypatch.setattr(start, "load_base", lambda *_: pytest.fail("the weights were read"))
    outcome = train(tiny_bases["sdxl"], "run", *flags)
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("photos", "is among the images of"),
        ("photos/runs/dog", "is among the images of"),
        ("link", "is among the images of"),
        ("file", "is a file, and a run is a folder"),
        ("file/dog", "is a file, and a run is a folder"),
    ],
)
def test_a_place_that_will_not_do_is_refused_at_once(train, photos, tmp_path, monkeypatch, out, message):
    from improved_diffusion.personalize.training import start

    monkeypatch.setattr(start, "build", lambda *_: pytest.fail("the run was begun"))
    folder = shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    outcome = train("nowhere", out, f"--data={folder}")
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_gpu_too_small_is_said_before_anything_starts(train, tiny_bases, tmp_path, monkeypatch):
    """As on a GPU with 400 MB free; the comparison needs none."""
    from improved_diffusion.personalize.training import start

    monkeypatch.setattr(start, "free_memory", lambda device: 400_000_000)
    outcome = train(tiny_bases["sd"], "run", "--method=full")
    assert outcome.is_one_clear_line(), outcome.err
    moments = r"a training step needs about 5\d\d MB, a look at the run 5\d\d MB, encoding the images 5\d\d MB, "
    assert re.search(moments + "and cpu has 400 MB free; to need less: .*method lora", outcome.err)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_estimate")
def test_a_name_of_several_tokens_is_taken_where_that_is_wanted(train, tiny_bases):
    flags = ("--subject.token=cinnamoroll", "--subject.class_name=ball", "--watch.every=null")
    outcome = train(tiny_bases["sd"], "refused", *flags, steps=1)
    assert outcome.is_one_clear_line()
    assert "subject.allow_split_token" in outcome.err
    assert train(tiny_bases["sd"], "taken", *flags, "--subject.allow_split_token=true", steps=1).code == 0
