"""Tests of scripts/explain.py, and of the code in docs/symmetry.md."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn

from bipolar import BReLU, build, sweep
from bipolar.networks.mlp import MLP
from bipolar.symmetry import explain as rows_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "symmetry.md").read_text()


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def explain(capsys, monkeypatch):
    """`python scripts/explain.py <arguments>` in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["scripts/explain.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("scripts/explain.py", run_name="__main__")
        return Ended(ended.value.code, *capsys.readouterr())

    return call


def test_the_table_of_a_network_that_breaks_the_symmetry(explain):
    ended = explain("activation=brelu", "network=cnn", "network.pool=max", "network.widths=[4,6]")
    assert (ended.status, ended.err) == (0, "")
    weights = "takes the signs of its input and output into its weights"
    pattern = "is S f(S x), the pattern of S being interleaved"
    not_odd = "is not odd: of a flipped map it keeps the value nearest zero"
    assert ended.out.splitlines() == [
        "layer                      operation          symmetry  reason",
        f"features.conv1.conv        convolution        keeps     {weights}",
        f"features.conv1.activation  BReLU              keeps     {pattern}",
        f"features.conv2.pool        max pooling        breaks    {not_odd}",
        f"features.conv2.conv        convolution        keeps     {weights}",
        f"features.conv2.activation  BReLU              keeps     {pattern}",
        "pool                       AdaptiveAvgPool2d  keeps     is linear in each feature map",
        "flatten                    flatten            keeps     keeps each feature's values together",
        f"output                     linear map         keeps     {weights}",
        "(the network itself)       output             keeps     no feature of it is flipped",
        "",
        "1 layer breaks the symmetry: features.conv2.pool (max pooling).",
    ]


EXACT = "This network is exactly its base network ({}) with other signs: whatever it learns, that learns too."
BROKEN = "{} layers break the symmetry: "


@pytest.mark.parametrize(
    ("overrides", "verdict"),
    [
        (["activation=brelu"], EXACT.format("ReLU")),
        (["activation=belu", "network=cnn", "network.pool=bipolar_max"], EXACT.format("ELU")),
        (["activation=bgelu", "network=resnet", "dataset=cifar100"], EXACT.format("GELU")),
        (["activation=brelu", "network=resnet", "activation.pattern=halves"], BROKEN.format(2) + "blocks.3 (sum), "),
        (["activation=brelu", "network=cnn"], BROKEN.format(2) + "features.conv3.pool (max pooling), features.conv5"),
        (["activation=brelu", "network.norm=layer"], BROKEN.format(8) + "hidden.layer1.norm (group normalization), "),
        (["activation=batch_axis_relu"], BROKEN.format(8) + "hidden.layer1.activation (BatchAxisReLU), "),
        (["activation=relu", "network=cnn"], "This network has no bipolar activation: it is a base network already."),
        (["activation=brelu", "dataset=npz", "dataset.path=nowhere.npz"], EXACT.format("ReLU")),
    ],
    ids=" ".join,
)
def test_the_verdict(overrides, verdict, explain):
    ended = explain(*overrides)
    assert (ended.status, ended.err) == (0, "")
    *table, empty, last = ended.out.splitlines()
    assert empty == ""
    assert last.startswith(verdict)
    assert last.endswith(".")
    model = build.hollow_network(sweep.compose(overrides))
    rows = rows_of(model)
    assert len(table) == len(rows) + 1
    for line, row in zip(table[1:], rows, strict=True):
        assert line.split("  ")[0] == row.layer
        assert line.endswith(row.reason)
    words = [" keeps " if row.keeps else " breaks " for row in rows]
    assert {line.index(word) for line, word in zip(table[1:], words, strict=True)} == {table[0].index("symmetry") - 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["activation=brelux"], r"activation=brelux is not there; choose from .* \(did you mean 'brelu'\?\)"),
        (["network=cnn", "network.pool=avarage"], r"network\.pool='avarage' is not allowed; .*'average'\?\)"),
        (["network.blah=3"], r"there is no option network\.blah; the options there are .*"),
        (["foo bar"], r"'foo bar' cannot be read: .*"),
        (["nonsense=3"], r"there is no (option|configuration group) nonsense.*|.*nonsense.*"),
        (["twin=true"], r"twin=true is not allowed here; leave it out .*"),
        (["-m", "activation=relu"], r"there is no flag -m; options are written key=value, .*"),
        (["--depth=3"], r"there is no flag --depth=3; .*"),
        (["activation.dim=5"], r"activation=belu .*activation\.dim=5.* cannot be used: .*"),
        (["network=resnet", "network.depth=21"], r"network\.depth=21 is not allowed; give 6n \+ 2, such as 20 .*"),
        (["network._target_=test_explain.Branching"], r"Branching cannot be traced by torch\.fx: .*"),
        (["network._target_=test_explain.Branching", "dataset=npz"], r"the samples' shape is not known .*"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(arguments, message, explain):
    ended = explain(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert re.fullmatch(rf"error: ({message})\n", ended.err), ended.err


class Branching(MLP):
    """A user's network that torch.fx cannot trace."""

    def forward(self, x):
        return super().forward(x) if int(x.shape[0]) > 0 else x


def test_help(explain):
    ended = explain("--help")
    assert ended.status == 0
    assert "scripts/explain.py activation=brelu network=cnn network.pool=max" in ended.out


def test_nothing_is_written(explain, tmp_path):
    explain("activation=brelu", f"output_root={tmp_path}/outputs")
    assert not list(tmp_path.iterdir())


# --- docs/symmetry.md -------------------------------------------------------------------------------------------------


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_code_of_the_page_runs(capsys):
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "docs/symmetry.md", "exec"), {})
    out = capsys.readouterr().out.splitlines()
    comment = re.search(r"print\(error\)  # (.*)", PAGE)
    assert out[-1] == comment.group(1)
    assert any(line.startswith("2 max pooling breaks") for line in out)


def test_the_commands_of_the_page_can_be_given(explain):
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    assert [command[:2] for command in commands] == [["python", "scripts/explain.py"], ["python", "scripts/train.py"]]
    assert explain(*commands[0][2:]).status == 0
    build.check(sweep.compose(commands[1][2:]))


def test_what_the_page_names_is_there():
    for path in re.findall(r"`((?:tests|scripts|bipolar)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists()
    assert rows_of(nn.Sequential(nn.Linear(2, 2), BReLU(), nn.Linear(2, 2)))[1].operation == "BReLU"
