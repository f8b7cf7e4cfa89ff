#!/usr/bin/env python3
"""Draw what forking.py has logged: a page of charts, tables and coloured answers.

    python tiny_data/report.py out/gpt2-top-seed0                   # of a run
    python tiny_data/report.py out/gpt2-compare                     # of a comparison
    python tiny_data/report.py out/tiny_data-gpt2-show              # of a look (--show)
    python tiny_data/report.py out/gpt2-compare --svg compare.svg   # the pictures in the README
    python tiny_data/report.py out/gpt2-top-seed0 --svg answers.svg

The page is FOLDER/report.html: one file that needs no network and runs no script. The table of
a comparison and the numbers of a look are printed, too.
"""

import argparse
import collections
import html
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path

import numpy as np

# Each kind of tokens has its colour, wherever it is drawn. They can be told apart by readers
# who are colour-blind, and on white as well as on black.
COLOURS = {"top": "#7c4dff", "all": "#0a8f5c", "random": "#b08c00", "bottom": "#d070b0"}
DASHES = ("", "8 4", "2 3", "11 3 2 3", "4 4", "12 7", "1 5", "8 2 2 2 2 2")
MEANINGS = {
    "top": "the {:.3g} % of the answer tokens with the highest entropy",
    "all": "all answer tokens",
    "random": "{:.3g} % of the answer tokens, chosen at random",
    "bottom": "the {:.3g} % of the answer tokens with the lowest entropy",
}
HEATS = (0.01, 0.3, 1)  # nats from which a token is blue, orange, red
COLOUR_NAMES = {
    "heat0": "plain below 0.01 nats",
    "heat1": "blue from 0.01",
    "heat2": "orange from 0.3",
    "heat3": "red and bold from 1",
}
NEARLY_ALL = 0.9  # of the policy gradient: what leaves out less, is as good as all
EDGES = (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 2, 4)  # of the histogram; its end is open

COLUMNS = (  # of a comparison's table: key, heading, format, explanation
    ("tokens", "tokens", "", "those that got a gradient"),
    (
        "accuracy",
        "accuracy, 95%",
        ".3f",
        "at the end, mean over the seeds ± half its 95 % interval",
    ),
    ("best", "best", ".3f", "highest accuracy of a run, mean over the seeds"),
    ("area", "area", ".3f", "mean accuracy over the whole run: high if it learned fast"),
    ("to_60", "to .60", ".1f", "first evaluated step with accuracy 0.60, mean over the seeds"),
    ("to_80", "to .80", ".1f", "the same for 0.80; — if a seed never got there"),
    ("length", "length", ".1f", "mean tokens of an answer in the last step"),
    ("entropy", "entropy", ".3f", "mean over all answer tokens in the last step, in nats"),
    ("kept", "kept", ".1%", "share of the tokens that got a gradient in the last step"),
    ("seconds", "seconds", ".0f", "of training, without evaluation"),
    ("seeds", "seeds", ".0f", "number of runs"),
)
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t, 2 to 10 seeds


class FolderError(Exception):
    """The folder is not one that forking.py writes."""


RUN = ("config.json", "metrics.jsonl")
LOOK = ("config.json", "samples.jsonl")
NEEDS = (
    "needs config.json and metrics.jsonl (a run with a step or more), subfolders with both "
    "(a comparison), or config.json and samples.jsonl (a look)"
)
Line = collections.namedtuple(
    "Line", "name x y colour dash dotted low high", defaults=("", 0, (), ())
)

FIELDS = {  # of the files, each with its kind; one with ? may be missing, or null
    "config.json": "model text, data text, base text?, tokens text, "
    "rho number, seed number, steps number",
    "metrics.jsonl": "step number, tokens number, seconds number, accuracy number?, "
    "reward number?, entropy number?, threshold number?, length number?, kept number?",
    "samples.jsonl": "step number, question text, target text, reward number, finished flag, "
    "length number, threshold number, tokens texts, entropy numbers, logp numbers, "
    "base_entropy numbers?",
    "heat.json": "threshold number, temperatures numbers, forks numbers, rest numbers",
    "gradient.json": "groups number, mixed number, rho number, group numbers?, "
    "entropy numbers?, all flags?, top flags?, random flags?, gain from all numbers?, "
    "gain from top numbers?, gain from random numbers?",
}
TYPES = {"text": (str,), "number": (int, float), "flag": (bool,)}  # and lists, in the plural

# --------------------------------------------------------------------------------- read


def fits(value, kind):
    """Whether a value from a file is of its kind, as FIELDS has it."""
    if value is None or kind.endswith("?"):
        return kind.endswith("?") and (value is None or fits(value, kind[:-1]))
    if kind.endswith("s"):
        return isinstance(value, list) and all(fits(each, kind[:-1]) for each in value)
    return type(value) in TYPES[kind]


def checked(path, record):
    """What was read from a file, or FolderError unless it is what belongs there."""
    if not isinstance(record, dict):
        raise FolderError(f"{path}: holds something else than it should")

    lengths = set()
    for field in FIELDS[path.name].split(", "):
        name, kind = field.rsplit(" ", 1)
        value = record.get(name)
        if not fits(value, kind):
            raise FolderError(f"{path}: holds something else than it should (see {name!r})")
        if isinstance(value, list):
            lengths.add(len(value))

    if len(lengths) > 1:
        raise FolderError(f"{path}: its lists should be of one length")
    if path.name == "config.json" and record["tokens"] not in COLOURS:
        raise FolderError(f"{path}: holds something else than it should (see 'tokens')")
    return record


