"""Every setting of a server. They lie in `config.yaml` of its home, where `serve.py init` writes them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from improved_diffusion.config import PRETRAINED
from improved_diffusion.data.photo import PhotoLimits
from improved_diffusion.errors import UserError
from improved_diffusion.settings import load_settings, require

SHIPPED_BASE = Path(__file__).parents[2] / "pretrained" / "stickers-128"


@dataclass(frozen=True)
class ModelsConfig:
    """What is drawn with, and where."""

    pixel: str | None = PRETRAINED
    """The pixel model, as sample.py --run takes it; null for none."""
    base: str | None = PRETRAINED
    """Base of text-to-image and image-to-image: the small one that ships, if it is there; or a folder, or a name on the
    hub; null for none."""
    styles: dict[str, str] = field(default_factory=dict)
    """LoRA runs of personalize.py on that base, by the name under which they are offered."""
    matting: str | None = PRETRAINED
    """What cuts stickers out: the cut-out that ships, if it is there; or a folder that stickers.py segment train wrote,
    or birefnet; null for no stickers."""
    captioner: str | None = None
    """BLIP model, by name or folder, whose caption of a photo a sticker is drawn from; null for none."""
    device: str | None = None
    """cpu, cuda, cuda:1 ...; by default cuda if there is one."""
    batch_size: int = 8
    """Images drawn at once."""
    adapter_bytes: int = 2_000_000_000
    """Adapters of styles that are kept in memory."""
    tunes: bool = True
    """Whether users may have styles of their own learned on that base; meanwhile there is a second one in memory."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"models.batch_size must be at least 1, not {self.batch_size}")
        require(self.adapter_bytes >= 0, f"models.adapter_bytes must not be negative, not {self.adapter_bytes}")
        require(self.matting != "alpha", "models.matting: what users send is kept without transparency, so not alpha")
        require(not self.styles or self.text_base is not None, "models.styles are runs on a base: name it, models.base")
        for name in self.styles:
            require(name.isidentifier(), f"a style's name is letters, digits and _, not {name!r}")

    @property
    def text_base(self) -> str | None:
        """`base` as a folder or a name on the hub: a copy of the project may lack the one that ships."""
        if self.base != PRETRAINED:
            return self.base
        return str(SHIPPED_BASE) if SHIPPED_BASE.exists() else None


@dataclass(frozen=True)
class LimitsConfig:
    """What one user, and all together, may ask for."""

    queued: int = 200
    """Jobs that wait or run, of all users."""
    queued_per_user: int = 8
    """Jobs that wait or run, of one user."""
    images: int = 4
    """Images of one job."""
    steps: int = 100
    """Sampling steps of one job."""
    text: int = 500
    """Letters of a prompt."""
    upload_bytes: int = 20_000_000
    """Size of an uploaded file."""
    upload_pixels: int = 40_000_000
    """Width times height of an uploaded picture."""
    upload_side: int = 1024
    """Pixels of the longer side to which an uploaded picture is reduced."""
    uploads_per_user: int = 50
    """Uploaded pictures that are kept of one user."""
    disk_bytes: int = 10_000_000_000
    """Results and uploads on disk, together."""
    results_hours: float = 72.0
    """Time until a finished job and its files are removed."""
    uploads_hours: float = 24.0
    """Time until an uploaded picture is removed."""
    attempts: int = 4
    """Times that the worker may die while it draws a job, until the job is parked; of a style, in the same chunk."""
    tunes: int = 4
    """Styles that wait to be learned or are being learned, of all users."""
    tune_steps: int = 1000
    """Updates of a style."""
    tune_pictures: int = 20
    """Pictures that a style is learned from."""
    chunk_seconds: float = 20.0
    """Seconds for which a style is learned at a time; then others have their turn."""
    styles_per_user: int = 3
    """Styles of one's own, the unfinished among them."""
    styles_hours: float = 720.0
    """Time until such a style is removed."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value > 0, f"limits.{name} must be positive, not {value}")
        require(
            self.images <= 10,
            f"limits.images must be at most 10, which an album of Telegram's holds, not {self.images}",
        )

    @property
    def photo(self) -> PhotoLimits:
        """What of an uploaded picture is taken."""
        return PhotoLimits(self.upload_bytes, self.upload_pixels, self.upload_side)


@dataclass(frozen=True)
class ServingConfig:
    """A server."""

    home: str = "serving"
    """Its folder: settings, database, uploads, results."""
    database: str | None = None
    """postgresql+psycopg://USER@HOST/NAME for several machines; by default SQLite, in the home."""
    host: str = "127.0.0.1"
    """Address of the pages: 127.0.0.1 is reached from this machine alone, 0.0.0.0 from its network."""
    port: int = 8090
    """Port of the status page; 0 takes any that is free."""
    page_port: int = 8501
    """Port of the page on which people ask for pictures."""
    survey: str | None = None
    """Address of a survey (personalize.py survey serve) to which the page leads."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, f"port must be from 0 to 65535, not {self.port}")
        require(0 < self.page_port < 65536, f"page_port must be from 1 to 65535, not {self.page_port}")
        require(
            self.database is None or self.database.startswith("postgresql+psycopg://"),
            "database must be postgresql+psycopg://USER@HOST/NAME, or left out for SQLite",
        )

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.folder / 'queue.sqlite'}"

    @property
    def folder(self) -> Path:
        return Path(self.home).absolute()

    @property
    def uploads(self) -> Path:
        return self.folder / "uploads"

    @property
    def results(self) -> Path:
        return self.folder / "results"


def config_file(home: Path | str) -> Path:
    return Path(home) / "config.yaml"


def load_serving_config(home: Path | str) -> ServingConfig:
    """The settings of the server at `home`.

    Raises:
        UserError: there is none, or its settings are damaged.
    """
    if not config_file(home).is_file():
        raise UserError(f"there is no server at {home}: make one, python serve.py init --home {home}")
    return dataclasses.replace(load_settings(ServingConfig, config_file(home)), home=str(home))
