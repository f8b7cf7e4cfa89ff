"""The tests of report.py and heat.py."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent.parent


def load_module(name):
    """tiny_data/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"tiny_data/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report = load_module("report")
heat = load_module("heat")
forking = heat.forking

CONFIG = {
    "model": "tiny_data/gpt2",
    "data": "train.jsonl",
    "eval_data": None,
    "seed": 0,
    "tokens": "top",
    "rho": 0.2,
    "steps": 4,
    "base": None,
}
HEAT = {"threshold": 0.125, "temperatures": [0, 1, 2]}
HEAT |= {"forks": [0.9, 0.8, 0.7], "rest": [0.9, 0.8, 0.1]}


def log(accuracies, tokens_per_step=1000):
    """A log in which step n was evaluated, unless accuracies[n] is None."""
    history = []
    for step, accuracy in enumerate(accuracies):
        metrics = {"step": step, "tokens": step * tokens_per_step, "seconds": 2.0 * step}
        if step:
            metrics |= {"reward": 0.5, "length": 24.0, "loss": 0.1, "entropy": 0.07}
            metrics |= {"threshold": 0.02, "kept": 0.2}
        if accuracy is not None:
            metrics |= {"accuracy": accuracy, "stderr": 0.01, "pass_at_k": 0.9}
        history.append(metrics)

    return history


def sample(step, tokens=("2", "*", "8"), entropy=(0.001, 0.5, 2.0), **more):
    """An answer as in samples.jsonl."""
    record = {"step": step, "question": "2*8=?", "target": "16", "reward": 1.0}
    record |= {"finished": True, "length": len(tokens), "tokens": list(tokens)}
    record |= {"entropy": list(entropy), "logp": [-0.5] * len(tokens)}
    return record | {"threshold": 1.0} | more


