"""class.ipynb: its cells run without Jupyter, and its text speaks of the numbers that come out.

In the text, 0.38<!--=usual--> must be what the expression gives at the end, to these digits.
"""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).with_name("class.ipynb").read_text(encoding="utf-8")
CELLS = json.loads(NOTEBOOK)["cells"]
TEXT = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def test_the_cells_print_what_was_saved_and_the_text_speaks_of_these_numbers():
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parent)
        patch.syspath_prepend(Path(__file__).parent)
        for cell in (cell for cell in CELLS if cell["cell_type"] == "code"):
            with contextlib.redirect_stdout(io.StringIO()) as screen:
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            saved = "".join("".join(output.get("text", "")) for output in cell["outputs"])
            assert saved == screen.getvalue(), "run all cells, save, and correct the text"
    found = re.findall(r"(-?\d[\d,]*(?:\.\d+)?)\s*%?<!--=(.*?)-->", TEXT, re.DOTALL)
    assert len(found) == TEXT.count("<!--=") > 40
    for number, expression in found:
        value, digits = float(eval(expression, names)), len(number.partition(".")[2])
        assert f"{value:,.{digits}f}" == number, expression


def test_it_takes_45_minutes_and_every_decimal_number_is_checked():
    for each in r"(?m)^\| .* \| (\d+) \|", r"(?m)^## .* \((\d+) minutes\)":
        assert sum(map(int, re.findall(each, TEXT))) == 45
    prose = re.sub(r"(?s)`[^`]*`|\[arXiv.*?\)|(?<=<!--).*?-->", "", TEXT)
    assert re.findall(r"\d+\.\d+(?!\d|\s*%?<!--)", prose) == []
    assert len(NOTEBOOK) < 400_000 and not re.search(r"/(root|home|tmp|usr)/", NOTEBOOK)
