"""What README, pages and recipes tell the reader to type is run here, on tiny data and untrained models.

Commands are those lines of an indented or fenced block that begin with `yolo_cwd` or `yolo`, and what stands in
backticks and begins so; recipes have theirs in a comment. They run unchanged, in a folder that has every file they
name, with arguments added that make them short. On the pages of measurements, which take hours, only the arguments are
checked.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import digits
import pytest
import yaml
from conftest import SHORT, STUDENT, bare
from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT, entrypoint

from yolo_cwd import cli
from yolo_cwd.config import OPTIONS, Settings, check_names, split_options
from yolo_cwd.run.request import EXTRA_ARGUMENTS
from yolo_cwd.study.comparison import Comparison
from yolo_cwd.tasks import ALL
from yolo_cwd.trainer import CWDTrainer

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "cfg" / "recipes").glob("*.yaml"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = {"evidence.md", "scale.md"}  # measurements, and commands for several machines
OPTION_TABLES = {ROOT / "README.md": 5, ROOT / "docs" / "options.md": len(OPTIONS)}  # with so many options each
OTHER_ARGUMENTS = {"method", "student", "arms", "folder", "seeds", "split", "format", "part"}  # of our own commands
OTHER_ARGUMENTS |= {"use_ray", "space", "weights", "trainer"}  # of Python calls
OTHER_ARGUMENTS |= {"tensorboard", "wandb"}  # settings of Ultralytics
FOLDERS = ("yolo_cwd", "method", "pool", "run", "study", "view", "cfg", "docs", "examples", "scripts", "tests")
BRITISH = r"label(?:led|ling)|colour|grey|normalis|licence|behaviour|centred|favour|distils?\b|\d %"
TINY = {name: value for name, value in SHORT.items() if name in {"imgsz", "batch", "epochs", "amp", "plots", "device"}}


def commands(page: Path) -> Iterator[str]:
    """Yield the commands of a page, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    for line in text.splitlines():
        if found := re.match(r"(?:#? {4,}|)(yolo(?:_cwd)? .*?)(?: {2,}#.*)?$", line):
            yield found[1].strip()
        yield from re.findall(r"`(yolo_cwd [^`]+)`", line)


def all_commands(*pages: Path) -> list[str]:
    return list(dict.fromkeys(command for page in pages for command in commands(page)))


SHORT_PAGES = [page for page in PAGES if page.name not in LONG]
ELSEWHERE = {"yolo_cwd demo"} | {  # test_packaging.py runs it; and what needs packages that the tests do not have
    command for command in all_commands(*PAGES) if re.search(r"format=(engine|litert)", command)
}
MENTIONS = {"yolo_cwd train", "yolo_cwd check", "yolo_cwd compare", "yolo_cwd label"}  # not meant to be typed like this
TO_RUN = [c for c in all_commands(*SHORT_PAGES, *RECIPES) if c not in ELSEWHERE | MENTIONS]


def test_commands_are_found() -> None:
    assert {c.split()[1] for c in TO_RUN if c.startswith("yolo_cwd ")} >= {
        "train",
        "check",
        "compare",
        "label",
        "settings",
    }
    assert all(any(f"cfg={recipe.stem} " in command for command in TO_RUN) for recipe in RECIPES)
    assert any(command.startswith("yolo export") for command in TO_RUN)