def read_json(path):
    """The object in a .json file."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise FolderError(f"{path}: cannot be read ({error})") from None

    return checked(path, record)


def read_gradient(folder):
    """What --show has found about the policy gradient, None if it has not; lists as arrays."""
    path = folder / "gradient.json"
    if not path.exists():
        return None

    found = read_json(path)
    names = [field.rsplit(" ", 1)[0] for field in FIELDS[path.name].split(", ")]
    lists = [name for name in names[3:] if found.get(name) is not None]
    whole = len(lists) == len(names[3:])
    if whole:
        found |= {name: np.array(found[name]) for name in lists}
        whole = np.array_equal(np.unique(found["group"]), range(found["mixed"]))
    if lists and not (whole and found["mixed"] >= 4):
        raise FolderError(f"{path}: its lists are not those of its groups")
    return found


def read_lines(path):
    """The objects of a .jsonl file, none if it is missing; a cut-off last line is skipped."""
    raw = path.read_bytes().split(b"\n") if path.exists() else []
    lines = [line for line in raw if line.strip()]
    records = []

    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise FolderError(f"{path}: line {number} cannot be read") from None
        records.append(checked(path, record))

    return records


def holds(folder, *names):
    """True if the folder has files of all these names."""
    return all((folder / name).is_file() for name in names)


def is_heated(folder):
    """Whether heat.py has been run since the look was taken."""
    heat, samples = folder / "heat.json", folder / "samples.jsonl"
    return heat.exists() and heat.stat().st_mtime >= samples.stat().st_mtime


def share(config):
    """The share of the answer tokens that a run trains on."""
    shares = {"all": 1, "bottom": 1 - config["rho"]}
    return shares.get(config["tokens"], config["rho"])


def arm_name(config):
    """How the runs with these settings are called: "top 0.2", "all", "bottom 0.8"."""
    return "all" if config["tokens"] == "all" else f"{config['tokens']} {share(config):.3g}"


def read_runs(folders):
    """([settings of each run], {name of each arm: [log of each of its runs]})."""
    runs = [(read_json(f / "config.json"), read_lines(f / "metrics.jsonl")) for f in folders]
    rhos = collections.Counter(config["rho"] for config, _ in runs)

    def place(run):
        config = run[0]
        kind = list(COLOURS).index(config["tokens"])
        return -rhos[config["rho"]], kind, config["rho"], config["seed"]

    runs.sort(key=place)
    arms = {}
    for config, history in runs:
        arms.setdefault(arm_name(config), []).append(history)

    return [config for config, _ in runs], arms


def evaluations(history):
    """The steps of a log at which accuracy was measured."""
    return [metrics for metrics in history if metrics.get("accuracy") is not None]


def only_shared_evaluations(arms):
    """The arms without the steps at which only some of the runs were evaluated."""
    steps = []
    for history in sum(arms.values(), []):
        steps.append({metrics["step"] for metrics in evaluations(history)})

    shared = set.intersection(*steps)

    def keep(history):
        return [m for m in history if m.get("accuracy") is None or m["step"] in shared]

    return {name: list(map(keep, runs)) for name, runs in arms.items()}


def at_evaluations(runs, key):
    """A value of each run at each of its evaluations: (runs, evaluations)."""
    rows = []
    for history in runs:
        rows.append([metrics[key] for metrics in evaluations(history)])

    return np.array(rows)


def curve(runs, key):
    """(x, mean, lowest and highest accuracy) of runs; x: the mean of their tokens or steps."""
    scores = at_evaluations(runs, "accuracy")
    return at_evaluations(runs, key).mean(0), scores.mean(0), scores.min(0), scores.max(0)


def points(history, key):
    """([steps], [values]) of a log, where the value is a finite number."""
    logged = [m for m in history if m.get(key) is not None and math.isfinite(m[key])]
    return [m["step"] for m in logged], [m[key] for m in logged]


def notable_tokens(records, min_count):
    """{"Forking tokens": [(text, mean entropy, count)], "Most certain tokens": the same}."""
    found = collections.defaultdict(list)
    for record in records:
        for token, entropy in zip(record["tokens"], record["entropy"], strict=True):
            found[token].append(entropy)

    rows = [(token, np.mean(H), len(H)) for token, H in found.items() if len(H) >= min_count]
    rows.sort(key=lambda row: -row[1])
    half = (len(rows) + 1) // 2  # no token is in both lists
    return {"Forking tokens": rows[:half][:12], "Most certain tokens": rows[half:][::-1][:12]}


# -------------------------------------------------------------------------------- texts


def visible(character):
    """The character or, if it does not print, something that says which one it is."""
    if character.isprintable():
        return character
    if character == "\n":
        return "↵"

    code = ord(character)
    return chr(0x2400 + code) if code < 32 else f"\\u{code:04x}"


def printable(text):
    """The text without control characters."""
    return "".join(map(visible, str(text)))


def tidy(value, form=",.9g"):
    """A number as text, without the dirt in its last bits or -0; — if there is none."""
    return "—" if value is None or math.isnan(value) else format(round(value, 9) + 0, form)


# -------------------------------------------------------- numbers of a comparison, a look


def half_interval(values):
    """Half the width of the 95 % confidence interval of a mean, by Student's t."""
    n = len(values)
    if n < 2:
        return math.nan
    return STUDENT[min(n, 10) - 2] * np.std(values, ddof=1) / math.sqrt(n)


def first_step(steps, scores, target):
    """First step with this accuracy, mean over the seeds; nan if a seed never has it."""
    reached = scores >= target - 1e-6  # (seeds, evaluations); they were rounded to float32
    return steps[reached.argmax(1)].mean() if reached.any(1).all() else math.nan


def summary(name, runs):
    """The row of an arm in a comparison's table: a dict with the keys of COLUMNS."""
    steps, mean, *_ = curve(runs, "step")
    scores = at_evaluations(runs, "accuracy")
    between = (mean[1:] + mean[:-1]) / 2
    row = {
        "tokens": name,
        "accuracy": mean[-1],
        "interval": half_interval(scores[:, -1]),
        "best": scores.max(1).mean(),
        "area": between @ np.diff(steps) / steps[-1] if steps[-1] else math.nan,
        "to_60": first_step(steps, scores, 0.6),
        "to_80": first_step(steps, scores, 0.8),
        "seeds": len(runs),
    }

    for key in "length", "entropy", "kept", "seconds":
        last = [history[-1].get(key) for history in runs]
        row[key] = np.array(last, float).mean()  # None becomes nan

    return row


