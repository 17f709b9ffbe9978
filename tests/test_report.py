"""From archives to the report: its numbers, its page, the README's table, and that a stale one is found out."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import pytest
from made_runs import made_run, made_runs

from bipolar.errors import ConfigError
from bipolar.recording.folder import write_json
from bipolar.runs import Run
from bipolar.sweep import CONFIGS
from experiments import claim_of, ordered, part_of
from experiments.analysis import inference
from experiments.analysis.inference import LOWER, Verdict, effect, judged, overall
from experiments.analysis.plots import MANY_POINTS, band, draw, layers, panels, plain_powers, style
from experiments.analysis.summaries import Row, by_activation, final
from experiments.reporting import html, provenance, readme, records, report, svg
from experiments.reporting.markdown import slug

ROOT = CONFIGS.parent
RESULTS = ROOT / "results"
PROFILES = sorted({path.parents[1].name for path in RESULTS.glob(f"*/*/{records.RECORDS}")})


def figure(runs: list[Run]):
    """Curves with `ticks` and [brackets],
    in two lines.

    Not part of the caption.
    """
    return _drawn(runs)


def another(runs: list[Run]):
    """A second figure."""
    return _drawn(runs)


def _drawn(runs: list[Run]):
    drawn, axes = panels(1, 1)
    draw(axes[0, 0], runs, layers("mean"), "Mean", "layer", "mean activation")
    return drawn


def table(runs: list[Run]) -> list[Row]:
    """What the | columns are."""
    return [{"activation": name, "|runs|": str(len(members))} for name, members in by_activation(runs).items()]


def verdict(runs: list[Run]) -> Verdict:
    errors = {name: [final(run, "test_error") for run in members] for name, members in by_activation(runs).items()}
    compare = lambda name, **options: effect(
        name, "test error", errors["brelu"], errors["relu"], smallest=0.05, favourable=LOWER, unit="points", **options
    )
    primary = judged([compare("BReLU against ReLU")])
    return Verdict(
        claim="Flipping lowers the error.",
        verdict=overall(primary),
        reason=f"It differs by {primary[0].interval()}.",
        rule="One effect.",
        primary=primary,
        secondary=(compare("the same in pairs", paired=True),),
    )


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two claims made up for the tests: `fake`, and `resnet`, which the report's order knows."""
    for name in ("fake", "resnet"):
        module = ModuleType(
            f"experiments.{name}", f"The title of {name}\n\nWhat *{name}* claims.\n\nAgainst: all else."
        )
        module.figure, module.table, module.verdict = figure, table, verdict  # type: ignore[attr-defined]
        module.more_figures = {"another": another}  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"experiments.{name}", module)


@pytest.fixture(scope="module")
def archived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archived") / "quick"
    runs = [*made_runs(), made_run("elu", 9, "quick/fake-pilot", "optimizer.lr=0.3", status="diverged")]
    records.write(folder / "fake", runs)
    records.write(folder / "resnet", made_runs(experiment="quick/resnet"))
    return folder


