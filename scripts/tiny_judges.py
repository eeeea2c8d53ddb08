"""A random CLIP, DINO or BLIP of a few hundred thousand parameters, to try the tools without weights.

    python scripts/tiny_judges.py clip --out data/tiny-clip
    python scripts/tiny_judges.py dino --out data/tiny-dino
    python scripts/tiny_judges.py blip --out data/tiny-blip

Classes, processors and the names of the modules are those of the real models, and CLIP's vocabulary is its own; BLIP's
is the alphabet and a few words. What they say of an image depends on the image and means nothing.
"""

from __future__ import annotations

import string
import tempfile
from pathlib import Path

from tiny_pipeline import make_tokenizer

from improved_diffusion.errors import ArgumentParser, user_errors_exit

IMAGE_SIZE = 32  # pixels
LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,  # at the usual 0.02 so small a network hardly sees its input
}
VISION = {**LAYERS, "image_size": IMAGE_SIZE, "patch_size": 8}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["photo", "picture", "of", "the", "dog", "cat", "red", "blue", "on", "in", "with"]


def make_clip():
    """A CLIPModel and its CLIPProcessor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = make_tokenizer("<|endoftext|>")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    text = {**LAYERS, "vocab_size": len(tokenizer), **ends}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32)
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE)
    return CLIPModel(config), CLIPProcessor(images, tokenizer)


def make_dino():
    """A ViTModel without the pooling layer, which DINO does not have, and its ViTImageProcessor."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    images = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return ViTModel(ViTConfig(**VISION), add_pooling_layer=False), images


def make_blip():
    """A BlipForConditionalGeneration and its BlipProcessor."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    letters = string.ascii_lowercase
    vocabulary = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *WORDS]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.txt"
        file.write_text("\n".join(vocabulary) + "\n")
        tokenizer = BertTokenizer.from_pretrained(folder)
    text = {
        **LAYERS,
        "vocab_size": len(vocabulary),
        "encoder_hidden_size": 32,
        "pad_token_id": tokenizer.pad_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    images = BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=32, image_text_hidden_size=32)
    return BlipForConditionalGeneration(config), BlipProcessor(images, tokenizer)


JUDGES = {"clip": make_clip, "dino": make_dino, "blip": make_blip}


def save_judge(kind: str, folder: Path, seed: int = 0) -> None:
    """Write a random model of that kind, and its processor, to `folder`."""
    import torch

    torch.manual_seed(seed)
    for part in JUDGES[kind]():
        part.save_pretrained(folder)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=JUDGES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    save_judge(options.kind, options.out, options.seed)
    print(f"a tiny {options.kind} in {options.out}")


if __name__ == "__main__":
    with user_errors_exit():
        main()