def write(folder, config, history=None, samples=None):
    """A folder as forking.py writes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    for name, records in ("metrics", history), ("samples", samples):
        if records is not None:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{name}.jsonl").write_text(lines)

    return folder


def write_comparison(folder, seeds=(0, 1, 2)):
    """Four arms; seed n is better than seed 0 by n / 10."""
    for seed in seeds:
        better = np.array([0.1, 0.3, 0.5]) + seed / 10
        for tokens in ("top", "all", "random", "bottom"):
            settings = {"tokens": tokens, "seed": seed}
            write(folder / f"{tokens}-{seed}", settings, log(better.tolist(), 1000 + seed))

    return folder


def make(folder, capsys, *flags):
    """(the page that is made of a folder, what is printed before the last line)."""
    report.main([str(folder), *flags])
    printed = capsys.readouterr().out
    last = f"wrote {folder / 'report.html'}\n"
    assert printed.endswith(last)
    return (folder / "report.html").read_text("utf-8"), printed.removesuffix(last)


def page(folder, capsys, *flags):
    """The text of the page that is made of a folder."""
    return make(folder, capsys, *flags)[0]


class Tags(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, text):
        """Read the page."""
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        """Note a tag."""
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        """Note a text."""
        self.texts.append(data)


def test_a_curve_is_the_mean_of_the_seeds_and_its_band_their_range():
    runs = [log([0.1, 0.3]), log([0.2, 0.5], 1100), log([0.6, 0.4], 1200)]

    tokens, mean, low, high = report.curve(runs, "tokens")

    assert np.allclose(tokens, [0, 1100])
    assert np.allclose(mean, [0.3, 0.4])
    assert np.allclose(low, [0.1, 0.3])
    assert np.allclose(high, [0.6, 0.5])


def test_a_chart_has_mean_and_band_where_they_belong():
    runs = [log([0.1, 0.3]), log([0.2, 0.5], 1100), log([0.6, 0.4], 1200)]
    left, right, top, bottom = report.LEFT, report.RIGHT, report.TOP, report.BOTTOM

    def place(x, y):
        return f"{left + x * (right - left):.1f},{bottom - y * (bottom - top):.1f}"

    for key in "tokens", "step":
        chart = report.accuracy_chart("title", {"top 0.2": runs}, key)
        assert f'<polyline points="{place(0, 0.3)} {place(1, 0.4)}"' in chart
        edge = f"{place(0, 0.1)} {place(1, 0.3)} {place(1, 0.5)} {place(0, 0.6)}"
        assert f'<polygon points="{edge}"' in chart

    assert "<polygon" not in report.accuracy_chart("title", {"top 0.2": runs[:1]}, "tokens")


def test_only_evaluations_that_all_runs_have_count():
    arms = {
        "top 0.2": [log([0.1, 0.2, 0.3]), log([0.1, None, 0.5])],
        "all": [log([0.2, 0.3, 0.4])],
    }

    shared = report.only_shared_evaluations(arms)

    for history in shared["top 0.2"] + shared["all"]:
        assert [m["step"] for m in report.evaluations(history)] == [0, 2]
    assert np.allclose(report.curve(shared["top 0.2"], "step")[1], [0.1, 0.4])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.07), (-0.21, 0.004), (0, 570.3), (3, 4)]
)
def test_ticks_are_round_and_cover_what_is_drawn(low, high):
    ticks = report.ticks(low, high)

    assert ticks[0] <= low and ticks[-1] >= high * (1 - 1e-6)
    assert 4 <= len(ticks) <= 9
    digits = f"{ticks[1] - ticks[0]:.6e}"
    assert re.match(r"[125]\.0+e", digits)


def test_what_a_model_wrote_is_shown_and_does_nothing(tmp_path, capsys):
    nasty = ["<script>alert(1)</script>", "\x1b[31m\x00\r\u202e", '"><img src=x>', "\ud83d"]
    answer = sample(1, nasty, [0.1] * 4, threshold=0.1, question="<i>", target="<a>", reward=0)
    folder = write(tmp_path / "run", {"model": "<link>"}, log([0.1, 0.2]), [answer, answer])

    text = page(folder, capsys)

    seen = Tags(text)
    assert not {"script", "link", "img", "iframe", "i", "a"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "src"]
    assert "://" not in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
    for shown in nasty[0], "␛[31m␀␍\\u202e", nasty[2], "\\ud83d", "<i>", "<a>":
        assert shown in seen.texts


def test_page_of_a_run(tmp_path, capsys):
    samples = [
        sample(1),
        sample(1, reward=0.0),
        sample(4),
        sample(4, finished=False, length=500),
    ]
    folder = write(tmp_path / "run", {}, log([0.25, None, 0.5, None, 0.75]), samples)

    text, printed = make(folder, capsys)

    assert printed == ""
    for shown in (
        "tiny_data/gpt2",
        "train.jsonl",
        "4,000 tokens in 8 seconds",
        "accuracy first 0.250, last 0.750",
        "the 20 % of the answer tokens with the highest entropy",
        "thousands of tokens generated",
        "the known answer is <b>16</b>",
        "cut off after 500 tokens",
        "only the first 3 of 500 tokens are shown",
        "Before (step 1, by the untrained model)",
        "At the end (step 4)",
        "threshold 0.02",
        '<span class="heat0" title="0.001 nats; probability 60.7%">2</span>',
        '<span class="heat3 fork" title="2.000 nats; probability 60.7%">8</span>',
        "<td><code>8</code></td><td>2.0000</td><td>2</td>",
        "tokens that occur 2 times or more",
    ):
        assert shown in text
    assert text.count("the known answer") == 1
    assert text.count("<svg") == 5
    assert not re.search(r"\brange\b|\bband\b|seeds&#x27;|seeds'", text)


def test_every_bar_of_the_histogram_is_a_share_of_the_tokens():
    records = [sample(1, entropy=[0.0, 0.0005, 0.02, 5.0])]

    chart = report.entropy_histogram("title", records, 0.02)

    heights = re.findall(r'class="mid small">([^<]*)<', chart)
    assert heights == ["50", "0", "0", "25", "0", "0", "0", "0", "25"]


def test_a_run_without_evaluations_samples_or_steps_has_a_page(tmp_path, capsys):
    history = [m | {"loss": None, "entropy": None} for m in log([None, None])[1:]]

    text = page(write(tmp_path / "run", {}, history), capsys)
    nothing = page(write(tmp_path / "nothing", {}, []), capsys)

    for shown in (
        "There were no evaluations",
        "No samples were kept",
        "No step has logged its entropy",
    ):
        assert shown in text and shown in nothing
    assert "<svg" not in nothing


def test_lines_that_a_kill_cut_off_are_skipped(tmp_path, capsys):
    folder = write(tmp_path / "run", {}, log([0.25, 0.5]), [sample(1)])
    for name in "metrics", "samples":
        with open(folder / f"{name}.jsonl", "ab") as file:
            file.write('{"step": 2, "question": "é'.encode()[:-1])

    assert "last 0.500" in page(folder, capsys)


def write_uneven_comparison(folder):
    """top with three seeds, one of which was evaluated more often; all with one seed."""
    for seed, accuracies in enumerate(
        ([0.2, 0.9, 0.6, 0.9], [0.2, None, 0.5, 0.8], [0.2, None, 0.7, 0.7])
    ):
        write(folder / f"top-{seed}", {"seed": seed}, log(accuracies))
    write(folder / "all-0", {"tokens": "all"}, log([0.2, None, 0.6, 0.4]))
    return folder


def test_the_rows_of_a_comparison_are_what_one_gets_by_hand(tmp_path):
    _, _, scored, _ = report.read_comparison(write_uneven_comparison(tmp_path / "comparison"))

    top = report.summary("top 0.2", scored["top 0.2"])
    one = report.summary("all", scored["all"])

    # Step 1 does not count: only one run was evaluated there.
    assert top.pop("tokens") == "top 0.2" and one.pop("tokens") == "all"
    for row, expected in (
        (
            top,
            {"accuracy": 0.8, "interval": 4.303 * 0.1 / math.sqrt(3), "best": 0.8, "seeds": 3},
        ),
        (top, {"area": (0.4 * 2 + 0.7) / 3, "to_60": (2 + 3 + 2) / 3, "to_80": math.nan}),
        (top, {"length": 24.0, "entropy": 0.07, "kept": 0.2, "seconds": 6.0}),
        (one, {"accuracy": 0.4, "interval": math.nan, "best": 0.6, "seeds": 1, "to_60": 2}),
        (one, {"area": (0.4 * 2 + 0.5) / 3, "to_80": math.nan}),
    ):
        found = {key: row[key] for key in expected}
        assert found == pytest.approx(expected, nan_ok=True)
    assert len(top) == len(one) == 11


@pytest.mark.parametrize(("n", "factor"), [(2, 12.706), (3, 4.303), (10, 2.262), (40, 2.262)])
def test_the_interval_is_students(n, factor):
    values = np.random.default_rng(0).normal(size=n)

    half = factor * np.sqrt(np.sum((values - values.mean()) ** 2) / (n - 1) / n)

    assert report.half_interval(values) == pytest.approx(half)
    assert math.isnan(report.half_interval(values[:1]))


def test_an_arm_that_was_only_evaluated_before_training_has_a_row():
    row = report.summary("all", [log([0.25])])

    assert row["accuracy"] == row["best"] == 0.25
    assert math.isnan(row["area"]) and math.isnan(row["length"])


def test_page_of_a_comparison(tmp_path, capsys):
    folder = write_comparison(tmp_path / "comparison")

    text, printed = make(folder, capsys)

    lines = printed.splitlines()
    names = ["top 0.2", "all", "random 0.2", "bottom 0.8"]
    headings = "tokens accuracy, 95% best area to .60 to .80 length entropy kept seconds seeds"
    assert " ".join(lines[0].split()) == headings
    assert [line[:12].strip() for line in lines[1:]] == names
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 100
    assert (
        " ".join(lines[1].split()[2:]) == "0.600 ± 0.248 0.600 0.400 — — 24.0 0.070 20.0% 4 3"
    )
    cells = "</td><td>".join(lines[1].split()[5:])
    assert f"<td>top 0.2</td><td>0.600 ± 0.248</td><td>{cells}</td>" in text
    assert "mean and range of 3 seeds" in text
    assert "accuracy first 0.200, last 0.600" in text
    assert text.count("<polygon") == 2 * 4
    assert all(colour in text for colour in report.COLOURS.values())


def test_one_seed_has_no_range(tmp_path, capsys):
    text, printed = make(write_comparison(tmp_path / "comparison", seeds=[0]), capsys)

    assert not re.search(r"\brange\b|\bband\b|seeds'", text)
    assert "<polygon" not in text
    assert "0.500 ±     —  " in printed


def test_a_long_comparison_fits_on_the_screen(tmp_path, capsys):
    for tokens, rho in ("top", 0.025), ("bottom", 0.025), ("random", 0.333), ("all", 0.2):
        history = log([0.2, 0.8])
        history[-1] |= {"length": 12345.6, "seconds": 1e6, "kept": 1.0}
        write(tmp_path / f"comparison/{tokens}", {"tokens": tokens, "rho": rho}, history)

    text, printed = make(tmp_path / "comparison", capsys)

    assert max(map(len, printed.splitlines())) <= 100


def test_a_comparison_without_evaluations_has_a_page(tmp_path, capsys):
    write(tmp_path / "comparison/top-0", {}, log([None, None]))

    assert "There is no step at which every run was evaluated" in page(
        tmp_path / "comparison", capsys
    )


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_the_picture_of_a_comparison(tmp_path, capsys, seeds):
    folder, path = write_comparison(tmp_path / "comparison", seeds), tmp_path / "picture.svg"
    for seed in seeds:
        write(folder / f"top-0.5-{seed}", {"rho": 0.5, "seed": seed}, log([0.1, 0.2, 0.3]))

    report.main([str(folder), "--svg", str(path)])

    assert capsys.readouterr().out == f"wrote {path}\n"
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(path).getroot()
    texts = [element.text for element in root.iter(f"{svg}text")]
    for name in "top 0.2", "all", "random 0.2", "bottom 0.8", "top 0.5", "step", "accuracy":
        assert name in texts
    assert root.find(f"{svg}title").text == texts[0]
    assert ("range" in texts[0]) == (len(seeds) > 1)

    lines = root.findall(f"{svg}polyline")[:5]
    assert len({(line.get("stroke"), line.get("stroke-dasharray")) for line in lines}) == 5
    assert lines[0].get("stroke") == lines[4].get("stroke") == report.COLOURS["top"]


def test_page_of_a_look(tmp_path, capsys):
    records = [sample(0, question=f"question {n}") for n in range(29)]
    folder = write(tmp_path / "look", {"eval_data": "test.jsonl"}, None, records)

    text, printed = make(folder, capsys)

    asked = re.findall(r"question (\d+)<", text)
    assert asked == ["0", "4", "8", "12", "16", "20", "24", "28"]
    assert "<dd>train.jsonl</dd>" in text  # what --show asks
    for shown in (
        "Of 87 answer tokens, 33.33 % have an entropy below 0.01 nats (paper, Qwen3-8B: 50.64",
        "The 80th percentile is 2 nats (paper: 0.672).",
        "0.0010 0.0010 0.0010 0.5000 0.5000 0.5000 2.0000 2.0000 2.0000",
        f"python tiny_data/heat.py {folder}",
    ):
        assert shown in text
        assert shown in " ".join(printed.split())
    printed = " ".join(printed.split())
    assert "count): '8' 2.000 (29), '*' 0.500 (29)." in printed
    assert "count): '2' 0.001 (29)." in printed
    assert "<td><code>8</code></td><td>2.0000</td><td>29</td>" in text
    assert text.count("<svg") == 1
    marked = re.findall(r'class="(heat. ?\w*)" title="([\d.]+) nats', text)
    assert set(marked) == {("heat0", "0.001"), ("heat2", "0.500"), ("heat3 fork", "2.000")}
    assert "of the base" not in text + printed


def test_a_look_draws_what_heat_has_measured(tmp_path, capsys):
    folder = write(tmp_path / "look", {}, None, [sample(0)])
    (folder / "heat.json").write_text(json.dumps(HEAT))

    text, printed = make(folder, capsys)

    assert text.count("<svg") == 2
    assert "forks: from 0.125 nats" in text
    assert "heat.py" not in text + printed


def test_a_measurement_older_than_the_look_is_not_drawn(tmp_path):
    (tmp_path / "samples.jsonl").write_text("")
    (tmp_path / "heat.json").write_text(json.dumps(HEAT))
    assert report.is_heated(tmp_path)
    os.utime(tmp_path / "heat.json", (1, 1))
    assert not report.is_heated(tmp_path)


def test_a_look_says_what_training_has_changed(tmp_path, capsys):
    base = np.arange(20) / 10
    entropy = base.copy()
    entropy[19], entropy[0] = 0.0, 5.0  # one of the base's four forks is none any more
    parts = []
    for n in range(0, 20, 5):
        lists = {"entropy": entropy[n : n + 5].tolist()}
        lists |= {"tokens": list("abcde"), "logp": [0] * 5, "length": 300 + n}
        parts.append(sample(0) | lists | {"base_entropy": base[n : n + 5].tolist()})
    folder = write(tmp_path / "look", {"base": "tiny_data/<gpt2>"}, None, parts)

    text, printed = make(folder, capsys)

    printed = " ".join(printed.split())
    for shown in (
        "Of 20 answer tokens (the first 300 of each answer)",
        "75.0 % of the base's top 20 % of the tokens are in this model's top 20 % "
        "(paper: 86.67 %; by chance: 20 %).",
        "highest: +2.500 +0.000 +0.000 +0.000 +0.000 +0.000 +0.000 +0.000 +0.000 -0.950 nats",
    ):
        assert shown in printed and shown.replace("'", "&#x27;") in text
    assert "tiny_data/&lt;gpt2&gt;" in text
    assert text.count("<svg") == 2


def test_of_equal_entropies_the_first_are_the_top_fifth():
    assert report.top_fifth(np.array([1.0, 2, 1, 1, 1, 1])).tolist() == [1, 0]
    for n in 5, 6, 35, 1000:
        assert len(report.top_fifth(np.zeros(n))) == math.ceil(n / 5)


@pytest.mark.parametrize(
    ("kind", "flags", "listed"),
    [
        ("look", [], False),
        ("run", [], True),
        ("look", ["--min-count", "4"], True),
        ("run", ["--min-count", "5"], False),
    ],
)
def test_rare_tokens_are_not_listed(tmp_path, capsys, kind, flags, listed):
    history = log([0.1, 0.2]) if kind == "run" else None
    folder = write(tmp_path / kind, {}, history, [sample(1, tokens="ab*")] * 4)

    text = page(folder, capsys, *flags)

    assert ("<code>*</code>" in text) == listed


def test_what_a_model_wrote_does_not_reach_the_terminal(tmp_path, capsys):
    record = sample(0, ["\x1b[31m", "\r\n", "\u202e"])
    _, printed = make(write(tmp_path / "look", {}, None, [record] * 5), capsys)

    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", printed)
    assert "'␛[31m'" in printed and "'␍↵'" in printed


@pytest.mark.parametrize("name", ["nothing", "empty", "broken", "cut", "silent"])
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    (write(tmp_path / "broken", {}, []) / "config.json").write_text("{")
    (write(tmp_path / "cut", {}, []) / "metrics.jsonl").write_text('{"step\n{"step": 1}\n')

    write(tmp_path / "silent", {}, None, [])

    with pytest.raises(SystemExit) as error:
        report.main([str(tmp_path / name)])

    printed = capsys.readouterr()
    assert error.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("report.py: ")
    assert str(tmp_path / name) in printed.err


# ------------------------------------------------------------------------------- gradient


def gradient(rng, groups, top, bottom, noise=0.3):
    """What --show writes, for groups of 2 forks and 8 others whose mean gradients are known."""
    slopes = np.concatenate([np.tile(top / 2, (2, 1)), np.tile(bottom / 8, (8, 1))])
    slopes = slopes + noise * rng.normal(size=(groups, 10, len(top)))
    kept = {"all": np.ones((groups, 10), bool)}
    kept["top"] = np.arange(10) < 2 * kept["all"]
    kept["random"] = rng.permuted(np.arange(groups * 10) < 2 * groups).reshape(groups, 10)

    number = np.arange(groups)
    found = {"groups": groups + 1, "mixed": groups, "rho": 0.2}
    found |= {"group": np.repeat(number, 10), "entropy": np.ravel(kept["top"] + 0.5)}
    for kind, keep in kept.items():
        total = (slopes * keep[..., None]).sum(1)
        opposite = [total[number % 2 == 1].sum(0), total[number % 2 == 0].sum(0)]
        gains = [each @ opposite[n % 2] for n, each in enumerate(slopes)]
        found |= {kind: keep.ravel(), f"gain from {kind}": np.ravel(gains)}

    return found


def write_gradient(folder, found):
    """gradient.json in the folder of a look."""
    lists = {name: np.array(value).tolist() for name, value in found.items()}
    (folder / "gradient.json").write_text(json.dumps(lists))


TOP, BOTTOM = np.eye(40)[:2] * [[1.0], [0.5]]  # of the gradient, 1 / 1.25 and 0.25 / 1.25
KNOWN = {"top": 0.8, "bottom": 0.2, "random": 0.2}


def test_without_noise_shares_and_cosines_are_exact():
    found = gradient(np.random.default_rng(0), 8, TOP, BOTTOM, noise=0)

    rows = report.gradient_rows(found)

    assert rows["top"] == pytest.approx((0.8, 0, math.sqrt(0.8), 0), abs=1e-9)
    assert rows["bottom"] == pytest.approx((0.2, 0, math.sqrt(0.2), 0), abs=1e-9)


def test_leaving_out_a_group_is_measuring_without_it():
    """Both its tokens' gains and what the others gain from its tokens."""
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=(7, 10, 5))
    keep = {"all": np.ones((7, 10), bool), "top": rng.random((7, 10)) < 0.4}
    keep["random"] = rng.random((7, 10)) < 0.4
    number = np.arange(7)
    found = {"mixed": 7, "group": np.repeat(number, 10)}
    for kind, chosen in keep.items():
        total = (slopes * chosen[..., None]).sum(1)
        gains = [slopes[n] @ total[number % 2 != n % 2].sum(0) for n in number]
        found |= {kind: chosen.ravel(), f"gain from {kind}": np.ravel(gains)}
    keep["bottom"] = ~keep["top"]

    for part, kind in ("top", "all"), ("bottom", "bottom"), ("random", "all"):
        found_products = report.inner_product(found, part, kind)
        a, b = ((slopes * keep[name][..., None]).sum(1) for name in (part, kind))
        for left_out in (None, *number):
            even = number[(number % 2 == 0) & (number != left_out)]
            odd = number[(number % 2 == 1) & (number != left_out)]
            expected = a[even].sum(0) @ b[odd].sum(0) + a[odd].sum(0) @ b[even].sum(0)
            place = 0 if left_out is None else left_out + 1
            assert found_products[place] * len(even) * len(odd) == pytest.approx(expected)