def comparison_rows(arms):
    """The rows of a comparison's table as texts, its headings first."""
    rows = [[heading for _, heading, _, _ in COLUMNS]]
    for name, runs in arms.items():
        row = summary(name, runs)
        cells = [tidy(row[key], form) for key, _, form, _ in COLUMNS[1:]]
        cells[0] += f" ± {tidy(row['interval'], '.3f'):>5}"
        rows.append([name, *cells])

    return rows


def aligned(rows):
    """Rows of texts as lines, the first column flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]  # of no rows: []
    lines = []
    for name, *cells in rows:
        columns = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *columns]))

    return lines


def every(records, key):
    """The values at all tokens of all answers, one after the other; None if one has none."""
    lists = [record.get(key) for record in records]
    return None if None in lists else np.concatenate(lists)


def top_fifth(entropy):
    """Where the 20 % of the tokens of highest entropy are; of equal ones, the first ones."""
    k = math.ceil(round(0.2 * len(entropy), 6))
    return np.argsort(-entropy, kind="stable")[:k]


def overlap(entropy, base):
    """The share of the base's top 20 % of the tokens that are in this model's top 20 %."""
    return np.isin(top_fifth(base), top_fifth(entropy)).mean()


def change_by_tenths(entropy, base):
    """By how much the entropy changed, on average, in each tenth of the base's entropies."""
    order = np.argsort(base, kind="stable")
    tenths = np.array_split(order, min(10, len(order)))
    return [round(np.mean(entropy[tenth] - base[tenth]), 3) for tenth in tenths]


def look_sentences(folder, records):
    """What the numbers of a look say, with those of the paper."""
    entropy, base = every(records, "entropy"), every(records, "base_entropy")
    deciles = np.percentile(entropy, range(10, 100, 10))
    cut = any(record["length"] > len(record["tokens"]) for record in records)
    which = " (the first 300 of each answer)" if cut else ""
    sentences = [
        f"Of {len(entropy):,} answer tokens{which}, {100 * np.mean(entropy < 0.01):.2f} % have "
        "an entropy below 0.01 nats (paper, Qwen3-8B: 50.64 %).",
        f"The 80th percentile is {deciles[7]:.3g} nats (paper: 0.672).",
        f"The deciles are {' '.join(f'{decile:.4f}' for decile in deciles)} nats.",
    ]

    if base is not None:
        changes = [tidy(change, "+.3f") for change in change_by_tenths(entropy, base)]
        sentences += [
            f"{100 * overlap(entropy, base):.1f} % of the base's top 20 % of the tokens are in "
            "this model's top 20 % (paper: 86.67 %; by chance: 20 %).",
            "Mean change of entropy since the base, by tenths of the base's entropies, from "
            f"the lowest to the highest: {' '.join(changes)} nats.",
        ]

    if not is_heated(folder):
        sentences.append(
            "What heating and cooling the forks does to the accuracy (the paper's Fig. 3) is "
            f"not measured yet: `python tiny_data/heat.py {folder}` does it."
        )
    return sentences


def jackknife(values, half):
    """The standard error of a value. values: it, and then what it is without each group.

    The groups of each half of the data are left out, one at a time.
    """
    variance = 0
    for here in half, ~half:
        spread = np.var(values[1:][here])
        variance += (here.sum() - 1) * spread

    return math.sqrt(variance)


def inner_product(found, part, kind):
    """<gradient of a part of the tokens, gradient of a kind of them>, without common noise.

    First of all groups, and then without each; mean over the pairs of groups of which one has
    an even number and one an odd number. A group that is left out is missing twice: its tokens
    do not gain any more, and the others gain nothing from its tokens.
    """
    gain = {name: found[f"gain from {name}"] for name in ("all", "top", "random")}
    gain["bottom"] = gain["all"] - gain["top"]
    kept = {name: found[name] for name in ("all", "top", "random")}
    kept["bottom"] = ~kept["top"]

    gains = np.bincount(found["group"], gain[kind] * kept[part])  # (groups,)
    from_it = np.bincount(found["group"], gain[part] * kept[kind])
    is_even = np.arange(len(gains)) % 2 == 0
    others = np.where(is_even, (~is_even).sum(), is_even.sum())  # in the other half
    pairs = is_even.sum() * (~is_even).sum()

    sums = np.append(gains.sum(), gains.sum() - gains - from_it)
    return sums / np.append(pairs, pairs - others)


def gradient_rows(found):
    """{"top": (share, twice its standard error, cosine, the same), "bottom", "random"}.

    share: of the policy gradient of all tokens. cosine: with it; not a number for a part that
    has no direction of its own. None if even the gradient of all tokens is lost in noise.
    """
    half = np.arange(found["mixed"]) % 2 == 0
    whole = inner_product(found, "all", "all")
    if not whole[0] >= 2 * jackknife(whole, half) or not whole.min() > 0:
        return None

    rows = {}
    for part in "top", "bottom", "random":
        along, own = inner_product(found, part, "all"), inner_product(found, part, part)
        share = along / whole
        cosine = np.full_like(share, math.nan)
        if own[0] > jackknife(own, half) and own.min() > 0:
            cosine = along / np.sqrt(own * whole)

        rows[part] = share[0], 2 * jackknife(share, half)
        rows[part] += cosine[0], 2 * jackknife(cosine, half)

    return rows


def gradient_sentence(found, rows):
    """Where the policy gradient comes from, and what is to be expected of training."""
    which = f"{found['mixed']} of {found['groups']} groups"
    advice = "so that a look with more --prompts-per-step is needed."
    if "group" not in found or found["group"] is None:
        return (
            f"Only {which} are partly right, too few to tell where the policy gradient comes "
            f"from, {advice}"
        )
    if not rows:
        return (
            f"The {which} that are partly right cannot tell where the policy gradient comes "
            f"from: it is not yet twice as large as its error, {advice}"
        )

    top = f"{100 * found['rho']:.3g} %"
    shares = {part: percent(*row[:2]) for part, row in rows.items()}
    share, error = rows["top"][:2]
    verdict = "this look cannot tell whether that is nearly all (90 % or more), " + advice
    if share - error >= NEARLY_ALL:
        verdict = "training on the top should be as good as training on all."
    elif share + error < NEARLY_ALL:
        verdict = "training on the top should be worse than training on all."

    return (
        f"In the {which} that are partly right, the {top} of the tokens with the highest "
        f"entropy carry {shares['top']} of the policy gradient, the others "
        f"{shares['bottom']}, and a random {top} {shares['random']}: {verdict}"
    )