@pytest.mark.parametrize("command", [c for c in all_commands(*PAGES, *RECIPES) if c.startswith("yolo_cwd ")])
def test_arguments_are_known(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, verb, *words = shlex.split(command)
    monkeypatch.chdir(folder)
    if verb == "train":
        options, arguments = split_options(cli.parse(words))
        check_names(arguments, DEFAULT_CFG_DICT.keys() | EXTRA_ARGUMENTS)
        if not arguments.get("resume"):
            Settings.parse({"teacher": "for a part of a command", **options})
    elif verb == "compare":
        Comparison.parse({"teacher": "t", "student": "s", "data": "d", **cli.parse(words)})
    else:
        assert f"  yolo_cwd {verb} " in cli.HELP


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A folder with every file that the commands name: models of the right family, untrained, and tiny data."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("cfg", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("my.yaml", "coco.yaml", "coco8.yaml"):
        shutil.copy(data, folder / name)
    for task in ALL[1:]:
        build = digits.build(folder / "sets", {"train": 8, "val": 4}, task=task.name)
        shutil.copy(build, folder / f"my{task.suffix}.yaml")
    (folder / "path" / "to").mkdir(parents=True)
    others = digits.build(folder / "others", {"train": 4, "val": 1}, seed=1)
    shutil.move(others.parent / "images" / "train", folder / "path" / "to" / "images")
    (folder / "my-settings.yaml").write_text(yaml.safe_dump({"tau": 3.0, "cwd": 50}))
    shutil.copy(STUDENT, folder / "slim.yaml")
    text = "\n".join(page.read_text(encoding="utf-8") for page in [*SHORT_PAGES, *RECIPES])
    for family, size, task in set(re.findall(r"\b(yolo(?:v8|11|26))([nslmx])((?:-[a-z]+)?)\b(?![.-])", text)):
        model = folder / f"{family}{task}-any.pt"
        if not model.exists():
            YOLO(bare(f"{family}n{task}.yaml", 0.5)).save(model)
        shutil.copy(model, folder / f"{family}{size}{task}.pt")
    classes = list(yaml.safe_load(Path(data).read_text())["names"].values())
    teacher = YOLO(STUDENT)
    teacher.model.names = dict(enumerate(classes))
    for name in ("best.pt", "pruned.pt", "grown.pt"):
        teacher.save(folder / name)
    _new_beside_old(folder)
    for run in ("teacher", "train"):
        weights = folder / "runs" / "detect" / run / "weights"
        weights.mkdir(parents=True)
        shutil.copy(folder / "best.pt", weights)
    return folder


def _new_beside_old(folder: Path) -> None:
    """Make data that are labeled for new classes alone, and a teacher of the old ones."""
    data = digits.build(folder / "new", {"train": 8, "val": 4}, seed=2)
    for file in (data.parent / "labels" / "train").iterdir():
        file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if line[0] > "4"))
    shutil.copy(data, folder / "new.yaml")
    shutil.copy(folder / "best.pt", folder / "old.pt")


@pytest.fixture
def interrupted(folder: Path) -> None:
    """Leave a training in runs/detect/train that was interrupted after its first epoch of two."""
    stopped = SHORT | {"data": str(folder / "my.yaml"), "teacher": str(folder / "best.pt"), "epochs": 2}
    trainer = CWDTrainer(overrides={**stopped, "save_dir": str(folder / "runs" / "detect" / "train")})

    def stop(trainer: CWDTrainer) -> None:
        raise KeyboardInterrupt

    trainer.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def short(verb: str, folder: Path) -> list[str]:
    """Return the arguments that make a command short and keep what it writes in the folder."""
    if verb == "export":
        return ["imgsz=64", "simplify=False"]  # the simplifier is one package more, and Ultralytics' matter
    words = [f"{name}={value}" for name, value in TINY.items() if verb != "val" or name not in {"epochs", "amp"}]
    if verb == "compare":
        place = tempfile.mkdtemp(prefix="compare-", dir=folder)  # one folder holds one comparison
        return [*words, "val=False", "seeds=1", f"folder={place}"]
    return [*words, f"project={folder / 'runs' / 'detect'}", "exist_ok=True"]


