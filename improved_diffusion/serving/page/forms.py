"""What can be asked for: a form for each kind of job. To send one is to queue it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import streamlit as st

from improved_diffusion.errors import UserError
from improved_diffusion.serving.config import LimitsConfig
from improved_diffusion.serving.queue import JobQueue
from improved_diffusion.serving.requests import (
    NO_STYLE,
    ClassRequest,
    ImageRequest,
    ProcessRequest,
    Request,
    StickerRequest,
    TextRequest,
    TuneRequest,
)
from improved_diffusion.serving.uploads import keep_upload
from improved_diffusion.stickers.finish import WIDEST

MOST_SEEDS = 2**31
PHOTOS = ["jpg", "jpeg", "png", "webp"]


def class_form(queue: JobQueue, user: str, offer: Mapping[str, Any]) -> None:
    """Images of a class, or how one comes about."""
    with st.form("class"):
        name = st.selectbox("Class", offer["classes"], format_func=lambda name: name.replace("_", " "))
        scale = None
        if offer["can_be_guided"]:
            own = min(5.0, float(offer.get("guidance_scale", 1)))  # which an older worker does not tell
            scale = st.slider("Guidance", 0.0, 5.0, own, 0.1, help="1 is none; more is truer to the class, less varied")
        common = _common(queue.config.limits)
        comes_about = st.checkbox("Show how it comes about, step by step", help="one image, whatever the number")
        if not st.form_submit_button("Draw", type="primary"):
            return
    values = {**common, "class_name": name, "guidance_scale": scale}
    _submit(queue, user, lambda: ProcessRequest(**{**values, "n": 1}) if comes_about else ClassRequest(**values))


def picture_form(queue: JobQueue, user: str, offer: Mapping[str, Any]) -> None:
    """Pictures of a text, in a style, and from a photo if there is one."""
    limits = queue.config.limits
    with st.form("picture"):
        prompt = st.text_area("Prompt", max_chars=limits.text, placeholder="a {token} {class} in the snow")
        style = NO_STYLE
        unet_scale = text_encoder_scale = 1.0
        if offer["styles"]:
            style = st.selectbox("Style", [*offer["styles"], NO_STYLE])
            unet_scale = st.slider("Weight of the style in the UNet", 0.0, 2.0, 1.0, 0.05)
            text_encoder_scale = st.slider("Weight of the style in the text encoder", 0.0, 2.0, 1.0, 0.05)
        scale = st.slider("Guidance", 0.0, 20.0, 7.5, 0.5, help="1 is none; more is truer to the prompt")
        negative = st.text_input("What it should not show", max_chars=limits.text)
        photo = st.file_uploader("A photo to start from, if wanted", type=PHOTOS)
        strength = st.slider("Strength", 0.05, 1.0, 0.6, 0.05, help="with a photo: little keeps it, 1 forgets it")
        common = _common(limits)
        if not st.form_submit_button("Draw", type="primary"):
            return
    values = {**common, "prompt": prompt, "guidance_scale": scale, "negative_prompt": negative}
    if style != NO_STYLE:
        values |= {"style": style, "unet_scale": unet_scale, "text_encoder_scale": text_encoder_scale}

    def request() -> Request:
        if photo is None:
            return TextRequest(**values)
        return ImageRequest(**values, upload=keep_upload(queue, user, photo.getvalue()), strength=strength)

    _submit(queue, user, request)


def sticker_form(queue: JobQueue, user: str, offer: Mapping[str, Any]) -> None:
    """A sticker of a photo: cut out as it is or, where that can be done, drawn anew before."""
    limits = queue.config.limits
    values: dict[str, Any] = {"restyle": False, "steps": 1}
    with st.form("sticker"):
        photo = st.file_uploader("A photo", type=PHOTOS)
        values["outline"] = st.slider("White outline, in pixels", 0, WIDEST, 10)
        if "image" in offer["kinds"]:
            values["restyle"] = st.checkbox("Draw it anew", value=True, help="else it is only cut out")
            empty = "if empty, what the photo shows" if offer.get("captions") else "if empty, it is only cut out"
            values["prompt"] = st.text_input(f"What to make of it ({empty})", max_chars=limits.text)
            if offer["styles"]:
                style = st.selectbox("Style", [*offer["styles"], NO_STYLE])
                values["style"] = None if style == NO_STYLE else style
            values["strength"] = st.slider("Strength", 0.05, 1.0, 0.6, 0.05, help="little keeps it, 1 forgets it")
            values |= _steps_and_seed(limits)
        if not st.form_submit_button("Make", type="primary"):
            return
    if photo is None:
        st.error("Choose a photo first.")
        return
    _submit(queue, user, lambda: StickerRequest(**values, upload=keep_upload(queue, user, photo.getvalue())))


def style_form(queue: JobQueue, user: str, offer: Mapping[str, Any]) -> None:
    """A style of the visitor's own, from pictures."""
    limits = queue.config.limits
    with st.form("style"):
        name = st.text_input("Name of the style", max_chars=30, placeholder="rex")
        class_name = st.text_input("What the pictures show", max_chars=30, placeholder="dog")
        photos = st.file_uploader(
            f"Pictures, up to {limits.tune_pictures}", type=PHOTOS, accept_multiple_files=True, key="style-photos"
        )
        steps = st.slider("Updates", 1, limits.tune_steps, min(TuneRequest.steps, limits.tune_steps))
        if not st.form_submit_button("Learn", type="primary"):
            return

    def request() -> Request:
        uploads = dict.fromkeys(keep_upload(queue, user, photo.getvalue()) for photo in photos)
        return TuneRequest(name=name.strip(), class_name=class_name.strip(), uploads=tuple(uploads), steps=steps)

    _submit(queue, user, request)


def _common(limits: LimitsConfig) -> dict[str, int]:
    """The settings of every kind of job that draws several pictures."""
    n = st.slider("Pictures", 1, limits.images, min(4, limits.images)) if limits.images > 1 else 1
    return {"n": n, **_steps_and_seed(limits)}


def _steps_and_seed(limits: LimitsConfig) -> dict[str, int]:
    steps = st.slider("Steps", 1, limits.steps, min(25, limits.steps)) if limits.steps > 1 else 1
    seed = st.number_input("Seed", 0, MOST_SEEDS - 1, value=None, placeholder="any; the same draws the same")
    return {"steps": steps, "seed": secrets.randbelow(MOST_SEEDS) if seed is None else int(seed)}


def _submit(queue: JobQueue, user: str, request: Callable[[], Request]) -> None:
    try:
        ticket = queue.submit(user, request())
    except UserError as error:  # busy, too
        st.error(f"{error}.")
    else:
        st.toast(f"Place {ticket.place} in the queue" if ticket.place else "It is being drawn")