def percent(share, error):
    """A share and its error as text."""
    return f"{tidy(100 * share, '.1f')} % ± {tidy(100 * error, '.1f')} %"


def gradient_table(found, rows):
    """The rows of a look's table as texts, its headings first."""
    texts = [["tokens", "share of the gradient", "cosine with all"]]
    for part, (share, error, cosine, cosine_error) in rows.items():
        name = f"{part} {tidy(1 - found['rho'] if part == 'bottom' else found['rho'], '.3g')}"
        direction = "none of its own"
        if not math.isnan(cosine):
            direction = f"{tidy(cosine, '.3f')} ± {tidy(cosine_error, '.3f')}"
        texts.append([name, percent(share, error), direction])

    return texts


def token_sentences(notable):
    """The forking tokens and the most certain ones, in a sentence each."""
    sentences = []
    for name, rows in notable.items():
        listed = [f"'{printable(token)}' {H:.3f} ({n:,})" for token, H, n in rows]
        sentences.append(f"{name}, by mean entropy (and count): {', '.join(listed)}.")

    return sentences


# --------------------------------------------------------------------------------- HTML


def escape(text):
    """The text for HTML, free of tags and of control characters."""
    return html.escape(printable(text))


def table(headings, rows):
    """A table that can be scrolled sideways in a box of its own. The cells are HTML."""
    lines = ["".join(f"<th>{cell}</th>" for cell in headings)]
    for row in rows:
        lines.append("".join(f"<td>{cell}</td>" for cell in row))

    body = "".join(f"<tr>{line}</tr>" for line in lines)
    hint = '<p class="hint">On a narrow screen this table scrolls sideways →</p>'
    box = f'<div class="scroll" tabindex="0"><table>{body}</table></div>'
    return hint * (len(headings) > 5) + box


def definitions(pairs):
    """A list of terms, each with a text (HTML) beside it."""
    return f"<dl>{''.join(f'<dt>{term}</dt><dd>{text}</dd>' for term, text in pairs)}</dl>"


def grid(*parts):
    """The parts side by side, as far as there is room."""
    return f'<div class="grid">{"".join(parts)}</div>'


# ------------------------------------------------------------------------------- charts

PICTURE_WIDTH, COLUMNS_OF_TEXT = 800, 72  # of answers as an SVG
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 400, 50, 388, 30, 200  # of a chart, in units of its SVG


