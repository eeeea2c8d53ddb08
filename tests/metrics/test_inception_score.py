from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from improved_diffusion.errors import UserError
from improved_diffusion.metrics import FeatureExtractor
from improved_diffusion.metrics.estimate import bootstrap_interval
from improved_diffusion.metrics.inception.extractor import fold_layers
from improved_diffusion.metrics.inception.weights import load_layers
from improved_diffusion.metrics.inception_score import inception_score


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return 3 * np.random.default_rng(0).normal(size=(400, 20)).astype(np.float32)


def test_it_is_torch_fidelitys(make_features, logits):
    score = inception_score(make_features(logits))
    whole = isc_features_to_metric(torch.from_numpy(logits), splits=1, shuffle=False)
    assert score.value == pytest.approx(whole["inception_score_mean"], rel=1e-6)
    order = np.random.default_rng(0).permutation(len(logits))
    splits = isc_features_to_metric(torch.from_numpy(logits[order]), splits=10, shuffle=False)
    assert score.details["split_mean"] == pytest.approx(splits["inception_score_mean"], rel=1e-6)
    assert score.details["split_std"] == pytest.approx(splits["inception_score_std"], rel=1e-6)


def test_certain_and_varied_is_the_number_of_classes_and_indifferent_is_one(make_features):
    assert inception_score(make_features(1000 * np.eye(10).repeat(3, 0))).value == pytest.approx(10)
    assert inception_score(make_features(np.zeros((30, 10)))).value == pytest.approx(1)


def test_its_interval_has_the_right_width(make_features):
    rng = np.random.default_rng(1)
    estimates = [inception_score(make_features(2 * rng.normal(size=(300, 10)))) for _ in range(200)]
    widths = [np.subtract(*bootstrap_interval(estimate, replicates=300)[::-1]) for estimate in estimates]
    assert np.mean(widths) / (2 * 1.96) == pytest.approx(np.std([e.value for e in estimates]), rel=0.25)


def test_weights_without_a_classifier_are_refused(weights):
    with pytest.raises(UserError, match=r"Inception Score needs the network's last layer.*--weights"):
        FeatureExtractor((1008,), weights=weights)


def test_logits_are_the_pooled_features_by_the_classifier(weights):
    classifier = torch.randn(1008, 2048, generator=torch.Generator().manual_seed(0))
    network = fold_layers((2048, 1008), load_layers(weights), classifier)
    with torch.inference_mode():
        features = network(torch.zeros(1, 3, 299, 299))
    torch.testing.assert_close(features[1008], features[2048] @ classifier.T, rtol=1e-4, atol=1e-4)
