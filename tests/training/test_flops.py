"""How much arithmetic a run is said to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from improved_diffusion.config import UNetConfig
from improved_diffusion.files import read_jsonl
from improved_diffusion.models.build import build_network
from improved_diffusion.training import loop
from improved_diffusion.training.flops import flops_per_image, peak_of


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.layer(x_t)


@pytest.mark.parametrize(
    ("layer", "forward"),
    [
        (nn.Conv2d(3, 7, 3, padding=1), 2 * 3 * 7 * 3 * 3 * 8 * 8),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), 2 * 192 * 5),
    ],
    ids=["convolution", "linear"],
)
def test_of_one_layer_as_by_hand(layer, forward):
    """Two operations for each weight and output; as many again for the gradient of the weights. The input of the first
    layer has no gradient."""
    assert flops_per_image(OneLayer(layer), UNetConfig(image_size=8)) == 2 * forward


def test_between_layers_the_gradient_passes_on():
    first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)
    flops = [2 * 3 * 4 * 64, 2 * 4 * 6 * 64]
    network = OneLayer(nn.Sequential(first, second))
    assert flops_per_image(network, UNetConfig(image_size=8)) == 2 * flops[0] + 3 * flops[1]


def test_counting_draws_and_changes_nothing(tiny_config):
    config = tiny_config()
    assert config.model.dropout > 0
    network = build_network(config, 3)
    before = [p.clone() for p in network.parameters()]
    state = torch.random.get_rng_state()
    assert flops_per_image(network, config.model) > 1e6
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, was) and p.grad is None for p, was in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("name", "bf16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756, 51.2),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("Tesla T4", None, None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_whole_name(name, bf16, float32):
    assert (peak_of(name, torch.bfloat16), peak_of(name, torch.float32)) == (bf16, float32)


def test_a_run_logs_and_shows_it(tiny_config_file, run_script, tmp_path, monkeypatch):
    """On a device whose peak is known, which no CPU's is."""
    flags = ["--config", tiny_config_file, "--training.steps=3"]
    outcome = run_script("train.py", *flags, "--out", tmp_path / "unknown")
    assert outcome.code == 0, outcome.err
    assert "tflops=" in outcome.err
    (record,) = read_jsonl(tmp_path / "unknown" / "metrics.jsonl")
    assert "mfu" not in record
    assert record["tflops"] == pytest.approx(record["flops_per_image"] * record["images_per_second"] / 1e12)

    monkeypatch.setattr(loop, "peak_tflops", lambda device, dtype: 0.5)
    outcome = run_script("train.py", *flags, "--out", tmp_path / "known")
    (known,) = read_jsonl(tmp_path / "known" / "metrics.jsonl")
    assert known["flops_per_image"] == record["flops_per_image"]
    assert known["mfu"] == pytest.approx(known["tflops"] / 0.5)
    assert "mfu=" in outcome.err
