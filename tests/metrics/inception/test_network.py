"""The network against two others: the packaged TorchScript, and the layers of torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from improved_diffusion.data.compositing import on_white
from improved_diffusion.errors import UserError
from improved_diffusion.metrics import FeatureExtractor
from improved_diffusion.metrics.inception import network as inception
from improved_diffusion.metrics.inception.extractor import fold_layers
from improved_diffusion.metrics.inception.preprocessing import preprocess
from improved_diffusion.metrics.inception.weights import load_layers, read_packaged, read_published, weights_hash

TORCHSCRIPT_LAYERS = {"pool0": 64, "pool1": 192, "mixed_7": 768, "pool2": 2048}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of one image's features, relative to their norm."""
    return ((actual - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def resize_by_hand(images: np.ndarray, half_pixel: bool = False) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, 299, 299), between the four pixels about each place and in float64."""
    n, height, width, _ = images.shape
    shift = 0.5 if half_pixel else 0.0
    y, x = (np.maximum((np.arange(299) + shift) * side / 299 - shift, 0) for side in (height, width))
    top, left = (np.floor(places).astype(int) for places in (y, x))
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, across = (y - top)[:, None, None], (x - left)[:, None]
    pixels = images.astype(np.float64)
    upper = pixels[:, top][:, :, left] * (1 - across) + pixels[:, top][:, :, right] * across
    lower = pixels[:, bottom][:, :, left] * (1 - across) + pixels[:, bottom][:, :, right] * across
    return torch.from_numpy(upper * (1 - down) + lower * down).permute(0, 3, 1, 2).float().contiguous()


@pytest.fixture(scope="module")
def expected(torchscript, photos) -> dict[int, torch.Tensor]:
    """Features of two photographs by the TorchScript, at every size."""
    features = {}
    x = (resize_by_hand(photos[:2]) - 128) / 128
    with torch.inference_mode():
        whole = torchscript(x)
        for name, layer in torchscript.net.layers.named_children():
            x = layer(x)
            if name in TORCHSCRIPT_LAYERS:
                features[TORCHSCRIPT_LAYERS[name]] = x.mean(dim=(2, 3))
    torch.testing.assert_close(whole, features[2048])  # so the layers above are taken in the right order
    return features


def test_features_of_every_size_equal_those_of_the_packaged_network(extractor, photos, expected):
    features = extractor(photos[:2])
    assert list(features) == [64, 192, 768, 2048]
    for size, tensor in features.items():
        assert tensor.shape == (2, size)
        assert tensor.dtype == torch.float32
        assert relative_error(tensor, expected[size]) < 1e-4


def test_spatial_features_are_seven_channels_of_a_branch_of_the_packaged_network(weights, torchscript, photos):
    x = (resize_by_hand(photos[:2]) - 128) / 128
    with torch.inference_mode():
        for name, layer in torchscript.net.layers.named_children():
            if name == "mixed_6":
                expected = layer.conv(x)[:, :7].flatten(1)
                break
            x = layer(x)
    features = FeatureExtractor((2023,), weights=weights)(photos[:2])[2023]
    assert features.shape == (2, 2023)
    assert relative_error(features, expected) < 1e-4


def test_compiled_features_are_the_same_in_batches_of_any_size(weights, extractor64, photos):
    compiled = FeatureExtractor((64,), weights=weights)
    compiled.compile()
    assert compiled._compiled is not None
    for n in (1, 5, 12):
        assert relative_error(compiled(photos[:n])[64], extractor64(photos[:n])[64]) < 1e-5


def test_without_a_compiler_there_is_a_warning_and_the_same_features(weights, extractor64, photos, monkeypatch):
    def broken(*_, **__):
        def fail(_):
            raise RuntimeError("no compiler\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    uncompiled = FeatureExtractor((64,), weights=weights)
    with pytest.warns(UserWarning, match="cannot be compiled here and runs uncompiled: no compiler$"):
        uncompiled.compile()
    assert torch.equal(uncompiled(photos)[64], extractor64(photos)[64])


def test_bfloat16_is_another_measurement(weights, extractor64, photos):
    fast = FeatureExtractor((64,), weights=weights, precision="bf16")
    assert fast.settings(64) != extractor64.settings(64)
    features = fast(photos)[64]
    assert features.dtype == torch.float32
    assert 1e-4 < relative_error(features, extractor64(photos)[64]) < 3e-2


def padding_counted(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=True)


@pytest.mark.parametrize("mutation", ["half-pixel resize", "divided by 127.5", "padding counted", "last pool a mean"])
def test_every_peculiarity_of_the_network_shows_in_its_features(mutation, extractor, photos, expected, monkeypatch):
    x = preprocess(torch.from_numpy(photos[:2]))
    if mutation == "half-pixel resize":
        x = (resize_by_hand(photos[:2], half_pixel=True) - 128) / 128
    elif mutation == "divided by 127.5":
        x = x * 128 / 127.5
    elif mutation == "padding counted":
        monkeypatch.setattr(inception, "average_pool", padding_counted)
    else:
        monkeypatch.setattr(extractor.network.Mixed_7c, "pool", inception.average_pool)
    with torch.inference_mode():
        features = extractor.network(x)[2048]
    assert relative_error(features, expected[2048]) > 1e-3


def test_a_shallower_network_gives_the_same_features(extractor, extractor64, photos, expected):
    assert list(extractor64(photos[:2])) == [64]
    assert relative_error(extractor64(photos[:2])[64], expected[64]) < 1e-4
    assert sum(p.numel() for p in extractor64.network.parameters()) < 30_000


def test_features_do_not_depend_on_the_batch(extractor64, photos):
    one_by_one = torch.cat([extractor64(photo[None])[64] for photo in photos])
    torch.testing.assert_close(extractor64(photos)[64], one_by_one, rtol=1e-5, atol=1e-6)


def test_features_ignore_autocast_and_reduced_matmul_precision(extractor64, photos):
    plain = extractor64(photos)[64]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reduced = extractor64(photos)[64]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain, reduced)


def test_images_of_any_size(extractor64, photos):
    wide = np.concatenate([photos, photos], axis=2)
    assert extractor64(wide[:2])[64].shape == (2, 64)
    assert extractor64(torch.from_numpy(photos[:1, :8, :9]))[64].shape == (1, 64)
    with pytest.raises(UserError, match="1x7 pixels"):
        extractor64(photos[:2, :7, :1])
    with pytest.raises(UserError, match="64x64 pixels: preprocessing none takes 299x299"):
        FeatureExtractor((64,), preprocessing="none")(photos)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_seen_as_rgb(extractor64, channels):
    images = torch.randint(0, 256, (2, 12, 20, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(extractor64(images)[64], extractor64(on_white(images))[64], rtol=0, atol=0)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 8, 8, 3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, 3).byte()]
)
def test_other_dtypes_and_layouts_are_refused(extractor64, images):
    with pytest.raises(ValueError, match=r"uint8 \(N, H, W, 3\)"):
        extractor64(images)


@pytest.mark.parametrize("features", [(), (100,), (64, 2047)])
def test_an_unknown_feature_size_names_the_known_ones(features):
    with pytest.raises(UserError, match="64, 192, 768, 2048"):
        FeatureExtractor(features)


@pytest.fixture(scope="module")
def torchvision_network() -> torchvision.models.Inception3:
    """The class whose layer names and shapes the published weights have, with random normalization."""
    network = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.3)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.1)
    return network.eval()


def test_published_weights_are_read_and_folded_layer_by_layer(torchvision_network, tmp_path):
    torch.save(torchvision_network.state_dict(), tmp_path / "published.pth")
    built = fold_layers((2048,), read_published(tmp_path / "published.pth"))
    generator = torch.Generator().manual_seed(0)
    layers = [(name, layer) for name, layer in built.named_modules() if isinstance(layer, inception.Conv)]
    assert len(layers) == 94
    with torch.inference_mode():
        for name, layer in layers:
            x = torch.randn(1, layer.in_channels, 9, 9, generator=generator)
            expected = torchvision_network.get_submodule(name)(x)
            torch.testing.assert_close(layer(x.clone()), expected, rtol=1e-4, atol=1e-4, msg=name)


def test_one_network_has_one_hash_whatever_file_it_came_in(torchvision_network, weights, tmp_path):
    packaged = read_packaged(weights)
    state = torchvision_network.state_dict()
    for name, layer in packaged.items():
        state[f"{name}.conv.weight"] = layer.weight
        state[f"{name}.bn.weight"] = torch.ones_like(layer.beta)
        state[f"{name}.bn.bias"] = layer.beta
        state[f"{name}.bn.running_mean"] = layer.mean
        state[f"{name}.bn.running_var"] = layer.variance
    torch.save(state, tmp_path / "published.pth")
    assert weights_hash(read_published(tmp_path / "published.pth")) == weights_hash(packaged)
    state["Mixed_7c.branch_pool.bn.bias"] = state["Mixed_7c.branch_pool.bn.bias"] + 1e-3
    torch.save(state, tmp_path / "published.pth")
    assert weights_hash(read_published(tmp_path / "published.pth")) != weights_hash(packaged)


def test_load_layers_reads_the_packaged_file(weights):
    assert load_layers(weights).keys() == read_packaged(weights).keys()
