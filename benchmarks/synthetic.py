"""How fast the synthetic pictures are drawn, on one core: `python benchmarks/synthetic.py [--per-class 40]`."""

from __future__ import annotations

import argparse
import time

from improved_diffusion.data.synthetic import CLASS_NAMES, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-class", type=int, default=40, help="pictures drawn of each class")
    per_class = parser.parse_args().per_class

    draw(0, CLASS_NAMES[0], 0)  # the first call fills small caches
    total = 0.0
    print(f"{'class':<22}{'images/s':>10}")
    for class_name in CLASS_NAMES:
        start = time.perf_counter()
        for index in range(per_class):
            draw(0, class_name, index)
        seconds = time.perf_counter() - start
        total += seconds
        print(f"{class_name:<22}{per_class / seconds:>10.0f}")
    print(f"{'all':<22}{len(CLASS_NAMES) * per_class / total:>10.0f}")


if __name__ == "__main__":
    main()