@pytest.mark.parametrize("command", TO_RUN)
def test_command_runs(
    command: str, folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if "path/to/images" in command or "new.yaml" in command:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    begin = time.time()
    program, *words = shlex.split(command)
    verb = words[0] if program == "yolo_cwd" else next(w for w in words if w in {"train", "val", "export"})
    if program == "yolo":
        entrypoint(shlex.join([program, *words, *short(verb, folder)]))
    else:
        if "resume" in words:
            request.getfixturevalue("interrupted")
        elif verb in {"train", "check", "compare"}:
            words = [re.sub(r"epochs=\d+", "epochs=1", word) for word in words]  # of an arm, too
            words += short(verb, folder)
        assert cli.main(words) == 0
    made = {"train": "runs/**/best.pt", "export": "**/best.onnx", "compare": "compare-*/summary.md"}.get(verb)
    if made:
        assert max(file.stat().st_mtime for file in folder.glob(made)) >= begin


def python_blocks() -> list[Any]:
    found = []
    for page in SHORT_PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        lines = re.findall(r"`(CWDTrainer\([^`]+\)\.train\(\))`", text)
        blocks += [f"from yolo_cwd import CWDTrainer\n{line}" for line in lines]
        found += [pytest.param(block, id=f"{page.name}-{number}") for number, block in enumerate(blocks)]
    return found


@pytest.mark.parametrize("block", python_blocks())
def test_python_runs(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(CWDTrainer):
        def __init__(self, cfg: Any = DEFAULT_CFG_DICT, overrides: Any = None, _callbacks: Any = None) -> None:
            short = {**TINY, "teacher_epochs": 1} if "teacher_epochs" in overrides else TINY
            super().__init__(cfg, {**overrides, **short, "project": str(folder / "python")}, _callbacks)

    monkeypatch.chdir(folder)
    monkeypatch.setattr("yolo_cwd.trainer.CWDTrainer", Short)
    exec(compile(block, "block", "exec"), {})


@pytest.mark.parametrize("page", OPTION_TABLES, ids=lambda page: page.name)
def test_tables_list_every_option_with_its_default(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|(?=[^|]+\|$)", text, flags=re.MULTILINE))
    shown = {name: value.strip().strip("`") for name, value in rows.items() if name in OPTIONS}
    expected = {name: str("" if OPTIONS[name].default is None else OPTIONS[name].default).lower() for name in shown}
    assert {name: value.removesuffix(".0") for name, value in expected.items()} == shown
    assert len(shown) == OPTION_TABLES[page]


def test_messages_are_those_of_the_code() -> None:
    headings = re.findall(
        r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), flags=re.MULTILINE
    )
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "yolo_cwd").rglob("*.py"))
    assert len(headings) > 10
    assert [message for message in headings if message not in code] == []


def test_every_recipe_is_on_the_page_and_valid() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    for recipe in RECIPES:
        first, *_ = commands(recipe)
        assert first in page
        assert f"(../cfg/recipes/{recipe.name})" in page
        options, arguments = split_options(yaml.safe_load(recipe.read_text(encoding="utf-8")))
        check_names(arguments, DEFAULT_CFG_DICT)
        Settings.parse({"teacher": "yolov8l", **options})
        defaults = {**DEFAULT_CFG_DICT, **{name: option.default for name, option in OPTIONS.items()}}
        assert [name for name, value in (options | arguments).items() if value == defaults[name]] == []


def test_generated_parts_are_up_to_date() -> None:
    command = [sys.executable, ROOT / "scripts" / "write_docs.py", "check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def anchors(page: Path) -> set[str]:
    """Return the anchors that a forge makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_plain_markdown_in_one_spelling(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    by_hand = re.sub(r"<!-- generated: (\w+) -->.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    marks = r"--8<--|^::: |\{#|^[!?]{3}|^===|^---$|\{\{|\[TOC\]"  # which a forge shows as they are
    assert not re.search(marks, text, flags=re.MULTILINE)
    assert re.findall(BRITISH, by_hand, flags=re.IGNORECASE) == []


def test_readme_is_short_and_one_edit_gives_it_an_address() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110
    placeholders = [page.name for page in PAGES for _ in re.findall("OWNER", page.read_text(encoding="utf-8"))]
    assert placeholders in ([], ["README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_arguments_and_files_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = OPTIONS.keys() | DEFAULT_CFG_DICT.keys() | EXTRA_ARGUMENTS | OTHER_ARGUMENTS
    assert {name for name in re.findall(r"`(?:[^`\n]* )?(\w+)=[^`\n]*`", text) if name not in known} == set()
    files = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+)`", text)
    assert [file for file in files if not ((ROOT / file).exists() or (ROOT / "yolo_cwd" / file).exists())] == []


@pytest.mark.parametrize("place", ["mkdocs.yml", "docs/index.md"])
def test_the_site_lists_every_page_in_its_group(place: str) -> None:
    text = (ROOT / place).read_text(encoding="utf-8")
    listed = {"index.md", *re.findall(r"\b(\w[\w-]*\.md)\b", text)}
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
    groups = ["Start", "Guides", "Reference", "Background"]
    assert re.findall("|".join(rf"(?<=[-|] ){group}(?=:| \|)" for group in groups), text) == groups


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    for package in ("mkdocs", "material"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "site" / "python" / "index.html").read_text(encoding="utf-8")
    assert "channel_wise_divergence(student, teacher, tau=1.0)" in reference
