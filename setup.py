"""Installation; tool settings are in pyproject.toml. What only tests need is the extra `dev`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search('__version__ = "(.+)"', Path("improved_diffusion/__init__.py").read_text())[1]

SIMILARITY = ["transformers>=4.46,<5.6", "torchmetrics>=1.4,<2"]  # CLIP, DINO and PickScore; LPIPS and ERGAS
STREAMING = ["webdataset>=1.0,<2"]  # training images in shards
# Fine-tuning of SD and SDXL. transformers 5.6 renamed the modules of CLIP's text model: LoRA files saved under it have
# keys that other programs drop.
PERSONALIZE = [
    "diffusers>=0.39,<0.43",
    "transformers>=4.57,<5.6",
    "peft>=0.21,<0.22",
    "accelerate>=1.15",
    "pyarrow>=15",
    "ftfy>=6",
    "prodigyopt>=1.1,<2",  # optimizers, chosen by training.optimizer
    "lion-pytorch>=0.2,<0.3",
    "pillow-heif>=1.0",  # photographs of telephones
]
# Optimizers of 8 bits and NF4; int8 and fp8.
FEW_BITS = ["bitsandbytes>=0.50", "torchao>=0.16"]
# Cut-outs: edges without the background's colour; icons as training data; quality of pictures.
STICKERS = [*PERSONALIZE, "pymatting>=1.1.13", "resvg-py>=0.2"]
# A durable queue, its status, a Telegram bot, a page, and what they make: pictures of texts, and stickers.
SERVING = [
    *STICKERS,
    "dbos>=3.4,<4",
    "sqlalchemy>=2.0.43",
    "prometheus_client>=0.21",
    "aiogram>=3.31,<4",
    "aiohttp>=3.9",
    "streamlit>=1.50",
]

setup(
    name="improved_diffusion",
    version=VERSION,
    description="From-scratch pixel-space diffusion: train, sample, and measure",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["improved_diffusion", "improved_diffusion.*"]),
    package_data={
        "improved_diffusion": ["py.typed"],
        "improved_diffusion.models": ["group_norm.c"],
        "improved_diffusion.personalize.studies.survey": ["page.html"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "numpy>=1.26",
        "scipy>=1.11",
        "scikit-learn>=1.5",  # the linear probe of class-accuracy
        "einops>=0.8",
        "pillow>=10.3",
        "tqdm>=4.66",
        "tensorboard>=2.17",
        "matplotlib>=3.8",
        "jsonargparse[signatures]>=4.49",
        "pyyaml>=6.0",
        "filelock>=3.20",
        "safetensors>=0.5",
    ],
    extras_require={
        "similarity": SIMILARITY,
        "personalize": PERSONALIZE,
        "streaming": STREAMING,
        "wandb": ["wandb>=0.18"],  # personalize.py train --wandb PROJECT
        "few-bits": FEW_BITS,
        "stickers": STICKERS,
        "serving": SERVING,
        "dev": [
            "pytest>=9",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "import-linter>=2.0",
            "mypy>=1.14",
            "types-PyYAML",
            "nbclient>=0.10",  # these two run the notebook
            "ipykernel>=6.29",
            "playwright>=1.50",  # drives the page in a browser, which is not part of it
            "torch-fidelity>=0.4",  # an independent answer for KID, precision and recall, Inception Score
            *FEW_BITS,
            *STREAMING,
            *SIMILARITY,
            *SERVING,
        ],
    },
)
