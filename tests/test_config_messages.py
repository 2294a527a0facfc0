"""What a user reads of bad input: one line of plain text, with the reason and a remedy."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from yolo_cwd.config import (
    ConfigError,
    check_names,
    first_line,
    listed,
    read_cfg,
    read_yaml,
    recipe,
    refuse_missing,
    refused_as,
    unusable_data,
    unusable_model,
)

SEE = "correct the data set, see https://docs.ultralytics.com/datasets"
GIVE = "give the path of a data set's YAML file"
MARK = yaml.Mark("a.yaml", 0, 4, 0, None, None)
RECIPES = "coco, few-images, finetune, new-classes, small-objects"


def test_a_long_message_loses_its_middle() -> None:
    assert str(ConfigError()) == ""
    assert str(ConfigError(" a\n  b\t")) == "a b"
    fits, long = "a" * 299, "a" * 104 + "b" * 6 + "c" * 190
    assert str(ConfigError(fits)) == fits
    assert str(ConfigError(long)) == f"{'a' * 104} ... {'c' * 190}"
    assert len(str(ConfigError(long))) == 299
    assert str(ConfigError(f"{'a' * 103} {'b' * 9} {'c' * 189}")) == f"{'a' * 103} ... {'c' * 189}", "at spaces"


def test_errors_of_others_become_a_line_and_our_own_pass() -> None:
    def refusal(error: Exception) -> ConfigError:
        return ConfigError(f"x: {error}")

    with pytest.raises(ConfigError, match=r"^x: no$") as refused, refused_as(refusal):
        raise ValueError("no")
    assert isinstance(refused.value.__cause__, ValueError)
    with pytest.raises(ConfigError, match=r"^no$"), refused_as(refusal):
        raise ConfigError("no")


def test_names_in_a_list() -> None:
    assert listed([]) == ""
    assert listed(["a", "b", "c", "d"]) == "a, b, c, d"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c, d and 1 more"
    assert listed(["a", "b", "c"], 1) == "a and 2 more"


def yaml_error(text: str, around: str = "") -> Exception:
    """What reading YAML raises: itself, as the cause of another error, or on the way to it."""
    try:
        try:
            yaml.safe_load(text)
        except yaml.YAMLError as error:
            if around == "cause":
                raise ValueError("Error loading") from error
            if around == "context":
                raise ValueError("Error loading")  # noqa: B904 - as Ultralytics does
            raise
    except Exception as error:
        return error
    raise AssertionError(text)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n\n b"), "a"),
        (ValueError("\n \n  a  b  \nc"), "a b"),
        (ValueError(), "ValueError"),
        (ValueError("a.;."), "a"),
        (ValueError("a . b"), "a. b"),
        (ValueError("\x1b[K\x1b[31m\x1b[1mred\x1b[0m ❌ ⚠️ 🚀 größer → 日本"), "red größer 日本"),
        (ValueError("no images. See https://a.b/c. And more"), "no images"),
        (ValueError("no images. Verify it at http://a.b\nnext"), "no images"),
        (ValueError("Note dataset download directory is '/a'. You can change it\nno images"), "no images"),
        (ValueError("train: no images"), "no images"),
        (ValueError("no train: images"), "no train: images"),
        (ValueError("See the images"), "See the images"),
        (KeyError("backbone"), "'backbone' is missing in it, or unknown"),
        (KeyError("a sentence of it."), "a sentence of it"),
        (KeyError(), "is missing in it, or unknown"),
        (OSError(28, "No space left"), "No space left"),
        (OSError(2, "No such file", "a.pt"), "No such file: a.pt"),
        (OSError("some reason"), "some reason"),
        (yaml_error("a: 1\nb: [2"), "line 2 is not YAML: expected ',' or ']', but got '<stream end>'"),
        (yaml_error("a: 1\n\nb: ]", "cause"), "line 3 is not YAML: expected the node content, but found ']'"),
        (yaml_error("a: b: c", "context"), "line 1 is not YAML: mapping values are not allowed here"),
        (
            yaml.MarkedYAMLError(problem_mark=yaml.Mark("a", 0, 4, 0, None, None)),
            "line 5 is not YAML: it cannot be read",
        ),
    ],
    ids=itertools.count(),
)
def test_the_first_line_of_an_error(error: BaseException, line: str) -> None:
    assert first_line(error) == line


def test_data_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    assert str(unusable_data(file, FileNotFoundError("x"))) == f"data={file}: no such file; {GIVE}"
    file.touch()
    for error, reason in (
        (FileNotFoundError("train: images not found."), "images not found"),
        (
            ValueError(f"Dataset '{file}' images not found ❌,\nmissing path 'b';"),
            "images not found , missing path 'b'",
        ),
        (SyntaxError(f"{file} 'train:' key missing ❌.\nSee https://a.b"), "'train:' key missing"),
    ):
        assert str(unusable_data(file, error)) == f"data={file}: {reason}; {SEE}"
    assert str(unusable_data("absent", ValueError("bad"))) == f"data=absent: bad; {SEE}"
    message = f"{tmp_path} No YAML file found."
    assert str(unusable_data(tmp_path, FileNotFoundError(message))) == f"data={tmp_path}: No YAML file found; {GIVE}"


def test_models_that_cannot_be_used() -> None:
    assert str(unusable_model("teacher=a.pt", FileNotFoundError("b"), "give c")) == "teacher=a.pt: no such file; give c"
    assert str(unusable_model("teacher=a.pt", ValueError("torn.\nb"), "give c")) == "teacher=a.pt: torn; give c"


def test_numbers_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes("a: 1e2\nb: -1.5E-3\nc: 1.e+1\nd: größer\ne: 1e\nf: +2e1\n3e0: x\n".encode())
    assert read_yaml(file) == {"a": 100.0, "b": -0.0015, "c": 10.0, "d": "größer", "e": "1e", "f": 20.0, 3.0: "x"}


@pytest.mark.usefixtures("ascii_locale")
def test_a_file_of_arguments_is_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes("name: größer\n".encode())
    assert read_cfg(file) == read_yaml(str(file)) == {"name": "größer"}


def test_a_file_without_arguments(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for empty in ("", "# nothing\n", "{}"):
        file.write_text(empty)
        assert read_cfg(file) == {}
    for other in ("- 1\n", "0", "[]", "text"):
        file.write_text(other)
        with pytest.raises(ConfigError) as error:
            read_cfg(file)
        reason = "holds no mapping of names to values"
        assert str(error.value) == f"cfg={file}: cannot be read ({reason}); give the path of a YAML file of arguments"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [", r"line \d is not YAML: .*"),
        (b"\xff\xfe\xfa", r"'utf-8' codec can't decode .*"),
        (None, "Is a directory: .*"),
    ],
    ids=["no YAML", "no text", "folder"],
)
def test_a_file_of_arguments_that_cannot_be_read(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_cfg(str(file))
    remedy = "give the path of a YAML file of arguments"
    assert re.fullmatch(rf"cfg={re.escape(str(file))}: cannot be read \({reason}\); {remedy}", str(error.value))


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the user's goes first; a path names no recipe."""
    monkeypatch.chdir(tmp_path)
    shipped = Path(__file__).parents[1] / "cfg" / "recipes" / "finetune.yaml"
    for name in ("finetune", "finetune.yaml", Path("finetune")):
        assert recipe(name) == shipped
    assert read_cfg("finetune") == read_yaml(shipped) != {}
    for other in ("finetun", "", "recipes/finetune", Path("a/finetune.yaml"), str(shipped)):
        assert recipe(other) is None
    Path("finetune").write_text("epochs: 7")
    assert recipe("finetune") is None
    assert recipe("finetune.yaml") == shipped
    assert read_cfg("finetune") == {"epochs": 7}


