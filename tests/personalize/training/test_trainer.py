"""One step, against what diffusers computes, and cached against not cached."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
from accelerate import Accelerator  # noqa: E402
from diffusers import DDPMScheduler  # noqa: E402

from improved_diffusion.personalize.config import (  # noqa: E402
    ConceptConfig,
    ImagesConfig,
    PersonalizeConfig,
    PriorConfig,
    SubjectConfig,
    TrainingConfig,
)
from improved_diffusion.personalize.data.captioned import open_captioned_set  # noqa: E402
from improved_diffusion.personalize.data.examples import Examples  # noqa: E402
from improved_diffusion.personalize.generate import Sampling, draw  # noqa: E402
from improved_diffusion.personalize.models.base import Base  # noqa: E402
from improved_diffusion.personalize.models.trained import needed_for_updates, prepare  # noqa: E402
from improved_diffusion.personalize.training import trainer as trainer_module  # noqa: E402
from improved_diffusion.personalize.training.trainer import EncodedSet, Trainer  # noqa: E402

TEXTS = ("a photo of a sks ball", "a sks ball on a lawn", "red", "green", "blue")
WORDINGS = [(text,) for text in TEXTS]
SIZE = (64, 64)


def make_trainer(base: Base, photos, **settings) -> Trainer:
    images = settings.pop("images", ImagesConfig())
    config = PersonalizeConfig(images=images, training=TrainingConfig(**{"steps": 9, **settings}))
    found = open_captioned_set(photos).images
    trained = prepare(base, config)
    source = EncodedSet(Examples(base, found, [SIZE] * len(found), images), WORDINGS)
    return Trainer(base, trained, config, source, {}, Accelerator(cpu=True))


def test_the_loss_is_what_diffusers_computes(base, photos):
    """The noise, the text and SDXL's further conditions by way of the pipeline's own functions."""
    trainer = make_trainer(base, photos)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    t = torch.tensor([10, 700])
    size_ids = torch.tensor([[100.0, 80.0, 0.0, 3.0, 64.0, 64.0], [64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    pipeline = base.pipeline
    with torch.no_grad():
        found = trainer.denoising_losses(x_0, noise, t, TEXTS[:2], size_ids, torch.ones(2, 1, 8, 8))
        x_t = DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(x_0, noise, t)
        encoded = pipeline.encode_prompt(
            list(TEXTS[:2]), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        added = None
        if base.is_sdxl:
            like = {
                "dtype": torch.float32,
                "text_encoder_projection_dim": pipeline.text_encoder_2.config.projection_dim,
            }
            rows = [tuple(row) for row in size_ids.tolist()]
            ids = [pipeline._get_add_time_ids(row[:2], row[2:4], row[4:], **like) for row in rows]
            added = {"text_embeds": encoded[2], "time_ids": torch.cat(ids)}
        predicted = base.unet(x_t, t, encoder_hidden_states=encoded[0], added_cond_kwargs=added).sample
    expected = (predicted - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_nothing_depends_on_what_is_cached(fresh_base, photos, kind):
    images = ImagesConfig(crops=2, flip=True)
    losses = []
    for cache in (True, False):
        trainer = make_trainer(fresh_base(kind), photos, images=dataclasses.replace(images, cache=cache), batch_size=2)
        losses.append([trainer.train_step()["loss"].item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_each_part_has_its_own_learning_rate_and_warms_up(base, photos):
    images = ImagesConfig()
    config = PersonalizeConfig(
        train_text_encoder=True,
        images=images,
        training=TrainingConfig(steps=9, lr=3e-4, lr_text_encoder=1e-4, lr_text_encoder_2=5e-5, warmup_steps=4),
    )
    found = open_captioned_set(photos).images
    trained = prepare(base, config)
    source = EncodedSet(Examples(base, found, [SIZE] * len(found), images), WORDINGS)
    trainer = Trainer(base, trained, config, source, {}, Accelerator(cpu=True))
    trainer.train_step()
    peaks = {"unet": 3e-4, "text_encoder": 1e-4, "text_encoder_2": 5e-5}
    rates = dict(zip(trained.parts, (group["lr"] for group in trainer.optimizer.param_groups), strict=True))
    assert rates == pytest.approx({part: peaks[part] / 4 for part in trained.parts})
    assert set(rates) == {"unet", *base.text_encoders}


def test_frozen_weights_stay_and_trained_ones_move(base, photos):
    trainer = make_trainer(base, photos, lr=1e-2)
    before = {name: p.detach().clone() for name, p in base.unet.named_parameters()}
    for _ in range(2):
        trainer.train_step()
    learned = {name.removeprefix("unet/") for name in trainer.trained.parameters}
    for name, parameter in base.unet.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in learned)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_prior_and_min_snr_by_hand(base, photos, batch_size, monkeypatch):
    """Each sample, of the subject or the prior, has the weight of its own timestep; then the two are averaged apart."""
    config = PersonalizeConfig(
        subject=SubjectConfig(token="sks", class_name="ball"),
        prior=PriorConfig(images=3, weight=0.7),
        training=TrainingConfig(steps=9, batch_size=batch_size, min_snr_gamma=5.0),
    )
    found = open_captioned_set(photos).images
    examples = Examples(base, found, [SIZE] * len(found), config.images)
    prior = EncodedSet(Examples(base, found[:3], [SIZE] * 3, config.images), [("a photo of a ball",)] * 3)
    trained = prepare(base, config)
    trainer = Trainer(base, trained, config, EncodedSet(examples, WORDINGS), {0: {SIZE: prior}}, Accelerator(cpu=True))
    errors = torch.linspace(0.2, 1.1, 2 * batch_size, requires_grad=True)
    seen = {}

    def denoising_losses(x_0, noise, t, texts, size_ids, mask):
        seen.update(t=t, texts=texts)
        return errors

    monkeypatch.setattr(trainer, "denoising_losses", denoising_losses)
    losses = trainer._losses(0)
    assert seen["texts"][batch_size:] == ["a photo of a ball"] * batch_size
    weighted = []
    for error, t in zip(errors.tolist(), seen["t"].tolist(), strict=True):
        abar = base.pipeline.scheduler.alphas_cumprod[t].item()
        snr = abar / (1 - abar)
        weighted.append(error * min(snr, 5.0) / snr)
    own, of_prior = weighted[:batch_size], weighted[batch_size:]
    expected = sum(own) / batch_size + 0.7 * sum(of_prior) / batch_size
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_masks_by_hand_and_a_prior_that_counts_whole(fresh_base, photos, monkeypatch):
    config = PersonalizeConfig(
        subject=SubjectConfig(token="sks", class_name="ball"),
        prior=PriorConfig(images=2, weight=0.5),
        images=ImagesConfig(alpha_mask=True),
        training=TrainingConfig(steps=9, batch_size=2),
    )
    base, found = fresh_base("sd"), open_captioned_set(photos).images[:2]
    left = Image.fromarray(np.repeat(np.arange(64)[None] < 16, 64, axis=0).astype(np.uint8) * 204)
    whole, part = found[0], dataclasses.replace(found[1], mask=lambda: left)
    examples = Examples(base, [part, part], [SIZE] * 2, config.images)
    prior = {0: {SIZE: EncodedSet(Examples(base, [whole, whole], [SIZE] * 2, config.images), [("a ball",)] * 2)}}
    trained = prepare(base, config)
    trainer = Trainer(base, trained, config, EncodedSet(examples, WORDINGS[:2]), prior, Accelerator(cpu=True))
    seen = []
    forward = base.unet.forward
    monkeypatch.setattr(base.unet, "forward", lambda x, *a, **k: seen.append((x, forward(x, *a, **k))) or seen[-1][1])
    noises = []
    really = trainer_module.target
    monkeypatch.setattr(trainer_module, "target", lambda *a: noises.append(really(*a)) or noises[-1])
    terms = trainer._losses(0)
    (_, predicted), side = seen[0], noises[0].shape[-1]
    errors = (predicted.sample.detach() - noises[0]).double().square().numpy()
    # Of the first quarter of the columns each counts as much as the others; the prior counts whole.
    own = [np.mean(errors[i, :, :, : side // 4]) for i in range(2)]
    of_prior = [np.mean(errors[i]) for i in (2, 3)]
    assert terms["mse"].item() == pytest.approx(np.mean(own), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(np.mean(own) + 0.5 * np.mean(of_prior), rel=1e-4)


def test_beside_each_image_is_one_of_its_own_concepts_prior(fresh_base, photos, monkeypatch):
    """Three concepts, of which the second has no prior; each prior is gone through in turn."""
    config = PersonalizeConfig(
        concepts=(
            ConceptConfig("a", token="sks", class_name="ball", class_images=2),
            ConceptConfig("b", token="oue", class_name="disc", repeats=2),
            ConceptConfig("c", token="red", class_name="disc", class_images=3),
        ),
        prior=PriorConfig(weight=0.5),
        training=TrainingConfig(steps=9, batch_size=2),
    )
    base, found = fresh_base("sd"), open_captioned_set(photos).images
    concepts, texts = (0, 1, 1, 2, 2), ("of 0", "of 1", "of 1", "of 2", "of 2")
    examples = Examples(base, found, [SIZE] * 5, config.images)
    priors = {
        concept: {SIZE: EncodedSet(examples, [(f"prior {concept} number {i}",) for i in range(count)])}
        for concept, count in ((0, 2), (2, 3))
    }
    source = EncodedSet(examples, [(text,) for text in texts], concepts)
    trainer = Trainer(base, prepare(base, config), config, source, priors, Accelerator(cpu=True))
    batches = []
    monkeypatch.setattr(
        trainer, "denoising_losses", lambda x_0, noise, t, texts, *rest: batches.append(texts) or torch.ones(len(x_0))
    )
    terms = [trainer._losses(number) for number in range(8)]
    seen = {concept: [] for concept in (0, 1, 2)}
    for number, (batch, found) in enumerate(zip(batches, terms, strict=True)):
        own = len(trainer.stream.micro_batch(number))
        of_prior = [text.split() for text in batch[own:]]
        assert [int(word[1]) for word in of_prior] == sorted(int(t[-1]) for t in batch[:own] if t != "of 1")
        assert found["loss"] == (1.5 if of_prior else 1)
        for _, concept, _, drawn in of_prior:
            seen[int(concept)].append(int(drawn))
    assert [len(batch) for batch in batches[:4]] != [4] * 4  # some images had none beside them
    for concept, count in ((0, 2), (2, 3)):
        whole = seen[concept][: len(seen[concept]) // count * count]
        assert whole
        for first in range(0, len(whole), count):
            assert sorted(whole[first : first + count]) == list(range(count))
    for number in range(4):
        trainer._count(trainer.stream.micro_batch(number))
    assert trainer.prior_seen == sum(text != "of 1" for batch in batches[:4] for text in batch if text[:2] == "of")


@pytest.mark.parametrize("batches", [{"accumulation": 2}, {"batch_size": 5}])
def test_it_counts_what_it_has_seen(base, photos, batches):
    trainer = make_trainer(base, photos, **batches)
    for _ in range(3):
        trainer.train_step()
    assert trainer.counters.updates == 3
    assert trainer.counters.images_seen == {"accumulation": 6, "batch_size": 15}[next(iter(batches))]


def test_what_waits_on_the_cpu_is_not_missed(base, photos):
    """Once texts and latents are kept, updates need neither encoders nor autoencoder, here on a device without data."""
    trainer = make_trainer(base, photos, images=ImagesConfig(caption_dropout=0.5))
    assert needed_for_updates(base, trainer.config) == ["unet"]
    assert len(needed_for_updates(base, dataclasses.replace(trainer.config, images=ImagesConfig(cache=False)))) == len(
        base.networks
    )
    trainer.conditions.encode([*TEXTS, ""])
    for name in {*base.networks} - {"unet"}:
        base.networks[name].to("meta")
    for _ in range(3):
        assert torch.isfinite(trainer.train_step()["loss"])


def test_parts_come_for_drawing_and_leave(base):
    """In either way, and the pictures are the same; a device without data stands for the place where parts wait."""
    sampling = Sampling(steps=2, guidance_scale=2.0, height=16, width=16)
    pictures = []
    for offload in (False, True):
        with base.drawing("cpu", offload, ["unet"]):
            assert hasattr(base.unet, "_hf_hook") == offload
            pictures.append(next(draw(base, ["a dog"], [0], sampling)).tobytes())
        assert not hasattr(base.unet, "_hf_hook")
    assert pictures[0] == pictures[1]
    base.place("meta", "unet")
    assert [part.device.type for part in base.networks.values()] == ["meta", *["cpu"] * (len(base.networks) - 1)]
