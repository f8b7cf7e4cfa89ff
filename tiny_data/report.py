"""Draw what forking.py has logged.

    python tiny_data/report.py out/gpt2-top-seed0               # a run
    python tiny_data/report.py out/gpt2-compare                 # a comparison (--compare)
    python tiny_data/report.py out/gpt2-show                    # a look (--show)
    python tiny_data/report.py out/gpt2-show --answers two.svg  # a picture of two answers

The first three write FOLDER/report.html, a page that needs no network and runs no script, and
FOLDER/curves.svg. The last one draws a wrong and a right answer to the same question: the right
one from the last FOLDER, if several are given, such as looks before and after training.
"""

import argparse
import base64
import io
import json
import math
import sys
from pathlib import Path
from statistics import fmean, stdev

import jinja2
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

FILES = {  # what forking.py writes, and the names that each object in it has
    "config.json": "model data tokens rho seed",
    "metrics.jsonl": "step",
    "samples.jsonl": "step question target reward truncated length tokens entropy logp",
}
SETTINGS = """model data eval_data tokens rho lr prompts_per_step group_size max_new_tokens
temperature seed steps"""  # flags that a page tells
FREE = """tokens seed seeds out steps save_every eval_every resume compare show
sample_batch_size micro_batch_size gradient_checkpointing offload"""  # may differ
PANELS = {  # title: {name of a line in metrics.jsonl: its name in the legend}
    "accuracy on test questions": {"accuracy": "accuracy", "pass_at_k": "pass@k"},
    "reward (mean over a step's answers)": {"reward": "reward"},
    "entropy (nats)": {"entropy": "mean of all tokens", "threshold": "threshold of forks"},
    "length (tokens per answer)": {"length": "length"},
    "clipped (share of the trained tokens)": {"clipped": "clipped"},
    "gradient norm (before clipping)": {"grad_norm": "gradient norm"},
}
GREY = "#797979"  # it reads on white and on black, and pictures are transparent
LOOKS = {  # Okabe and Ito's colours, which colour-blind readers can tell apart
    "top": {"color": "#d55e00", "linestyle": "-", "marker": "o"},
    "all": {"color": "#0072b2", "linestyle": "--", "marker": "s"},
    "random": {"color": "#009e73", "linestyle": "-.", "marker": "^"},
    "bottom": {"color": "#cc79a7", "linestyle": ":", "marker": "v"},
}
SECOND = {"color": GREY, "linestyle": "--", "marker": "D"}  # the second line in a run's panel
HEAT = {0.01: "#fdeab5", 0.03: "#fcd074", 0.1: "#faac4d", 0.3: "#f5843f", 1: "#ea5a47"}  # nats
SCALE = [{"text": f" ≥{least:g} ", "colour": colour} for least, colour in HEAT.items()]
LEGEND = [{"text": "entropy "}, *SCALE, {"text": " nats; "}, {"text": "fork", "fork": True}]
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 2 to 10 seeds
COMPARED = (
    "Accuracy at step {}: mean over seeds ± half its 95 % interval (Student's t); minus all: "
    "difference to the run with the same seed. Bands: the range of seeds; of one, its error."
)
coloured = "text.color axes.edgecolor axes.labelcolor xtick.color ytick.color grid.color"
rcParams.update(dict.fromkeys(coloured.split(), GREY))
rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
rcParams.update({"grid.alpha": 0.2, "legend.frameon": False, "legend.handlelength": 3.5})
rcParams.update({"axes.titlelocation": "left", "axes.titlesize": 10, "svg.hashsalt": "fixed"})