def text(x, y, words, kind=""):
    """Words in a chart. kind: where x is (end, mid, or the start), and how they look."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def ticks(low, high):
    """Round numbers, three to eight steps from at most low to at least high."""
    rough = (high - low) / 6
    unit = 10 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= 0.999 * rough)
    return [step * n for n in range(math.floor(low / step), math.ceil(high / step - 1e-6) + 1)]


def axes(x_range, x_ticks, x_label, y_ticks, y_label):
    """Grid, ticks and labels. x_ticks: [(value, its text)]; the axis of y ends at its ticks."""
    middle = (TOP + BOTTOM) / 2
    parts = [
        f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>',
        text((LEFT + RIGHT) / 2, BOTTOM + 34, x_label, "mid"),
        f'<g transform="translate(14 {middle}) rotate(-90)">{text(0, 0, y_label, "mid")}</g>',
    ]

    for value, y in zip(y_ticks, np.linspace(BOTTOM, TOP, len(y_ticks)), strict=True):
        parts.append(f'<path class="line" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(text(LEFT - 6, y + 4, tidy(value), "end"))

    for value, label in x_ticks:
        x = np.interp(value, x_range, (LEFT, RIGHT))
        parts.append(f'<path class="axis" d="M{x:.1f} {BOTTOM}v4"/>')
        parts.append(text(x, BOTTOM + 17, label, "mid"))

    return "".join(parts)


def polyline(places, dots, line):
    """A line through places in the chart, with some dots."""
    style = f'fill="none" stroke="{line.colour}"'
    path = "".join(f"M{place}h0" for place in dots)
    return (
        f'<polyline points="{" ".join(places)}" {style} stroke-width="2" '
        f'stroke-dasharray="{line.dash or "none"}"/>'
        f'<path d="{path}" {style} stroke-width="6" stroke-linecap="round"/>'
    )


def legend(lines, y):
    """(a sample of each line with its name, in rows from y on; where the last row is)."""
    start = 20
    parts, x = [], start
    for line in lines:
        room = 38 + 7 * len(line.name)
        if x > start and x + room > WIDTH + 8:  # after the last one, no gap is needed
            x, y = start, y + 18

        sample = [f"{x:.1f},{y}", f"{x + 22:.1f},{y}"]
        parts.append(polyline(sample, sample[: line.dotted], line))
        parts.append(text(x + 27, y + 4, line.name))
        x += room

    return "".join(parts), y


def picture(title, body, bottom):
    """A chart as an SVG within a page."""
    return (
        f'<svg width="600" height="{1.5 * bottom + 18:.0f}" role="img" '
        f'viewBox="0 0 {WIDTH} {bottom + 12}"><title>{escape(title)}</title>'
        f"{text(4, 14, title, 'title')}{body}</svg>"
    )


def line_chart(title, lines, x_label, y_label, y_least=0.0):
    """A chart of lines. Its axes start at 0 or below; y goes up to y_least or further."""
    every_x = np.concatenate([line.x for line in lines])
    every_y = np.concatenate([line.y for line in lines])
    x_range = 0, every_x.max() or 1
    y_ticks = ticks(min(0, every_y.min()), max(y_least, every_y.max()) or 1)
    y_range = y_ticks[0], y_ticks[-1]

    def places(x, y):
        x, y = np.interp(x, x_range, (LEFT, RIGHT)), np.interp(y, y_range, (BOTTOM, TOP))
        return [f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)]

    x_ticks = [(value, tidy(value)) for value in ticks(*x_range) if value <= x_range[1]]
    parts = [axes(x_range, x_ticks, x_label, y_ticks, y_label)]
    for line in lines:
        if len(line.low):
            edge = " ".join([*places(line.x, line.low), *places(line.x, line.high)[::-1]])
            parts.append(f'<polygon points="{edge}" fill="{line.colour}" opacity="0.2"/>')

    for line in lines:
        path = places(line.x, line.y)
        parts.append(polyline(path, path if line.dotted or len(path) == 1 else [], line))

    samples, bottom = legend(lines, BOTTOM + 52) if len(lines) > 1 else ("", BOTTOM + 34)
    return picture(title, "".join(parts) + samples, bottom)


def bar_chart(title, heights, classes, x_ticks, x_label, y_label, mark=None):
    """A chart of bars, the n-th one from n to n + 1. mark: (place, text) of an upright line."""
    x_range = 0, len(heights)
    y_ticks = ticks(min(0, *heights) * 1.1, max(0.05, *heights) * 1.1)
    parts, labels = [axes(x_range, x_ticks, x_label, y_ticks, y_label)], []
    zero = np.interp(0, (y_ticks[0], y_ticks[-1]), (BOTTOM, TOP))
    width = (RIGHT - LEFT) / len(heights)

    for n, (height, colour) in enumerate(zip(heights, classes, strict=True)):
        x = LEFT + n * width
        y = np.interp(height, (y_ticks[0], y_ticks[-1]), (BOTTOM, TOP))
        size = f'width="{0.88 * width:.1f}" height="{abs(zero - y):.1f}" class="{colour}"'
        parts.append(f'<rect x="{x + 0.06 * width:.1f}" y="{min(y, zero):.1f}" {size}/>')
        label_y = y + 12 if height < 0 else y - 4
        labels.append(text(x + width / 2, label_y, tidy(round(height, 3), ".3g"), "mid small"))

    if mark:
        x = np.interp(mark[0], x_range, (LEFT, RIGHT))
        side, gap = ("end", -5) if x > WIDTH / 2 else ("", 5)
        parts.append(f'<path class="mark" d="M{x:.1f} {TOP - 8}V{BOTTOM}"/>')
        parts.append(text(x + gap, TOP - 3, mark[1], side))

    return picture(title, "".join(parts + labels), BOTTOM + 34)


def entropy_histogram(title, records, threshold):
    """How the entropies of the answers' tokens are distributed, with the threshold."""
    entropies = every(records, "entropy")
    counts = np.histogram(entropies, [-np.inf, *EDGES[1:-1], np.inf])[0]
    classes = [f"heat{heat(edge)}" for edge in EDGES[:-1]]
    x_ticks = [(n, f"{edge:g}") for n, edge in enumerate(EDGES[:-1])]
    labels = "entropy of a token in nats (last bar: above 2)", "% of the tokens"

    mark = None
    if threshold is not None:
        mark = np.interp(threshold, EDGES, range(len(EDGES))), f"threshold {threshold:.3g}"

    title = f"{title}: {len(entropies):,} tokens"
    return bar_chart(title, 100 * counts / len(entropies), classes, x_ticks, *labels, mark)


def accuracy_chart(title, arms, key):
    """Accuracy against "tokens" or "step": the mean of each arm's runs, and their range."""
    unit, label = (1000, "thousands of tokens generated") if key == "tokens" else (1, "step")
    lines = []
    for n, (name, runs) in enumerate(arms.items()):
        x, mean, *edges = curve(runs, key)
        band = edges if len(runs) > 1 else ((), ())
        style = COLOURS[name.split()[0]], DASHES[n % len(DASHES)], True
        lines.append(Line(name, x / unit, mean, *style, *band))

    return line_chart(title, lines, label, "accuracy", 1.0)


# ------------------------------------------------------------------------------ answers


def heat(entropy):
    """0, 1, 2 or 3: plain, blue, orange or red."""
    return sum(entropy >= bound for bound in HEATS)


def answer(record):
    """An answer in colours. Underlined are the forks."""
    spans = []
    columns = (record[key] for key in ("tokens", "entropy", "logp"))
    for token, entropy, logp in zip(*columns, strict=True):
        mark = entropy >= record["threshold"]
        hint = f"{entropy:.3f} nats; probability {math.exp(logp):.1%}"
        shown = escape(token or "∅").replace("↵", "↵\n")
        kind = f"heat{heat(entropy)}{' fork' * mark}"
        spans.append(f'<span class="{kind}" title="{hint}">{shown}</span>')

    notes = [f"reward {record['reward']:g}"]
    if record["reward"] != 1:
        notes.append(f"the known answer is <b>{escape(record['target'])}</b>")
    if not record["finished"]:
        notes.append(f"cut off after {record['length']:,} tokens")
    if record["length"] > len(spans):
        notes.append(f"only the first {len(spans)} of {record['length']:,} tokens are shown")

    question = f"<p>{escape(record['question'])}</p>"
    return f"<article>{question}<pre>{''.join(spans)}</pre><p>{'; '.join(notes)}</p></article>"


def legend_of_colours(tag, underlined):
    """What the colours and the underline of the answers mean, in a line. tag: span or tspan."""
    pieces = [f'<{tag} class="{kind}">{words}</{tag}>' for kind, words in COLOUR_NAMES.items()]
    fork = f'<{tag} class="fork">Underlined</{tag}>: {underlined}.'
    return f"The entropy of a token: {', '.join(pieces)}. {fork}"


def colour_legend(underlined):
    """The same for a page."""
    more = "↵ is a new line. A pointer that rests on a token shows its numbers."
    return f"<p>{legend_of_colours('span', underlined)} {more}</p>"


