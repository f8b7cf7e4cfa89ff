"""What report.py draws, against numbers worked out by hand."""

import json
import xml.etree.ElementTree as ET

import pytest
import report

FLAGS = {"model": "tiny", "data": "d.jsonl", "tokens": "top", "rho": 0.2, "seed": 0, "lr": 1e-3}
ANSWER = json.loads(r"""{"step": 1, "question": "1<2 & 3?", "target": "<b>", "reward": 0.0,
    "truncated": false, "length": 3, "threshold": 0.5, "tokens": ["<i>", "\n", "no"],
    "entropy": [0.5, 0.02, 0.0], "logp": [-1.3862943611198906, 0.0, -1.0]}""")


def write(folder, log=None, samples=None, **flags):
    """A folder as forking.py writes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(FLAGS | flags))
    for name, records in (("metrics.jsonl", log), ("samples.jsonl", samples)):
        if records is not None:
            (folder / name).write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def page(folder):
    """The page of a folder."""
    report.main([str(folder)])
    return (folder / "report.html").read_text(encoding="utf-8")


def refusal(capsys, *arguments):
    """The line with which report.py ends, with exit code 2."""
    with pytest.raises(SystemExit, match="^2$"):
        report.main([str(each) for each in arguments])
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def comparison(tmp_path):
    """Last accuracies of top and all with seeds 0 to 2, and of random with seeds 1 and 9."""
    kinds = {"top": {0: 0.90, 1: 0.94, 2: 0.92}, "random": {1: 0.60, 9: 0.80}}
    kinds["all"] = {0: 0.95, 1: 0.93, 2: 0.97}
    for tokens, ends in kinds.items():
        for seed, end in ends.items():
            log = [{"step": 0, "accuracy": 0.3}, {"step": 2, "accuracy": end, "seconds": 7}]
            write(tmp_path / f"{tokens}-{seed}", log, tokens=tokens, seed=seed)
    return tmp_path


def test_the_table_has_the_mean_its_interval_and_the_paired_difference(comparison, capsys):
    # top: mean 0.92, deviation 0.02, 4.303 * 0.02 / sqrt(3) = 0.0497. It differs from all by
    # -0.05, 0.01, -0.05: mean -0.03, deviation sqrt(0.0012), 4.303 * sqrt(0.0004) = 0.0861.
    # random: mean 0.7, deviation sqrt(0.02), 12.706 * 0.1 = 1.2706; seed 1 is shared: -0.33.
    text = page(comparison).replace("\u00a0", " ")
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "top 20 % 3 0.920 ± 0.050 -0.030 ± 0.086 7" in rows
    assert "all 3 0.950 ± 0.050 - 7" in rows
    assert "random 20 % 2 0.700 ± 1.271 -0.330 7" in rows
    assert "-0.030 ± 0.086" in text


@pytest.mark.parametrize("flags", [{"lr": 1.0}, {"model": "other"}, {"group_size": 4}])
def test_unlike_runs_are_refused_in_one_line(comparison, capsys, flags):
    write(comparison / "unlike", [{"step": 0}], **flags)
    assert next(iter(flags)) in refusal(capsys, comparison)


@pytest.mark.parametrize("config", [None, "", "[]", "{}", '{"architectures": ["GPT2"]}'])
def test_other_folders_are_refused_in_one_line(tmp_path, capsys, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert str(tmp_path) in refusal(capsys, tmp_path)


def test_a_look_shows_its_answers_escaped_and_token_by_token(tmp_path):
    text = page(write(tmp_path / "look", None, [ANSWER, ANSWER | {"truncated": True}]))
    assert "1&lt;2 &amp; 3? (target: &lt;b&gt;)" in text
    fork = '<span class="fork" title="entropy 0.5 nats, probability 0.25"'
    assert fork in text  # its entropy is the threshold
    assert all(token in text for token in ("&lt;i&gt;</span>", "↵\n</span>"))
    assert not any(word in text for word in ("<i>", "<script", "http"))
    assert "cut off after 3 tokens" in text
    assert text.count('class="fork"') == 3  # in each answer, and in the legend


@pytest.mark.parametrize("log", [[], [{"step": 0}], [{"step": 1, "reward": 1, "loss": None}]])
def test_a_run_without_evaluation_updates_or_answers_has_a_page(tmp_path, log):
    text = page(write(tmp_path / "run", log, [] if log else None))
    assert ("not measured" in text) == bool(log)
    assert "No answers were logged" in text


def test_the_picture_has_a_wrong_and_a_right_answer_to_one_question(tmp_path, capsys):
    other = ANSWER | {"question": "never right"}
    look = write(tmp_path / "look", None, [other, ANSWER, ANSWER | {"reward": 1.0}])
    report.main([str(look), "--answers", str(tmp_path / "two.svg")])
    texts = "".join(ET.parse(tmp_path / "two.svg").getroot().itertext()).replace("\u00a0", " ")
    assert texts.index("1<2 & 3?") < texts.index("wrong (reward 0)") < texts.index("right")
    assert refusal(capsys, look, "--answers", "x", "--question", "never right")
