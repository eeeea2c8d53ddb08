"""The settings that ship are those of the published experiments; others are refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import (
    ConceptConfig,
    ImagesConfig,
    PersonalizeConfig,
    PriorConfig,
    SubjectConfig,
    TrainingConfig,
)
from improved_diffusion.personalize.studies.sweep_config import SweepConfig
from improved_diffusion.settings import (
    load_settings,
    parse_arguments,
    read_settings,
    settings_of,
    settings_parser,
    to_plain,
    to_settings,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name: str) -> PersonalizeConfig:
    return load_settings(PersonalizeConfig, CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize(
    ("name", "steps", "scale"), [("dog_dreambooth_lora", 1300, 0.4), ("dog5_dreambooth_lora", 450, 0.64)]
)
def test_the_dog(name, steps, scale):
    config = load(name)
    training, watch = config.training, config.watch
    assert (config.method, config.train_text_encoder, config.seed) == ("lora", True, 42)
    assert (training.steps, training.batch_size, training.lr, training.lr_text_encoder) == (steps, 1, 3e-4, 1e-4)
    assert (watch.unet_scale, watch.text_encoder_scale, watch.guidance_scale) == (scale, scale, 6.4)


def test_the_cartoon_character():
    config = load("cartoon_dreambooth_lora")
    assert (config.training.epochs, config.training.batch_size, config.seed) == (500, 1, 123)
    assert (config.training.lr, config.training.lr_text_encoder) == (3e-4, 1e-5)
    assert (config.watch.unet_scale, config.watch.text_encoder_scale, config.images.resolution) == (0.5, 0.1, 512)
    assert (config.subject.token, config.subject.allow_split_token, config.adapter.rank) == ("cinnamoroll", True, 4)


def test_the_pokemon():
    config = load("pokemon_sdxl_lora")
    training = config.training
    assert "xl" in config.base
    assert (training.steps, config.watch.every, config.images.held_out) == (5000, 209, 0)
    assert (training.batch_size, training.accumulation, training.lr) == (1, 4, 1e-5)
    assert (training.precision, training.tf32, training.vae_precision) == ("fp16", True, "float32")
    assert config.images.caption_column == "en_text"


def test_the_stickers():
    config = load("stickers_dreambooth")
    assert (config.method, config.subject.token, config.subject.class_name) == ("full", "sks", "sticker")
    assert config.prior.images > 0


def load_sweep(name: str, *flags: str) -> SweepConfig:
    file, parser = CONFIGS / f"{name}.yaml", settings_parser(SweepConfig)
    config = to_settings(SweepConfig, parser, parse_arguments(parser, list(flags), read_settings(file), str(file)))
    assert config.train.config is None or (file.parent / config.train.config).is_file()
    return config


@pytest.mark.parametrize(("name", "scales"), [("rare_tokens", [0.4, 0.6, 0.64]), ("rare_tokens_5", [0.6, 0.64])])
def test_which_rare_token(name, scales):
    config = load_sweep(name)
    assert config.train.grid == {"subject.token": ["sks", "http", "hta", "oue"], "train_text_encoder": [True, False]}
    assert len(config.train.combinations()) == 8
    assert [tuple(point.values()) for point in config.draw.points()] == [(scale, scale, 6.4) for scale in scales]
    assert (len(config.draw.seeds), "A {token} {class} in red t-shorts." in config.draw.prompts) == (4, True)


def test_the_cartoon_characters_runs_and_scales():
    assert len(load_sweep("cartoon_runs").train.combinations()) == 16
    points = [tuple(point.values()) for point in load_sweep("cartoon_scales", "--runs=[x]").draw.points()]
    assert len(points) == 9
    assert ((0.5, 0.1, 9) in points, (0.9, 0.5, 15) in points) == (True, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "textual_inversion"}, "name it with subject.token"),
        ({"method": "textual_inversion", "subject": SubjectConfig("<x>")}, "name it with subject.class_name"),
        (
            {"method": "textual_inversion", "subject": SubjectConfig("<x>", "dog"), "train_text_encoder": True},
            "trains embeddings alone",
        ),
        ({"method": "full", "base_bits": 4}, "cannot be trained in full"),
        ({"prior": PriorConfig(images=2)}, "needs {class}: set subject.token and subject.class_name"),
        ({"seed": -1}, "seed must be from 0"),
        ({"concepts": (ConceptConfig("a"),), "data": "b"}, "each of the concepts has its own data: set it to null"),
        ({"concepts": (ConceptConfig("a"),), "subject": SubjectConfig("sks")}, "has its own subject.token"),
        ({"concepts": (ConceptConfig("a", token="sks", class_images=2),)}, "needs {class}"),
        ({"concepts": (ConceptConfig("a", repeats=0),)}, "images.repeats must be at least 1"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        PersonalizeConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "flag", "message"),
    [
        (SweepConfig, "--runs=dog", r"runs must be a list in brackets, '\[dog\]' say, not dog"),
        (PersonalizeConfig, "--training.steps=1.5", "training.steps must be a whole number or null, not 1.5"),
        (PersonalizeConfig, "--training.lr=fast", "training.lr must be a number, not fast"),
        (PersonalizeConfig, "--method=lor", "method must be one of 'lora', 'full', 'textual_inversion', not lor"),
    ],
    ids=["list", "whole number", "number", "choice"],
)
def test_values_of_another_type_are_named_in_words(kind, flag, message):
    with pytest.raises(UserError, match=f"^in the command line: {message}$"):
        parse_arguments(settings_parser(kind), [flag])


def test_concepts_override_what_they_name():
    dog = ConceptConfig("dogs", token="sks", class_name="dog", repeats=3, class_prompt="a {class}", class_images=5)
    cat = ConceptConfig("cats", token="oue", class_name="cat", prompt="my {class}", class_data_dir="prior")
    config = PersonalizeConfig(concepts=(dog, cat), prior=PriorConfig(images=2), images=ImagesConfig(repeats=2))
    of_dog, of_cat = config.parts
    assert (of_dog.data, of_dog.images.repeats, of_dog.prior.images, of_dog.prior.prompt) == ("dogs", 3, 5, "a {class}")
    assert (of_cat.data, of_cat.images.repeats, of_cat.prior.images, of_cat.prior.path) == ("cats", 2, 2, "prior")
    assert (of_dog.subject.prompt, of_cat.subject.prompt) == (SubjectConfig().prompt, "my {class}")
    assert config.prompts(["a {token} in the snow", "snow"]) == ["a sks in the snow", "a oue in the snow", "snow"]
    assert PersonalizeConfig(data="dogs").parts == (PersonalizeConfig(data="dogs"),)


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([{"data": "a", "tokn": "x"}], "concepts: Option 'tokn' is not accepted"),
        ([{"token": "x"}], "concepts: the following arguments are required: data"),
        ([{"data": "a", "repeats": "often"}], "concepts.repeats must be a whole number or null, not often"),
        ([{"data": "a", "repeats": 2**63}], "concepts.repeats must be a finite number"),
        ({"data": "a"}, "concepts must be a list in brackets"),
    ],
)
def test_mistakes_in_a_list_of_concepts(concepts, message):
    with pytest.raises(UserError, match=message):
        settings_of(PersonalizeConfig, {"concepts": concepts}, "run.yaml")


def test_concepts_are_read_as_they_were_written():
    config = PersonalizeConfig(concepts=(ConceptConfig("dogs", token="sks"), ConceptConfig("cats", repeats=2)))
    assert settings_of(PersonalizeConfig, to_plain(config), "run.yaml") == config


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1, "epochs": 1.0},
        {"steps": 0},
        {"epochs": 0},
        {"lr": 0},
        {"ema_rate": 1},
        {"noise_offset": -1},
        {"min_snr_gamma": 0},
    ],
    ids=str,
)
def test_training_settings_out_of_range(settings):
    with pytest.raises(UserError, match="training"):
        TrainingConfig(**settings)


def test_prompts_are_filled_in():
    subject = SubjectConfig("sks", "dog")
    assert subject.fill("a photo of {token}  {class}") == "a photo of sks dog"
    assert SubjectConfig().fill("plain") == "plain"
    with pytest.raises(UserError, match=r"needs \{token\}: set subject.token"):
        SubjectConfig().fill("a {token}")
    assert subject.fill("{{token}}: {token}") == "{token}: sks"
    for wrong in ("a { dog", "{token:>1000000000}", "{token:a<{class}}", "{class!r}"):
        with pytest.raises(UserError, match="cannot be filled in"):
            subject.fill(wrong)
    for wrong in ("{}", "{0}", "{token.__class__}", "{token[0]}"):
        with pytest.raises(UserError, match="only {token} and {class} can be filled in"):
            subject.fill(wrong)
