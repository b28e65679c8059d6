"""Run as a program: fork processes of a group, so that torch is imported once, and let them compute what a job says.

python -m tests.ranks.processes JOB RANKS FOLDER
"""

import datetime
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent


def run(job: str, ranks: int, folder: Path, **environment: str) -> list[dict]:
    """Run a job in a process of its own, which forks the ranks; return what each rank found."""
    command = [sys.executable, str(ROOT / "processes.py"), job, str(ranks), str(folder)]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), *sys.path]), **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=given, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    import torch

    saved = sorted(folder.glob("ranks-*.pt"))
    return [torch.load(path) for path in saved]


def asked(cases: list) -> list:
    """Return the cases that the tests of this session take, all where nothing is said of them."""
    names = os.environ.get("ASKED")
    return cases if names is None else [case for case in cases if case.name in names.split(",")]


def _rank(job, rank: int, ranks: int, folder: Path, place: str, arguments: list[str]) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    timeout = datetime.timedelta(seconds=60)
    store = f"file://{folder / place}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    found = job(rank, ranks, *arguments)
    torch.save(found, folder / f"{place}-{rank}.pt")
    leave(rank, ranks)


def leave(rank: int, ranks: int) -> None:
    """End this process when all ranks have come so far.

    Not by Python's end: torch's own threads of a group then end the process with SIGABRT now and then, also where
    nothing but torch was imported (2 of 24 processes that trained with DistributedDataParallel).
    """
    from torch import distributed

    # Not by a barrier: the group may be broken.
    told = distributed.distributed_c10d._get_default_store()
    told.set(f"finished {rank}", "")
    told.wait([f"finished {other}" for other in range(ranks)])
    sys.stdout.flush()
    os._exit(0)


def run_program(source: str, folder: Path, ranks: int = 2) -> list[str]:
    """Run source text as a program of its own for each rank, and return what each printed last.

    It gets its rank and the file to meet at as arguments, and ends by `leave`.
    """
    program = folder / "program.py"
    program.write_text(source)
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), *sys.path])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program), str(rank), str(folder / "meeting")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    # All are waited for before any is judged: one that was left would end in the middle of another test.
    said = [process.communicate(timeout=240) for process in processes]
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err
    return [out.splitlines()[-1] for out, _ in said]


def started(job, ranks: int, folder: Path, place: str = "ranks", arguments=()) -> list:
    """Fork the ranks of a group."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(job, rank, ranks, folder, place, list(arguments))) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    from normkit.functional import batch_steps
    from ranks import jobs
    from ranks.cases import CASES, FORMS, Case

    name, count, where = sys.argv[1:]
    # What the ranks share is compiled and read before they are.
    for form in {case.form for case in asked(CASES)} if name == "matrix" else ("vectors",):
        _, _, _, activation, residual, *_ = FORMS[form]
        x, shortcut, dy, _ = Case(2, "even", form).tensors()
        mean, var = batch_steps.statistics(x)
        batch_steps.apply(x, mean, var, None, None, activation, shortcut if residual else None)
        batch_steps.apply_backward(dy, x, mean, var, None, batch_steps.reduce(dy, x, mean, var), 2)
    program = getattr(jobs, name)
    if getattr(program, "forks", False):
        program(int(count), Path(where))
    else:
        ended = [process.join() or process.exitcode for process in started(program, int(count), Path(where))]
        sys.exit(1 if any(ended) else 0)