def test_the_intervals_of_the_shares_hold_what_they_should():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        rows = report.gradient_rows(gradient(rng, 24, TOP, BOTTOM, noise=0.1))
        hits.append(
            [abs(rows[part][0] - share) <= rows[part][1] for part, share in KNOWN.items()]
        )

    assert (np.mean(hits, 0) > 0.9).all()
    assert (np.mean(hits, 0) < 0.995).all()


@pytest.mark.parametrize(
    ("top", "bottom", "verdict"),
    [
        (TOP, 0 * BOTTOM, "should be as good as training on all"),
        (TOP, BOTTOM * 3, "should be worse than training on all"),
        (TOP, BOTTOM * 0.6, "cannot tell whether that is nearly all"),
        (0 * TOP, 0 * BOTTOM, "is not yet twice as large as its error"),
    ],
)
def test_a_look_predicts_from_the_gradient(tmp_path, capsys, top, bottom, verdict):
    folder = write(tmp_path / "look", {}, None, [sample(0)] * 5)
    found = gradient(np.random.default_rng(1), 32, top, bottom, 0.05)
    write_gradient(folder, found)

    text, printed = make(folder, capsys)

    whole = " ".join(printed.split())
    assert whole.index("32 of 33 groups") < 20 and verdict in whole and verdict in text
    assert ("--prompts-per-step" in whole) == ("cannot tell" in verdict or "yet" in verdict)
    told = "yet" not in verdict
    assert ("<h2>The policy gradient</h2>" in text) == told
    assert ("cosine with all" in printed) == told
    assert text.count("<svg") == 1 + told
    if told:
        share, error, cosine, _ = report.gradient_rows(found)["top"]
        assert f"carry {100 * share:.1f} % ± {100 * error:.1f} % of" in whole
        assert f"top 0.2 {100 * share:.1f} % ± {100 * error:.1f} % {cosine:.3f} ±" in whole