JINJA = jinja2.Environment(autoescape=True, trim_blocks=True)
PAGE = JINJA.from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ folder }}</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 62em; margin: 2em auto; padding: 0 1em; overflow-wrap: break-word }
img { width: 100% } table { margin: 1em 0 }
h2, h3 { margin: 1.5em 0 0; white-space: pre-wrap }
td { vertical-align: top; padding-right: min(1.5em, 2vw) }
td:nth-child(2):last-child { overflow-wrap: anywhere }
.answer { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap }
.answer span { margin-right: 2px; border-bottom: 2px solid transparent }
.answer .fork { border-color: CanvasText }
</style>
{% macro draw(pieces) %}<div class="answer">{% for piece in pieces %}<span
{%- if piece.fork %} class="fork"{% endif %} title="{{ piece.title }}"
{%- if piece.colour %} style="background: {{ piece.colour }}; color: #111"{% endif %}>
{{- piece.text }}</span>{% endfor %}</div>{% endmacro %}
<h1>{{ folder }}</h1>
<p>{{ summary }}</p>
{% for narrow, wide in curves %}
<picture><source media="(max-width: 700px)" srcset="{{ narrow }}">
<img src="{{ wide }}" alt="curves over the training steps"></picture>
{% endfor %}
{% for table in tables %}<table>
{% for row in table %}<tr>
{% for cell in row %}<td>{{ cell | replace("± ", "±\u00a0") | replace(" %", "\u00a0%") }}</td>
{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% for run in runs %}
{% set steps = run.samples | groupby("step") %}
{% for step, samples in steps[:1] + steps[1:][-1:] %}
<h2>Worst and best answers at step {{ step }} ({{ run.kind }}
{%- if samples[0].threshold %}, forks from {{ "%.3g" % samples[0].threshold }} nats{% endif -%}
)</h2>{{ draw(LEGEND) }}
{% for group in extremes(samples)[:32 // runs | length] %}
<h3>{{ group[0].question }} (target: {{ group[0].target }})</h3>
{% for sample in group %}{{ verdict(sample) }}{{ draw(pieces(sample)) }}
{% if sample.tokens | length < sample.length %}(the rest was not logged){% endif %}{% endfor %}
{% endfor %}
{% else %}<p>No answers were logged.</p>{% endfor %}{% endfor %}
</html>
""")
PICTURE = JINJA.from_string("""<svg xmlns="http://www.w3.org/2000/svg" fill="#797979"
 width="{{ width }}" height="{{ height }}" viewBox="0 0 {{ width }} {{ height }}"
 font-family="monospace" font-size="15">
{% for cell in cells %}<g transform="translate({{ cell.x }} {{ cell.y }})">
{% if cell.colour %}<rect width="{{ cell.w }}" height="22" fill="{{ cell.colour }}"/>{% endif %}
{% if cell.fork %}<rect width="{{ cell.w }}" y="22" height="3"/>{% endif %}
<text y="16" textLength="{{ cell.w }}"{% if cell.colour %} fill="#111"{% endif %}>
{{- cell.text | replace(" ", "\u00a0") }}</text></g>{% endfor %}</svg>
""")


def refuse(message):
    """End with one line on the screen, and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


class Run:
    """A run; or a look, which has no log."""

    def __init__(self, folder):
        self.folder = folder
        [self.config], self.log, self.samples = (read(folder / name) for name in FILES)

    @property
    def kind(self):
        """The tokens that it trains on: "top 20 %", "bottom 80 %", "all"."""
        tokens, rho = self.config["tokens"], self.config["rho"]
        share = 1 - rho if tokens == "bottom" else rho
        return tokens if tokens == "all" else f"{tokens} {100 * share:.3g} %"

    def curve(self, key):
        """{step: value}, without steps at which the value is missing or not finite."""
        return {each["step"]: each[key] for each in self.log if is_number(each.get(key))}


def is_number(value):
    """Whether a value from a file is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def read(path):
    """The objects in a file: one in a .json file; one a line, or none, in a .jsonl file."""
    try:
        text = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        lines = text.split("\n") if path.suffix == ".jsonl" else [text]
        records = [json.loads(line) for line in lines if text or path.suffix == ".json"]
    except ValueError as error:
        refuse(f"{path}: {error}")
    for name in FILES[path.name].split():
        if not all(isinstance(record, dict) and name in record for record in records):
            refuse(f"{path}: was not written by forking.py ({name!r} is missing)")
    return records


def load(folder):
    """{kind of tokens: [Run, ...]} of a run or a look, or of the runs in a folder's folders."""
    alone = (folder / "config.json").exists()
    paths = [folder] if alone else [path.parent for path in folder.glob("*/metrics.jsonl")]
    runs = [Run(path) for path in sorted(paths)]
    for run in runs:
        for flag in sorted((runs[0].config | run.config).keys() - FREE.split()):
            if run.config.get(flag) != runs[0].config.get(flag):
                refuse(f"{runs[0].folder} and {run.folder} cannot be compared: other {flag}")
    kinds = {name: [run for run in runs if run.config["tokens"] == name] for name in LOOKS}
    if not any(kinds.values()):
        refuse(f"{folder}: holds no run, no look, and no folders of runs")
    return {name: members for name, members in kinds.items() if members}


def points(runs, key):
    """Steps, means over the runs, and a band: from lowest to highest, or ± a run's stderr."""
    curves = [run.curve(key) for run in runs]
    stderr = runs[0].curve("stderr") if key == "accuracy" and len(runs) == 1 else {}
    rows = []
    for step in sorted(set.intersection(*map(set, curves))):
        values = [curve[step] for curve in curves]
        error = stderr.get(step, 0)
        rows.append((step, fmean(values), min(values) - error, max(values) + error))
    return list(zip(*rows, strict=True)) or [()] * 4


def draw_curves(kinds, columns, compare):
    """Draw the panels of a run, or the first three for a comparison -> SVG."""
    panels = [*PANELS.items()][: 3 if compare else 6]
    rows = len(panels) // columns
    last = max(each["step"] for runs in kinds.values() for run in runs for each in run.log)
    figure = Figure((3.3 * columns, 2.4 * rows + 0.3 * compare), layout="constrained")
    for number, (title, names) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number, title=title, xlabel="training step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        [nothing] = axes.plot((0, max(last, 1)), (0, 0), linewidth=0)
        nothing.sticky_edges.y.append(0)  # the axis begins at 0
        for kind, runs in kinds.items():
            looks = [LOOKS[kind], SECOND][: 1 if compare else 2]
            for (key, name), look in zip(names.items(), looks, strict=False):
                steps, values, low, high = points(runs, key)
                every = len(steps) // 15 + 1  # points for a marker
                axes.plot(steps, values, label=name, markersize=4, markevery=every, **look)
                axes.fill_between(steps, low, high, color=look["color"], alpha=0.2, lw=0)
        if not any(len(line.get_xdata()) for line in axes.lines[1:]):
            axes.text(0.5, 0.5, "nothing logged", ha="center", transform=axes.transAxes)
            axes.set_yticks([])
        elif len(names) > 1 and not compare:
            axes.legend()
    if compare:
        labels = [runs[0].kind for runs in kinds.values()]
        figure.legend(axes.lines[1:], labels, loc="outside upper left", ncols=2 * columns)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def with_interval(values, form=".3f"):
    """The mean of values as text, ± half its 95 % interval, which needs two; "-" for none."""
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else "-"
    t = STUDENT[min(len(values), 10) - 2]  # for more than 10, a little too wide
    return f"{fmean(values):{form}} ± {t * stdev(values) / math.sqrt(len(values)):.3f}"


def comparison_table(kinds):
    """(a sentence, rows of texts) on the last step at which all runs were evaluated."""
    runs = [run for members in kinds.values() for run in members]
    shared = set.intersection(*(set(run.curve("accuracy")) for run in runs))
    if not shared:
        return "There is no step at which all runs were evaluated.", []
    end, rows = max(shared), [["tokens", "seeds", "accuracy", "minus all", "seconds"]]
    whole = {run.config["seed"]: run.curve("accuracy")[end] for run in kinds.get("all", [])}
    for name, members in kinds.items():
        scores = {run.config["seed"]: run.curve("accuracy")[end] for run in members}
        pairs = [scores[seed] - whole[seed] for seed in scores if seed in whole]
        seconds = fmean(run.curve("seconds").get(end, math.nan) for run in members)
        row = [members[0].kind, str(len(scores)), with_interval([*scores.values()])]
        row.append(with_interval(pairs, "+.3f") if name != "all" else "-")
        rows.append([*row, f"{seconds:.0f}"])
    return COMPARED.format(end), rows


def pieces(sample):
    """What to draw of each token of an answer."""
    for token, H, logp in zip(sample["tokens"], sample["entropy"], sample["logp"], strict=True):
        H, logp = (value if is_number(value) else math.nan for value in (H, logp))
        text = token.replace(" ", "␣") if token.isspace() else token
        yield {
            "text": text.replace("\t", "→\t").replace("\n", "↵\n"),
            "colour": [None, *[colour for least, colour in HEAT.items() if least <= H]][-1],
            "fork": is_number(sample.get("threshold")) and sample["threshold"] <= H,
            "title": f"entropy {H:.3g} nats, probability {math.exp(logp):.3g}",
        }


def verdict(sample):
    """How an answer was graded, in words."""
    words = {0: "wrong", 1: "right"}.get(sample["reward"], "graded")
    cut = f", cut off after {sample['length']} tokens" if sample["truncated"] else ""
    return f"{words} (reward {sample['reward']:.3g}){cut}"


def extremes(samples):
    """Of each question, a list: an answer with the lowest reward, and one with the highest."""
    groups = {}
    for sample in sorted(samples, key=lambda sample: sample["reward"]):
        groups.setdefault(sample["question"], []).append(sample)
    return [[group[0], group[-1]] if group[1:] else group for group in groups.values()]


def draw_answers(first, last, question):
    """Draw the first Run's wrong answer to a question, or to any, and the last's right one."""
    right = {group[-1]["question"]: group[-1] for group in extremes(last.samples)}
    for wrong, *_more in extremes(first.samples):
        name = wrong["question"]
        if question in (None, name) and wrong["reward"] < right.get(name, wrong)["reward"]:
            break
    else:
        refuse("no question has a wrong and a right answer")
    rows = [[{"text": f"{name}  (target: {wrong['target']})"}]]
    for run, sample in (first, wrong), (last, right[name]):
        whose = f"{run.config['model']}: " if last is not first else ""
        rows += [[], [{"text": whose + verdict(sample)}], pieces(sample)]
    cells, y = [], 0
    for row in [*rows, [], LEGEND]:
        x = 0
        for piece in row:
            cells.append(piece | {"x": x, "y": y, "w": 9 * len(piece["text"])})
            x += cells[-1]["w"] + 2
        y += 28 if x else 12
    width = max(cell["x"] + cell["w"] for cell in cells)
    return PICTURE.render(cells=cells, width=width, height=y)


def summary(run):
    """What a run has come to, or how many answers a look has."""
    if not run.log:
        return f"{len(run.samples)} answers, the best and the worst of each group; no training."
    accuracy, stderr = run.curve("accuracy"), run.curve("stderr")
    steps = [*accuracy][:1] + [*accuracy][1:][-1:]  # the first and the last
    ends = [f"{accuracy[i]:.3f} ± {stderr.get(i, math.nan):.3f} at step {i}" for i in steps]
    return f"Accuracy (± its standard error): {' → '.join(ends) or 'not measured'}."


def write_page(folder):
    """Write FOLDER/report.html, and FOLDER/curves.svg if there is a log."""
    kinds = load(folder)
    runs = [members[0] for members in kinds.values()]
    compare = runs[0].folder != folder
    told = [flag for flag in SETTINGS.split() if not compare or flag not in FREE.split()]
    tables = [[(flag.replace("_", " "), runs[0].config.get(flag, "-")) for flag in told]]
    text, curves = summary(runs[0]), []
    if compare:
        text, rows = comparison_table(kinds)
        tables.insert(0, rows)
        print(text, *["".join(f"{cell:<18}" for cell in row) for row in rows], sep="\n")
    if runs[0].log:
        pictures = [draw_curves(kinds, columns, compare) for columns in (1, 3)]
        (folder / "curves.svg").write_text(pictures[1], encoding="utf-8")
        encoded = [base64.b64encode(picture.encode()).decode() for picture in pictures]
        curves = [[f"data:image/svg+xml;base64,{picture}" for picture in encoded]]
    values = {"folder": folder, "runs": runs, "summary": text, "curves": curves}
    page = PAGE.render(globals() | values, tables=tables)
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")
    print(folder / "report.html")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--answers", type=Path, metavar="OUT.svg", help="draw two answers")
    parser.add_argument("--question", help="with --answers: to which question")
    args = parser.parse_args(argv)
    if args.answers:
        runs = [next(iter(load(folder).values()))[0] for folder in args.folders]
        args.answers.write_text(draw_answers(runs[0], runs[-1], args.question), "utf-8")
    else:
        for folder in args.folders:
            write_page(folder)


if __name__ == "__main__":
    main()
