"""The exercises: right answers pass their check, stubs and plausible wrong answers get a helpful line."""

import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import data
import evaluate
import runtime
import train_refiner
import vqgan
import vsr
from studies.window import WindowBias

sys.path.append(str(ROOT / "notebooks" / "exercises"))

import checks
import make

EXERCISES = ROOT / "notebooks" / "exercises"
NAMES = [path.stem for path in sorted((EXERCISES / "solutions").glob("*.py"))]
BY_NUMBER = {int(name[:2]): name for name in NAMES}
READINGS = ("tokens", "tokens+query", "query")  # of the refiners in weights/toy.pt


# Running notebooks without Jupyter


def code_of_notebook(name: str) -> list[str]:
    """The code cells of a student's notebook."""
    cells = json.loads((EXERCISES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def code_of_solution(name: str) -> list[str]:
    source = (EXERCISES / "solutions" / f"{name}.py").read_text(encoding="utf-8")
    return [text for kind, text in make.cells_of(source) if kind == "code"]


def is_stub(cell: str) -> bool:
    return make.STUB in cell


@pytest.fixture
def run_cells(monkeypatch):
    """run_cells(cells, folder) runs code cells as a notebook started in this folder does."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(cells, folder=EXERCISES):
        monkeypatch.chdir(folder)
        space = {"__name__": "__main__"}
        for cell in cells:
            exec(compile(cell, "cell", "exec"), space)
        matplotlib.pyplot.close("all")
        return space

    return run


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A file of very small models as weights/toy.pt has it; rollouts have many different tokens."""
    torch.manual_seed(0)
    config = {
        "run": {"seed": 0, "dtype": "float32"},
        "weights": {},
        "data": {"data": "shapes", "image_size": 16, "num_demos": 1, "palette": "fixed"},
        "vqgan": asdict(vqgan.VQGANConfig(codebook_size=16, code_dim=8, channels=16, res_blocks=1)),
        "gpt": asdict(vsr.GPTConfig(layers=1, heads=2, width=16)),
        "refiner": asdict(vsr.RefinerConfig(layers=1, heads=2, width=16)),
    }
    checkpoints = {}
    for name, reads in (("tokenizer", ""), ("backbone", ""), *((f"refiner_{r}", r) for r in READINGS)):
        made_with = {**config, "reads": reads}
        model = evaluate.make_model(name.split("_")[0], made_with)
        for parameter in (model.to_code if reads else model).parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.5)
        checkpoints[f"{name}.pt"] = {"config": made_with, "model": model.state_dict()}
    path = tmp_path_factory.mktemp("weights") / "toy.pt"
    runtime.save(path, {"config": config, "checkpoints": checkpoints})
    return path


@pytest.fixture
def shipped(monkeypatch, tiny_weights):
    """The tiny models in the place of weights/toy.pt."""
    monkeypatch.setattr(checks, "WEIGHTS", tiny_weights)


# The notebooks


def test_there_are_sixteen_in_order_of_difficulty():
    minutes = []
    for number, name in enumerate(NAMES, 1):
        assert name.startswith(f"{number:02d}_")
        text = (EXERCISES / "solutions" / f"{name}.py").read_text(encoding="utf-8")
        assert re.match(rf"# %% \[markdown\]\n# # {number}\. ", text), "the title has the number"
        minutes.append(
            int(
                re.search(
                    r"\*\*(\d+) minutes\. You need:\*\* .* \*\*You learn:\*\*", text.replace("\n# ", " ")
                ).group(1)
            )
        )
    assert len(NAMES) == 16 and minutes == sorted(minutes) and minutes[0] >= 10 and minutes[-1] <= 60
    table = re.findall(
        r"^\| (\d+) \| \[.*?\]\((.*?)\.ipynb\) \| (\d+) \|",
        (EXERCISES / "README.md").read_text(),
        re.MULTILINE,
    )
    assert [(int(n), name, int(m)) for n, name, m in table] == list(
        zip(range(1, 17), NAMES, minutes, strict=True)
    )


def test_the_notebooks_are_what_the_solutions_give():
    assert [path.stem for path in sorted(EXERCISES.glob("*.ipynb"))] == NAMES
    result = subprocess.run(
        [sys.executable, EXERCISES / "make.py", "--check"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "")


def test_make_says_which_notebook_differs(tmp_path, monkeypatch, capsys):
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "01_a.py").write_text("# %%\nx = 1\n")
    monkeypatch.setattr(make, "HERE", tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["make.py", *flags])
        with pytest.raises(SystemExit) as stop:
            make.main()
        return stop.value.code, capsys.readouterr().out

    assert run("--check") == (
        1,
        "01_a.ipynb is not what solutions/01_a.py gives: run make.py, and change solutions only\n",
    )
    assert run() == (0, "wrote 01_a.ipynb\n")
    first = (tmp_path / "01_a.ipynb").read_bytes()
    assert run("--check") == (0, "") and run() == (0, "")
    (tmp_path / "01_a.ipynb").write_text("{}")
    assert run("--check")[0] == 1
    assert run()[0] == 0 and (tmp_path / "01_a.ipynb").read_bytes() == first
    (tmp_path / "02_b.ipynb").write_text("{}")
    assert run("--check") == (1, "02_b.ipynb has no solution that it is made from\n")


def test_make_refuses_a_file_that_is_not_in_cells():
    with pytest.raises(ValueError, match="expected `# %%`"):
        make.cells_of("x = 1\n# %%\n")
    with pytest.raises(ValueError, match="without END"):
        make.without_solution("# BEGIN SOLUTION\nx = 1")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_a_notebook_without_its_solution(name):
    text = (EXERCISES / f"{name}.ipynb").read_text(encoding="utf-8")
    content = json.loads(text)
    assert (content["nbformat"], content["nbformat_minor"], content["metadata"]["kernelspec"]["name"]) == (
        4,
        5,
        "python3",
    )
    cells = content["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None
        for cell in cells
        if cell["cell_type"] == "code"
    )
    assert "SOLUTION" not in text and make.STUB.replace('"', r"\"") in text
    assert cells[0]["cell_type"] == cells[-1]["cell_type"] == "markdown"
    assert "## Where this is in the project" in "".join(cells[-1]["source"])
    assert "<details><summary>Hint</summary>" in "".join(cells[0]["source"])


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_to_what_it_names(name):
    """Links are relative to the notebook: to files that are there, to names that are in them."""
    source = (EXERCISES / "solutions" / f"{name}.py").read_text(encoding="utf-8")
    prose = "\n".join(text for kind, text in make.cells_of(source) if kind == "markdown")
    links = re.findall(r"\[([^\]]*)\]\(([^)]+)\)", prose)
    assert len(links) >= 2
    for label, target in links:
        path = (EXERCISES / target).resolve()
        assert path.is_file(), target
        if named := re.fullmatch(r"`(\w+)`\s+in\s+`([\w.]+)`", label):
            assert named.group(2) == path.name
            assert re.search(rf"^(def|class) {named.group(1)}\b", path.read_text(), re.MULTILINE), label


@pytest.mark.parametrize("folder", [ROOT, EXERCISES], ids=["in the root", "beside the notebook"])
@pytest.mark.parametrize("name", NAMES)
def test_setup_cells_run_wherever_jupyter_starts(name, folder, run_cells):
    cells = code_of_notebook(name)
    setup = cells[: next(i for i, cell in enumerate(cells) if is_stub(cell))]
    space = run_cells(setup, folder)
    assert len(setup) >= 2 and space["root"] == ROOT


# Stubs and solutions


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_fails_with_one_line(name, run_cells, shipped):
    cells = code_of_notebook(name)
    with pytest.raises(checks.Wrong, match=r"^\w+ is not written yet$"):
        run_cells(cells[: 1 + next(i for i, cell in enumerate(cells) if "\ncheck_" in cell)])


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_passes_and_its_pictures_are_drawn(name, run_cells, shipped, capsys):
    cells = code_of_solution(name)
    shorter = {"steps = 1, 300": "steps = 1, 20", "load_lesson(seed)": "load_lesson(seed, train=64, val=32)"}
    for long, short in shorter.items():  # the control's minute of training
        cells = [cell.replace(long, short) for cell in cells]
    run_cells(cells)
    assert capsys.readouterr().out.count("\n") >= 1, "a line when all is right"
    assert "plt.show()" in "".join(cells)


def test_what_a_check_found_is_one_line_in_a_notebook():
    """IPython asks an exception for the lines to show."""
    with pytest.raises(checks.Wrong) as found:
        checks.check_nearest_code(lambda embeddings, codebook: embeddings.argmax(-1).int())
    assert found.value._render_traceback_() == [
        "Not right yet: nearest_code gave torch.int32, expected torch.int64"
    ]
    with pytest.raises(checks.Wrong) as found:
        checks.check_nearest_code(lambda embeddings, codebook: embeddings.no_such_thing)
    lines = found.value._render_traceback_()
    assert "no_such_thing" in "".join(lines[:-1]), "with where the answer raised it"
    assert lines[-1].startswith("Not right yet: nearest_code raised AttributeError for embeddings (4, 6, 5)")


# Right and wrong answers. Each exercise: its check, right answers, wrong answers with a part of their line.


def gap_right(free_running, refined, teacher_forced):
    if free_running == teacher_forced:
        return float("nan")
    return 1 - (refined - teacher_forced) / (free_running - teacher_forced)


def gap_tensor(free_running, refined, teacher_forced):
    a, r, t = torch.tensor([free_running, refined, teacher_forced], dtype=torch.float64)
    return torch.where(a == t, torch.nan, (a - r) / (a - t))


def gap_cut_off(free_running, refined, teacher_forced):
    return min(1.0, max(0.0, gap_right(free_running, refined, teacher_forced)))


def gap_relative(free_running, refined, teacher_forced):
    return (free_running - refined) / free_running


def gap_divides_by_zero(free_running, refined, teacher_forced):
    return (free_running - refined) / (free_running - teacher_forced)


def gap_zero(free_running, refined, teacher_forced):
    return gap_right(free_running, refined, teacher_forced) if free_running != teacher_forced else 0.0


def gap_difference(free_running, refined, teacher_forced):
    return free_running - refined


def gap_upside_down(free_running, refined, teacher_forced):
    return (refined - teacher_forced) / (free_running - teacher_forced)


def loss_by_hand(refined, target):
    total = 0.0
    for a, b in zip(refined.flatten(0, 1), target.flatten(0, 1), strict=True):
        total = (
            total + 1 - (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt()).clamp_min(1e-8)
        )
    return total / refined.shape[0] / refined.shape[1]


def loss_by_distance(refined, target):
    return (F.normalize(refined, dim=-1) - F.normalize(target, dim=-1)).square().sum(-1).mean() / 2 + 0.5 * (
        (refined.norm(dim=-1) == 0).float().mean()
    )


def nearest_by_distance(embeddings, codebook):
    e, c = F.normalize(embeddings, dim=-1), F.normalize(codebook, dim=-1)
    return (e[..., None, :] - c).norm(dim=-1).argmin(-1)


def nearest_by_loop(embeddings, codebook):
    tokens = [max(range(len(codebook)), key=lambda v: F.cosine_similarity(e, codebook[v], 0).item()) for e in
              embeddings.reshape(-1, embeddings.shape[-1])]  # fmt: skip
    return torch.tensor(tokens).view(embeddings.shape[:-1])


def exposure_right(free_running, refined, teacher_forced, refined_forced):
    if free_running <= teacher_forced:
        return float("nan")
    accumulated, left = free_running - teacher_forced, refined - refined_forced
    return (accumulated - left) / accumulated


def exposure_tensor(*errors):
    a, r, t, rt = torch.tensor(errors, dtype=torch.float64)
    return torch.where(a > t, 1 - (r - rt) / (a - t), torch.nan)


def base_right(teacher_forced, refined_forced):
    return 1 - refined_forced / teacher_forced if teacher_forced else float("nan")


def base_tensor(teacher_forced, refined_forced):
    return (
        1 - torch.tensor(refined_forced) / teacher_forced if teacher_forced > 0 else torch.tensor(torch.nan)
    )


def window_by_loop(grid, radius):
    mask = torch.full((grid[0] * grid[1],) * 2, -torch.inf)
    for t in range(len(mask)):
        for s in range(len(mask)):
            (y, x), (j, i) = divmod(t, grid[1]), divmod(s, grid[1])
            if abs(y - j) <= radius and abs(x - i) <= radius:
                mask[t, s] = 0
    return mask


def window_by_pooling(grid, radius):
    """Each key as a picture with one bright place, which spreads by `radius`."""
    places = torch.eye(grid[0] * grid[1]).view(-1, 1, *grid)
    return F.max_pool2d(places, 2 * radius + 1, 1, radius).flatten(1).log()


def window_of_the_study(grid, radius):
    bias = WindowBias(1, grid, radius, "anywhere")
    return bias()[0].detach()


def window_with(near=lambda y, x, r: (abs(y) <= r) & (abs(x) <= r), width=1, hidden=-torch.inf, shown=0.0):
    """A mask that is right by default. near: of the differences in rows and in columns (N, N)."""

    def mask(grid, radius):
        place = torch.arange(grid[0] * grid[1])
        row, column = place // grid[width], place % grid[width]
        sees = near(row - row[:, None], column - column[:, None], radius)
        return torch.where(sees, shown, hidden)

    return mask


def window_of_the_raster(grid, radius):
    place = torch.arange(grid[0] * grid[1])
    return torch.zeros(len(place), len(place)).masked_fill(
        (place - place[:, None]).abs() > radius, -torch.inf
    )


def window_around_a_ring(grid, radius):
    h, w = grid

    def near(y, x, r):
        return ((y % h <= r) | (-y % h <= r)) & ((x % w <= r) | (-x % w <= r))

    return window_with(near)(grid, radius)


def training(
    rows=lambda step, S: torch.randint(S, (32,)), given=lambda tokens, target, rows: tokens[rows],
    asked=lambda tokens, target, rows: target[rows], states=lambda query, rows: query[rows],
    call=lambda refiner, embeddings, states: refiner(embeddings, query=states), sign=1, clear=True, move=True,
    rate=1e-2, also=(), steps=lambda steps: steps, result=lambda losses: losses,
):  # fmt: skip
    """A training with AdamW that is right by default; each argument changes one of its parts."""

    def train(refiner, codebook, rollout, target, total):
        learns = [*refiner.parameters(), *(x.requires_grad_() for x in (codebook,) if "codebook" in also)]
        optimizer, losses = torch.optim.AdamW(learns, lr=rate), []
        for step in range(steps(total)):
            batch = rows(step, len(target))
            embeddings = codebook[given(rollout.tokens, target, batch)]
            refined = call(refiner, embeddings, states(rollout.query, batch))
            loss = sign * vsr.cosine_loss(refined, codebook[asked(rollout.tokens, target, batch)])
            if clear:
                optimizer.zero_grad()
            loss.backward()
            if move:
                optimizer.step()
            losses.append(loss.item())
        return result(losses)

    return train


def train_in_epochs(refiner, codebook, rollout, target, steps):
    """Right: every rollout once before any comes again; SGD; the dot product, since both have unit norm."""
    optimizer = torch.optim.SGD(refiner.parameters(), lr=1.0, momentum=0.9)
    losses = torch.zeros(steps)
    for step in range(steps):
        start = step * 32 % len(target)
        if start == 0:
            order = torch.randperm(len(target))
        rows = order[start : start + 32]
        embeddings, _, query = (None if x is None else x[rows] for x in rollout)
        refined = refiner(codebook[embeddings], None, query)
        loss = (1 - (refined * codebook[target[rows]]).sum(-1)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
    return losses


def train_as_the_project(refiner, codebook, rollout, target, steps):
    optimizers, losses = train_refiner.make_optimizers(refiner, 2e-2), []
    for step in range(steps):
        rows = torch.randint(len(target), (32,))
        loss = vsr.cosine_loss(refiner(codebook[rollout.tokens[rows]], None, rollout.query[rows]),
                               codebook[target[rows]])  # fmt: skip
        rate = train_refiner.scheduled_rate(step, steps, 2e-2)
        train_refiner.optimizer_step(loss, refiner, optimizers, rate)
        losses.append(loss.detach())
    return losses


def train_a_copy(refiner, *given):
    own = vsr.Refiner(vsr.RefinerConfig(layers=1, heads=2, width=16), refiner.reads, (2, 3), 5, 7)
    return training()(own, *given)


def mask_by_comparison(T):
    return torch.arange(T)[:, None] >= torch.arange(T)


def softmax_by_loop(scores):
    weights = torch.zeros_like(scores)
    for t in range(scores.shape[-1]):
        weights[..., t, : t + 1] = scores[..., t, : t + 1].softmax(-1)
    return weights


def softmax_by_additive_mask(scores):
    return (
        scores + torch.zeros_like(scores).masked_fill(~mask_by_comparison(scores.shape[-1]), -1e9)
    ).softmax(-1)


def softmax_renormalised(scores):
    weights = scores.softmax(-1) * mask_by_comparison(scores.shape[-1])
    return weights / weights.sum(-1, keepdim=True)


def softmax_of_zeros(scores):
    return (scores * mask_by_comparison(scores.shape[-1])).softmax(-1)


def softmax_then_mask(scores):
    return scores.softmax(-1) * mask_by_comparison(scores.shape[-1])


def softmax_over_queries(scores):
    return scores.masked_fill(~mask_by_comparison(scores.shape[-1]), -torch.inf).softmax(-2)


def softmax_in_place(scores):
    return scores.masked_fill_(~mask_by_comparison(scores.shape[-1]), -torch.inf).softmax(-1)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context, z, e):
        return e.clone()

    @staticmethod
    def backward(context, slope):
        return slope, None


def losses_by_mse(z, e):
    return F.mse_loss(e, z.detach()) * z.shape[-1], F.mse_loss(z, e.detach()) * z.shape[-1]


def losses_by_loop(z, e):
    z, e = z.reshape(-1, z.shape[-1]), e.reshape(-1, e.shape[-1])
    pairs = [
        (((a.detach() - b) ** 2).sum(), ((a - b.detach()) ** 2).sum()) for a, b in zip(z, e, strict=True)
    ]
    return sum(p[0] for p in pairs) / len(z), sum(p[1] for p in pairs) / len(z)


def edges_with(
    kernel=((1, 0, -1), (2, 0, -2), (1, 0, -1)), divide=4, padding="replicate", prepare=lambda x: x,
    length=None, combine=None, finish=lambda s: 2 * s.clamp(max=1) - 1,
):  # fmt: skip
    """An edge filter that is right by default; each argument changes one of its parts."""

    def sobel(images):
        images = prepare(images)
        across = torch.tensor(kernel, dtype=torch.float32) / divide
        padded = F.pad(images, (1, 1, 1, 1), mode=padding)
        g_x = F.conv2d(padded, across.expand(3, 1, 3, 3), groups=3)
        g_y = F.conv2d(padded, across.T.expand(3, 1, 3, 3), groups=3)
        strength = torch.hypot(g_x, g_y) if length is None else length(g_x, g_y)
        strength = strength.amax(1, keepdim=True) if combine is None else combine(strength)
        return finish(strength).repeat(1, 3, 1, 1)

    return sobel


def edges_of_the_project(images):
    return data.edges(images, None)[1]


def top_p_by_loop(logits, top_p):
    rows = []
    for row in logits:
        p, total, kept = row.softmax(-1), 0.0, torch.zeros_like(row)
        for v in row.argsort(descending=True).tolist():
            if total < top_p:
                kept[v] = p[v]
            total += p[v].item()
        rows.append(kept / kept.sum())
    return torch.stack(rows)


def top_p_on_logits(logits, top_p):
    """As in `vsr.sample`."""
    ordered, order = logits.sort(descending=True)
    p = ordered.softmax(-1)
    before = p.cumsum(-1) - p
    ordered = ordered.masked_fill((before >= top_p) & (before > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered).softmax(-1)


def top_p_with(
    drop=lambda p, ordered, top_p: ordered.cumsum(-1) - ordered >= top_p, unsort=True, divide=True
):
    """A filter that is right by default."""

    def probabilities(logits, top_p):
        p = logits.softmax(-1)
        ordered, order = p.sort(descending=True)
        kept = ordered.masked_fill(drop(p, ordered, top_p), 0)
        if unsort:
            kept = torch.zeros_like(kept).scatter(-1, order, kept)
        return kept / kept.sum(-1, keepdim=True) if divide else kept

    return probabilities


class Lora(nn.Module):
    """A right one that keeps the weight in buffers and multiplies the matrices first."""

    def __init__(self, linear, rank):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.A = nn.Parameter(torch.empty(rank, linear.in_features).normal_(std=linear.in_features**-0.5))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return F.linear(x, self.weight + self.B @ self.A, self.bias)

    def merged(self):
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=self.bias is not None)
        linear.weight.data = (self.weight + self.B @ self.A).detach()
        if self.bias is not None:
            linear.bias.data = self.bias.clone()
        return linear


class LoraWrapped(Lora):
    """Right as well: the wrapped layer frozen, in place of buffers."""

    def __init__(self, linear, rank):
        nn.Module.__init__(self)
        self.linear = linear
        for parameter in linear.parameters():
            parameter.requires_grad = False
        self.A = nn.Parameter(torch.rand(rank, linear.in_features) - 0.5)
        self.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B)

    def merged(self):
        linear = nn.Linear(self.linear.in_features, self.linear.out_features, self.linear.bias is not None)
        linear.load_state_dict({**self.linear.state_dict(), "weight": self.linear.weight + self.B @ self.A})
        return linear