def test_a_part_without_slope_has_no_direction_and_the_tenths_add_up(tmp_path, capsys):
    folder = write(tmp_path / "look", {}, None, [sample(0)] * 5)
    found = gradient(np.random.default_rng(0), 16, TOP, 0 * BOTTOM, 0)
    write_gradient(folder, found | {"rho": 0.25})

    text, printed = make(folder, capsys)

    assert "the 25 % of the tokens" in " ".join(printed.split())
    assert re.search(r"bottom 0.75 +0.0 % ± 0.0 % +none of its own\n", printed)
    heights = re.findall(r'class="(?:mid small)">([^<]*)<', text)[:10]
    assert [float(height) for height in heights] == [50, 50, *[0] * 8]


@pytest.mark.parametrize("rho", [1.0, 0.2])
def test_every_share_of_tokens_has_a_report(tmp_path, capsys, rho):
    folder = write(tmp_path / "look", {}, None, [sample(0)] * 5)
    found = gradient(np.random.default_rng(0), 16, TOP, BOTTOM, 0.1)
    if rho == 1:
        for kind in "top", "random":
            found |= {kind: found["all"], f"gain from {kind}": found["gain from all"]}
    write_gradient(folder, found | {"rho": rho})

    assert f"bottom {1 - rho:.3g} " in make(folder, capsys)[1]


