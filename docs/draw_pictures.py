"""Draw the README's picture, for light and for dark pages: `python docs/draw_pictures.py`."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import nn

import normkit
from normkit.doctor.demos import build

FOLDER = Path(__file__).parent / "pictures"
# Ink on nothing: the page shows through.
INKS = {"light": ("#24292f", "#9a6700", "#0969da"), "dark": ("#e6edf3", "#d29922", "#58a6ff")}


def measured() -> tuple[list[float], list[float], list[tuple[str, float]]]:
    """Return what layer 4 of the sick model stores, what its input has, and the accuracy before and after the cure."""
    patient = build("stale")
    model = patient.model
    assert isinstance(model, nn.Sequential)
    images, labels = patient.batches.dataset.tensors

    @torch.no_grad()
    def accuracy() -> float:
        return float((model.eval()(images).argmax(1) == labels).double().mean())

    norm = model[4]
    assert isinstance(norm, nn.BatchNorm2d)
    stored = norm.running_var
    assert stored is not None
    before, kept = accuracy(), stored.tolist()
    normkit.recalibrate(model, patient.batches)
    return kept, stored.tolist(), [("before", before), ("after", accuracy())]


def draw(name: str) -> None:
    """Draw one variant."""
    ink, off, right = INKS[name]
    stored, true, accuracies = measured()
    settings = {
        "svg.fonttype": "path", "svg.hashsalt": "normkit", "font.size": 10, "text.color": ink, "axes.labelcolor": ink,
        "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink, "axes.titlesize": 10,
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure, (left, side) = plt.subplots(1, 2, figsize=(8, 2.6), width_ratios=(2.6, 1), layout="constrained")
        channels = range(len(stored))
        for values, colour, label in ((true, right, "of the data"), (stored, off, "stored")):
            left.scatter(channels, values, color=colour, label=label, s=28)
        for channel in channels:
            left.plot([channel, channel], [stored[channel], true[channel]], color=ink, alpha=0.4, linewidth=1)
        left.set(
            yscale="log",
            xlabel="channel of layer 4",
            ylabel="variance of the channel",
            xticks=[0, 5, 10, 15],
            ylim=(0.1, 200),
        )
        worst = max(data / kept for kept, data in zip(stored, true, strict=True))
        left.set_title(f"diagnose: up to {round(worst)} times too small", loc="left")
        left.legend(frameon=False, ncols=2, loc="upper right", labelcolor=ink)
        bars = side.bar(*zip(*accuracies, strict=True), color=[off, right], width=0.6)
        side.bar_label(bars, [f"{value:.1%}" for _, value in accuracies], color=ink)
        side.set(ylim=(0, 1.15), yticks=[])
        side.set_title("recalibrate: accuracy", loc="left")
        for axes in (left, side):
            axes.spines[["top", "right"]].set_visible(False)
        side.spines["left"].set_visible(False)
        figure.savefig(FOLDER / f"doctor-{name}.svg", transparent=True, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for variant in INKS:
        draw(variant)