class LoraNotFrozen(LoraWrapped):
    def __init__(self, linear, rank):
        super().__init__(linear, rank)
        self.linear.requires_grad_(True)


class LoraBothZero(Lora):
    def __init__(self, linear, rank):
        super().__init__(linear, rank)
        nn.init.zeros_(self.A)


class LoraBothRandom(Lora):
    def __init__(self, linear, rank):
        super().__init__(linear, rank)
        nn.init.normal_(self.B)


class LoraOtherWayRound(Lora):
    def __init__(self, linear, rank):
        super().__init__(linear, rank)
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)


class LoraOnes(Lora):
    def __init__(self, linear, rank):
        super().__init__(linear, rank)
        nn.init.ones_(self.A)


class LoraSwapped(Lora):
    def __init__(self, linear, rank):
        super().__init__(linear, rank)
        self.A, self.B = nn.Parameter(self.A.data.T), nn.Parameter(self.B.data.T)


class LoraScaled(Lora):
    def forward(self, x):
        return F.linear(x, self.weight + 2 * self.B @ self.A, self.bias)


class LoraDetached(Lora):
    def forward(self, x):
        return F.linear(x, self.weight + self.B @ self.A.detach(), self.bias)


class LoraMergesIntoItself(LoraWrapped):
    def merged(self):
        self.linear.weight.data += self.B @ self.A
        return self.linear