def test_too_few_groups_are_said_to_be_too_few(tmp_path, capsys):
    folder = write(tmp_path / "look", {}, None, [sample(0)] * 5)
    write_gradient(folder, {"groups": 32, "mixed": 3, "rho": 0.2})

    text, printed = make(folder, capsys)

    assert printed.startswith("Only 3 of 32 groups are partly right")
    assert "--prompts-per-step" in text and text.count("<svg") == 1


def test_what_show_writes_is_what_the_report_reads(tmp_path, capsys):
    out = tmp_path / "look"
    forking.main(["--show", "--model", str(HERE / "tiny_data/gpt2"), "--out", str(out),
        "--data", str(HERE / "tiny_data/test.jsonl"), "--prompts-per-step", "8"])  # fmt: skip
    capsys.readouterr()

    text, printed = make(out, capsys)

    found = report.read_gradient(out)
    assert found["mixed"] >= 4
    assert f"{found['mixed']} of 8 groups" in printed
    assert ("cosine" in text) == bool(report.gradient_rows(found))
    own = report.inner_product(found, "top", "top")
    again = report.inner_product(found, "top", "all") - report.inner_product(
        found, "top", "bottom"
    )
    assert again == pytest.approx(own)
    # <top, bottom> is the same as <bottom, top>, but for the error of finite differences.
    ways = [report.inner_product(found, *pair)[0] for pair in (("all", "top"), ("top", "all"))]
    assert ways[0] == pytest.approx(ways[1], rel=0.02)


