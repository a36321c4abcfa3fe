"""README.md and results/README.md state what the committed results say, and their code runs.

python tests/test_readme.py     # put the tables of results/ into both pages
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", ROOT / "results" / "first_edition" / "README.md"]
TABLE = re.compile(r"(<!-- table of results/([\w/]+).*?-->\n```\n)(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")
TABLES = [
    pytest.param(match[2], match[3], id=f"{page.relative_to(ROOT)}:{match[2]}")
    for page in PAGES
    for match in TABLE.finditer(page.read_text())
]


def table_of(name: str) -> list[str]:
    """The lines of a study's table, or of a run's; a line that says so if there is no such result yet."""
    study, run = ROOT / "results" / f"{name}.json", ROOT / "results" / name
    if study.is_file():
        return json.loads(study.read_text())["table"]
    if (run / "table.txt").is_file():  # a run of the first edition: as its own code had printed it
        return (run / "table.txt").read_text().splitlines()
    if (run / "metrics.json").is_file():
        metrics = json.loads((run / "metrics.json").read_text())
        return evaluate.format_table(metrics["methods"]).splitlines()
    return ["(not measured yet)"]


def anchors(page: Path) -> set:
    """The headings of a page, as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("name", "stated"), TABLES)
def test_tables_are_those_of_the_committed_results(name, stated):
    """No number of a table is typed by hand."""
    assert [line.rstrip() for line in stated.splitlines()] == [line.rstrip() for line in table_of(name)]


def test_every_table_of_the_results_is_on_a_page():
    results = ROOT / "results"
    studies = [path for path in results.rglob("*.json") if "table" in json.loads(path.read_text())]
    runs = [path.parent for path in results.rglob("metrics.json")]
    made = {str(path.relative_to(results).with_suffix("")) for path in studies + runs}
    assert made and made <= {param.values[0] for param in TABLES}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_file_and_heading_that_is_linked_is_there(page):
    links = [link for link in LINK.findall(page.read_text()) if not link[0].startswith("http")]
    missing = []
    for path, anchor in links:
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append((path, anchor))
    assert links and not missing


def test_the_figures_of_the_readme_are_those_of_the_run():
    """Minutes, sizes and qualities of the stages."""
    metrics, page = json.loads((ROOT / "results" / "toy" / "metrics.json").read_text()), PAGES[0].read_text()
    seconds, params = metrics["seconds"], metrics["params"]
    rows = {line.split(" | ")[0].lstrip("| "): line for line in page.splitlines() if line.startswith("|")}

    def minutes(*stages):
        return f"| {sum(seconds[stage] for stage in stages) / 60:.1f} |"

    def size(model):
        return f"| {params[model] / 1e6:.2f} M parameters"

    tokenizer, backbone = metrics["tokenizer"], metrics["backbone"]
    for name, title in (("psnr_source", "sources"), ("psnr_target", "targets"), ("psnr_edges", "edge maps")):
        assert f"{tokenizer[name]:.1f} dB on {title}" in rows["tokenizer"]
    assert (
        f"{tokenizer['codes_used']} of 128 codes used, perplexity {tokenizer['perplexity']:.0f} |"
        in rows["tokenizer"]
    )
    losses = (
        f"validation loss {backbone['val_loss']:.3f}, on the last image {backbone['val_target_loss']:.3f}"
    )
    assert f"{losses}, where {100 * backbone['val_target_accuracy']:.1f} % of tokens" in rows["backbone"]
    assert minutes("tokenizer") in rows["tokenizer"] and size("tokenizer") in rows["tokenizer"]
    assert minutes("sentences", "backbone") in rows["backbone"] and size("backbone") in rows["backbone"]
    assert minutes("rollouts", "states") in rows["rollouts, states"]
    for reading in ("tokens", "tokens+query", "query"):
        row = rows[f"refiner `{reading}`"]
        assert minutes(f"refiner_{reading}") in row and size(f"refiner_{reading}") in row
    assert minutes("evaluation") in rows["evaluation"]
    assert f"took {sum(seconds.values()) / 60:.0f} minutes" in page


def sections(page: Path) -> list:
    """The parts of a page between its headings that have a table: (heading, table, sentences)."""
    found = []
    for part in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)[1:]:
        tables = "\n".join(match[3] for match in TABLE.finditer(part))
        if tables and "first_edition/" not in part:
            prose = re.sub(r"```.*?```|<!--.*?-->|`[^`]*`|\]\([^)]*\)", " ", part, flags=re.DOTALL)
            found.append(pytest.param(tables, prose, id=part.splitlines()[0]))
    return found


@pytest.mark.parametrize(("tables", "prose"), sections(PAGES[1]))
def test_every_decimal_in_a_sentence_of_the_evidence_stands_in_the_table_above_it(tables, prose):
    known = set(re.findall(r"\d+\.\d+", tables))
    assert set(re.findall(r"\d+\.\d+", prose)) <= known


def test_every_decimal_of_the_findings_stands_in_the_table_that_its_line_links_to():
    anchor = re.compile(r"\(results/README\.md#([\w-]+)\)")
    tables = {}
    for param in sections(PAGES[1]):
        tables[re.sub(r"[^\w\- ]", "", param.id.lower()).replace(" ", "-")] = param.values[0]
    part = PAGES[0].read_text().split("## What the evidence says\n")[1].split("\n## ")[0]
    bullets = re.split(r"^- ", part, flags=re.MULTILINE)[1:]
    assert len(bullets) >= 4
    for bullet in bullets:
        known = "\n".join(tables[name] for name in anchor.findall(bullet))
        found = set(re.findall(r"\d+\.\d+", bullet))
        assert found <= set(re.findall(r"\d+\.\d+", known)), bullet


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 220


def test_the_example_for_ones_own_backbone_runs():
    code = re.search(r"```python\n(import torch, vsr\n.*?)```", PAGES[0].read_text(), re.DOTALL).group(1)
    codebook = torch.randn(50, 8) * 2
    tokens, target_tokens = torch.randint(50, (2, 2, 256))
    space = {"codebook": codebook, "my_rollouts": [(tokens, torch.randn(2, 256, 4096), target_tokens)]}
    exec(code, space)
    assert space["new_tokens"].shape == (2, 256)
    assert space["new_embeddings"].shape == (2, 256, 8)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(
            TABLE.sub(
                lambda match: "\n".join([match[1].rstrip(), *table_of(match[2]), "```"]), page.read_text()
            )
        )