class LoraMergesNothing(LoraWrapped):
    def merged(self):
        return self.linear


def gate_by_loop(tokens, refined, codebook, threshold):
    y = tokens.clone()
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            cosine = codebook @ refined[b, t]
            if cosine.max() - cosine[tokens[b, t]] > threshold:
                y[b, t] = cosine.argmax()
    return y


def gate_by_arithmetic(tokens, refined, codebook, threshold):
    cosine = F.cosine_similarity(refined[:, :, None], codebook, dim=-1)
    change = (cosine.amax(-1) >= threshold + cosine.gather(-1, tokens[..., None])[..., 0]).long()
    return change * cosine.argmax(-1) + (1 - change) * tokens


def choose_by_loop(thresholds, tokens, refined, truth, codebook):
    best = None
    for threshold in reversed(thresholds):
        y = gate_by_loop(tokens[:, :], refined, codebook, threshold)
        error = vsr.cosine_error(y, truth, codebook).mean()
        if best is None or error < best[0]:
            best = (error, threshold)
    return best[1]


def choose(score, pick=min):
    """A choice by another score of (y, truth, codebook)."""

    def choose_threshold(thresholds, tokens, refined, truth, codebook):
        return pick(
            thresholds,
            key=lambda th: score(gate_right(tokens, refined, codebook, th), truth, codebook).item(),
        )

    return choose_threshold