# ------------------------------------------------------------------- files of another kind


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("heat.json", "{}"),
        ("heat.json", "[1]"),
        ("heat.json", json.dumps(HEAT | {"rest": [0.9, 0.8]})),
        ("heat.json", json.dumps(HEAT | {"rest": ["a", "b", "c"]})),
        ("heat.json", json.dumps(HEAT | {"threshold": None})),
        ("gradient.json", "7"),
        ("gradient.json", "{"),
        ("gradient.json", '{"groups": 8, "mixed": 8}'),
        ("gradient.json", '{"groups": 8, "mixed": 2, "rho": 0.2, "group": [0, 1]}'),
        ("config.json", "[]"),
        ("config.json", '{"architectures": ["GPT2"]}'),
        ("config.json", json.dumps(CONFIG | {"tokens": "some"})),
        ("samples.jsonl", '{"text": "a"}'),
        ("samples.jsonl", json.dumps(sample(0) | {"logp": [0.0]})),
        ("samples.jsonl", json.dumps(sample(0) | {"tokens": [1, 2, 3]})),
        ("samples.jsonl", json.dumps(sample(0, [], []))),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, capsys, name, content):
    folder = write(tmp_path / "look", {}, None, [sample(0)])
    (folder / name).write_text(content)

    with pytest.raises(SystemExit) as error:
        report.main([str(folder)])

    printed = capsys.readouterr()
    assert error.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"report.py: {folder / name}: ")


