"""Run the CPU kernels under valgrind, which looks at every single access: `make memory-check`.

The guard pages of `test_guard_pages` see what passes the end of a tensor by a byte, and whole pages beyond; valgrind
sees, in malloc's memory, every access outside of what is allocated now. It takes some minutes, and is no part of
`make test`. First it is seen to find a fault that is planted.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

WORKER = Path(__file__).with_name("guard_pages_worker.py")
ELEMENTS = "float32,float64,bfloat16"
# The zone around a block is wide, for a kernel writes whole vectors: past valgrind's own sixteen bytes lies its book.
VALGRIND = (
    "valgrind", "--tool=memcheck", "--undef-value-errors=no", "--leak-check=no", "--show-leak-kinds=none",
    "--redzone-size=1024", "--error-limit=no", "--num-callers=20", "--xml=yes",
)  # fmt: skip


def say(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def faults(element: str, side: str, environment: dict[str, str], report: Path) -> list[str]:
    """Return what valgrind says of the code that Numba compiled: it lies in no file, unlike Python's and torch's.

    Raises:
        CalledProcessError: the process ended otherwise than well.
    """
    words = [*VALGRIND, f"--xml-file={report}", sys.executable, str(WORKER), element, side]
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = []
    for error in ElementTree.parse(report).iter("error"):
        kind, stack = error.findtext("kind", ""), error.find("stack")
        if kind.startswith("Leak") or stack is None:
            continue
        if any(frame.find("obj") is None for frame in stack.iter("frame")):
            found.append(f"{kind}: {error.findtext('what')}; {error.findtext('auxwhat')}")
    return found


def main() -> str | None:
    """Return what is wrong, or None."""
    if shutil.which("valgrind") is None:
        return "memory-check needs valgrind: apt install valgrind"
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "NUMBA_CACHE_DIR": folder, "NORMKIT_KEPT_MEGABYTES": "0", "OMP_NUM_THREADS": "1",
            "PYTHONMALLOC": "malloc",
        }  # fmt: skip
        if platform.machine() == "x86_64":
            # Valgrind knows no AVX-512.
            environment.update(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="")
        say("compiling the kernels")
        words = [sys.executable, str(WORKER), ELEMENTS, "free"]
        subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
        report = Path(folder) / "report.xml"
        for planted, kind in (("overrun", "InvalidRead"), ("overwrite", "InvalidWrite")):
            told = faults("float32", planted, environment, report)
            if not any(fault.startswith(kind) for fault in told):
                return f"valgrind does not see the planted {planted}; what it says of the rest proves nothing"
            say(f"a planted {planted} is told: {told[0]}")
        found = faults(ELEMENTS, "free", environment, report)
    for fault in found:
        say(fault)
    if found:
        return f"{len(found)} faults; tests/kernels/test_guard_pages.py may say which kernel it is"
    say(f"the kernels of {ELEMENTS} touch nothing but what they were handed")
    return None


if __name__ == "__main__":
    sys.exit(main())