def gate_right(tokens, refined, codebook, threshold):
    best, nearest = (refined @ codebook.T).max(-1)
    return torch.where(best - (refined * codebook[tokens]).sum(-1) > threshold, nearest, tokens)


def gate_by_cosine(tokens, refined, codebook, threshold):
    best, nearest = (refined @ codebook.T).max(-1)
    return torch.where(best > threshold, nearest, tokens)


def gate_the_other_way(tokens, refined, codebook, threshold):
    return torch.where(
        gate_right(tokens, refined, codebook, threshold) != tokens,
        tokens,
        vsr.nearest_code(refined, codebook),
    )


def gate_by_sentence(tokens, refined, codebook, threshold):
    best, nearest = (refined @ codebook.T).max(-1)
    margin = (best - (refined * codebook[tokens]).sum(-1)).mean(1, keepdim=True)
    return torch.where(margin > threshold, nearest, tokens)


def gate_to_second(tokens, refined, codebook, threshold):
    values, codes = (refined @ codebook.T).topk(min(2, len(codebook)))
    return torch.where(values[..., 0] - values[..., -1] > threshold, codes[..., 0], tokens)


def choose_right(*arguments):
    return choose(lambda y, truth, codebook: vsr.cosine_error(y, truth, codebook).mean())(*arguments)


def step_with(write=True, stop=1, scale=True, first_write=True, swap=False):
    """A decoding step that is right by default, by slices."""

    def step(x, W_q, W_k, W_v, cache, t):
        k, v = (x @ W_v, x @ W_k) if swap else (x @ W_k, x @ W_v)
        if write and first_write:
            cache[0, :, t], cache[1, :, t] = k, v
        keys, values = cache[0, :, : t + stop].clone(), cache[1, :, : t + stop].clone()
        if write and not first_write:
            cache[0, :, t], cache[1, :, t] = k, v
        q = x @ W_q
        scores = torch.einsum("bd,bsd->bs", q, keys) / (W_q.shape[1] ** 0.5 if scale else 1)
        return torch.einsum("bs,bsd->bd", scores.softmax(-1), values)

    return step


def step_masked(x, W_q, W_k, W_v, cache, t):
    """Right: the whole cache, masked, by PyTorch's own attention."""
    cache[:, :, t] = torch.stack([x @ W_k, x @ W_v])
    mask = torch.arange(cache.shape[2]) <= t
    return F.scaled_dot_product_attention((x @ W_q)[:, None], cache[0], cache[1], attn_mask=mask[None, None])[
        :, 0
    ]


def step_clears_the_rest(x, W_q, W_k, W_v, cache, t):
    cache[:, :, t:] = 0
    return step_with()(x, W_q, W_k, W_v, cache, t)


def step_shifts(x, W_q, W_k, W_v, cache, t):
    cache.copy_(cache.roll(1, 2))
    cache[:, :, t] = torch.stack([x @ W_k, x @ W_v])
    return step_with(write=False)(x, W_q, W_k, W_v, cache, t)


class Refines(nn.Module):
    """A right one with PyTorch's own blocks and learnt places; subclasses change one part."""

    def __init__(self, grid, code_dim, width=32, heads=4):
        super().__init__()
        N = grid[0] * grid[1]
        self.place = nn.Parameter(torch.randn(N, width) * 0.5)
        self.read = nn.Linear(code_dim, width)
        block = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.move = nn.Linear(width, code_dim)
        nn.init.zeros_(self.move.weight)
        nn.init.zeros_(self.move.bias)

    def moves(self, embeddings):
        return self.move(self.blocks(self.read(embeddings) + self.place))

    def forward(self, embeddings):
        embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
        refined = embeddings + self.moves(embeddings)
        return refined / refined.norm(dim=-1, keepdim=True)


class RefinesByProject(vsr.Refiner):
    """Right: the project's own."""

    def __init__(self, grid, code_dim, width=32, heads=4):
        super().__init__(
            vsr.RefinerConfig(layers=2, heads=heads, width=width, dropout=0.0), ("tokens",), grid, code_dim
        )


class RefinesFromNothing(Refines):
    def forward(self, embeddings):
        return F.normalize(self.moves(F.normalize(embeddings, dim=-1)) + 1e-6, dim=-1)


class RefinesWithoutZero(Refines):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.move.reset_parameters()


class RefinesUnnormalised(Refines):
    def forward(self, embeddings):
        embeddings = F.normalize(embeddings, dim=-1)
        return embeddings + self.moves(embeddings)


class RefinesByLength(Refines):
    def forward(self, embeddings):
        return F.normalize(embeddings + self.moves(embeddings), dim=-1)


class RefinesCausally(Refines):
    def __init__(self, grid, code_dim, width=32, heads=4):
        super().__init__(grid, code_dim)
        self.blocks = nn.Sequential(*[vsr.Block(width, heads, 0.0) for _ in range(2)])


class RefinesAlone(Refines):
    def __init__(self, grid, code_dim, width=32, heads=4):
        super().__init__(grid, code_dim)
        self.blocks = nn.Sequential(*[vsr.Block(width, heads, 0.0, grid, attention=False) for _ in range(2)])


class RefinesWithoutPlaces(Refines):
    def moves(self, embeddings):
        return self.move(self.blocks(self.read(embeddings)))


