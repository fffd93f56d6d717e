"""What README.md says of measurements is what the results say."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import readme


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = (readme.ROOT / "README.md").read_text()
    assert readme.filled(text) == text, "run python benchmarks/readme.py"
    for name in readme.SECTIONS:
        assert f"<!-- {name} -->\n\n<!-- end" not in text


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="expected the marks"):
        readme.filled("nothing")
