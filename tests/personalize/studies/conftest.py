from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trained_run(tiny_bases, photos, tmp_path_factory) -> Path:
    """A run of two updates of LoRA on the UNet and the text encoder, with a checkpoint of each; its looks draw a single
    picture and measure nothing."""
    from accelerate.state import AcceleratorState

    from improved_diffusion.personalize.commands import train

    run = tmp_path_factory.mktemp("runs") / "ball"
    AcceleratorState._reset_state(reset_partial_state=True)
    subject = ("--subject.token=sks", "--subject.class_name=ball", "--train_text_encoder=true")
    where = (f"--base={tiny_bases['sd']}", f"--data={photos}", f"--out={run}")
    training = ("--training.steps=2", "--training.lr=1e-2", "--training.save_every=1")
    watch = ("--watch.clip=null", "--watch.vision=null", "--watch.steps=1", "--watch.seeds=[0]", "--watch.share=1")
    prompts = ('--watch.prompts=["a {token} {class}"]', "--watch.class_prompts=[]")
    train.run([*where, *subject, *training, *watch, *prompts])
    return run