def telling_answers(records):
    """[(a heading, an answer)]: a wrong one before training, and a right one after it.

    Or what there is of that kind: an answer of a look, or of the only step with samples.
    """
    first, last = records[0]["step"], records[-1]["step"]
    wrong = [r for r in records if r["step"] == first and r["reward"] < 1 and r["tokens"]]
    right = [r for r in records if r["step"] == last and r["reward"] == 1 and r["tokens"]]
    after = (right or [r for r in records if r["step"] == last])[0]
    if first == last:
        return [("An answer", after)]

    before = (wrong or records)[0]
    heading = "Before training" if first == 1 else f"At step {first}"
    return [(heading, before), (f"After {last} steps", after)]


def wrapped_answer(record):
    """An answer in colours for an SVG: [its lines, as tspans], the first few of them."""
    lines, kinds, column = [[]], [], 0
    for token, entropy in zip(record["tokens"][:100], record["entropy"], strict=False):
        kind = f"heat{heat(entropy)}{' fork' * (entropy >= record['threshold'])}"
        kinds += [(character, kind) for character in printable(token or "∅")]

    for character, kind in kinds:
        if column == COLUMNS_OF_TEXT:
            lines.append([])
            column = 0
        if not lines[-1] or lines[-1][-1][0] != kind:
            lines[-1].append((kind, ""))
        lines[-1][-1] = kind, lines[-1][-1][1] + character
        column = 0 if character == "↵" else column + 1
        if character == "↵":
            lines.append([])

    lines = [line for line in lines if line]
    spans = []
    for line in lines:
        spans.append(
            "".join(f'<tspan class="{k}">{escape(words)}</tspan>' for k, words in line)
        )
    cut = len(spans) > 4 or len(record["tokens"]) > 100 or record["length"] > 100
    spans = spans[:4]
    spans[-1] += " ..." * cut
    return spans


def answers_picture(pairs, title, rho):
    """An SVG of answers, each with a heading; legible on white and on black."""
    parts, y = [], 22
    for heading, record in pairs:
        verdict = "right" if record["reward"] == 1 else f"wrong: it is {record['target']}"
        question = textwrap.shorten(printable(record["question"]), COLUMNS_OF_TEXT - 3)
        parts.append(text(10, y, f"{heading} ({textwrap.shorten(verdict, 50)})", "title"))
        parts.append(text(10, y + 22, question, "mono"))
        y += 44
        for line in wrapped_answer(record):
            parts.append(f'<text x="10" y="{y}" class="mono">{line}</text>')
            y += 22
        y += 14

    fork = f"the top {100 * rho:.3g} %"
    parts.append(f'<text x="10" y="{y}">{legend_of_colours("tspan", fork)}</text>')
    size = f'width="{PICTURE_WIDTH}" height="{y + 12}" viewBox="0 0 {PICTURE_WIDTH} {y + 12}"'
    body = f"<title>{escape(title)}</title><style>{CHART_STYLE}{ANSWER_STYLE}</style>"
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return f"{opening}{body}{''.join(parts)}</svg>"


def token_tables(notable):
    """Two tables side by side: the forking tokens, and the most certain ones."""
    tables = []
    for name, rows in notable.items():
        cells = [(f"<code>{escape(t)}</code>", f"{H:.4f}", f"{n:,}") for t, H, n in rows]
        tables.append(table((name, "mean entropy", "count"), cells))

    return grid(*tables)


# -------------------------------------------------------------------------------- pages


def facts(configs, arms, scored):
    """What was run, and how far it came. scored: the arms with the evaluations they share."""
    lasts = [history[-1] for history in sum(arms.values(), []) if history]
    steps = sorted({last["step"] for last in lasts}) or [0]
    done = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else steps[0]
    seeds = sorted({config["seed"] for config in configs})
    tokens, seconds = (sum(last[key] for last in lasts) for key in ("tokens", "seconds"))
    pairs = [
        ("model", escape(configs[0]["model"])),
        ("data", escape(configs[0]["data"])),
        ("seed" if len(seeds) == 1 else "seeds", ", ".join(map(str, seeds))),
        ("steps done", f"{done} of {configs[0]['steps']}"),
        ("generated", f"{tokens:,} tokens in {seconds:,.0f} seconds, without evaluation"),
    ]

    for name, config in {arm_name(config): config for config in configs}.items():
        words = f"trained on {MEANINGS[config['tokens']].format(100 * share(config))}"
        if evaluations(scored[name][0]):
            mean = curve(scored[name], "step")[1]
            words += f"; accuracy first {mean[0]:.3f}, last {mean[-1]:.3f}"
        pairs.append((name, words))

    return definitions(pairs)


def training_charts(config, history):
    """Accuracy, reward, entropy and length in the course of a run, where there are any."""
    charts, missing = [], []
    if evaluations(history):
        arms = {arm_name(config): [history]}
        charts.append(accuracy_chart("Accuracy on the test questions", arms, "tokens"))
    else:
        missing.append("There were no evaluations, so that the accuracy is not known.")

    for key, title, unit, least in (
        ("reward", "Reward of the sampled answers", "mean reward", 1.0),
        ("entropy", "Entropy of the answers' tokens", "nats", 0.0),
        ("length", "Length of the answers", "mean number of tokens", 0.0),
    ):
        lines = [Line("mean of all tokens", *points(history, key), COLOURS[config["tokens"]])]
        if key == "entropy":
            tau = points(history, "threshold")
            lines.append(Line("threshold of the forks", *tau, "currentColor", "4 3"))
        if lines[0].x:
            charts.append(line_chart(title, lines, "step", unit, least))
        else:
            missing.append(f"No step has logged its {key}.")

    return grid(*charts) + "".join(f"<p>{sentence}</p>" for sentence in missing)