class RefinesWithAList(Refines):
    def __init__(self, grid, code_dim, width=32, heads=4):
        super().__init__(grid, code_dim)
        del self.blocks
        self.layers = [vsr.Block(width, heads, 0.0, grid) for _ in range(2)]

    def blocks(self, x):
        for block in self.layers:
            x = block(x)
        return x


class RefinesNever(Refines):
    """All of the last two layers at zero: no gradient passes."""

    def __init__(self, grid, code_dim, width=32, heads=4):
        super().__init__(grid, code_dim)
        self.last = nn.Linear(code_dim, code_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.move.bias.requires_grad_(False)
        self.last.bias.requires_grad_(False)

    def moves(self, embeddings):
        return self.last(super().moves(embeddings))


def improve_plainly(case):
    return checks.plain_refinement(case)


def improve_by_rollouts(case):
    generator = torch.Generator().manual_seed(3)
    N = case.truth.shape[1]
    drawn = case.backbone.generate(case.prompt, N, temperature=0.7, generator=generator)
    refiner = case.refiners["tokens+query"]
    both = [vsr.refine(refiner, case.codebook, *rollout)[1] for rollout in (case.rollout, drawn)]
    return vsr.nearest_code(sum(both), case.codebook)


def improve_by_truth(case):
    return case.truth


def improve_where_it_was_wrong(case):
    """A gate that opens where the backbone was wrong: nobody knows that."""
    return torch.where(case.rollout.tokens == case.truth, case.rollout.tokens, checks.plain_refinement(case))


GENERATOR = torch.Generator()


def improve_by_luck(case):
    return torch.randint(len(case.codebook), case.truth.shape, generator=GENERATOR)


def improve_in_place(case):
    return case.rollout.tokens.fill_(1)


UPPER = torch.ones(9, 9, dtype=torch.bool).triu(1)

RIGHT = {
    1: [(gap_right,), (gap_tensor,), (vsr.gap_closed,)],
    2: [(loss_by_hand,), (loss_by_distance,), (vsr.cosine_loss,)],
    3: [(nearest_by_distance,), (nearest_by_loop,), (vsr.nearest_code,)],
    4: [(exposure_right, base_right), (exposure_tensor, base_tensor), (vsr.exposure_removed, base_right)],
    5: [(mask_by_comparison, softmax_by_loop), (mask_by_comparison, softmax_by_additive_mask),
        (lambda T: ~torch.ones(T, T, dtype=torch.bool).triu(1), softmax_renormalised)],
    6: [(lambda z, e: e.detach() + z - z.detach(),), (StraightThrough.apply,)],
    7: [(losses_by_mse,), (losses_by_loop,)],
    8: [(window_by_loop,), (window_by_pooling,), (window_of_the_study,), (window_with(),)],
    9: [(edges_of_the_project,), (edges_with(),), (edges_with(kernel=((-1, 0, 1), (-2, 0, 2), (-1, 0, 1))),)],
    10: [(top_p_by_loop,), (top_p_on_logits,)],
    11: [(Lora,), (LoraWrapped,)],
    12: [(gate_by_loop, choose_by_loop), (gate_by_arithmetic, choose_right)],
    13: [(training(),), (train_in_epochs,), (train_as_the_project,)],
    14: [(step_with(),), (step_masked,)],
    15: [(Refines,), (RefinesByProject,)],
    16: [(improve_plainly,), (improve_by_rollouts,), (lambda case: case.rollout.tokens,)],
}  # fmt: skip

WRONG = {
    1: [
        ((gap_cut_off,), "gave 1, expected 1.125: a refiner may be better than teacher forcing"),
        ((gap_relative,), "you divide by the free-running error"),
        ((gap_difference,), "divide by what accumulated"),
        ((gap_upside_down,), r"gap_closed\(0.5, 0.5, 0.1\) gave 1, expected 0: nothing is gained"),
        ((gap_divides_by_zero,), "ZeroDivisionError for .*Nothing has accumulated there: give NaN"),
        ((gap_zero,), "gave 0, expected NaN"),
        ((lambda *errors: None,), "gave None"),
    ],
    2: [
        ((lambda a, b: (1 - F.cosine_similarity(a, b)).mean(),), "along dim 1, the positions"),
        ((lambda a, b: (1 - (a * b).sum(-1)).mean(),), "dot product of vectors of any length"),
        ((lambda a, b: F.mse_loss(a, b),), "squared distance"),
        ((lambda a, b: (1 - F.cosine_similarity(a, b, dim=-1)).sum(),), "the mean, not the sum"),
        ((lambda a, b: 1 - F.cosine_similarity(a, b, dim=-1),), r"gave shape \(2, 3\), expected \(\)"),
        ((lambda a, b: F.cosine_similarity(a, b, dim=-1).mean(),), "the loss is 1 minus it"),
        ((lambda a, b: 1 - F.cosine_similarity(a.flatten(), b.flatten(), dim=0),), "position by position"),
        (
            (lambda a, b: (1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean(),),
            "length zero makes the loss nan",
        ),
        ((lambda a, b: vsr.cosine_loss(a.detach(), b),), "no gradient reaches `refined`"),
        ((lambda a, b: vsr.cosine_loss(a, b).item(),), "gave a float, expected a tensor"),
    ],
    3: [
        ((lambda e, c: (e @ c.T).argmax(-1),), "largest dot product, and long codes win it"),
        (
            (lambda e, c: (e[..., None, :] - c).norm(dim=-1).argmin(-1),),
            "smallest distance, which depends on the lengths",
        ),
        ((lambda e, c: (e @ F.normalize(c, dim=-1).T).argmin(-1),), "the largest cosine is wanted"),
        ((lambda e, c: vsr.nearest_code(e, c).int(),), "gave torch.int32, expected torch.int64"),
        ((lambda e, c: (e @ F.normalize(c, dim=-1).T).max(-1),), "expected a tensor"),
        (
            (lambda e, c: vsr.nearest_code(e, c * torch.linspace(-1, 1, len(c))[:, None]),),
            r"position \(0, \d\): you chose code",
        ),
        (
            (lambda e, c: torch.einsum("bnd,vd->bnv", e, F.normalize(c, dim=-1)).argmax(-1),),
            r"RuntimeError for embeddings \(11, 5\)",
        ),
    ],
    4: [
        (
            (lambda a, r, t, rt: gap_right(a, r, t), base_right),
            r"\(0.5, 0, 0.1, 0\) gave 1.25, expected 1: that is gap closed",
        ),
        ((lambda *errors: 1 - exposure_right(*errors), base_right), "that is the part that is left"),
        ((lambda a, r, t, rt: 1 - (r - rt) / a, base_right), "you divide by the free-running error"),
        ((lambda a, r, t, rt: (a - t) - (r - rt), base_right), "divide by what accumulated, F - T"),
        ((lambda *errors: min(1.0, exposure_right(*errors)), base_right), "nothing is cut off at 1"),
        ((lambda *errors: max(0.0, exposure_right(*errors)), base_right), "the number is below 0"),
        (
            (lambda a, r, t, rt: exposure_right(a, r, rt, t), base_right),
            "expected 1: one that returns the truth",
        ),
        ((lambda a, r, t, rt: 1 - (r - rt) / (a - t), base_right), "ZeroDivisionError .*give NaN"),
        (
            (lambda a, r, t, rt: 1 - (r - rt) / (a - t) if a != t else float("nan"), base_right),
            r"\(0.2, 0.2, 0.3, 0.1\) gave 2, expected NaN: nothing has accumulated",
        ),
        ((lambda *errors: None, base_right), "exposure_removed gave None"),
        ((exposure_right, lambda t, rt: t - rt), "base_error_removed.* divide by T"),
        ((exposure_right, lambda t, rt: rt / t if t else float("nan")), "1 minus it is gone"),
        (
            (exposure_right, lambda t, rt: (t - rt) / t),
            "There is no error to remove: give NaN",
        ),
        ((exposure_right, lambda t, rt: 1 - rt / t if t else 0.0), "gave 0, expected NaN"),
        ((exposure_right, lambda t, rt: max(0.0, base_right(t, rt))), "it became more"),
    ],
    5: [
        ((lambda T: torch.ones(T, T, dtype=torch.bool), None), "your mask lets position 0 see position 1"),
        ((lambda T: ~mask_by_comparison(T), None), "True means that the query may see"),
        (
            (lambda T: mask_by_comparison(T).T, None),
            "your mask lets position 0 see position 1, which comes later",
        ),
        (
            (lambda T: torch.ones(T, T, dtype=torch.bool).tril(-1), None),
            "your mask hides position 0 from itself",
        ),
        (
            (lambda T: torch.ones(T, T, dtype=torch.bool).tril(1), None),
            "your mask lets position 0 see position 1",
        ),
        (
            (lambda T: mask_by_comparison(T) & (torch.arange(T) > torch.arange(T)[:, None] - 3), None),
            "hides position 0 from position 3",
        ),
        ((lambda T: torch.ones(T, T).tril(), None), "gave torch.float32, expected torch.bool"),
        (
            (mask_by_comparison, softmax_of_zeros),
            r"see position 1 \(weight .*a score of 0 is not a weight of 0",
        ),
        ((mask_by_comparison, softmax_then_mask), "hide the scores before the softmax"),
        ((mask_by_comparison, softmax_over_queries), "your softmax runs over the queries"),
        ((mask_by_comparison, softmax_in_place), "changed its argument number 1 in place"),
    ],
    6: [
        ((lambda z, e: e,), "no gradient reaches z"),
        ((lambda z, e: e.detach(),), "no gradient at all"),
        ((lambda z, e: z,), "forwards it gives z"),
        ((lambda z, e: z + (z - e).detach(),), "forwards it must give e"),
        ((lambda z, e: e + z - z.detach(),), "a gradient also reaches e"),
        ((lambda z, e: 2 * z + (e - 2 * z).detach(),), "backwards it has to be the identity"),
    ],
    7: [
        ((lambda z, e: losses_by_mse(z, e)[::-1],), "the two are swapped"),
        (
            (lambda z, e: (F.mse_loss(z.detach(), e), F.mse_loss(z, e.detach())),),
            "5 times too small: sum over the D = 5",
        ),
        (
            (lambda z, e: ((z - e).square().sum(-1).mean(),) * 2,),
            "your codebook loss moves the encoder's output z",
        ),
        (
            (lambda z, e: (losses_by_mse(z, e)[0], (z - e).square().sum(-1).mean()),),
            "your commitment loss moves the codes e",
        ),
        (
            (lambda z, e: (losses_by_mse(z, e)[0], losses_by_mse(z, e)[0].detach()),),
            "commitment loss has no gradient",
        ),
        ((lambda z, e: tuple(24 * loss for loss in losses_by_mse(z, e)),), "24 times too large"),
        (
            (lambda z, e: (losses_by_mse(z, e)[0], 0.25 * losses_by_mse(z, e)[1]),),
            "leave the weights 0.1 and beta",
        ),
        ((lambda z, e: sum(losses_by_mse(z, e)),), "return codebook_loss, commitment_loss"),
    ],
    8: [
        (
            (window_of_the_raster,),
            r"position 7 \(row 0, column 7\) sees position 8 \(row 1, column 0\): neighbours in the raster "
            "need not be neighbours in the image",
        ),
        ((window_around_a_ring,), r"position 0 .* sees position 7 .*: nothing goes on beyond the border"),
        (
            (window_with(lambda y, x, r: abs(y) <= r),),
            r"position 0 .* sees position 2 .*0 down and 2 across",
        ),
        (
            (window_with(lambda y, x, r: abs(x) <= r),),
            r"sees position 16 \(row 2, column 0\): 2 down and 0 acr",
        ),
        (
            (window_with(lambda y, x, r: abs(y) + abs(x) <= r),),
            r"position 0 .* does not see position 9 .*1 down and 1 across. Each counts on its own",
        ),
        (
            (window_with(lambda y, x, r: y * y + x * x <= r * r),),
            "1 down and 1 across. Each counts on its own",
        ),
        ((window_with(lambda y, x, r: (abs(y) < r) & (abs(x) < r)),), "0 down and 1 across, and neither"),
        ((window_with(lambda y, x, r: ((abs(y) <= r) & (abs(x) <= r)) & (y + x != 0)),), "see itself"),
        (
            (window_with(lambda y, x, r: (abs(y) <= r) & (abs(x) <= r) & (8 * y + x <= 0)),),
            "does not see position 1 .*not causal, later positions count too",
        ),
        ((window_with(width=0),), "rows and columns are mixed up"),
        ((window_with(shown=-torch.inf, hidden=0.0),), "the wrong way round"),
        ((window_with(shown=1.0, hidden=0.0),), r"entry \[0, 0\] is 1. The mask is added to the scores"),
        ((window_with(hidden=-1e9),), r"entry \[0, 2\] is -1e\+09"),
        ((lambda grid, radius: window_with()(grid, radius) == 0,), "gave torch.bool, expected torch.float32"),
        (
            (lambda grid, radius: window_with()(grid, radius).view(*grid, *grid),),
            r"gave shape \(5, 8, 5, 8\)",
        ),
        ((lambda grid, radius: window_with()(grid, radius)[None],), r"expected \(40, 40\)"),
    ],
    9: [
        ((edges_with(padding="constant"),), "flat image has an edge of strength .* at its border"),
        ((edges_with(finish=lambda s: s.clamp(max=1)),), "a flat image gives 0, expected -1"),
        ((edges_with(divide=1),), "divide the kernels by 4"),
        ((edges_with(divide=8),), "divide by 4, not by 8"),
        ((edges_with(length=lambda x, y: x.abs() + y.abs()),), r"you add \|g_x\| and \|g_y\|"),
        ((edges_with(length=lambda x, y: torch.maximum(x.abs(), y.abs())),), "the length is wanted"),
        ((edges_with(length=lambda x, y: x**2 + y**2),), "take the square root"),
        ((edges_with(length=lambda x, y: x.abs()),), "horizontal step of height 0.3: at row 3"),
        ((edges_with(finish=lambda s: 2 * s - 1),), "reaches .*: strengths end at 1"),
        ((edges_with(kernel=((1, 0, -1),) * 3, divide=3),), "one pixel of 0.4"),
        ((edges_with(prepare=data.grey),), "not of the grey image"),
        ((edges_with(prepare=lambda x: x.mean(1, keepdim=True).repeat(1, 3, 1, 1)),), "not of their mean"),
        ((edges_with(combine=lambda s: s.mean(1, keepdim=True)),), "take the largest channel, not the mean"),
        (
            (edges_with(length=lambda x, y: torch.hypot(x.abs().amax(1, True), y.abs().amax(1, True))),),
            "the length first, then the channel",
        ),
        ((lambda images: edges_of_the_project(images)[:, :1],), r"gave shape \(2, 1, 8, 8\)"),
        (
            (lambda images: edges_of_the_project(images) / edges_of_the_project(images).amax(),),
            "a flat image: at row 0",
        ),
    ],
    10: [
        (
            (top_p_with(drop=lambda p, ordered, top_p: ordered.cumsum(-1) > top_p),),
            r"tokens \[1\] are kept, 0.500 in all, less than top_p: the token that reaches",
        ),
        ((top_p_with(unsort=False),), "are the sorted tokens back in their own order"),
        ((top_p_with(divide=False),), "divide by the sum of the kept"),
        ((lambda logits, top_p: logits.softmax(-1),), "is kept, although the likelier ones"),
        (
            (top_p_with(drop=lambda p, ordered, top_p: ordered.cumsum(-1) - 2 * ordered >= top_p),),
            "is kept, although",
        ),
        (
            (top_p_with(drop=lambda p, ordered, top_p: ordered < 1 - top_p),),
            "the token that reaches top_p is kept too",
        ),
        (
            (lambda logits, top_p: top_p_by_loop(logits, top_p).gt(0).float().softmax(-1),),
            "is kept, although",
        ),
        (
            (lambda logits, top_p: F.normalize(top_p_by_loop(logits, top_p).gt(0).float(), p=1, dim=-1),),
            "keep their proportions",
        ),
        (
            (lambda logits, top_p: torch.multinomial(top_p_by_loop(logits, top_p), 1)[:, 0],),
            r"gave shape \(1,\), expected \(1, 3\)",
        ),
        (
            (lambda logits, top_p: logits.clamp_(max=0).softmax(-1) * 0 + top_p_by_loop(logits, top_p),),
            "in place",
        ),
    ],
    11: [
        ((LoraNotFrozen,), "linear.bias, linear.weight would be trained as well"),
        ((LoraBothZero,), "A and B both start at zero"),
        ((LoraBothRandom,), "before training the layer is off .* B has to start at zero"),
        ((LoraOtherWayRound,), "B starts at zero and A at random: you have them the other way round"),
        ((LoraOnes,), "the numbers of A are all the same"),
        ((LoraSwapped,), r"A has shape \(5, 2\), expected \(2, 5\)"),
        ((LoraScaled,), "without any scale"),
        ((LoraDetached,), "no gradient reaches A"),
        ((LoraMergesIntoItself,), "merged changed the layer itself"),
        ((LoraMergesNothing,), "the merged layer is off by up to .* its weight is W [+] B A"),
    ],
    12: [
        ((gate_by_cosine, choose_right), "is below the threshold, but the token was replaced"),
        ((gate_the_other_way, choose_right), "it is the other way round"),
        ((gate_by_sentence, choose_right), "is above the threshold, but the backbone's token 19 is kept"),
        ((gate_to_second, choose_right), "is above the threshold, but the backbone's token 19 is kept"),
        (
            (lambda y, e, c, threshold: vsr.nearest_code(e, c), choose_right),
            "is below the threshold, but the token was replaced",
        ),
        (
            (gate_right, lambda thresholds, *_: thresholds.index(0.0)),
            "choose_threshold gave 0, where the mean cosine error is",
        ),
        (
            (gate_right, choose(lambda y, truth, c: vsr.cosine_error(y, truth, c).mean(), max)),
            "where the mean cosine error is",
        ),
        (
            (gate_right, choose(lambda y, truth, c: (y == truth).float().mean())),
            "where the mean cosine error is",
        ),
        ((gate_right, lambda thresholds, *_: 7), "gave 7, which is not one of the thresholds"),
        ((gate_right, lambda thresholds, *_: None), "choose_threshold gave None"),
    ],
    13: [
        (
            (training(given=lambda tokens, target, rows: target[rows]),),
            "step 0: the refiner was given the true",
        ),
        (
            (training(asked=lambda tokens, target, rows: tokens[rows]),),
            "step 0: you compare with what was written",
        ),
        (
            (training(asked=lambda tokens, target, rows: target[torch.randint(64, (32,))]),),
            "not that of the cosine loss against .* with the rows of this batch",
        ),
        (
            (training(given=lambda tokens, target, rows: tokens[torch.randint(64, (32,))]),),
            "tokens and query are of different rollouts",
        ),
        (
            (training(states=lambda query, rows: query[rows].roll(1, -1)),),
            "the query states are not those of rollout.query",
        ),
        ((training(rows=lambda step, S: torch.arange(32)),), "32 of 64 rollouts were never used, number 32"),
        ((training(rows=lambda step, S: torch.randint(S - 3, (32,))),), "3 of 64 rollouts were never used"),
        ((training(rows=lambda step, S: torch.arange(S)),), "the batch has 64 rollouts, expected 32"),
        ((training(call=lambda refiner, embeddings, states: refiner(embeddings)),), "was given no query"),
        (
            (
                training(
                    call=lambda refiner, e, states: vsr.refine(refiner, None, embeddings=e, query=states)[1]
                ),
            ),
            "call refiner\\(...\\) itself, not vsr.refine",
        ),
        ((torch.no_grad()(training()),), "no gradient is kept"),
        ((training(sign=-1),), "step 0: the loss would rise"),
        ((training(clear=False),), "step 1: the gradients of the step before are still there"),
        ((training(move=False),), "step 0: the refiner did not change: the optimizer's step is missing"),
        ((training(also="codebook"),), "codebook has changed, or would learn"),
        ((training(rate=1e-7),), "is the learning rate too small or too large"),
        ((training(rate=30.0),), "is the learning rate too small or too large"),
        ((training(steps=lambda steps: 2),), "2 steps were taken, expected 40"),
        ((training(result=lambda losses: None),), "train gave None"),
        ((training(result=lambda losses: losses[-1]),), "train gave float, expected a list of numbers"),
        ((training(result=lambda losses: losses[-3:]),), "train gave 3 losses for 40 steps"),
        ((training(result=lambda losses: [32 * loss for loss in losses]),), "the mean over the batch"),
        ((train_a_copy,), "no gradient went through the refiner that was given"),
    ],
    14: [
        ((step_with(stop=0),), "t = 0: position 0 does not see itself"),
        ((step_with(stop=99),), "t = 0: rows after 0 were read"),
        ((step_with(stop=2),), "t = 0: row 1 was read"),
        ((step_with(write=False),), r"row 0 of cache\[0\] was not written"),
        ((step_with(first_write=False),), "row 0 was read before it was written"),
        ((step_with(scale=False),), r"t = 1: the scores are not divided by sqrt\(d\)"),
        ((step_with(swap=True),), "keys and values are swapped"),
        ((step_clears_the_rest,), "t = 0: row 1 of the keys was changed too"),
        ((step_shifts,), "of the keys was changed too"),
        ((lambda *given: (step_with()(*given), given[4]),), "gave a tuple, expected a tensor"),
        ((lambda *given: step_with()(*given)[:, None],), r"gave shape \(3, 1, 4\), expected \(3, 4\)"),
    ],
    15: [
        ((RefinesFromNothing,), "untrained it moves embeddings"),
        ((RefinesWithoutZero,), "start the last layer .* at zero"),
        ((RefinesUnnormalised,), "normalise the sum"),
        ((RefinesByLength,), "longer embeddings give another result"),
        ((RefinesCausally,), "position 0 does not see position 1, which comes later: it is causal"),
        ((RefinesAlone,), "position 0 does not see position 1, nor any other"),
        ((RefinesWithoutPlaces,), "cannot tell positions apart"),
        ((RefinesWithAList,), "self.layers is a plain Python list"),
        ((RefinesNever,), "no parameter gets a gradient"),
    ],
    16: [
        ((improve_by_truth,), "with another truth you give another answer"),
        ((improve_where_it_was_wrong,), "the truth must not be read"),
        ((improve_by_luck,), "two calls with the same case differ"),
        ((lambda case: case.rollout.tokens[:, :-1],), r"gave shape \(128, 15\), expected \(128, 16\)"),
        ((lambda case: case.rollout.tokens + 16,), "is not in the codebook, 0 to 15"),
        ((lambda case: case.codebook[case.rollout.tokens],), r"gave shape \(128, 16, 8\)"),
        ((improve_in_place,), "changed case.rollout.tokens in place"),
    ],
}

CHECKS = {
    number: getattr(checks, name)
    for number, name in enumerate(
        ("check_gap_closed", "check_cosine_loss", "check_nearest_code", "check_exposure_removed",
         "check_causal_mask", "check_straight_through", "check_commitment_loss", "check_window_mask",
         "check_sobel_edges", "check_top_p", "check_lora_layer", "check_gated_refinement",
         "check_parallel_control", "check_kv_cache", "check_residual_refiner",
         "check_open"), 1)
}  # fmt: skip


def flat(answers: dict) -> list:
    return [
        pytest.param(number, each, id=f"{BY_NUMBER[number]}-{i}")
        for number, all_ in answers.items()
        for i, each in enumerate(all_)
    ]


@pytest.mark.parametrize(("number", "answer"), flat(RIGHT))
def test_other_right_answers_pass(number, answer, shipped, capsys):
    CHECKS[number](*answer)
    assert capsys.readouterr().out


@pytest.mark.parametrize(("number", "answer"), flat(WRONG))
def test_wrong_answers_get_a_helpful_line(number, answer, shipped):
    functions, line = answer
    with pytest.raises(checks.Wrong, match=line) as found:
        CHECKS[number](*functions)
    assert "\n" not in str(found.value) and len(str(found.value)) < 260


def test_every_exercise_has_right_and_wrong_answers():
    assert list(RIGHT) == list(WRONG) == list(CHECKS) == list(BY_NUMBER)
    assert all(RIGHT.values()) and min(len(wrong) for wrong in WRONG.values()) >= 2


# The prediction, and the lesson it is about


FORM = dict.fromkeys(checks.PREDICTED, "query")


@pytest.mark.parametrize(
    ("prediction", "line"),
    [
        (None, "predict gave None, expected a dictionary"),
        ({"least error": "query"}, "says nothing of 'most exposure removed', 'most tokens right'"),
        ({**FORM, "best": "query"}, "has 'best', which was not asked"),
        ({**FORM, "least error": "parallel"}, "'least error': 'parallel' is none of 'backbone', 'tokens'"),
        ({**FORM, "least error": ...}, "'least error': Ellipsis is none of"),
        ({**FORM, "least error": ["query"]}, r"'least error': \['query'\] is none of"),
    ],
)
def test_the_form_of_a_prediction_is_checked(prediction, line):
    with pytest.raises(checks.Wrong, match=line):
        checks.check_prediction(lambda: prediction)


def test_any_prediction_of_the_right_form_passes(capsys):
    for name in ("backbone", *checks.READINGS):
        checks.check_prediction(lambda name=name: dict.fromkeys(checks.PREDICTED, name))
    assert capsys.readouterr().out == "Noted. Now run it.\n" * 4
    with pytest.raises(checks.Wrong, match="predict is not written yet"):
        exec(make.without_solution(code_of_solution(BY_NUMBER[13])[4]), space := {})
        checks.check_prediction(space["predict"])


def test_a_lesson_has_rollouts_of_one_task_and_each_seed_has_its_own(shipped):
    lesson, other = checks.load_lesson(1, train=70, val=20), checks.load_lesson(2, train=70, val=20)
    again = checks.load_lesson(1, train=70, val=20)
    assert torch.equal(lesson.train.tokens, again.train.tokens)
    assert not torch.equal(lesson.val_target, other.val_target)
    assert lesson.train.tokens.shape == lesson.train_target.shape == (70, 16)
    assert lesson.train.query.shape == (70, 16, lesson.sizes["state_dim"])
    assert lesson.forced.tokens.shape == lesson.val.tokens.shape == lesson.val_target.shape == (20, 16)
    assert torch.equal(lesson.forced.query, lesson.val.query)
    _, backbone, _, config = evaluate.load_run(checks.WEIGHTS, torch.device("cpu"))
    images, task = data.Sentences(data.DataConfig(**config["data"]), 1)("val", 0, 64)
    tokenizer = evaluate.load_run(checks.WEIGHTS, torch.device("cpu"))[0]
    tokens = tokenizer.encode(images[task == 0].flatten(0, 1)).view(-1, 4, 16)[:5]
    prompt, truth = tokens[:, :-1].flatten(1), tokens[:, -1]
    assert torch.equal(lesson.val_target[:5], truth)
    assert torch.equal(lesson.val.tokens[:5], backbone.generate(prompt, 16).tokens)
    forced = backbone.logits(backbone.replay(prompt, truth).states).argmax(-1)
    assert torch.equal(lesson.forced.tokens[:5], forced)
    assert not torch.equal(lesson.forced.tokens, lesson.val.tokens)


# The open exercise


def test_the_open_exercise_says_how_to_get_its_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "WEIGHTS", tmp_path / "toy.pt")
    with pytest.raises(
        checks.Wrong, match=r"toy.pt is not there: `python train_refiner.py --weights weights/toy.pt`"
    ):
        checks.check_open(improve_plainly)


def test_the_open_exercise_reports_what_was_measured(shipped, capsys):
    case = checks.load_case("check")
    checks.check_open(improve_plainly)
    lines = capsys.readouterr().out.splitlines()
    plain, yours = (line for line in lines if line.startswith(("plain refinement", "yours")))
    assert plain.split()[2:] == yours.split()[1:], "the same method has the same numbers"
    tokens = checks.plain_refinement(case)
    error = vsr.cosine_error(tokens, case.truth, case.codebook)
    assert plain.split()[2] == f"{error.mean().item():.4f}"
    assert plain.split()[6] == f"{(tokens == case.truth).float().mean().item():.1%}"
    assert "not better than plain refinement" in lines[-1]
    control, _ = vsr.refine(case.refiners["query"], case.codebook, *case.rollout)
    row = next(line for line in lines if line.startswith("control"))
    assert row.split()[6] == f"{(control == case.truth).float().mean().item():.1%}"


def test_the_solution_of_the_open_exercise_has_a_smaller_error_with_the_shipped_weights(run_cells, capsys):
    cells = code_of_solution(BY_NUMBER[16])
    run_cells(cells[: 1 + next(i for i, cell in enumerate(cells) if "\ncheck_open(" in cell)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(("Yours is better", "Yours has the smaller error"))


def test_what_one_tries_things_on_is_not_what_the_check_measures(shipped):
    here, there = checks.load_case(), checks.load_case("check")
    assert here.prompt.shape == there.prompt.shape == (128, 48)
    assert not torch.equal(here.truth, there.truth)
    rows = {tuple(row) for row in here.prompt.tolist()}
    shared = sum(tuple(row) in rows for row in there.prompt.tolist())
    assert shared <= 2
