"""The README states what the committed results say, and its code runs.

python tests/test_readme.py     # put the tables of results/ into the README
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_refiner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


TABLE = re.compile(r"(<!-- table of results/(\w+).*?-->\n```\n)(.*?)```", re.DOTALL)
TABLES = [(match[2], match[3]) for match in TABLE.finditer(README)]


def table_of(name):
    """The lines of a study's table, or of a run's."""
    result = ROOT / "results" / f"{name}.json"
    if result.is_file():
        return json.loads(result.read_text())["table"]
    metrics = json.loads((ROOT / "results" / name / "metrics.json").read_text())
    return train_refiner.format_table(metrics["methods"], metrics["gap_closed"]).splitlines()


@pytest.mark.parametrize(("name", "stated"), TABLES, ids=[name for name, _ in TABLES])
def test_tables_are_those_of_the_committed_results(name, stated):
    """No number of a table is typed by hand."""
    assert [line.rstrip() for line in stated.splitlines()] == [line.rstrip() for line in table_of(name)]


def test_readme_has_the_tables_of_both_runs():
    assert {"toy", "photos"} <= {name for name, _ in TABLES}


def test_every_file_that_is_linked_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert links and not missing


def test_the_example_for_ones_own_backbone_runs():
    code = re.search(r"```python\n(import torch, vsr\n.*?)```", README, re.DOTALL).group(1)
    codebook = torch.randn(50, 8) * 2
    tokens, true_tokens = torch.randint(50, (2, 2, 256))
    space = {"codebook": codebook, "my_rollouts": [(tokens, torch.randn(2, 256, 4096), true_tokens)]}
    exec(code, space)
    assert space["refined_tokens"].shape == (2, 256)
    assert space["refined_embeddings"].shape == (2, 256, 8)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(TABLE.sub(lambda match: "\n".join([match[1].rstrip(), *table_of(match[2]), "```"]), README))
