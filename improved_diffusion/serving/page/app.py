"""The page, top to bottom. Streamlit runs this file again at everything a visitor does.

A visitor is whoever has the address: a secret in it says whose the jobs are, so that a reload keeps them.
"""

from __future__ import annotations

import re
import secrets
import sys

import streamlit as st

from improved_diffusion.errors import UserError
from improved_diffusion.serving.config import load_serving_config
from improved_diffusion.serving.page.forms import class_form, picture_form, sticker_form, style_form
from improved_diffusion.serving.page.gallery import show_jobs
from improved_diffusion.serving.queue import JobQueue

SECRET = re.compile(r"[A-Za-z0-9_-]{22}")


@st.cache_resource
def open_queue(home: str) -> JobQueue:
    """One for all visitors."""
    return JobQueue(load_serving_config(home))


def visitor() -> str:
    """The name in the queue of whoever has this address."""
    known = st.query_params.get("visitor", "")
    if not SECRET.fullmatch(known):
        known = st.query_params["visitor"] = secrets.token_urlsafe(16)
    return f"page:{known}"


def main() -> None:
    st.set_page_config(page_title="improved_diffusion", layout="wide")
    queue, user = open_queue(sys.argv[1]), visitor()
    st.title("Draw")
    try:
        offer = queue.offer(user)
    except UserError as error:
        st.error(f"{error}. Then reload this page.")
        return
    forms = {}
    if "text" in offer["kinds"]:
        forms["From a text or a photo"] = picture_form
    if "sticker" in offer["kinds"]:
        forms["A sticker"] = sticker_form
    if "class" in offer["kinds"]:
        forms["A class"] = class_form
    if "tune" in offer["kinds"]:
        forms["A style of my own"] = style_form
    settings, results = st.columns([1, 2], gap="large")
    with settings:
        for tab, form in zip(st.tabs(list(forms)), forms.values(), strict=True):
            with tab:
                form(queue, user, offer)
        survey(queue)
    with results:
        show_jobs(queue, user)


def survey(queue: JobQueue) -> None:
    """The link to the survey's pictures, where there is one."""
    if queue.config.survey is not None:
        st.link_button("What do you think of our pictures? A survey", queue.config.survey)


main()
