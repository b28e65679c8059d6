"""``normkit lab``: list the claims, run them, draw their report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ArgumentError
from .examples import explained
from .lab_run import Run, run_and_report
from .terminal import echo

if TYPE_CHECKING:
    from ..lab.claim import Claim
    from ..lab.settings_file import SettingsFile

__all__ = ["lab"]

lab = typer.Typer(help="Put the claims made for batch normalization to the test.", rich_markup_mode=None)


@lab.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Put the claims made for batch normalization to the test."""
    if context.invoked_subcommand is None:
        echo(context.get_help())


@lab.command("list", cls=explained("lab list"))
def list_claims(as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False) -> None:
    """List the claims that can be run."""
    from ..lab.claims import all_claims
    from .lab_display import print_claims

    if as_json:
        echo(json.dumps([_described(claim) for claim in all_claims()], indent=2, ensure_ascii=False))
    else:
        print_claims(all_claims())


def _completed(incomplete: str) -> list[str]:
    """Return the claims that begin so, for a shell."""
    from ..lab.claims import all_claims

    return [claim.id for claim in all_claims() if claim.id.startswith(incomplete)]


@lab.command("run", cls=explained("lab run"))
def run_claims(
    claims: Annotated[
        list[str],
        typer.Argument(metavar="CLAIM...|all", help="Ids from `normkit lab list`.", autocompletion=_completed),
    ],
    data: Annotated[
        str | None, typer.Option(help="digits, fashion-mnist or cifar-100; the claim's own choice if left out.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data set's files.")] = None,
    norms: Annotated[str | None, typer.Option(help="Comma-separated, such as none,batch.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes side by side; one per processor if left out.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder for results and report; runs/CLAIM-DATA if left out.")
    ] = None,
    lang: Annotated[str, typer.Option(help="The report's language: en or zh.")] = "en",
    settings: Annotated[
        Path | None, typer.Option(help="TOML file that names your own data and network, and how to train it.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Address of a Dask scheduler whose workers run the cells, such as tcp://host:8786."),
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's files.")] = None,
    until_decided: Annotated[
        bool, typer.Option("--until-decided", help="Add seeds, to 5, 10, 20 and 40, until every claim is decided.")
    ] = False,
    budget: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="With --until-decided: begin nothing after so many minutes.")
    ] = None,
) -> None:
    """Run claims, or go on with a run that was broken off, and write the report."""
    from ..lab.claim import Request, concerning, plan
    from ..lab.grid import available_jobs
    from ..lab.processes import processes
    from ..report.language import language

    if jobs is not None and jobs < 1:
        raise ArgumentError(f"--jobs {jobs}: expected 1 or more")
    _check_until(until_decided, budget, seeds, processes())
    language(lang)
    chosen = _chosen(claims)
    names = None if norms is None else tuple(name.strip() for name in norms.split(","))
    own = _own(settings, data)
    request = Request(
        data=own.data if own and own.data else data, data_dir=data_dir, norms=names, seeds=seeds, epochs=epochs,
        device=device, processes=processes(), network=own.network if own else None,
        training=own.training if own else {},
    )  # fmt: skip
    # With `all`, an option goes to the claims that it concerns; a claim that is named refuses what it has no use for.
    everything = claims == ["all"]
    plans = [plan(claim, concerning(claim, request) if everything else request) for claim in chosen]
    on = plans[0].data.replace(":", ".")
    todo = Run(
        plans=plans,
        folder=out or Path("runs") / f"{'all' if everything else '+'.join(claims)}-{on}",
        # A GPU is shared by processes only at the price of its memory; one is the sound default there.
        jobs=jobs or (1 if device == "cuda" else available_jobs()),
        data_dir=data_dir,
        lang=lang,
        scheduler=scheduler,
        tensorboard=tensorboard,
        modules=own.folder if own else None,
        until_decided=until_decided,
        minutes=budget,
    )
    raise typer.Exit(run_and_report(todo))


@lab.command("report", cls=explained("lab report"))
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `normkit lab run` wrote.")],
    lang: Annotated[str, typer.Option(help="The report's language: en or zh.")] = "en",
) -> None:
    """Judge a folder's results again and redraw figures and report, as HTML and as Markdown."""
    from ..report.language import language
    from ..report.page import write_report
    from .lab_display import print_entries

    chosen = language(lang)
    print_entries(write_report(folder, chosen), folder, chosen)


@lab.command("compare", cls=explained("lab compare"))
def compare_runs(
    first: Annotated[Path, typer.Argument(metavar="A", help="A folder that `normkit lab run` wrote.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False,
) -> None:
    """Put two runs of the same claims beside each other: effects, intervals, verdicts and what changed."""
    from ..lab.compare import compare
    from .lab_display import print_comparisons

    comparisons = compare(first, second)
    if as_json:
        echo(json.dumps([comparison.record() for comparison in comparisons], indent=2, ensure_ascii=False))
    else:
        print_comparisons(comparisons)


def _own(settings: Path | None, data: str | None) -> "SettingsFile | None":
    """Read the settings file, which the command line must not contradict."""
    from ..lab.settings_file import read_settings

    own = None if settings is None else read_settings(settings)
    if own is not None and own.data is not None and data is not None:
        raise ArgumentError(f"--data {data} and --settings {settings}, which names its own data: give one of them")
    return own


def _check_until(until_decided: bool, budget: float | None, seeds: int | None, processes: int) -> None:
    """Refuse options that contradict each other."""
    if budget is not None and not (until_decided and budget > 0):
        raise ArgumentError(f"--budget {budget:g}: expected minutes above 0, together with --until-decided")
    if until_decided and seeds is not None:
        raise ArgumentError(f"--until-decided chooses the seeds itself; leave --seeds {seeds} out")
    if until_decided and processes > 1:
        raise ArgumentError("--until-decided runs whole cells; start it without torchrun, with --jobs or --scheduler")


def _chosen(names: list[str]) -> "list[Claim]":
    """Return the claims of these ids, each once; ``all`` stands for every one."""
    from ..lab.claims import all_claims, get_claim

    if names == ["all"]:
        return list(all_claims())
    return [get_claim(name) for name in dict.fromkeys(names)]


def _described(claim: "Claim") -> dict[str, object]:
    """Return what ``--json`` prints of a claim."""
    return {
        "id": claim.id,
        "number": claim.number,
        "title": claim.title,
        "statement": claim.statement,
        "source": claim.source,
        "prediction": claim.prediction,
        "question": claim.question.text,
        "premises": [rule.text for rule in claim.premises],
        "details": [rule.text for rule in claim.details],
        "kind": claim.kind,
        "data": claim.data,
        "norms": claim.norms,
        "own_network": claim.own_network,
        "seeds": claim.seeds,
        "epochs": claim.settings[claim.data[0]].epochs,
    }