def run_page(folder, min_count):
    """(title, body, lines to print) of the page of a run."""
    (config,), arms = read_runs([folder])
    history = arms[arm_name(config)][0]
    records = read_lines(folder / "samples.jsonl")
    title = f"{config['model']}, trained on {arm_name(config)}"
    parts = [facts([config], arms, arms), "<h2>Training</h2>", training_charts(config, history)]

    if not records:
        return title, "".join([*parts, "<p>No samples were kept.</p>"]), []

    first, last = records[0]["step"], records[-1]["step"]
    before = [record for record in records if record["step"] == first]
    end = [record for record in records if record["step"] == last]
    threshold = (points(history, "threshold")[1] or [None])[-1]
    by = ", by the untrained model" if first == 1 else ""

    parts.append(
        f"<h2>Answers</h2>{colour_legend('a fork, at or above the threshold tau of its step')}"
    )
    if first < last:
        parts.append(f"<h3>Before (step {first}{by})</h3>{grid(*map(answer, before))}")
    parts.append(f"<h3>At the end (step {last})</h3>{grid(*map(answer, end))}")

    parts.append(f"<h2>Tokens of the answers of step {last}</h2>")
    parts.append(grid(entropy_histogram("Entropies", end, threshold)))
    parts.append(token_tables(notable_tokens(end, min_count or 2)))
    parts.append(f"<p>In the tables are tokens that occur {min_count or 2} times or more.</p>")
    return title, "".join(parts), []


def read_comparison(folder):
    """(settings, arms, arms with the evaluations they share, title of a chart of them)."""
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    runs = [child for child in children if holds(child, *RUN)]
    begun = [run for run in runs if read_lines(run / "metrics.jsonl")]
    if not begun:
        raise FolderError(f"{folder}: {NEEDS}")

    configs, arms = read_runs(begun)
    counts = sorted({len(logs) for logs in arms.values()})
    title = "Test accuracy of one seed each"
    if counts != [1]:
        title = f"Test accuracy, mean and range of {' or '.join(map(str, counts))} seeds"

    return configs, arms, only_shared_evaluations(arms), title


def comparison_page(folder, _):
    """(title, body, lines to print) of the page of a comparison."""
    configs, arms, scored, title = read_comparison(folder)
    parts = [facts(configs, arms, scored), "<h2>Accuracy on the test questions</h2>"]
    lines = ["There is no step at which every run was evaluated."]

    evaluated = len(evaluations(scored[arm_name(configs[0])][0]))
    if evaluated:
        rows = comparison_rows(scored)
        lines = aligned(rows)
        parts.append(f"<p>{evaluated} evaluations: at the steps where every run has one.</p>")
        parts.append(grid(*(accuracy_chart(title, scored, key) for key in ("tokens", "step"))))
        parts.append(table(rows[0], rows[1:]))
        parts.append(definitions([(heading, meaning) for _, heading, _, meaning in COLUMNS]))
    else:
        parts.append(f"<p>{lines[0]}</p>")

    return "Which tokens to train on", "".join(parts), lines


def heat_chart(found):
    """What heating and cooling does to the accuracy: the paper's Fig. 3."""
    x = found["temperatures"]
    forks = f"forks: from {found['threshold']:.3g} nats"
    lines = [
        Line(forks, x, found["forks"], COLOURS["top"], DASHES[0], True),
        Line("all the rest", x, found["rest"], COLOURS["bottom"], DASHES[1], True),
    ]
    title = "Accuracy if only these are heated or cooled"
    return line_chart(title, lines, "their temperature (1 for the others)", "accuracy", 1.0)


def change_chart(records):
    """What training has changed, by the entropies before."""
    change = change_by_tenths(every(records, "entropy"), every(records, "base_entropy"))
    x_ticks = [(n + 0.5, str(n + 1)) for n in range(len(change))]
    title, classes = "Change of entropy since the base", ["heat0"] * len(change)
    label = "tenth of the tokens, by the base's entropy"
    return bar_chart(title, change, classes, x_ticks, label, "nats")


def gradient_chart(found):
    """Where the policy gradient comes from, by the entropy of the tokens."""
    gain, entropy = found["gain from all"], found["entropy"]
    order = np.argsort(-entropy, kind="stable")
    tenths = np.array_split(order, min(10, len(order)))
    heights = [round(100 * gain[tenth].sum() / gain.sum(), 1) for tenth in tenths]
    classes = [f"heat{heat(np.median(entropy[tenth]))}" for tenth in tenths]
    x_ticks = [(n + 0.5, str(n + 1)) for n in range(len(tenths))]
    labels = "tenth of the tokens, from the highest entropy", "% of the gradient"
    return bar_chart("Where the policy gradient comes from", heights, classes, x_ticks, *labels)


def gradient_parts(found):
    """(sentences, table as texts, chart, HTML of the table) of the gradient of a look."""
    if not found:
        return [], [], [], ""

    rows = "group" in found and gradient_rows(found)
    sentence = gradient_sentence(found, rows)
    if not rows:
        return [sentence], [], [], ""

    texts = gradient_table(found, rows)
    note = (
        f"Of the {found['mixed']} groups that are partly right. ± is two standard errors, by "
        "leaving out one group at a time. Shares and cosines are inner products of the "
        "gradients of two halves of the groups, so that noise does not count, and an estimate "
        "can lie above 1 or below 0. A part has no direction of its own if its gradient does "
        "not exceed its error. The chart has no intervals: what the noise of the whole "
        "gradient does to a tenth of the tokens was not measured."
    )
    body = f"<h2>The policy gradient</h2>{table(texts[0], texts[1:])}<p>{escape(note)}</p>"
    return [sentence], texts, [gradient_chart(found)], body


