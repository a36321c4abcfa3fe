"""Make the student's notebooks, without the solutions: `solutions/NN_name.py` -> `NN_name.ipynb`.

    python notebooks/exercises/make.py            # writes all notebooks
    python notebooks/exercises/make.py --check    # writes nothing; exit status 1 if a notebook differs

A solution is a Python file in cells: `# %% [markdown]` starts a cell of text, each of its lines behind `# `,
and `# %%` a cell of code. What stands between `# BEGIN SOLUTION` and `# END SOLUTION` is the student's to
write.
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
STUB = 'raise NotImplementedError("write me")'


def cells_of(source: str) -> list[tuple[str, str]]:
    """A file in cells -> [("markdown" or "code", text), ...]. Raises ValueError for text before the first."""
    before, *parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)
    if before.strip():
        raise ValueError(f"expected `# %%` in the first line, found {before.splitlines()[0]!r}")
    cells = []
    for head, body in zip(parts[0::2], parts[1::2], strict=True):
        kind = "markdown" if head.strip() == "[markdown]" else "code"
        text = body.strip("\n")
        if kind == "markdown":
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        cells.append((kind, text))
    return cells


def without_solution(code: str) -> str:
    """Put the stub in the place of each solution. Raises ValueError for a lone marker."""
    code = re.sub(
        r"^( *)# BEGIN SOLUTION\n.*?^ *# END SOLUTION$", rf"\1{STUB}", code, flags=re.MULTILINE | re.DOTALL
    )
    if "SOLUTION" in code:
        raise ValueError("BEGIN SOLUTION without END SOLUTION, or the other way round")
    return code


def notebook(source: str) -> str:
    """The student's notebook of a solution, as the text of an .ipynb file: the same for the same source."""
    cells = []
    for number, (kind, text) in enumerate(cells_of(source)):
        cell = {"cell_type": kind, "id": f"cell-{number:02d}", "metadata": {}}
        if kind == "code":
            text = without_solution(text)
            cell |= {"execution_count": None, "outputs": []}
        cells.append({**cell, "source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Make the student's notebooks from the solutions.")
    parser.add_argument("--check", action="store_true", help="write nothing, name the notebooks that differ")
    args = parser.parse_args()
    solutions = sorted((HERE / "solutions").glob("[0-9][0-9]_*.py"))
    differ = 0
    for solution in solutions:
        path = HERE / f"{solution.stem}.ipynb"
        made = notebook(solution.read_text(encoding="utf-8"))
        if path.is_file() and path.read_text(encoding="utf-8") == made:
            continue
        differ += 1
        if args.check:
            print(
                f"{path.name} is not what solutions/{solution.name} gives: run make.py, and change solutions "
                "only"
            )
        else:
            path.write_text(made, encoding="utf-8", newline="\n")
            print(f"wrote {path.name}")
    for path in sorted(
        set(HERE.glob("*.ipynb")) - {HERE / f"{solution.stem}.ipynb" for solution in solutions}
    ):
        differ += 1
        print(f"{path.name} has no solution that it is made from")
    sys.exit(1 if args.check and differ else 0)


if __name__ == "__main__":
    main()
