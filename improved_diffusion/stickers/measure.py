"""Sets of stickers beside each other: Inception Score, FID, LPIPS and ERGAS against a reference set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.estimate import bootstrap_interval, mean_score
from improved_diffusion.metrics.features import Features, finite
from improved_diffusion.metrics.fid import frechet_inception_distance
from improved_diffusion.metrics.inception.extractor import FeatureExtractor, FeatureSettings
from improved_diffusion.metrics.inception.network import LOGITS
from improved_diffusion.metrics.inception_score import inception_score
from improved_diffusion.metrics.pairs import ergas, lpips
from improved_diffusion.metrics.store import extract_features
from improved_diffusion.personalize.data.captioned import CaptionedSet
from improved_diffusion.personalize.data.crops import fit
from improved_diffusion.personalize.models.base import fingerprint
from improved_diffusion.personalize.models.judges import load_vit_classifier
from improved_diffusion.personalize.studies.evaluate import CaptionedSource
from improved_diffusion.results import markdown_table

INCEPTION = "inception"
BATCH = 32
PAIR_SIDE = 256  # pixels to which pictures of a pair are cut: both distances depend on the size

Extract = Callable[[CaptionedSet], tuple[Features, Features]]


@dataclass(frozen=True)
class Value:
    """A measured value, with its interval of 95 %."""

    metric: str
    value: float
    low: float | None
    high: float | None


def open_extractor(name: str, device: torch.device | str, weights: Path | None = None) -> Extract:
    """What gives the features and the logits of a set: `inception`, or a ViT classifier by folder or name.

    Args:
        weights: of Inception; by default those that are found.

    Raises:
        UserError: as `FeatureExtractor` and `load_vit_classifier` do.
    """
    if name == INCEPTION:
        extractor = FeatureExtractor((2048, LOGITS), device, weights)

        def by_inception(pictures: CaptionedSet) -> tuple[Features, Features]:
            of_size = extract_features(CaptionedSource(pictures), extractor)
            return of_size[2048], of_size[LOGITS]

        return by_inception
    model, processor = load_vit_classifier(name, device)
    settings = FeatureSettings(model.config.hidden_size, "the model's own", "float32", fingerprint(model))

    @torch.inference_mode()
    def by_vit(pictures: CaptionedSet) -> tuple[Features, Features]:
        states, logits = [], []
        for start in range(0, len(pictures), BATCH):
            batch = [image.load() for image in pictures.images[start : start + BATCH]]
            pixels = processor(images=batch, return_tensors="pt")["pixel_values"].to(device)
            states.append(model.vit(pixel_values=pixels).last_hidden_state[:, 0])  # the class token, after the norm
            logits.append(model.classifier(states[-1]))
        arrays = (finite(torch.cat(parts), str(pictures.path)) for parts in (states, logits))
        features, outputs = (Features(str(pictures.path), array, settings) for array in arrays)
        return features, outputs

    return by_vit


def measure_sets(
    sets: Sequence[CaptionedSet], reference: CaptionedSet, extract: Extract, lpips_network: torch.nn.Module | None
) -> tuple[list[list[Value]], list[str]]:
    """The values of each set, and notes on what could not be measured.

    The Inception Score is of the classifier in `extract`; FID of its features, against those of `reference`. LPIPS and
    ERGAS compare pictures of one file name, and are left out where names differ.
    """
    real = extract(reference)[0]
    measured, notes = [], []
    for pictures in sets:
        features, logits = extract(pictures)
        estimates = {"Inception Score": inception_score(logits), "FID": frechet_inception_distance(real, features)}
        values = [
            Value(name, estimate.value, *(bootstrap_interval(estimate) or (None, None)))
            for name, estimate in estimates.items()
        ]
        try:
            values += paired(pictures, reference, lpips_network)
        except UserError as error:
            notes.append(str(error))
        measured.append(values)
    return measured, notes


def paired(pictures: CaptionedSet, reference: CaptionedSet, lpips_network: torch.nn.Module | None) -> list[Value]:
    """ERGAS, and LPIPS where there is a network, the means over the pictures that both sets have.

    Raises:
        UserError: a picture has no counterpart of its name.
    """
    others = {Path(image.name).with_suffix(""): image for image in reference.images}
    names = [Path(image.name).with_suffix("") for image in pictures.images]
    if strange := [str(name) for name in names if name not in others]:
        raise UserError(f"no LPIPS and ERGAS of {pictures.path}: {reference.path} has no {strange[0]} to compare with")
    distances: dict[str, list[torch.Tensor]] = {"LPIPS": [], "ERGAS": []}
    for image, name in zip(pictures.images, names, strict=True):
        pair = [[fit(one.load(), (PAIR_SIDE, PAIR_SIDE))[0]] for one in (image, others[name])]
        distances["ERGAS"].append(ergas(*pair))
        if lpips_network is not None:
            distances["LPIPS"].append(lpips(*pair, lpips_network))
    scores = {metric: mean_score(torch.cat(values)) for metric, values in distances.items() if values}
    return [Value(metric, score.mean, score.low, score.high) for metric, score in scores.items()]


def table(sets: Sequence[CaptionedSet], measured: Sequence[Sequence[Value]]) -> str:
    """In Markdown: a row for each set, a column for each metric."""
    metrics = list(dict.fromkeys(value.metric for values in measured for value in values))
    rows = []
    for pictures, values in zip(sets, measured, strict=True):
        cells = {value.metric: _cell(value) for value in values}
        rows.append([pictures.path.name, f"{len(pictures):,}", *(cells.get(metric, "") for metric in metrics)])
    return "\n".join(markdown_table(["set", "n", *metrics], rows))


def _cell(value: Value) -> str:
    interval = "" if value.low is None else f" ({value.low:.3f} to {value.high:.3f})"
    return f"{value.value:.3f}{interval}"
