"""What is known of the runs of an ablation, as rows of a table: their logs, and measurements of their last checkpoint
that are the same for all: the same latents, the same number of images of each class, the same reference."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from improved_diffusion.config import Config, SamplingConfig
from improved_diffusion.data import open_image_set
from improved_diffusion.errors import UserError
from improved_diffusion.files import read_jsonl, write_text
from improved_diffusion.metrics import FeatureExtractor, FeatureSets, extract_features, measure
from improved_diffusion.metrics.estimate import Estimate, Influence, bootstrap_interval
from improved_diffusion.metrics.images.opening import image_set_source
from improved_diffusion.models.build import number_of_steps
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.sampling.bound import bound_on_images, bound_rows, has_bound
from improved_diffusion.sampling.generate import sampling_record
from improved_diffusion.sampling.loading import load
from improved_diffusion.sampling.model import Model, change_sampling
from improved_diffusion.sampling.run_source import generating_code_hash, run_source
from improved_diffusion.sampling.series import PROTOCOL, Record, difference, evaluation_series
from improved_diffusion.training.evaluation import reference_set

LOGGED = ("loss", "mse", "vlb")
MOST_BOUND_IMAGES = 100  # where the command does not say


class Row(NamedTuple):
    """One number. `step` is of training; what does not apply is None."""

    arm: str
    seed: int
    step: int
    metric: str  # loss, mse, vlb; training FID64; FID64, FID; bits/dim, and its terms L_t; hours; parameters
    sampling_steps: int | None
    t: int | None
    value: float
    low: float | None = None
    high: float | None = None


class Measures:
    """Gives the rows of runs.

    Args:
        settings: of the arms.
        options: of the command.
        device: on which images are drawn and measured.

    Raises:
        UserError: the arms would be measured against different images, or with settings that do not fit.
    """

    def __init__(self, settings: Mapping[str, Config], options: argparse.Namespace, device: torch.device):
        self.settings, self.options, self.device = settings, options, device
        references = [reference_set(one, open_image_set(one.data)) for one in settings.values()]
        self.images = references[0]
        if len({reference.content_hash for reference in references}) > 1:
            raise UserError(
                "the arms would be measured against different images: name a set for all with --evaluation.reference"
            )
        evaluation = next(iter(settings.values())).evaluation
        self.per_class = options.per_class or evaluation.samples_per_class
        self.reference = image_set_source(self.images)
        wanted = options.bound_images
        self.bound_images = min(MOST_BOUND_IMAGES, len(self.reference)) if wanted is None else wanted
        if self.bound_images:
            bound_rows(self.images, self.bound_images)
        self.extractor = FeatureExtractor(options.features, device, evaluation.weights)
        self.real = extract_features(self.reference, self.extractor)
        self.protocols: dict[tuple[str, int], Record] = {}  # of the evaluations while training

    def describe(self) -> str:
        """With what the runs were measured."""
        samplers = sorted({self.options.sampler or one.sampling.sampler for one in self.settings.values()})
        scales = sorted({one.sampling.guidance_scale for one in self.settings.values()})
        guided = "" if scales == [1] else f" with guidance {' or '.join(f'{scale:g}' for scale in scales)}"
        return (
            f"Images of the last checkpoints: {self.per_class} of each class, seed {self.options.generation_seed}, "
            f"drawn by {' or '.join(samplers)}{guided}. Reference: the {len(self.reference):,} images of "
            f"{os.path.relpath(self.images.path)}; bits/dim are of {self.bound_images} of them. "
            "The list of runs has FID at all of a model's sampling steps. FID is biased upwards by few "
            "images: compare only values of one table."
        )

    def of_run(self, path: Path, arm: str, seed: int) -> list[Row]:
        """All rows of a run whose training is finished.

        Raises:
            UserError: its evaluations were made in another way than those of the runs before.
        """
        run, model = RunDirectory(path), load(path, "latest", device=self.device)
        rows = [Row(arm, seed, *rest) for rest in self._logged(run, arm, seed)]
        parameters = sum(parameter.numel() for parameter in model.network.parameters())
        rows.append(Row(arm, seed, model.step, "parameters", None, None, parameters))
        for rest in itertools.chain(self._distances(model), self._bound(model, arm, seed)):
            row = Row(arm, seed, model.step, *rest)
            rows.append(row)
            if row.t is None:
                steps = "" if row.sampling_steps is None else f" at {row.sampling_steps} sampling steps"
                print(f"{path}: {row.metric}{steps} {row.value:.4f} ({row.low:.4f} to {row.high:.4f})", flush=True)
        return rows

    def _logged(self, run: RunDirectory, arm: str, seed: int) -> Iterator[tuple[Any, ...]]:
        """(step, metric, ...) of what the run itself has recorded."""
        seconds, images = 0.0, 0
        for record in read_jsonl(run.metrics_file):
            yield from ((record["step"], name, None, None, record[name]) for name in LOGGED if name in record)
            seconds += (record["images_seen"] - images) / record["images_per_second"]
            images = record["images_seen"]
        yield record["step"], "hours", None, None, seconds / 3600
        scored = [record for record in read_jsonl(run.evaluations_file) if "value" in record]
        if scored:
            series = evaluation_series(scored)[-1]
            self.protocols[arm, seed] = series[0]
            require_one_protocol(self.protocols, self.settings)
            for record in series:
                name, steps = f"training {record['metric']}", record.get("sampling_steps")
                yield record["step"], name, steps, None, record["value"], record.get("low"), record.get("high")

    def _distances(self, model: Model) -> Iterator[tuple[Any, ...]]:
        """(metric, ...) of the distances of images drawn in several numbers of steps."""
        for steps in steps_measured(model.config, self.options.sampling_steps):
            sampling = change_sampling(model.config.sampling, sampler=self.options.sampler, steps=steps)
            source = run_source(model, self.reference, sampling, self.options.generation_seed, self.per_class)
            fake = extract_features(source, self.extractor)
            for size in self.options.features:
                (measured,) = measure(FeatureSets(self.real, fake), ["fid"], size, self.device)
                yield measured.metric, steps, None, measured.value, measured.low, measured.high

    def _bound(self, model: Model, arm: str, seed: int) -> Iterator[tuple[Any, ...]]:
        """(metric, ...) of the bound and of its terms, kept in a file, for it takes minutes."""
        if not self.bound_images or not has_bound(model.config):
            return
        file = self.options.out / "bounds" / f"{arm}-seed{seed}.json"
        rows = bound_rows(self.images, self.bound_images)
        made_of = {
            "checkpoint_sha256": model.checkpoint_sha256,
            "images": self.images.content_hash,
            "n": len(rows),
            "code": generating_code_hash(),
        }
        kept = json.loads(file.read_text()) if file.is_file() else {}
        if kept.get("made_of") != made_of:
            bound = bound_on_images(model, self.images, rows)
            kept = {"made_of": made_of, "total": bound.total.tolist(), "vlb": bound.vlb.mean(0).tolist()}
            write_text(file, json.dumps(kept))
        total = np.array(kept["total"])
        low_high = bootstrap_interval(Estimate(total.mean(), (Influence(total, self.images.labels[rows]),)))
        yield "bits/dim", None, None, float(total.mean()), *low_high
        yield from (("L_t", None, t, value) for t, value in enumerate(kept["vlb"]))


def all_steps(config: Config) -> int:
    """The sampling steps of a model that leaves out none of its own; in continuous time the number by default."""
    return number_of_steps(config.diffusion, SamplingConfig())


def steps_measured(config: Config, wanted: list[int]) -> list[int]:
    """Those of the `wanted` sampling steps that a model can take, and all of its own."""
    most = all_steps(config)
    return sorted({most, *(steps for steps in wanted if steps < most or config.diffusion.timesteps is None)})


def require_one_protocol(protocols: Mapping[tuple[str, int], Record], settings: Mapping[str, Config]) -> None:
    """Raise UserError where two runs were not evaluated in the same way while they trained, but for what the settings
    of their arms say."""

    def of_settings(config: Config) -> Record:
        return {**sampling_record(config, config.sampling), "ema_rate": config.training.ema_rates[0]}

    (first, record), *others = protocols.items()
    for other, other_record in others:
        one, two = of_settings(settings[first[0]]), of_settings(settings[other[0]])
        alike = [name for name in PROTOCOL if one.get(name) == two.get(name)]
        if what := difference(*({name: r.get(name) for name in alike} for r in (record, other_record))):
            raise UserError(f"{first} and {other} were not measured in the same way and cannot be compared: {what}")