def test_a_recipe_that_does_not_exist() -> None:
    begin = "cannot be read (no such file); give the path of a YAML file of arguments"
    for asked, end in (
        ("finetun.yaml", "; did you mean the recipe finetune?"),
        ("a/small-object", "; did you mean the recipe small-objects?"),
        ("qqqq", f", or a recipe: {RECIPES}"),
    ):
        with pytest.raises(ConfigError) as error:
            read_cfg(asked)
        assert str(error.value) == f"cfg={asked}: {begin}{end}"


def test_all_that_is_missing_is_said_at_once() -> None:
    refuse_missing({"teacher": None, "student": "a", "data": 0})  # one is refused where it is read
    refuse_missing({"teacher": Path("a"), "data": {"a": 1}})
    with pytest.raises(ConfigError) as error:
        refuse_missing({"teacher": None, "student": "", "data": "b", "source": None})
    assert str(error.value) == (
        "teacher, student, source: missing; give them, such as teacher=yolov8l.pt student=yolov8n.pt "
        "source=path/to/images"
    )
    with pytest.raises(ConfigError, match=r"such as data=coco8\.yaml source=path/to/images$"):
        refuse_missing({"data": None, "source": ""})


def test_unknown_arguments() -> None:
    check_names({"epochs": 3, "batch": 4}, {"epochs", "batch"})
    check_names({}, set())
    for arguments, message in (
        ({"epochs": 3, "epoch": 2, "x": 1}, "epoch=2: unknown argument; did you mean epochs?"),
        ({"pool_con": 2}, "pool_con=2: unknown argument; did you mean pool_conf?"),
        ({"q": 1}, "q=1: unknown argument; 'yolo_cwd settings' and 'yolo cfg' list the known ones"),
    ):
        with pytest.raises(ConfigError) as error:
            check_names(arguments, {"epochs"})
        assert str(error.value) == message