def look_page(folder, min_count):
    """(title, body, lines to print) of the page of a look."""
    config, records = read_json(folder / "config.json"), read_lines(folder / "samples.jsonl")
    if not any(record["tokens"] for record in records):
        raise FolderError(f"{folder / 'samples.jsonl'}: holds no answers")

    keys = {"model": config["model"], "base": config["base"] or "none"}
    keys |= {"data": config["data"], "seed": config["seed"]}
    first, texts, bars, gradient = gradient_parts(read_gradient(folder))
    sentences = look_sentences(folder, records)
    notable = notable_tokens(records, min_count or 5)

    threshold = np.percentile(every(records, "entropy"), 80)
    charts = [*bars, entropy_histogram("Entropies", records, threshold)]
    if is_heated(folder):
        charts.append(heat_chart(read_json(folder / "heat.json")))
    if every(records, "base_entropy") is not None:
        charts.append(change_chart(records))

    chosen = sorted({round(n) for n in np.linspace(0, len(records) - 1, 8)})
    underlined = f"it is among the {100 * config['rho']:.3g} % with the highest entropy"
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in first + sentences)
    items = re.sub("`(.+?)`", r"<code>\1</code>", items)
    parts = [
        definitions([(key, escape(value)) for key, value in keys.items()]),
        f"<ul>{items}</ul>",
        gradient,
        grid(*charts),
        f"<h2>Tokens that occur {min_count or 5} times or more</h2>{token_tables(notable)}",
        f"<h2>Answers</h2>{colour_legend(underlined)}",
        grid(*(answer(records[n]) for n in chosen)),
    ]
    wrapper = textwrap.TextWrapper(96, break_long_words=False, break_on_hyphens=False)
    lines = [wrapper.fill(sentence) for sentence in first] + aligned(texts)
    lines += [wrapper.fill(sentence) for sentence in sentences + token_sentences(notable)]
    return f"The forks of {config['model']}", "".join(parts), lines


# --------------------------------------------------------------------------------- files

CHART_STYLE = """
svg { font: 12px system-ui, sans-serif }
text { fill: var(--soft, #757d87) }
.title { font-size: 13px; font-weight: 600 }
.small { font-size: 10px; paint-order: stroke; stroke: var(--page); stroke-width: 3px }
.mid { text-anchor: middle }
.end { text-anchor: end }
.axis, .line { fill: none; stroke: var(--soft, #757d87) }
.line { opacity: 0.25 }
"""

ANSWER_STYLE = """
.title { fill: #757d87 }
.mono { font: 15px ui-monospace, monospace; white-space: pre }
.heat1 { fill: #2f80d8 }
.heat2 { fill: #b87400 }
.heat3 { fill: #e8384f; font-weight: bold }
.fork { text-decoration: underline }
"""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1f2328; --soft: #59636e;
  --box: #f3f5f7; --blue: #1668b8; --orange: #a86200; --red: #c8102e }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --text: #e6edf3; --soft: #9da7b3;
    --box: #1a2029; --blue: #6cb6ff; --orange: #f0a030; --red: #ff6b7a }
}
body { max-width: 1000px; margin: auto; padding: 16px; overflow-wrap: anywhere;
  background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6em; line-height: 1.2 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px }
dt { color: var(--soft) }
dd { margin: 0 }
ul { padding-left: 20px }
.grid { display: grid; gap: 16px 32px; align-items: start; margin: 16px 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
.grid svg { width: 100%; height: auto }
.mark { fill: none; stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 4 3 }
.heat0 { fill: #8a929a }
.heat1 { fill: var(--blue); color: var(--blue) }
.heat2 { fill: var(--orange); color: var(--orange) }
.heat3 { fill: var(--red); color: var(--red); font-weight: bold }
.fork { text-decoration: underline 2px; text-underline-offset: 4px }
article { background: var(--box); border-radius: 6px; padding: 8px 12px; min-width: 0 }
article p { margin: 0; color: var(--soft); font-size: 14px }
pre { margin: 4px 0; white-space: pre-wrap; font: 15px/1.8 ui-monospace, monospace }
code { white-space: pre-wrap; background: var(--box); border-radius: 3px; padding: 0 3px }
.scroll { overflow-x: auto; min-width: 0 }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap }
th { color: var(--soft); border-bottom: 1px solid; font-weight: 600 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.hint { display: none; color: var(--soft); font-size: 14px }
@media (max-width: 840px) { .hint { display: block } }
"""


def write_page(folder, min_count):
    """Write report.html into the folder of a run, a comparison or a look. (path, lines)"""
    make = comparison_page
    if holds(folder, *RUN):
        make = run_page
    elif holds(folder, *LOOK):
        make = look_page

    title, body, lines = make(folder, min_count)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{CHART_STYLE}{STYLE}</style></head>
<body><h1>{escape(title)}</h1>{body}</body></html>
"""
    path = folder / "report.html"
    path.write_text(page, "utf-8")
    return path, lines


def comparison_picture(folder):
    """The chart of a comparison as an SVG that is legible on white and on black."""
    configs, _, scored, title = read_comparison(folder)
    if not evaluations(scored[arm_name(configs[0])][0]):
        raise FolderError(f"{folder}: there is no step at which every run was evaluated")

    chart = accuracy_chart(title, scored, "step")
    chart = chart.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return chart.replace("</title>", f"</title><style>{CHART_STYLE}</style>", 1)


def write_svg(folder, path):
    """Write the picture of a comparison, or of answers of a run or a look. (path, [])"""
    if holds(folder, *RUN) or holds(folder, *LOOK):
        config = read_json(folder / "config.json")
        records = read_lines(folder / "samples.jsonl")
        if not any(record["tokens"] for record in records):
            raise FolderError(f"{folder / 'samples.jsonl'}: holds no answers")
        title = f"Answers of {config['model']}, the forks underlined"
        drawn = answers_picture(telling_answers(records), title, config["rho"])
    else:
        drawn = comparison_picture(folder)

    path.write_text(drawn + "\n", "utf-8")
    return path, []


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of a run, a comparison or a look")
    words = "a picture alone, to this file: a comparison's chart, or answers of a run or a look"
    parser.add_argument("--svg", type=Path, help=words)
    words = "occurrences a token needs to be listed (default: 5 for a look, 2 for a run)"
    parser.add_argument("--min-count", type=int, metavar="N", help=words)
    options = parser.parse_args(argv)

    try:
        if options.svg:
            path, lines = write_svg(options.folder, options.svg)
        else:
            path, lines = write_page(options.folder, options.min_count)
    except (FolderError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    try:
        print(*lines, f"wrote {path}", sep="\n", flush=True)
    except BrokenPipeError:  # | head has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
