"""The state beside a checkpoint: what is kept of each epoch, and which checkpoints go with it; nothing is trained."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Payload
from torch import nn

from yolo_cwd.config import ConfigError
from yolo_cwd.run import state as states
from yolo_cwd.run.files import content_of
from yolo_cwd.run.state import FILE, RunState, load_state, set_aside

MEASURED = {"P3": [0.5, 2.0]}


def adapters(width: int = 2) -> nn.Module:
    torch.manual_seed(width)
    return nn.Conv2d(3, width, 1)


def optimizer_of(module: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **more: Any) -> Any:
    """An optimizer that has made a step."""
    optimizer = kind(module.parameters(), lr=0.1, **more)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def kept(*epochs: int) -> tuple[RunState, nn.Module, Any]:
    """The state at the end of these epochs, with the adapters and the optimizer of the last one."""
    state, module = RunState({"teacher": "t.pt"}), adapters()
    optimizer = optimizer_of(module)
    for epoch in epochs:
        state.remember(epoch, module, optimizer, MEASURED, f"digest {epoch}")
    return state, module, optimizer


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[name]) for name, value in ours.items())
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def test_a_new_state_knows_nothing_else() -> None:
    options = {"teacher": "t.pt"}
    state = RunState(options)
    assert vars(state) == {
        "options": options,
        "epochs": {},
        "start": {},
        "teacher": "",
        "score": None,
        "first_time": None,
        "measured": {},
    }
    state.options["tau"] = 2
    assert options == {"teacher": "t.pt"}, "the caller's stay as they are"


def test_the_last_two_epochs_are_kept_in_order() -> None:
    state, *_ = kept(0, 1, 2, 3)
    assert list(state.epochs) == [2, 3]
    state.remember(2, adapters(), optimizer_of(adapters()), {}, "")
    assert list(state.epochs) == [2], "what is later has been given up"
    assert state.epochs[2]["checkpoint"] == ""


def test_what_is_kept_is_a_copy_on_the_cpu() -> None:
    state, module, optimizer = kept(5)
    weights, moments = copy.deepcopy(module.state_dict()), copy.deepcopy(list(optimizer.state.values()))
    optimizer.step()
    assert not same(dict(module.state_dict()), dict(weights))
    found = state.epochs[5]
    assert same(found["adapters"], dict(weights))
    assert same(found["optimizer"], moments)
    assert not any(value.requires_grad for value in found["adapters"].values())
    assert (found["measured"], found["checkpoint"]) == (MEASURED, "digest 5")
    assert found["measured"] is not MEASURED


def test_values_that_are_no_tensors_are_kept_and_restored() -> None:
    module, state = adapters(), RunState({})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for parameter in list(module.parameters())[:1]:  # the other one has no state yet
        optimizer.state[parameter] = {"momentum_buffer": torch.ones(3), "step": 7, "none": None}
    state.remember(0, module, optimizer, {}, "")
    other = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    state.restore(0, module, other)
    first, second = (other.state[parameter] for parameter in module.parameters())
    assert same(first, {"momentum_buffer": torch.ones(3), "step": 7, "none": None})
    assert second == {}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_restored_training_makes_the_same_steps(kind: Any) -> None:
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    module = adapters()
    optimizer = optimizer_of(module, kind, **more)
    state = RunState({})
    state.remember(3, module, optimizer, MEASURED, "")
    before = copy.deepcopy(state.epochs)
    other = nn.Conv2d(3, 2, 1)
    resumed = kind(other.parameters(), lr=0.1, **more)
    state.restore(3, other, resumed)
    assert state.measured == MEASURED
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        theirs.grad = ours.grad
    for one in (optimizer, resumed):
        one.step()
    assert same(dict(module.state_dict()), dict(other.state_dict()))
    assert same(state.epochs, before), "what is kept of the epoch stays as it was"


@pytest.mark.parametrize("spoiled", ["another epoch", "not finite"])
def test_adapters_that_are_not_there_or_not_finite_begin_anew(spoiled: str) -> None:
    state, *_ = kept(0, 1)
    state.measured = MEASURED
    if spoiled == "not finite":
        state.epochs[1]["adapters"]["bias"][1] = math.inf
    module = adapters()
    optimizer = torch.optim.AdamW(module.parameters())
    before = copy.deepcopy(dict(module.state_dict()))
    state.restore(1 if spoiled == "not finite" else 2, module, optimizer)
    assert (state.measured, len(optimizer.state)) == ({}, 0)
    assert same(dict(module.state_dict()), before)


def test_adapters_of_other_shapes_are_refused() -> None:
    state, *_ = kept(0)
    with pytest.raises(ConfigError) as error:
        state.restore(0, adapters(4), optimizer_of(adapters(4)))
    assert str(error.value) == (
        "teacher=t.pt: asks for adapters of [(4, 3, 1, 1), (4,)], the run has [(2, 3, 1, 1), (2,)]; "
        "resume with the teacher it began with"
    )


@pytest.mark.parametrize(
    ("more", "theirs", "where"),
    [
        ({}, {}, "cpu"),
        ({"fused": True}, {}, "meta"),
        ({"capturable": True}, {}, "meta"),
        ({}, {"fused": True, "capturable": True}, "cpu"),
    ],
    ids=["plain", "fused", "capturable", "only that of others"],
)
def test_counters_of_steps_are_where_the_optimizer_wants_them(
    more: dict[str, bool], theirs: dict[str, bool], where: str
) -> None:
    """A counter has no dimensions; a device without memory stands for a GPU."""
    state, *_ = kept(0)
    module = adapters().to("meta")
    module.load_state_dict = lambda saved: None  # type: ignore[method-assign,assignment]
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]}, {"params": list(module.parameters())}], 0.1)
    for group, words in zip(optimizer.param_groups, (theirs, more), strict=True):
        group.update(words)
    state.restore(0, module, optimizer)
    for parameter in module.parameters():
        found = {name: value.device.type for name, value in optimizer.state[parameter].items()}
        assert found == {"step": where, "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_plain_ultralytics_finds_an_optimizer_without_ours() -> None:
    """Whether or not ours have made a step; the group comes back to its place, even into another list."""
    student, ours, guest = (adapters(width) for width in (2, 3, 4))
    groups = [{"params": list(module.parameters())} for module in (student, ours, guest)]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for module in (student, ours, guest):
        next(module.parameters()).grad = torch.ones_like(next(module.parameters()))
    optimizer.step()
    before, order = dict(optimizer.state), list(optimizer.param_groups)
    with set_aside(optimizer, list(ours.parameters())):
        assert [*map(id, optimizer.param_groups)] == [id(order[0]), id(order[2])]
        assert optimizer.state.keys() == {next(student.parameters()), next(guest.parameters())}
        optimizer.param_groups = list(optimizer.param_groups)
    assert [*map(id, optimizer.param_groups)] == [*map(id, order)]
    assert dict(optimizer.state) == before
    with pytest.raises(KeyError), set_aside(optimizer, list(ours.parameters())):
        raise KeyError
    assert [*map(id, optimizer.param_groups)] == [*map(id, order)]
    with set_aside(optimizer, []):
        assert [*map(id, optimizer.param_groups)] == [*map(id, order)]


TABLE = {"time": [1.5, 3.0], "train/cwd_weight": [1.0, 0.5]}


def checkpoint(folder: Path, epoch: int = 1, epochs: int = 3, **more: Any) -> Path:
    """A checkpoint of a training that is interrupted."""
    content = {"epoch": epoch, "optimizer": {}, "train_args": {"epochs": epochs}, "train_results": TABLE, **more}
    torch.save(content, folder / "last.pt")
    return folder / "last.pt"


@pytest.fixture(autouse=True)
def any_checkpoint_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one without a model, which would be larger."""
    monkeypatch.setattr(states, "read_checkpoint", lambda file: torch.load(file, weights_only=False))


