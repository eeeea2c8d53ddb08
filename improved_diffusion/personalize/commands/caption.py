"""Write a caption beside each image of a folder that has none, by BLIP.

python personalize.py caption data/dog
python personalize.py caption data/dog --prefix "a photo of" --overwrite
"""

from __future__ import annotations

from pathlib import Path

from improved_diffusion.errors import ArgumentParser

BLIP = "Salesforce/blip-image-captioning-base"  # as models.judges.BLIP, which a test compares


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="personalize.py caption", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="the images; the caption of NAME.jpg is written to NAME.txt")
    add("--model", default=BLIP, help="a folder, or a name on the Hugging Face hub (default: %(default)s)")
    add("--prefix", default="", help="words that each caption starts with (default: none)")
    add("--overwrite", action="store_true", help="caption anew what has a caption")
    add("--batch-size", type=int, default=8, help="images at once; changes speed and memory only (default: 8)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, not {options.batch_size}")

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.personalize.data.captioning import find_uncaptioned, write_captions
    from improved_diffusion.personalize.models.judges import load_blip
    from improved_diffusion.runtime.devices import usable_device

    device = usable_device(options.device)
    found, uncaptioned = find_uncaptioned(options.folder, options.overwrite)
    for line in found.skipped:
        print(f"skipped {line}")
    if uncaptioned:
        model, processor = load_blip(options.model, device)
        written = write_captions(options.folder, uncaptioned, model, processor, options.prefix, options.batch_size)
        for name, caption in written:
            print(f"{name}: {caption}", flush=True)
    kept = len(found) - len(uncaptioned)
    print(f"{len(uncaptioned)} captions written, {kept} kept, {len(found.skipped)} files skipped")
