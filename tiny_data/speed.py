"""Measure how fast a model learned on each kind of tokens, beside what gradient.py predicted.

    python tiny_data/gradient.py --out out/tiny                            # with --model ...
    python forking.py --compare --steps 30 --eval-every 1 --out out/tiny   # with the same
    python tiny_data/speed.py out/tiny [MORE FOLDERS] --picture out/speed.svg

The measured speed of a kind of tokens is the factor s for which its accuracy at step t is that
of all tokens at step s t: by least squares over the first 10 steps, and over all of them, with
accuracies averaged over the seeds. It lies from 0 (nothing learned) to 2. Intervals: 95 %, by
jackknife over the seeds, which are paired.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import report
from matplotlib.figure import Figure

FACTORS = np.arange(0, 2.0001, 0.005)
MARKERS = "osD^v<>ph*XP"  # one for each folder


def speed(kind, every, steps):
    """The s for which kind[t] is closest to every[s t] over the steps 1 ... steps: (T + 1,)."""
    t, last = np.arange(1, steps + 1), len(every) - 1
    errors = []
    for s in FACTORS:
        there = t[s * t <= last]
        expected = np.interp(s * there, np.arange(last + 1), every)
        errors.append(np.mean((kind[there] - expected) ** 2))
    return FACTORS[np.argmin(errors)]


def measured(kind, every, steps):
    """The speed over the seeds, (S, T + 1) each, and half its interval; nan for one seed."""
    n = len(kind)
    value = speed(kind.mean(0), every.mean(0), steps)
    if n < 2:
        return value, np.nan
    without = [np.delete(np.arange(n), i) for i in range(n)]
    values = [speed(kind[some].mean(0), every[some].mean(0), steps) for some in without]
    return value, report.STUDENT[min(n, 10) - 2] * np.sqrt((n - 1) * np.var(values))


def rows_of(folder):
    """Yield (kind, predicted, first 10 steps, all steps) of the runs in a folder, as pairs."""
    table = json.loads((folder / "gradient.json").read_text(encoding="utf-8"))["table"]
    curves = {}
    for kind, runs in report.load(folder).items():
        for run in runs:
            curve = run.curve("accuracy")
            values = np.array([curve[step] for step in sorted(curve)])
            if sorted(curve) != [*range(len(curve))] or len(curve) < 7:
                report.refuse(f"{run.folder}: needs --eval-every 1, and at least 6 steps")
            curves.setdefault(kind, {})[run.config["seed"]] = values
    for kind in [kind for kind in curves if kind != "all"]:
        seeds = sorted(curves[kind].keys() & curves["all"].keys())
        ours, every = (np.stack([curves[name][s] for s in seeds]) for name in (kind, "all"))
        last = ours.shape[1] - 1
        windows = [measured(ours, every, steps) for steps in (min(10, last), last)]
        yield kind, table[kind]["speed"], *windows


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--picture", type=Path, metavar="OUT.svg")
    args = parser.parse_args(argv)
    figure = Figure((7.2, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="speed predicted before training (all tokens = 1)")
    axes.set_ylabel("speed measured over the first 10 steps")
    axes.plot((0, 1.2), (0, 1.2), color=report.GREY, linewidth=1)
    print(f"{'model':20}{'tokens':8}{'predicted':16}{'first 10 steps':16}all steps")
    for folder, marker in zip(args.folders, itertools.cycle(MARKERS), strict=False):
        try:
            rows = [*rows_of(folder)]
        except (OSError, LookupError, ValueError) as error:  # or runs of several lengths
            report.refuse(f"{folder}: needs gradient.json and finished runs ({error!r})")
        for kind, *pairs in rows:
            cells = [f"{value:.2f} ± {error:.2f}" for value, error in pairs]
            print(f"{folder.name:20}{kind:8}{cells[0]:16}{cells[1]:16}{cells[2]}")
            (x, x_error), (y, y_error), _ = pairs
            colour = report.LOOKS[kind]["color"]
            axes.errorbar(x, y, y_error, x_error, color=colour, marker=marker, linewidth=0.8)
        axes.scatter([], [], color=report.GREY, marker=marker, label=folder.name)
    for kind in ("top", "random", "bottom"):
        axes.scatter([], [], color=report.LOOKS[kind]["color"], marker="_", label=kind)
    figure.legend(loc="outside right upper")
    if args.picture:
        figure.savefig(args.picture, format="svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
