"""Drawing: what a picture depends on, and what it costs nothing to share."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from improved_diffusion.personalize.config import AdapterConfig  # noqa: E402
from improved_diffusion.personalize.generate import SAMPLERS, Sampling, draw  # noqa: E402
from improved_diffusion.personalize.models.adapters import adapted_parts, attach_adapters, set_scales  # noqa: E402

FEW_STEPS = Sampling(steps=2)


def arrays(pictures) -> list[np.ndarray]:
    return [np.asarray(picture, dtype=np.int16) for picture in pictures]


def adapt_strongly(base) -> None:
    """Adapters that all but saturate the attention: SD's picture then shows the last digit of every matrix product."""
    attach_adapters(base, AdapterConfig(rank=3, alpha=5.0), text_encoders=True)
    with torch.no_grad():
        for part in adapted_parts(base).values():
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


def test_a_picture_is_what_the_pipeline_draws(base):
    (found,) = arrays(draw(base, ["a dog"], [7], FEW_STEPS))
    generator = torch.Generator().manual_seed(7)
    expected = base.pipeline("a dog", num_inference_steps=2, guidance_scale=7.5, generator=generator).images[0]
    assert np.array_equal(found, np.asarray(expected))


def test_a_picture_does_not_depend_on_its_batch(base):
    adapt_strongly(base)
    prompts, seeds = ["a dog", "a cat", "a dog"], [1, 1, 2]
    alone = [arrays(draw(base, [prompt], [seed], FEW_STEPS))[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    for batch_size in (2, 3):
        assert np.array_equal(arrays(draw(base, prompts, seeds, FEW_STEPS, batch_size)), alone)
    assert not np.array_equal(alone[0], alone[2])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_is_diffusers_own_and_the_base_keeps_its_one(fresh_base, sampler):
    base = fresh_base("sd")
    before = base.pipeline.scheduler
    (found,) = arrays(draw(base, ["a dog"], [7], Sampling(steps=3, sampler=sampler)))
    assert base.pipeline.scheduler is before
    base.pipeline.scheduler = SAMPLERS[sampler].from_config(before.config)
    generator = torch.Generator().manual_seed(7)
    expected = base.pipeline("a dog", num_inference_steps=3, guidance_scale=7.5, generator=generator).images[0]
    assert np.array_equal(found, np.asarray(expected))
    assert not np.array_equal(found, *arrays(draw(fresh_base("sd"), ["a dog"], [7], Sampling(steps=3))))


def test_a_sampler_from_a_picture(base):
    photo = Image.new("RGB", (64, 64), "red")
    pictures = [
        arrays(draw(base, ["a dog"], [0], Sampling(steps=4, sampler=sampler), start=photo))[0]
        for sampler in ("euler", "euler_a")
    ]
    assert not np.array_equal(*pictures)


def test_from_a_picture_and_no_weight_is_cast_or_copied(base):
    base.to("cpu", "bf16", "float32")
    before = {id(parameter): parameter.dtype for parameter in base.unet.parameters()}
    photo = Image.new("RGB", (100, 60), "red")
    little, much = (
        arrays(draw(base, ["a dog"], [0], Sampling(steps=5, strength=strength), start=photo))[0]
        for strength in (0.2, 1.0)
    )
    assert little.shape == (base.resolution, base.resolution, 3)
    assert not np.array_equal(little, much)
    assert {id(parameter): parameter.dtype for parameter in base.unet.parameters()} == before
    assert {parameter.dtype for parameter in base.pipeline.vae.parameters()} == {torch.float32}


def test_a_strength_that_leaves_no_step(base):
    with pytest.raises(UserError, match="leaves none of 2 steps"):
        next(draw(base, ["a dog"], [0], Sampling(steps=2, strength=0.2), start=Image.new("RGB", (64, 64))))


def test_what_is_no_picture_is_said(base):
    with torch.no_grad():
        base.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="drew what is no picture"):
        next(draw(base, ["a dog"], [0], FEW_STEPS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least 1 step"),
        ({"strength": 0}, "above 0"),
        ({"height": 65}, "height must be a multiple of 8"),
        ({"sampler": "dpm"}, "the sampler must be one of ddim, euler, euler_a, dpmpp_2m, unipc, not dpm"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


class TestCommandLine:
    def test_scales_zero_are_the_base(self, base, run_script, tmp_path):
        from improved_diffusion.personalize.models.export import export_kohya

        adapt_strongly(base)
        file = export_kohya(base, tmp_path / "adapter")
        common = ("generate", "a dog", "--n=2", "--steps=2", "--seed=3", f"--base={base.name}")
        folders = {}
        for name, flags in {
            "plain": (),
            "zero": (f"--adapter={file}", "--unet-scale=0", "--text-encoder-scale=0"),
            "whole": (f"--adapter={file}",),
        }.items():
            outcome = run_script("personalize.py", *common, *flags, f"--out={tmp_path / name}")
            assert outcome.code == 0, outcome.err
            folders[name] = [np.asarray(Image.open(tmp_path / name / f"{i:04d}.png")) for i in range(2)]
            assert (tmp_path / f"{name}.png").is_file()
        assert np.array_equal(folders["plain"], folders["zero"])
        assert not np.array_equal(folders["plain"], folders["whole"])
        set_scales(base, 1.0, 1.0)
        (alone,) = arrays(draw(base, ["a dog"], [4], FEW_STEPS))
        assert np.array_equal(alone, folders["whole"][1])
        records = [json.loads(line) for line in (tmp_path / "whole" / "metadata.jsonl").read_text().splitlines()]
        assert records[1] == {"file_name": "0001.png", "text": "a dog", "seed": 4}

    def test_interrupted_it_goes_on(self, run_script, tiny_bases, tmp_path, monkeypatch):
        from improved_diffusion.personalize import pictures
        from improved_diffusion.personalize.data.captioned import open_captioned_set

        command = ("generate", "a dog", "a cat", "--n=2", "--steps=2", f"--base={tiny_bases['sd']}")
        assert run_script("personalize.py", *command, f"--out={tmp_path / 'unbroken'}").code == 0

        def draw_two(*arguments):
            yield from itertools.islice(draw(*arguments), 2)
            raise KeyboardInterrupt

        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "draw", draw_two)
            assert run_script("personalize.py", *command, f"--out={out}").code == 130
        (out / ".0002.png.abc.tmp").write_bytes(b"half a picture")  # as a kill leaves it
        kept = {name: (out / name).stat().st_mtime_ns for name in ("0000.png", "0001.png")}
        outcome = run_script("personalize.py", *command, f"--out={out}")
        assert outcome.code == 0, outcome.err
        assert f"4 pictures in {out} (2 were there)" in outcome.out
        assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
        for name in ("0000.png", "0001.png", "0002.png", "0003.png"):
            assert (out / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
        assert (out / "metadata.jsonl").read_text() == (tmp_path / "unbroken" / "metadata.jsonl").read_text()
        assert open_captioned_set(out).skipped == ()
        assert "(4 were there)" in run_script("personalize.py", *command, f"--out={out}").out

    def test_prompts_from_a_file(self, run_script, tiny_bases, tmp_path):
        (tmp_path / "prompts.txt").write_text("a cat\n\n  a  red ball \n")
        where = (f"--base={tiny_bases['sd']}", f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'out'}")
        outcome = run_script("personalize.py", "generate", "--n=1", "--steps=1", "--sampler=unipc", *where, "a dog")
        assert outcome.code == 0, outcome.err
        records = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
        assert [record["text"] for record in records] == ["a dog", "a cat", "a red ball"]
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["sampler"] == "unipc"

    def test_a_run_of_several_concepts_draws_each(self, run_script, tiny_bases, tmp_path):
        from improved_diffusion.personalize.config import ConceptConfig, PersonalizeConfig
        from improved_diffusion.personalize.models.base import load_base
        from improved_diffusion.personalize.models.trained import prepare
        from improved_diffusion.run_directory import RunDirectory

        concepts = (ConceptConfig("a", token="sks", class_name="ball"), ConceptConfig("b", token="oue"))
        config = PersonalizeConfig(base=str(tiny_bases["sd"]), concepts=concepts)
        run = RunDirectory(tmp_path / "run")
        run.write_config(config, [])
        trained = prepare(load_base(config.base), config)
        run.save_checkpoint({"step": 1, "model": trained.state_dict(), "ema": None}, 1)
        where = (f"--run={run.path}", f"--out={tmp_path / 'out'}")
        outcome = run_script("personalize.py", "generate", "a {token}", "snow", "--n=1", "--steps=1", *where)
        assert outcome.code == 0, outcome.err
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["prompts"] == ["a sks", "a oue", "snow"]
        outcome = run_script("personalize.py", "generate", "a {class}", *where)
        assert outcome.is_one_clear_line()
        assert "needs {class}" in outcome.err

    def test_other_pictures_are_not_drawn_into_the_same_folder(self, run_script, tiny_bases, tmp_path):
        def generate(*changed: str):
            where = (f"--base={tiny_bases['sd']}", f"--out={tmp_path / 'out'}")
            return run_script("personalize.py", "generate", "--n=1", "--steps=1", *where, *changed, "a dog")

        assert generate().code == 0
        there = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
        for change, message in {
            "--seed=1": "seed 0, not 1",
            "--guidance-scale=3": "guidance_scale 7.5, not 3.0",
            "a cat": "prompts ['a dog'], not ['a cat', 'a dog']",
            "--precision=bf16": "precision 'float32', not 'bfloat16'",
            f"--base={tiny_bases['sdxl']}": "base ",
        }.items():
            outcome = generate(change)
            assert outcome.is_one_clear_line(), outcome.err
            assert f"the pictures in {tmp_path / 'out'} were drawn with {message}" in outcome.err
            assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == there

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ((), "which model? give --run, or --base"),
            (("--base=nowhere",), "the base model nowhere does not exist"),
            (("--run=nowhere",), "no run directory at nowhere"),
            (("--base={sd}", "--adapter=nowhere"), "there is no adapter at nowhere"),
            (("--base={sd}", "--adapter={broken}"), "is damaged, or of another architecture"),
            (("--base={sd}", "--run=x", "--adapter=y"), "--run has an adapter of its own"),
            (("--base={sd}", "--n=0"), "--n must be at least 1"),
            (("--base={sd}", "--unet-scale=0.5"), "the scales weigh adapters, and this model has none"),
            (("--base={sd}", "--steps=0"), "at least 1 step"),
            (("--base={sd}", "--image=nowhere.jpg"), "cannot read the image nowhere.jpg: there is no such file"),
            (("--base={sd}", "--device=tpu9"), "--device tpu9 cannot be used here"),
            (("--base={sd}", "--out={full}"), "is not empty: choose another --out"),
            (("--base={sd}", "--prompts=nowhere.txt"), "cannot read the prompts in nowhere.txt"),
            (("--base={sd}", "--adapters", "x:much"), "the weight of the adapter x must be a number, not 'much'"),
            (("--base={sd}", "--adapters", "x:nan"), "the weight of the adapter x must be a number, not 'nan'"),
            (("--base={sd}", "--adapters", "nowhere:0.5"), "there is no adapter at nowhere"),
            (("--adapters", "nowhere"), "--adapters of files alone need --base"),
            (("--base={sd}", "--unet-scale=0.5", "--adapters", "x"), "each has its weight behind a colon"),
            (("--run=x", "--adapters", "y"), "--adapters names all adapters"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_mistakes_are_one_clear_line(self, run_script, tiny_bases, tmp_path, flags, message):
        (tmp_path / "broken.safetensors").write_bytes(b"nothing")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "0.png").write_bytes(b"")
        places = {"sd": tiny_bases["sd"], "broken": tmp_path / "broken.safetensors", "full": tmp_path / "full"}
        flags = [flag.format(**places) for flag in flags]
        out = () if any(flag.startswith("--out") for flag in flags) else (f"--out={tmp_path / 'out'}",)
        outcome = run_script("personalize.py", "generate", "a dog", *out, *flags)
        assert outcome.is_one_clear_line(), outcome.err
        assert message in outcome.err

    @pytest.fixture(scope="class")
    def of_each(self, fresh_base, tmp_path_factory) -> Path:
        """A folder with a folder of adapters in both forms for each kind of base."""
        from improved_diffusion.personalize.models.export import export_diffusers, export_kohya

        folder = tmp_path_factory.mktemp("adapters")
        for kind in ("sd", "sdxl"):
            base = fresh_base(kind)
            attach_adapters(base, AdapterConfig(), text_encoders=False)
            export_diffusers(base, folder / kind)
            export_kohya(base, folder / kind)
        return folder

    @pytest.mark.parametrize("form", ["pytorch_lora_weights", "kohya_lora"])
    def test_an_adapter_of_another_architecture(self, run_script, tiny_bases, of_each, tmp_path, form):
        for kind, other in (("sd", "sdxl"), ("sdxl", "sd")):
            where = (f"--base={tiny_bases[other]}", f"--adapter={of_each / kind / form}.safetensors")
            outcome = run_script("personalize.py", "generate", "a dog", *where, f"--out={tmp_path / 'out'}")
            assert outcome.is_one_clear_line(), outcome.err
            assert "of another architecture" in outcome.err
        several = (f"{of_each / 'sdxl' / form}.safetensors", f"{of_each / 'sd' / form}.safetensors:0.5")
        where = (f"--base={tiny_bases['sdxl']}", f"--out={tmp_path / 'out'}")
        outcome = run_script("personalize.py", "generate", "a dog", *where, "--adapters", *several)
        assert outcome.is_one_clear_line(), outcome.err
        assert f"{of_each / 'sd' / form}.safetensors" in outcome.err
        assert "of another architecture" in outcome.err
        assert not (tmp_path / "out").exists()
