"""Measuring generated pictures against real ones: CLIP-T, CLIP-I, DINO, copying, LPIPS, KID, FID, Inception Score."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.estimate import Score, mean_score
from improved_diffusion.metrics.images.sources import Batch, check_count
from improved_diffusion.metrics.inception.extractor import FeatureExtractor
from improved_diffusion.metrics.measure import FeatureSets, Measurement, feature_sizes, measure
from improved_diffusion.metrics.pairs import load_lpips, lpips
from improved_diffusion.metrics.store import extract_features
from improved_diffusion.personalize.data.captioned import CaptionedSet
from improved_diffusion.personalize.data.crops import fit
from improved_diffusion.personalize.measuring.judge import Judge, Seen, scores_of
from improved_diffusion.personalize.measuring.prompts import without_tokens

INCEPTION_METRICS = ("kid", "fid", "inception-score")
SIMILARITY_METRICS = ("clip-t", "clip-i", "likeness", "copying", "lpips")
LPIPS_SIDE = 256  # pixels: the distance depends on the size


@dataclass(frozen=True)
class Similarity:
    """A mean over pictures, with what it was measured."""

    metric: str
    score: Score
    n_references: int | None
    model: str


@dataclass(eq=False)
class CaptionedSource:
    """A captioned set as a source of images for Inception features; see `Source`."""

    found: CaptionedSet
    rows: np.ndarray | None = None
    labels: None = None
    class_names: None = None
    broken: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = str(self.found.path)
        self.images = [self.found.images[row] for row in (range(len(self.found)) if self.rows is None else self.rows)]
        check_count(self.name, len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the encoded images, in order."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(hashlib.sha256(image.read()).digest())
        return digest.hexdigest()

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """See `Source`: neighbours of one size together."""
        numbered = enumerate((np.asarray(image.load()) for image in self.images[start:stop]), start)
        for _, group in itertools.groupby(numbered, key=lambda item: item[1].shape):
            members = list(group)
            for first in range(0, len(members), batch_size):
                numbers, arrays = zip(*members[first : first + batch_size], strict=True)
                yield Batch(np.array(numbers), np.stack(arrays))

    def subset(self, rows: np.ndarray) -> CaptionedSource:
        """See `Source`."""
        return CaptionedSource(self.found, rows)


class Similarities:
    """The SIMILARITY_METRICS of a set of pictures. Each set is looked at once, when the first metric asks.

    Args:
        generated: pictures with their prompts.
        references: real pictures, or None.
        judge: of both.
        tokens: rare ones, which CLIP is not to read in the prompts.
        lpips_weights: torchvision's AlexNet, or None.
        device: where LPIPS runs.
    """

    def __init__(
        self,
        generated: CaptionedSet,
        references: CaptionedSet | None,
        judge: Judge,
        tokens: Sequence[str] = (),
        lpips_weights: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        self.generated, self.references, self.judge, self.tokens = generated, references, judge, tokens
        self.lpips_weights, self.device = lpips_weights, device

    @functools.cached_property
    def _values(self) -> dict[str, torch.Tensor]:
        """All scores that can be told. Unlike a look at a run, there is no autoencoder to render the references by."""
        texts = None
        if not self.generated.without_caption():
            texts = self.judge.read([without_tokens(image.caption, self.tokens) for image in self.generated.images])
        real = Seen()
        if self.references is not None:
            real = self.judge.see(_square(image.load()) for image in self.references.images)
        return scores_of(self.judge.see(image.load() for image in self.generated.images), texts, real, copies=real)

    def measure(self, metric: str) -> Similarity:
        """One of SIMILARITY_METRICS.

        Raises:
            UserError: it needs references, prompts or weights that are not there.
        """
        if metric == "lpips":
            return self._diversity()
        if metric == "clip-t" and (missing := self.generated.without_caption()):
            raise UserError(
                f"clip-t compares pictures with their prompts, and {missing[0]} has none in {self.generated.path}"
            )
        if metric != "clip-t" and self.references is None:
            raise UserError(f"{metric} compares with real pictures: give --references")
        if metric == "copying" and len(self.references) < 2:
            raise UserError("copying needs at least two references, to know how close is close")
        model = self.judge.clip_name if metric.startswith("clip") else self.judge.vision_name
        name = {"clip-t": "CLIP-T", "clip-i": "CLIP-I"}.get(metric, metric)
        if metric == "likeness" and "dino" in model.lower():
            name = "DINO"
        score = mean_score(self._values[metric.replace("-", "_")])
        return Similarity(name, score, None if metric == "clip-t" else len(self.references), model)

    def _diversity(self) -> Similarity:
        """The mean LPIPS between pictures of one prompt (DIV; Ruiz et al. 2022, DreamBooth, section 4.3): for each
        picture, its mean distance to the others of its prompt. Pictures that all look alike have little."""
        if self.lpips_weights is None:
            raise UserError(
                "lpips needs torchvision's AlexNet weights: download alexnet-owt-7be5be79.pth from "
                "download.pytorch.org/models and give --lpips-weights FILE"
            )
        network = load_lpips(self.lpips_weights, device=self.device)
        of_prompt: dict[str | None, list[Image.Image]] = {}
        for image in self.generated.images:
            picture = fit(image.load(), (LPIPS_SIDE, LPIPS_SIDE))[0]
            of_prompt.setdefault(image.caption, []).append(picture)
        values = []
        for pictures in of_prompt.values():
            for i, picture in enumerate(pictures):
                if others := pictures[:i] + pictures[i + 1 :]:
                    values.append(lpips([picture] * len(others), others, network).mean())
        if not values:
            raise UserError("lpips measures how pictures of one prompt differ, and no prompt has two")
        return Similarity("LPIPS", mean_score(torch.stack(values)), None, "AlexNet")


def _square(image: Image.Image) -> Image.Image:
    return fit(image, (min(image.size), min(image.size)))[0]


def measure_inception(
    metrics: Sequence[str],
    generated: CaptionedSet,
    references: CaptionedSet | None,
    device: str,
    weights: Path | None = None,
) -> list[Measurement]:
    """Those of INCEPTION_METRICS, in the order in which they deserve trust: KID, which is unbiased, first.

    `weights` are the Inception network's; by default those that are found.

    Raises:
        UserError: no references where they are needed, or weights that are not there.
    """
    fake = CaptionedSource(generated)
    if references is None:
        if set(metrics) - {"inception-score"}:
            raise UserError(f"{metrics[0]} compares with real pictures: give --references")
        references = generated  # which the Inception Score does not look at
    extractor = FeatureExtractor(feature_sizes(metrics, 2048), device, weights)
    sets = FeatureSets(extract_features(CaptionedSource(references), extractor), extract_features(fake, extractor))
    return measure(sets, metrics, 2048, device)


def similarity_table(found: Sequence[Similarity]) -> str:
    """One line for each number, with its interval, n and model."""
    lines = [f"{'':10}  {'value':>8}  {'95% interval':>20}  {'n':>6}  {'references':>10}  model"]
    for row in found:
        interval = "" if row.score.low is None else f"{row.score.low:.4f} to {row.score.high:.4f}"
        references = "" if row.n_references is None else f"{row.n_references:,}"
        lines.append(
            f"{row.metric:10}  {row.score.mean:8.4f}  {interval:>20}  {row.score.n:6,}  {references:>10}  {row.model}"
        )
    return "\n".join(lines)


def each(metrics: Sequence[str], measure_one: Callable[[str], None]) -> list[str]:
    """Measure one after the other; what is refused is told at the end and does not keep the others from being measured.

    Returns the refusals."""
    refused = []
    for metric in metrics:
        try:
            measure_one(metric)
        except UserError as error:
            refused.append(str(error))
    return refused
