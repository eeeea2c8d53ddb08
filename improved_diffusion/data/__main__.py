"""Pack an image set, `python -m improved_diffusion.data {food101,folder,synthetic} --out DIR`; `verify DIR` it; `shard`
it into files to stream from; or render `icons` into a zip of captioned pictures."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

from improved_diffusion.data.icons import open_icons, write_icons
from improved_diffusion.data.image_set import CHANNELS, is_image_set, open_image_set
from improved_diffusion.data.labelled_files import labelled_folder, labelled_food101, with_validation
from improved_diffusion.data.packing import VALIDATION_PER_CLASS, PackedSplit, check_free, pack, pack_synthetic
from improved_diffusion.data.shards import require_webdataset, write_shards
from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit

LISTED_BROKEN = 10
PACKING = {"image_size": (64, 64), "channels": 3, "validation_per_class": VALIDATION_PER_CLASS}


def positive(text: str) -> int:
    return at_least(1, text)


def natural(text: str) -> int:
    return at_least(0, text)


def at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
    return value


def sides(text: str) -> tuple[int, int]:
    """Height and width: `64`, or `64x96`."""
    try:
        height, width = text.split("x") if "x" in text else (text, text)
        return positive(height), positive(width)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a side, such as 64, or HEIGHTxWIDTH, such as 64x96, not {text!r}"
        ) from None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    about = "Pack images into one memory-mapped array."
    parser = ArgumentParser(prog="python -m improved_diffusion.data", description=about)
    names = "{food101,folder,synthetic,shard,verify,icons}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)

    food101 = commands.add_parser("food101", help="Food101 from torchvision, with its official train and test splits")
    food101.add_argument("--source", type=Path, help="folder that holds food-101/ (default: download it beside --out)")
    folder = commands.add_parser("folder", help="a folder of class folders or of images alone, or a zip of one")
    folder.add_argument("path", type=Path, help="CLASS/IMAGE, or train/CLASS/IMAGE with val/ and test/ as more splits")
    crops = "of each image to train on, the centre and others at random: for few pictures (default: %(default)s)"
    folder.add_argument("--crops", type=positive, default=1, help=crops)
    validation = {"type": natural, "default": VALIDATION_PER_CLASS}
    shard = commands.add_parser(
        "shard", help="files to stream training images from, of a packed set, a folder or a zip"
    )
    shard.add_argument("path", type=Path, help="a packed set, or a folder or zip as above, which is packed first")
    megabytes = "of images in a file; training holds two for each of training.lanes (default: %(default)s)"
    shard.add_argument("--shard-megabytes", type=positive, default=32, metavar="MB", help=megabytes)
    shard.add_argument("--seed", type=natural, default=0, help="of the images' order (default: %(default)s)")
    for command in (food101, folder, shard):
        taken = f"images taken out of train where there is no val split; 0 for none (default: {VALIDATION_PER_CLASS})"
        command.add_argument("--validation-per-class", **validation, help=taken)
        size = "pixels: a side, or HEIGHTxWIDTH such as 64x96, to whose proportions images are cut (default: 64)"
        command.add_argument("--image-size", type=sides, default=(64, 64), metavar="SIZE", help=size)
        kinds = "1 grey, 3 RGB on white, 4 RGBA with its transparency (default: 3)"
        command.add_argument("--channels", type=int, choices=CHANNELS, default=3, help=kinds)
    shard.set_defaults(**dict.fromkeys(PACKING))  # to know which are given, for a packed set has no use for them

    synthetic = commands.add_parser("synthetic", help="the embedded synthetic set, drawn here; 64x64")
    synthetic.add_argument("--per-class", type=positive, default=500, help="training images (default: %(default)s)")
    synthetic.add_argument("--validation-per-class", **validation, help="val images (default: %(default)s)")
    synthetic.add_argument("--test-per-class", type=positive, default=100, help="test images (default: %(default)s)")
    synthetic.add_argument("--seed", type=natural, default=0, help="(default: %(default)s)")

    for command in (food101, folder, synthetic):
        command.add_argument("--overwrite", action="store_true", help="replace the packed set at --out")
    for command in (food101, folder, synthetic, shard):
        command.add_argument("--out", type=Path, required=True, help="a new directory")
        command.add_argument("--workers", type=positive, help="processes (default: one per core)")

    verify = commands.add_parser("verify", help="read a packed set and its splits whole and compare their SHA-256")
    verify.add_argument("path", type=Path, help="the packed set")

    icons = commands.add_parser(
        "icons", help="an icon set of npm, `npm pack @iconify-json/noto`, as captioned pictures"
    )
    icons.add_argument("path", type=Path, help="the .tgz, or its unpacked folder")
    icons.add_argument("--out", type=Path, required=True, help="a new zip")
    icons.add_argument("--image-size", type=positive, default=128, help="pixels a side (default: %(default)s)")
    icons.add_argument("--style", help="word of the captions, WORD sticker of birthday cake (default: noto of noto)")
    return parser.parse_args(arguments)


def print_report(packed: list[PackedSplit], notes: tuple[str, ...], seconds: float) -> None:
    total = sum(split.num_images for split in packed)
    print(f"packed {total:,} images in {seconds:.1f} s: {total / seconds:,.0f} images/s")
    for split in packed:
        absent = [name for name, count in split.images_per_class.items() if count == 0]
        classes = f"{len(split.images_per_class) - len(absent)} classes"
        if absent:
            classes += f" (no image of {len(absent)} others: {', '.join(map(repr, absent[:LISTED_BROKEN]))})"
        print(f"  {split.split}: {split.num_images:,} images, {classes}, in {split.path}")
        if split.broken:
            print(f"  {split.split}: {len(split.broken)} broken images left out, all named in dataset.json:")
        for name, reason in split.broken[:LISTED_BROKEN]:
            print(f"    {name!r}: {reason}")
    for note in notes:
        print(f"  {note}")


def verify(path: Path) -> None:
    """Read the set at `path`, and those inside it, whole; the first that is damaged is a UserError."""
    inside = sorted(directory for directory in path.glob("*") if is_image_set(directory))
    for directory in [path, *inside]:
        images = open_image_set(directory, verify=True)
        print(f"{directory}: {len(images.images):,} images, as packed (SHA-256 {images.content_hash[:16]}...)")


def shard(arguments: argparse.Namespace) -> None:
    """Divide a packed set into shards; what is no packed set yet is packed for that, beside the shards."""
    require_webdataset()
    check_free(arguments.out, overwrite=False)
    given = {name: value for name in PACKING if (value := getattr(arguments, name)) is not None}
    if given and is_image_set(arguments.path):
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"{arguments.path} is packed already, and is divided as it is: leave out {flags}")
    packing = argparse.Namespace(**PACKING | given)
    with contextlib.ExitStack() as stack:
        packed = arguments.path
        if not is_image_set(packed):
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            beside = tempfile.TemporaryDirectory(dir=arguments.out.parent, prefix=f".{arguments.out.name}.")
            packed = Path(stack.enter_context(beside)) / "packed"
            files = with_validation(labelled_folder(arguments.path), packing.validation_per_class)
            start = time.perf_counter()
            splits = pack(files, packed, packing.image_size, packing.channels, workers=arguments.workers)
            print_report(splits, files.notes, time.perf_counter() - start)
        size = arguments.shard_megabytes * 10**6
        written = write_shards(open_image_set(packed), arguments.out, size, arguments.seed)
    print(f"{len(written):,} images in {len(written.shards):,} shards: train with --data {arguments.out}, or its URL")


def render(arguments: argparse.Namespace) -> None:
    """Write an icon set's zip, and say under which licence its pictures are."""
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists already: choose another --out, or remove it")
    icons = open_icons(arguments.path)
    count, skipped = write_icons(icons, arguments.out, arguments.image_size, arguments.style)
    print(
        f"{count:,} pictures of {icons.prefix} in {arguments.out}, under the licence {icons.licence} (see source.json)"
    )
    for reason in skipped[:LISTED_BROKEN]:
        print(f"  left out: {reason}")


def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "verify":
        verify(arguments.path)
        return
    if arguments.command == "shard":
        shard(arguments)
        return
    if arguments.command == "icons":
        render(arguments)
        return
    check_free(arguments.out, arguments.overwrite)  # before a long download, too
    start = time.perf_counter()
    validation = arguments.validation_per_class
    options = {"overwrite": arguments.overwrite, "workers": arguments.workers}
    notes: tuple[str, ...] = ()
    if arguments.command == "synthetic":
        options["validation_per_class"] = validation
        packed = pack_synthetic(arguments.out, arguments.per_class, arguments.test_per_class, arguments.seed, **options)
    else:
        if arguments.command == "folder":
            files = labelled_folder(arguments.path)
            options["crops"] = arguments.crops
        else:
            files = labelled_food101(arguments.source or arguments.out.parent, download=arguments.source is None)
        files = with_validation(files, validation)
        notes = files.notes
        packed = pack(files, arguments.out, arguments.image_size, arguments.channels, **options)
    print_report(packed, notes, time.perf_counter() - start)


if __name__ == "__main__":
    with user_errors_exit():
        main()