@pytest.fixture(scope="module")
def _written(archived: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report, drawn once for the tests that only read it."""
    folder = tmp_path_factory.mktemp("written") / "quick"
    shutil.copytree(archived, folder)
    return folder


@pytest.fixture
def results(claims: None, _written: Path) -> Path:
    if not (_written / "report.md").exists():
        report.write("quick", _written, "make reproduce")
    return _written


@pytest.fixture
def copy(results: Path, tmp_path: Path) -> Path:
    """One that may be changed."""
    shutil.copytree(results, tmp_path / "quick")
    return tmp_path / "quick"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Page(HTMLParser):
    """What the tests ask of a page; fails where a tag is not closed."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(attributes) == len(dict(attributes)), f"an attribute of <{tag}> occurs twice"
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(results: Path) -> Page:
    return Page((results / "report.html").read_text(encoding="utf-8"))


# --- names


def test_experiments_belong_to_claims() -> None:
    assert [claim_of(name) for name in ("cnn", "cnn-twins", "cpu/deep_mlp-a-b")] == ["cnn", "cnn", "deep_mlp"]
    assert [part_of(name) for name in ("cnn", "cpu/cnn-twins", "cpu/deep_mlp-a-b")] == ["", "twins", "a-b"]
    assert ordered(["zeta", "cnn", "alpha", "mean_shift"]) == ["mean_shift", "cnn", "alpha", "zeta"]


# --- what is written


def test_numbers_are_the_runs_numbers(results: Path) -> None:
    runs = records.read(results / "fake")
    expected = verdict(runs)
    saved = json.loads((results / "fake" / "verdict.json").read_text(encoding="utf-8"))
    assert saved["profile"] == "quick"
    assert saved["verdict"] == expected.verdict
    assert saved["primary"][0]["estimate"] == pytest.approx(expected.primary[0].estimate, rel=1e-8)
    assert saved["primary"][0]["n"] == [3, 3]
    text = (results / "report.md").read_text(encoding="utf-8")
    assert text.count(expected.primary[0].interval()) >= 3  # summary, reason, table of effects
    text = text.split("## The title of fake")[1]
    assert expected.secondary[0].interval() in text.split("<details>")[1].split("</details>")[0]
    with (results / "fake" / "table.csv").open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == table(runs)


def test_report_says_first_what_came_out(results: Path) -> None:
    text = (results / "report.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        "Claims and verdicts", "How a verdict is reached", "The title of resnet", "The title of fake",
        "Environment of the runs",
    ]  # fmt: skip
    rule = text.split("## How a verdict is reached")[1].split("## ")[0]
    assert " ".join(inference.__doc__.split()).endswith(" ".join(rule.split()))  # type: ignore[union-attr]
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in map(slug, headings)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (results / link).exists()


def test_section_says_what_was_run_and_how_to_do_it_again(results: Path) -> None:
    text = (results / "report.md").read_text(encoding="utf-8").split("## The title of fake")[1]
    assert "What *fake* claims." in text
    assert "- **main grid**: 6 runs\n  - activations: ReLU, BReLU" in text
    assert "seeds: 0 to 2" in text
    pilot = text.split("- **pilot**")[1].split("###")[0]
    assert pilot.startswith(": 1 runs, 1 of them diverged")
    assert "learning rate 0.3" in pilot
    assert "data: CIFAR-10, batch 5 held out" in pilot
    assert "python scripts/train.py -m experiment=quick/fake\n" in text
    assert "python scripts/train.py -m experiment=quick/fake-pilot\n" in text
    assert "make reproduce PROFILE=quick" in text
    assert "![Curves with `ticks` and [brackets], in two lines.](fake/figure.png)" in text
    assert "7 min, the sum over runs" in text  # a run that two grids share counts once


def test_nothing_of_the_machine_but_its_name(results: Path) -> None:
    for name, content in contents(results).items():
        if not name.endswith((".png", ".xz")):
            assert b"/secret" not in content, name


def test_same_archives_give_the_same_files(copy: Path) -> None:
    before = contents(copy)
    report.write("quick", copy, "make reproduce")
    assert contents(copy) == before


def test_results_are_current_until_runs_or_files_change(copy: Path, tmp_path: Path) -> None:
    folders = []
    for run in (run for name in ("fake", "resnet") for run in records.read(copy / name)):
        folder = tmp_path / run.folder
        folder.mkdir(parents=True)
        write_json(folder / "summary.json", {**run.summary, "wall_seconds": 1.0, "training_seconds": 2.0})
        folders.append(folder)
    assert provenance.is_current(copy, folders)
    assert not provenance.is_current(copy, folders[:-1])
    (copy / "fake" / "another.svg").rename(tmp_path / "aside")
    assert not provenance.is_current(copy, folders)
    (tmp_path / "aside").rename(copy / "fake" / "another.svg")
    assert provenance.is_current(copy, folders)
    write_json(folders[0] / "summary.json", {**records.read(copy / "resnet")[0].summary, "steps": 21})
    assert not provenance.is_current(copy, folders)
    assert not provenance.is_current(tmp_path / "nowhere", folders)


def test_claim_without_a_file_or_archive_is_an_error(claims: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no archive"):
        report.load(tmp_path)
    records.write(tmp_path / "unknown_claim", made_runs())
    with pytest.raises(ConfigError, match="unknown_claim"):
        report.write("quick", tmp_path, "make reproduce")


def test_claim_without_a_rule_is_not_judged(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(sys.modules["experiments.fake"], "verdict")
    records.write(tmp_path / "quick" / "fake", records.read(results / "fake"))
    report.write("quick", tmp_path / "quick", "make reproduce")
    assert json.loads((tmp_path / "quick" / "fake" / "verdict.json").read_text())["verdict"] == inference.NOT_TESTED
    assert not (tmp_path / "quick" / "claims.png").exists()
    assert report.check("quick", tmp_path / "quick") == []


# --- drawing


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    x, y = np.arange(1, 1001), np.linspace(3.0, 5.0, 1000)
    for length, expected in ((1000, MANY_POINTS), (150, 150), (1, 1)):
        _, axes = panels(1, 1)
        band(axes[0, 0], "relu", [(x[:length], y[:length]), (x[:length], y[:length] + 1)])
        drawn = axes[0, 0].lines[0]
        assert len(drawn.get_xdata()) == expected
        assert (drawn.get_xdata()[0], drawn.get_xdata()[-1]) == (1, length)
        assert drawn.get_ydata() == pytest.approx(y[np.asarray(drawn.get_xdata()) - 1] + 0.5)
        plt.close()


@pytest.mark.parametrize(
    ("scale", "limits", "expected"),
    [
        ({"value": "log"}, (1e-4, 1e2), ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "10⁰", "10¹", "10²"]),
        ({"value": "log"}, (2.5, 4.5), ["3×10⁰", "4×10⁰"]),
        ({"value": "symlog", "linthresh": 0.1}, (-1, 10), ["−10⁰", "−10⁻¹", "0", "10⁻¹", "10⁰", "10¹"]),
    ],
)
def test_logarithmic_axes_are_labelled_in_plain_text(scale: dict, limits: tuple, expected: list[str]) -> None:
    with style(layout=False):
        figure, axes = panels(1, 1)
    axes[0, 0].set_yscale(**scale)
    plain_powers(axes[0, 0].yaxis)
    axes[0, 0].set_ylim(*limits)
    figure.draw_without_rendering()
    ticks = [*axes[0, 0].yaxis.get_major_ticks(), *axes[0, 0].yaxis.get_minor_ticks()]
    inside = [each for each in ticks if limits[0] <= each.get_loc() <= limits[1]]
    assert [text for each in sorted(inside, key=lambda each: each.get_loc()) if (text := each.label1.get_text())] == (
        expected
    )
    plt.close()


# --- check


def test_check_passes_on_what_was_written_and_writes_nothing(copy: Path) -> None:
    before = contents(copy)
    assert report.check("quick", copy) == []
    assert contents(copy) == before


@pytest.mark.parametrize(
    "name",
    ["report.md", "report.html", "fake/verdict.json", "fake/table.csv", "fake/table.md", "fake/runs.csv"],
)
def test_check_names_a_text_that_was_changed_or_lost(name: str, copy: Path) -> None:
    path = copy / name
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"\d", lambda match: str(9 - int(match[0])), text, count=1), encoding="utf-8")
    (line,) = report.check("quick", copy)
    assert line.startswith(str(path))
    path.unlink()
    (line,) = report.check("quick", copy)
    assert line == f"{path} is missing"


