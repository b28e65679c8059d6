"""What ``import normkit`` costs over ``import torch``: fresh interpreters in turns, medians and quantiles.

python benchmarks/import_time.py [ROUNDS]
"""

import sys

from normkit.bench.goals import verdicts
from normkit.bench.imports import measure_imports


def main() -> None:
    """Measure and print."""
    found = measure_imports(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
    for module, seconds in found["modules"].items():
        low, high = seconds["low"], seconds["high"]
        print(f"import {module:8} {seconds['median']:.3f} s ({low:.3f}-{high:.3f}, {seconds['samples']} times)")
    (verdict,) = verdicts({"rows": [], "training": [], "imports": [found], "machine": {}, "settings": {}})
    print(f"{verdict.goal}: {verdict.found}, {'met' if verdict.met else 'not met'}")


if __name__ == "__main__":
    main()
