"""A visitor's jobs, the newest first: how far they are, and their pictures."""

from __future__ import annotations

import io
from pathlib import Path

import streamlit as st
from PIL import Image

from improved_diffusion.serving.queue import UNFINISHED, Job, JobQueue
from improved_diffusion.serving.requests import ProcessRequest, Request, StickerRequest, TuneRequest
from improved_diffusion.serving.words import answer_of, describe

SECONDS_BETWEEN_LOOKS = 1.0
COLUMNS = 4
SIDE = 256  # pixels to which the small pictures of a process are enlarged
FRAME, LAST_FRAME = 120, 1500  # milliseconds


def show_jobs(queue: JobQueue, user: str) -> None:
    """All of a visitor's jobs; the page looks again by itself while one of them is under way."""
    under_way = bool(queue.jobs_of(user, UNFINISHED))
    st.fragment(_jobs, run_every=SECONDS_BETWEEN_LOOKS if under_way else None)(queue, user, under_way)


def _jobs(queue: JobQueue, user: str, under_way: bool) -> None:
    mine = queue.jobs_of(user)
    if under_way and not any(job.state in UNFINISHED for job in mine):
        st.rerun()  # of the whole page, which then no longer looks again, and is not interrupted by that
    if not mine:
        st.info("Your pictures will be here. This address is the key to them: who has it sees them.")
    for job in reversed(mine):
        with st.container(border=True, key=f"job-{job.id}"):
            _job(queue, user, job)
    if mine and st.button("Remove all that is kept of me", help="jobs, pictures and uploads"):
        queue.purge(user)
        st.rerun()


def _job(queue: JobQueue, user: str, job: Job) -> None:
    st.markdown(f"**{_plain(describe(job.request))}** &nbsp; :gray[{_settings(job.request)}]")
    if job.state in UNFINISHED:
        st.progress(job.progress, text=answer_of(queue.ticket(job.id)))
        if st.button("Cancel", key=f"cancel-{job.id}"):
            queue.cancel(job.id, user)
            st.rerun(scope="fragment")
    elif job.state == "done":
        files = [file for file in queue.files(job) if file.is_file()]  # else removed meanwhile
        if isinstance(job.request, ProcessRequest):
            _process(job, files)
        else:
            _pictures(job, files)
        if isinstance(job.request, TuneRequest) and st.button("Remove this style", key=f"forget-{job.id}"):
            queue.remove([job.id])
            st.rerun()
    else:
        st.warning(f"{answer_of(queue.ticket(job.id))}{f': {job.error}' if job.error else ''}.")


def _settings(request: Request) -> str:
    if isinstance(request, StickerRequest) and not request.restyle:
        return f"outline {request.outline}"
    if isinstance(request, TuneRequest):
        return f"{request.steps} updates; {{token}} {{class}} in a prompt is what it shows"
    guidance = "" if request.guidance_scale is None else f", guidance {request.guidance_scale:g}"
    return f"{request.steps} steps{guidance}, seed {request.seed}"


def _pictures(job: Job, files: list[Path]) -> None:
    for i in range(0, len(files), COLUMNS):
        for column, file in zip(st.columns(COLUMNS), files[i : i + COLUMNS], strict=False):
            with column:
                st.image(str(file), width="stretch")
                content, name, key = file.read_bytes(), f"{job.id[:8]}-{file.name}", f"download-{job.id}-{file.name}"
                st.download_button("Download", content, name, f"image/{file.suffix[1:]}", key=key)


def _process(job: Job, files: list[Path]) -> None:
    """What the model took the image to be: as a moving picture, and to be looked at one by one."""
    if not files:
        return
    moving, still, _ = st.columns([1, 1, 2])
    with moving:
        st.image(_animation(tuple(map(str, files))), width="stretch")
    with still:
        shown = st.empty()
        moment = len(files)
        if len(files) > 1:
            moment = st.slider("Moment", 1, len(files), len(files), key=f"moment-{job.id}")
        shown.image(_enlarged(str(files[moment - 1])), width="stretch")


@st.cache_data(max_entries=100)
def _animation(files: tuple[str, ...]) -> bytes:
    """A GIF of pictures, the last of which stays a while."""
    frames = [_enlarged(file).convert("P", palette=Image.Palette.ADAPTIVE) for file in files]
    times = [FRAME] * (len(frames) - 1) + [LAST_FRAME]
    content = io.BytesIO()
    frames[0].save(content, format="gif", save_all=True, append_images=frames[1:], duration=times, loop=0)
    return content.getvalue()


def _enlarged(file: str) -> Image.Image:
    with Image.open(file) as image:
        factor = max(1, SIDE // max(image.size))
        return image.convert("RGB").resize([factor * side for side in image.size], Image.Resampling.BICUBIC)


def _plain(text: str) -> str:
    """What a visitor wrote, without meaning anything to Markdown."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()<>#+-.!|$:~" else letter for letter in text)