@pytest.mark.parametrize("name", ["fake/another.svg", "resnet/figure.png", "claims.png", "provenance.json"])
def test_check_names_a_missing_figure(name: str, copy: Path) -> None:
    (copy / name).unlink()
    assert f"{copy / name} is missing" in report.check("quick", copy)


def test_check_sees_that_the_runs_are_others(copy: Path) -> None:
    runs = records.read(copy / "fake")
    figures = {**runs[0].summary["final"], "test_error": 0.999}
    records.write(copy / "fake", [replace(runs[0], summary={**runs[0].summary, "final": figures}), *runs[1:]])
    wrong = "\n".join(report.check("quick", copy))
    assert str(copy / "fake" / "verdict.json") in wrong
    assert str(copy / "report.md") in wrong
    assert str(copy / "resnet") not in wrong


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts" / "report.py"), *arguments]
    return subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("profile", PROFILES)
def test_committed_results_are_what_records_and_code_make(profile: str) -> None:
    done = command("--profile", profile, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_command_writes_checks_and_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    records.write(folder / "cnn", made_runs("relu", "brelu", seeds=2, experiment="tiny/cnn"))
    place = ("--profile", "tiny", "--results", str(tmp_path))
    assert command(*place, "--check").returncode == 1
    written = command(*place)
    assert written.returncode == 0, written.stderr
    checked = command(*place, "--check")
    assert checked.returncode == 0, checked.stdout
    (folder / "report.md").write_text("older", encoding="utf-8")
    stale = command(*place, "--check")
    assert stale.returncode == 1
    assert "report.md" in stale.stdout
    (folder / "cnn" / records.RECORDS).write_bytes(b"damaged")
    for wrong, message in ((place, "is damaged"), (("--profile", "tiny", "--results", str(folder)), "--profile=tiny")):
        done = command(*wrong)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_processes_draw_what_one_draws(tmp_path: Path) -> None:
    for folder in (tmp_path / "one" / "tiny", tmp_path / "two" / "tiny"):
        for claim in ("cnn", "batch_axis"):
            records.write(folder / claim, made_runs(seeds=2, experiment=f"tiny/{claim}"))
    for name, workers in (("one", "1"), ("two", "2")):
        done = command("--profile", "tiny", "--results", str(tmp_path / name), "--workers", workers)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    (tmp_path / "two" / "tiny" / "cnn" / records.RECORDS).write_bytes(b"damaged")
    done = command("--profile", "tiny", "--results", str(tmp_path / "two"), "--workers", "2")
    assert done.returncode == 2
    assert "is damaged" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


# --- the page


def test_page_needs_nothing_from_elsewhere(page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")) or (tag == "a" and name == "href"), (tag, target)


def test_page_has_unique_ids_and_every_anchor_leads_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes[name] for _, attributes in page.tags for name in ("href", "xlink:href") if name in attributes]
    styles = " ".join(str(value) for _, attributes in page.tags for value in attributes.values())
    targets += [f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", styles)]
    inside = [target for target in targets if target and target.startswith("#")]
    assert len(inside) > 20
    assert {target[1:] for target in inside} <= set(ids)


def test_every_figure_can_be_heard_and_has_its_caption(page: Page) -> None:
    labels = [attributes["aria-label"] for attributes in page.all("svg") if attributes.get("role") == "img"]
    assert len(labels) == len(page.all("figure")) == len(page.all("figcaption")) == 5
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert labels.count("Curves with ticks and [brackets], in two lines.") == 2


def test_page_suits_small_screens_and_keyboards(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("title")
    metas = {attributes.get("name"): attributes.get("content") for attributes in page.all("meta")}
    assert "width=device-width" in str(metas["viewport"])
    assert metas["color-scheme"] == "light dark"
    boxes = [each for each in page.all("div") if each.get("class") == "scroll"]
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in boxes)
    assert len(boxes) >= len(page.all("table")) + len(page.all("figure"))


def test_verdicts_are_badges_that_carry_their_text(results: Path, page: Page) -> None:
    expected = verdict(records.read(results / "resnet")).verdict
    badges = [each for each in page.all("strong") if str(each.get("class")).startswith("verdict ")]
    assert len(badges) == 2 * 3  # of each claim: summary, section, table of effects
    assert page.text.count(expected) >= 3


def test_colours_have_enough_contrast_in_both_schemes() -> None:
    def luminance(colour: str) -> float:
        channels = [byte / 255 for byte in bytes.fromhex(colour[1:])]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    style = html.TEMPLATE.read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(schemes) == 2
    pairs = [("text", "back"), ("soft", "back"), ("link", "back"), ("link", "raised"), ("text", "raised")]
    pairs += [(name, f"{name}-back") for name in ("yes", "no", "none", "open")]
    for scheme in schemes:
        for pair in pairs:
            low, high = sorted(luminance(scheme[name]) for name in pair)
            assert (high + 0.05) / (low + 0.05) >= 4.5, pair


def test_greys_become_ink_and_colours_stay() -> None:
    drawn = """<?xml version="1.0"?><svg width="72pt" viewBox="0 0 72 36"><metadata>x</metadata>
    <defs><style>*{}</style><path id="m"/></defs>
    <path style="fill: #ffffff"/><path style="fill: none; stroke: #000000; stroke-width: 2"/>
    <path style="stroke: #cccccc; stroke-opacity: 0.5"/><path style="fill: #0072b2; fill-opacity: 0.15"/>
    <use xlink:href="#m" clip-path="url(#m)"/></svg>"""
    made = svg.inline(drawn, "f1", 'A "label"')
    styles = re.findall(r'<path[^>]*style="([^"]*)"', made)
    declared = [dict(part.split(": ") for part in style.split("; ")) for style in styles]
    assert declared[0]["fill"] == "none"
    assert declared[1]["stroke"] == "currentColor"
    assert declared[1]["stroke-width"] == "2"
    assert declared[2]["stroke"] == "currentColor"
    assert float(declared[2]["stroke-opacity"]) == pytest.approx(0.1)
    assert declared[3] == {"fill": "#0072b2", "fill-opacity": "0.15"}
    assert 'id="f1-m"' in made
    assert 'href="#f1-m"' in made
    assert "url(#f1-m)" in made
    assert 'aria-label="A &quot;label&quot;"' in made
    assert not {"metadata", "style>", "?xml"} & set(re.findall(r"metadata|style>|\?xml", made))


def test_large_figure_goes_in_as_png(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "LARGEST_SVG", 1000)
    made = Page(html.page((results / "report.md").read_text(encoding="utf-8"), results))
    assert not made.all("svg")
    assert len(made.all("img")) == 5
    assert all(str(each["src"]).startswith("data:image/png;base64,") and each["alt"] for each in made.all("img"))


# --- the README

README = "# name\n\nbefore\n\n<!-- claims: begin (generated) -->\nold\n<!-- claims: end -->\n\nafter \\1\n"


@pytest.fixture
def repository(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own with results of one profile."""
    shutil.copytree(results, tmp_path / "results" / "quick")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def test_readme_shows_the_claims_and_keeps_the_rest(repository: Path) -> None:
    folder = repository / "results" / "quick"
    assert report.check("quick", folder) == [f"{repository / 'README.md'} is not what the records and the code make"]
    report.write("quick", folder, "make reproduce")
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# name\n\nbefore\n\n<!-- claims: begin (generated) -->\n")
    assert text.endswith("<!-- claims: end -->\n\nafter \\1\n")
    assert "\nold\n" not in text
    assert f"**{verdict(records.read(folder / 'fake')).verdict}**" in text
    for path, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", text):
        assert (repository / path).exists()
        assert not anchor or f"\n## The title of {anchor.rpartition('-')[2]}\n" in (repository / path).read_text()
    assert "results/quick/claims.png" in text
    assert report.check("quick", folder) == []


def test_readme_shows_the_cpu_profile_where_there_is_one(repository: Path) -> None:
    report.write("quick", repository / "results" / "quick", "make reproduce")
    shutil.copytree(repository / "results" / "quick", repository / "results" / "cpu")
    report.write("cpu", repository / "results" / "cpu", "make reproduce")
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert "results/cpu/report.md" in text
    assert "results/quick" not in text
    report.write("quick", repository / "results" / "quick", "make reproduce")
    assert (repository / "README.md").read_text(encoding="utf-8") == text


def test_readme_is_left_alone_by_results_elsewhere(repository: Path, copy: Path) -> None:
    report.write("quick", copy, "make reproduce")
    assert (repository / "README.md").read_text(encoding="utf-8") == README


def test_readme_without_the_block_is_an_error(repository: Path) -> None:
    (repository / "README.md").write_text("# name\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="claims: begin"):
        report.check("quick", repository / "results" / "quick")


def test_the_repositorys_readme_has_the_block() -> None:
    assert readme.BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