def saved(folder: Path, **more: Any) -> RunState:
    """A state of two epochs that is saved beside the checkpoint of the second."""
    state, *_ = kept(0, 1)
    state.epochs[1]["checkpoint"] = content_of(folder / "last.pt")
    for name, value in more.items():
        setattr(state, name, value)
    state.save(folder)
    return state


def test_a_saved_state_is_loaded_with_the_epoch_of_its_checkpoint(tmp_path: Path) -> None:
    file = checkpoint(tmp_path)
    start = {"P3": torch.rand(2, 3)}
    state = saved(tmp_path, start=start, teacher="network", score=0.25, first_time=1.5)
    (tmp_path / ".cwd.pt.7").touch()
    found = load_state(file)
    assert same(vars(found), {**vars(state), "epochs": {1: state.epochs[1]}})
    assert sorted(f.name for f in tmp_path.iterdir()) == [FILE, "last.pt"], "what a kill has left is gone"


def test_a_state_is_known_by_its_checkpoint_alone(tmp_path: Path) -> None:
    """Before the first row of the table, or where it has been lost."""
    file = checkpoint(tmp_path, train_results=None)
    saved(tmp_path, first_time=None)
    assert list(load_state(file).epochs) == [1]


@pytest.mark.parametrize("kind", ["torn", "hostile", "of something else"])
def test_a_state_that_cannot_be_read(kind: str, tmp_path: Path) -> None:
    file, marker = checkpoint(tmp_path), tmp_path / "ran"
    if kind == "torn":
        (tmp_path / FILE).write_bytes(b"torn")
    else:
        content = {"options": Payload(marker), "epochs": {}} if kind == "hostile" else {"model": {}}
        torch.save(content, tmp_path / FILE)
    with pytest.raises(ConfigError) as error:
        load_state(file)
    assert str(error.value) == (
        f"resume={file}: cwd.pt cannot be read, it is torn or no state of a run; "
        "'yolo train resume' continues without a teacher"
    )
    assert not marker.exists()