@pytest.mark.parametrize("change", ["groups", "some", "lengths"])
def test_lists_that_are_not_of_the_groups_are_refused(tmp_path, change):
    found = gradient(np.random.default_rng(0), 8, TOP, BOTTOM)
    if change == "groups":
        found["group"] = found["group"] + 1
    elif change == "some":
        del found["top"]
    else:
        found["top"] = found["top"][1:]
    write_gradient(tmp_path, found)

    with pytest.raises(report.FolderError, match="gradient.json"):
        report.read_gradient(tmp_path)


def test_a_log_of_another_kind_is_refused(tmp_path, capsys):
    folder = write(tmp_path / "run", {}, [{"loss": 1.0}])
    with pytest.raises(SystemExit):
        report.main([str(folder)])
    assert "metrics.jsonl: holds something else" in capsys.readouterr().err


# ------------------------------------------------------------------------ picture of answers


def svg_texts(path):
    """The lines of text in an SVG, and the classes of the pieces that say something."""
    root = ElementTree.parse(path).getroot()
    name = "{http://www.w3.org/2000/svg}"
    lines = ["".join(line.itertext()) for line in root.iter(f"{name}text")]
    return lines, [(piece.text, piece.get("class")) for piece in root.iter(f"{name}tspan")]


def test_the_picture_of_a_run_has_a_wrong_answer_before_and_a_right_one_after(tmp_path, capsys):
    samples = [
        sample(1, question="first"),
        sample(1, question="second", reward=0.0),
        sample(4, question="third", reward=0.0),
        sample(4, ["<a>", "\x1b", "&"], question="fourth"),
    ]
    folder = write(tmp_path / "run", {}, log([0.1, 0.2]), samples)

    report.main([str(folder), "--svg", str(tmp_path / "a.svg")])

    assert capsys.readouterr().out == f"wrote {tmp_path / 'a.svg'}\n"
    lines, pieces = svg_texts(tmp_path / "a.svg")
    assert lines[:6] == [
        "Before training (wrong: it is 16)", "second", "2*8",
        "After 4 steps (right)", "fourth", "<a>␛&",
    ]  # fmt: skip
    assert pieces[:3] == [("2", "heat0"), ("*", "heat2"), ("8", "heat3 fork")]
    assert "".join(lines[6:]).count("nats") == 1 and len(lines) == 7
    text = page(folder, capsys)
    for words in report.COLOUR_NAMES.values():
        assert words in lines[6] and words in text
    assert "://" not in (tmp_path / "a.svg").read_text("utf-8").replace(
        "http://www.w3.org/", ""
    )


