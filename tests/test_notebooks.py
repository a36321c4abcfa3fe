"""The notebooks run from top to bottom, and are committed with clean outputs.

    python tests/test_notebooks.py                       # put the line numbers of links to the code right
    python tests/test_notebooks.py notebooks/01*.ipynb   # the same, and execute these and keep their outputs

Executing needs `pip install nbclient ipykernel`; without, that test is skipped.
"""

import ast
import base64
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)(#L\d+)?\)")  # [`vsr.Refiner.forward`](../vsr.py#L400)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path, kind: str) -> list:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source_of(cell) -> str:
    return "".join(cell["source"])


def right_link(match: re.Match) -> str:
    """A link to code with the line on which the class or function starts; to a whole file, as it is."""
    name, file, _ = match.groups()
    if name == file:
        return f"[`{name}`](../{file})"
    node = ast.parse((ROOT / file).read_text())
    for part in name.removeprefix(f"{Path(file).stem}.").split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        assert node, f"{file} has no {name}"
    return f"[`{name}`](../{file}#L{node.lineno})"


@every_notebook
def test_outputs_are_there_and_clean(path):
    assert path.stat().st_size < 1_000_000
    cells = cells_of(path, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), (
        "executed in another order"
    )
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert not any(cell["metadata"] for cell in cells), "timestamps or other metadata"
    text = "\n".join(
        [source_of(cell) for cell in cells] + ["".join(output.get("text", "")) for output in outputs]
    )
    assert not re.search(r"/home|/root|/tmp|/work|/Users|[A-Z]:\\|Warning", text)


@every_notebook
def test_links_lead_somewhere(path):
    text = "\n\n".join(source_of(cell) for cell in cells_of(path, "markdown"))
    for match in LINK.finditer(text):
        assert match[0] == right_link(match), "python tests/test_notebooks.py puts this right"
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links and not [link for link in links if not (path.parent / link).exists()]


@every_notebook
def test_nothing_of_the_project_is_written_again(path):
    """A notebook imports classes and functions; it has no copy of its own."""
    project = {
        node.name
        for file in (*ROOT.glob("*.py"), *ROOT.glob("studies/*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    tree = ast.parse("\n".join(source_of(cell) for cell in cells_of(path, "code")))
    assert not project & {
        node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }


def execute(path):
    """The notebook with the outputs of a fresh kernel that was started beside it. Raises if a cell fails.

    One thread, as in all tests: threads that wait for each other on a busy machine take many times as long.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the kernel inherits it
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=folder, record_timing=False
    ).execute()
    return notebook


@every_notebook
def test_runs(path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = execute(path)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


def tidy(notebook) -> None:
    """Join pieces of printed text, put pictures into palettes of 256 colours if that changes little."""
    from PIL import Image, ImageChops

    for cell in [cell for cell in notebook.cells if cell.cell_type == "code"]:
        joined = []
        for output in cell.outputs:
            if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
                joined[-1].text += output.text
            else:
                joined.append(output)
            if "image/png" in output.get("data", {}):
                whole, small = base64.b64decode(output.data["image/png"]), io.BytesIO()
                picture = Image.open(io.BytesIO(whole)).convert("RGB")
                few = picture.quantize(256, dither=Image.Dither.NONE)
                few.save(small, "PNG", optimize=True)
                changes = ImageChops.difference(picture, few.convert("RGB")).getextrema()
                if max(most for _, most in changes) < 96 and len(small.getvalue()) < len(whole):
                    whole = small.getvalue()
                output.data = {"image/png": base64.b64encode(whole).decode()}
                output.metadata = {}
        cell.outputs, cell.metadata = joined, {}
    python = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": python, "language_info": {"name": "python"}}


def main():
    for path in [Path(name).resolve() for name in sys.argv[1:]]:
        import nbformat

        notebook = execute(path)
        tidy(notebook)
        path.write_text(nbformat.writes(notebook, indent=1) + "\n")
    for path in NOTEBOOKS:
        path.write_text(LINK.sub(right_link, path.read_text()))


if __name__ == "__main__":
    main()