def test_a_checkpoint_without_a_state(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_state(checkpoint(tmp_path))
    assert str(error.value) == (
        f"resume={tmp_path / 'last.pt'}: has no cwd.pt beside it, so it had no teacher; 'yolo train resume' continues "
        "it without one"
    )


@pytest.mark.parametrize("left", [False, True])
def test_a_finished_training_has_no_state(left: bool, tmp_path: Path) -> None:
    file = checkpoint(tmp_path, epoch=2)
    if left:
        saved(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_state(file)
    assert str(error.value) == (
        f"resume={file}: the training is finished; for more epochs, begin a new run from best.pt beside it"
    )
    assert not (tmp_path / FILE).exists()


OTHER = (
    "is of another run than cwd.pt beside it, which an earlier one has left; "
    "'yolo train resume' continues it as it began, without a teacher"
)


@pytest.mark.parametrize(
    ("table", "first_time", "is_ours"),
    [
        pytest.param(TABLE, 1.5, True, id="plain Ultralytics has gone on"),
        pytest.param(TABLE, 3.0, False, id="another run"),
        pytest.param(TABLE, None, False, id="a state that does not know"),
        pytest.param({}, 1.5, False, id="a checkpoint that does not say"),
        pytest.param({"time": []}, None, False, id="neither says anything"),
        pytest.param(None, None, False, id="a checkpoint without a table"),
    ],
)
def test_a_checkpoint_that_was_written_without_us(
    table: Any, first_time: float | None, is_ours: bool, tmp_path: Path
) -> None:
    checkpoint(tmp_path)
    saved(tmp_path, first_time=first_time)
    file = checkpoint(tmp_path, train_results=table, more="of it")
    if is_ours:
        assert load_state(file).epochs == {}, "the adapters begin anew"
        return
    with pytest.raises(ConfigError) as error:
        load_state(file)
    assert str(error.value) == f"resume={file}: {OTHER}"