@pytest.mark.parametrize("rewards", [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
def test_any_answers_make_a_picture(tmp_path, rewards):
    samples = [sample(n + 1, reward=reward) for n, reward in enumerate(rewards)]
    folder = write(tmp_path / "run", {}, log([0.1, 0.2]), samples)
    report.main([str(folder), "--svg", str(tmp_path / "a.svg")])
    lines, _ = svg_texts(tmp_path / "a.svg")
    assert [line for line in lines if "(right" in line or "(wrong" in line] == lines[:4:3]


def test_the_picture_of_a_look_is_of_one_answer_and_small(tmp_path):
    words = [f'"{n}&<' for n in range(300)]
    long = sample(0, words, [0.001, 0.1] * 150, question="why? " * 400, length=5000)
    folder = write(tmp_path / "look", {}, None, [long])

    report.main([str(folder), "--svg", str(tmp_path / "a.svg")])

    lines, pieces = svg_texts(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size <= 12_000
    assert lines[0] == "An answer (right)" and len(lines) == 7 and lines[5].endswith(" ...")
    assert max(map(len, lines[1:6])) <= report.COLUMNS_OF_TEXT + 4


def test_a_folder_without_answers_has_no_picture(tmp_path, capsys):
    folder = write(tmp_path / "run", {}, log([0.1, 0.2]))
    with pytest.raises(SystemExit):
        report.main([str(folder), "--svg", str(tmp_path / "a.svg")])
    assert "holds no answers" in capsys.readouterr().err


# --------------------------------------------------------------------------------- heat.py


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """A look at the tiny model, with three questions."""
    out = tmp_path_factory.mktemp("runs") / "look"
    forking.main(["--show", "--model", str(HERE / "tiny_data/gpt2"), "--out", str(out),
        "--data", str(HERE / "tiny_data/test.jsonl"), "--prompts-per-step", "3",
        "--max-new-tokens", "40", "--group-size", "4"])  # fmt: skip
    return out


def test_heat_changes_the_rows_it_should():
    fork, sure = [0.0, 0.0, 1.0], [0.0, 9.0, 0.0]  # 1.0 nats, and 0.0025
    logits = torch.tensor([[fork, sure]])

    def scaled(name, temperature):
        output = types.SimpleNamespace(logits=logits.clone())
        hook = heat.reheat(name, temperature, 0.5)
        return hook(None, None, output).logits[0]

    for temperature in 0.5, 1.0, 2.0:
        half = scaled("forks", temperature)
        assert torch.allclose(half[0], logits[0, 0] / temperature)
        assert torch.equal(half[1], logits[0, 1])
        half = scaled("rest", temperature)
        assert torch.equal(half[0], logits[0, 0])
        assert torch.allclose(half[1], logits[0, 1] / temperature)
    assert torch.softmax(scaled("forks", 0), -1)[0].tolist() == [0.0, 0.0, 1.0]


def test_heat_does_nothing_where_it_should_do_nothing(look):
    cfg, threshold = heat.read_look(look)
    model, tokenizer = forking.open_model(cfg, cfg.model)
    problems, _ = forking.load_questions(cfg, model, tokenizer)

    def measure(name, temperature, threshold):
        hook = heat.reheat(name, temperature, threshold)
        return heat.accuracy(model, tokenizer, problems[:3], cfg, hook)

    records = report.read_lines(look / "samples.jsonl")
    usual = np.mean([record["reward"] for record in records])
    assert measure("forks", 1, threshold) == measure("rest", 1, threshold) == usual
    for temperature in 0, 3:
        assert measure("rest", temperature, -1.0) == usual
    assert not model.sampler[0]._forward_hooks


def test_heat_writes_what_the_report_draws(look, capsys, monkeypatch):
    monkeypatch.setattr(heat, "TEMPERATURES", (0, 1))

    heat.main([str(look)])

    printed = capsys.readouterr().out
    found = json.loads((look / "heat.json").read_text())
    entropies = report.every(report.read_lines(look / "samples.jsonl"), "entropy")
    assert found["threshold"] == np.percentile(entropies, 80)
    assert found["temperatures"] == [0, 1] and found["forks"][1] == found["rest"][1]
    for name in "forks", "rest":
        assert f"{name:11}" + "".join(f"{value:7.3f}" for value in found[name]) in printed
    assert printed.endswith(f"python tiny_data/report.py {look}\n")
    text, printed = make(look, capsys)
    assert "heated or cooled" in text and "heat.py" not in text + printed


def test_the_threshold_of_heat_is_that_of_the_base(tmp_path):
    record = sample(0) | {"base_entropy": [0.0, 1.0, 3.0]}
    folder = write(tmp_path / "look", {"show": True, "rhos": [0.5]}, None, [record])

    cfg, threshold = heat.read_look(folder)

    assert threshold == pytest.approx(2.2)
    assert cfg.rhos == (0.5,)


@pytest.mark.parametrize("name", ["nothing", "run", "broken", "other", "silent", "moved"])
def test_heat_refuses_other_folders_in_one_line(tmp_path, capsys, name):
    write(tmp_path / "run", {}, log([0.1, 0.2]), [sample(1)])
    (write(tmp_path / "broken", {}, None, []) / "config.json").write_text("{")
    write(tmp_path / "other", {"architectures": ["GPT2"]}, None, [sample(0)])
    write(tmp_path / "silent", {"show": True}, None, [])
    write(tmp_path / "moved", {"show": True, "model": "no/such/model"}, None, [sample(0)])

    with pytest.raises(SystemExit) as error:
        heat.main([str(tmp_path / name)])

    printed = capsys.readouterr()
    assert error.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("heat.py: ")


def test_a_reader_that_goes_away_is_no_error(look):
    command = f"{sys.executable} tiny_data/report.py {look} | true"
    result = subprocess.run(command, shell=True, capture_output=True, cwd=HERE)
    assert result.stderr == b""
