# SPDX-License-Identifier: AGPL-3.0-or-later
"""Training of a student under a teacher. Read this file first: it shows the whole method.

`CWDTrainer` is Ultralytics' `DetectionTrainer` whose student has its criterion wrapped. One training step is

    teacher(images)  ->  pyramid                       frozen, without its head, no gradient        (teacher.py)
    student(images)  ->  predictions and pyramid       as without us                                (fpn.py)
    loss  =  detection loss                            as without us
          +  weight * divergence(adapter(student map), teacher map)  for every shared level         (loss.py)

Teacher and adapters belong to the trainer, never to the student: every checkpoint is a plain Ultralytics model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.cfg import _handle_deprecation, cfg2dict, get_cfg, get_save_dir
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, RANK, YAML, colorstr
from ultralytics.utils.torch_utils import parse_device, unwrap_model

from yolo_cwd import digits, distributed, plots
from yolo_cwd.config import ConfigError, Settings, check_names, first_line, split_options, unusable_data, with_suffix
from yolo_cwd.fpn import Level, build_adapters, match_levels, pyramid_taps
from yolo_cwd.loss import CWDLoss
from yolo_cwd.report import WEIGHT, beginning, outcome, read_curves
from yolo_cwd.state import FILE as STATE_FILE
from yolo_cwd.state import (
    RunState,
    checkpoint_to_resume,
    checkpoints_written_whole,
    drop_rows_after,
    load_state,
    optimizers_stripped_whole,
)
from yolo_cwd.teacher import load_teacher

STUDENT_CLIP_NORM = 10.0  # what Ultralytics clips the student's gradient norm to
EXTRA_ARGUMENTS = {"augmentations", "save_dir"}  # training arguments that Ultralytics takes without a default


class CWDTrainer(distributed.ProcessTrainer):
    """Train a detector with channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

    Takes every argument of Ultralytics' `DetectionTrainer`, and the options of `cfg/default.yaml` beside them.

    Attributes:
        cwd: The checked options.
        teacher: The frozen teacher.
        levels: The distilled levels, finest first; known once the student is built.
        level_weights: The weight of each of them, before the overall weight.
        adapters: One module a level, from student to teacher channels, trained with the student.
        criterion: The student's criterion, once the training has begun.
        state: What a resumed training needs beside the student's checkpoint.

    Examples:
        >>> YOLO("yolov8n.pt").train(trainer=CWDTrainer, teacher="yolov8l.pt", data="coco8.yaml", epochs=10)
        >>> CWDTrainer(overrides={"model": "yolov8n.pt", "teacher": "yolov8l.pt", "data": "coco8.yaml"}).train()
    """

    def __init__(
        self,
        cfg: Any = DEFAULT_CFG_DICT,
        overrides: dict[str, Any] | None = None,
        _callbacks: dict[str, Any] | None = None,
    ) -> None:
        """Check all that can be checked before a run folder exists, then hand over to Ultralytics.

        Args:
            cfg: Base configuration: a YAML path, a dictionary or a namespace, with our options in it or without.
            overrides: Arguments and options that take precedence; `teacher` may be a path, a `YOLO` or a
                `DetectionModel`, `data` may be `digits`.
            _callbacks: Ultralytics' callbacks by event.

        Raises:
            ConfigError: If an option or a model cannot be used.
        """
        cfg_options, base = split_options(cfg2dict(cfg))
        options, arguments = split_options(overrides or {})
        options = {**cfg_options, **options}
        base, arguments = _handle_deprecation(base), _handle_deprecation(arguments)
        check_names(base | arguments, DEFAULT_CFG_DICT.keys() | EXTRA_ARGUMENTS)

        base = {**DEFAULT_CFG_DICT, **base}
        student, model = options.pop("student", None), arguments.get("model")
        if arguments.get("resume") is True and arguments.get("name") and options.get("teacher"):
            arguments |= _go_on_or_begin(base | arguments)
        checkpoint = checkpoint_to_resume(arguments.get("resume", base["resume"]), student or model or base["model"])
        if checkpoint:
            arguments["resume"] = arguments["model"] = str(checkpoint)
            self.state = load_state(checkpoint)
            options = self._options_of_resumed_run(options)
        else:
            arguments["model"] = student_path(student, model, base["model"])
            self.state = RunState({})
        self.cwd = Settings.parse(options)
        self._given_options = options
        args = get_cfg(base, {**arguments})
        refuse_unsupported(args)
        arguments["device"] = distributed.join(args.device)
        with distributed.first_here_first():
            self.teacher = load_teacher(self.cwd.teacher, self.cwd.trust_teacher)
            arguments["data"] = digits.resolve(arguments.get("data", base["data"]))

        self.levels: list[Level] = []
        self.level_weights: list[float] = []
        self.adapters = nn.ModuleList()
        self.criterion: CWDLoss | None = None
        self._batches = 0
        self._made_folders: list[Path] = []
        if RANK in {-1, 0} and not args.resume:
            claimed, self._made_folders = _claim_folder(args)
            arguments["save_dir"] = str(claimed)
        with self._leaving_nothing_behind():
            if folder := distributed.agree(arguments.get("save_dir")):
                arguments["save_dir"] = folder
            super().__init__(base, arguments, _callbacks)
        distributed.check_folder(self.save_dir)

    def train(self) -> None:
        """Train the student; see the top of this file for a step."""
        if self.ddp:  # Ultralytics starts the processes, each of which rebuilds this trainer from its arguments
            for name, value in self._given_options.items():
                setattr(self.args, name, value)
        super().train()

    def _options_of_resumed_run(self, given: dict[str, Any]) -> dict[str, Any]:
        replaced = {name: value for name, value in given.items() if name in {"teacher", "trust_teacher"} and value}
        kept = self.state.options
        if ignored := sorted(n for n in given.keys() - replaced.keys() if given[n] != kept.get(n)):
            LOGGER.warning(f"{colorstr('CWD:')} a resumed run keeps its options; ignored: {', '.join(ignored)}")
        self.state.options.update(replaced)
        return self.state.options

    def setup_model(self) -> Any:
        """Build the student, match its pyramid with the teacher's, and make the adapters."""
        try:
            with distributed.first_here_first():
                checkpoint = super().setup_model()
        except Exception as error:
            reason = f"student={self.args.model}: {first_line(error)}"
            raise ConfigError(f"{reason}; give an existing .pt checkpoint or .yaml model of a detector") from error
        student = pyramid_taps(self.model, f"student={self.args.model}")
        self.levels = match_levels(student, self.teacher.taps, self.cwd.levels)
        self.level_weights = self.cwd.weights_of([level.name for level in self.levels])
        if self.teacher.image_channels != self.data["channels"]:
            raise ConfigError(
                f"{self.teacher.argument}: takes images of {self.teacher.image_channels} channels, data="
                f"{self.args.data} has {self.data['channels']}; choose a teacher trained on such images"
            )
        if self.args.amp == "bf16" and self.device.type != "cuda":
            raise ConfigError(f"amp=bf16: Ultralytics has it on CUDA only, not on device={self.device}; use amp=False")
        self.adapters = build_adapters(self.levels, self.cwd.adapter).to(self.device)
        distributed.spread(self.adapters)
        if self.cwd.cwd:
            self.teacher.settle(self.device)
        return checkpoint

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Add the adapters to Ultralytics' optimizer as the last group, so that warm-up and schedule apply to them."""
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        if adapters := list(self.adapters.parameters()):
            plain = [group for group in optimizer.param_groups if group["param_group"] == "weight"]
            optimizer.add_param_group({**min(plain, key=lambda group: float(group["lr"])), "params": adapters})
        return optimizer

    def _setup_train(self) -> None:
        with self._leaving_nothing_behind():
            super()._setup_train()
            if self.cwd.cwd:
                self._calibrate_teacher()
        student = unwrap_model(self.model)
        self.criterion = student.criterion = CWDLoss(
            getattr(student, "criterion", None) or student.init_criterion(),
            adapters=self.adapters,
            levels=self.levels,
            level_weights=self.level_weights,
            tau=self.cwd.tau,
            normalize=self.cwd.normalize,
        )
        self.state.options = self._plain_options()
        self.add_callback("on_train_epoch_start", CWDTrainer._begin_epoch)
        self.add_callback("on_train_epoch_end", CWDTrainer._report_dropped_terms)
        if RANK in {-1, 0}:
            self._record_settings()
            self.add_callback("on_train_end", CWDTrainer._report_outcome)
            if self.args.plots and self.cwd.cwd:
                plots.remember_start(self)
                self.add_callback("on_train_epoch_end", plots.show_first_epoch)

    def _calibrate_teacher(self) -> None:
        wanted, image, first = self.cwd.teacher_dtype, self._validation_image(), RANK in {-1, 0}
        if first or wanted != "auto":
            self.teacher.calibrate(wanted, image)
        if wanted == "auto":  # the first process chooses for all
            chosen = distributed.agree(self.teacher.precision.name)
            if not first:
                self.teacher.calibrate(chosen, image)

    def _begin_epoch(self) -> None:
        assert self.criterion is not None
        self.teacher.eval().requires_grad_(False)  # whatever a callback has done to it
        self.criterion.begin_epoch(self.cwd.weight(self.epoch, self.epochs) * self.cwd.cwd_every)
        self._batches = 0

    def _report_dropped_terms(self) -> None:
        assert self.criterion is not None
        if dropped := int(self.criterion.dropped):
            LOGGER.warning(f"{colorstr('CWD:')} {dropped} terms of this epoch were not finite and have been left out")
            self.criterion.dropped = 0

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Prepare a batch as Ultralytics does, and add the teacher's pyramid of its images for the criterion.

        Before the student's forward pass, so that the teacher's passing memory and the activations the student keeps
        for its gradient are never needed at once.
        """
        batch = super().preprocess_batch(batch)
        if self.criterion is not None and self.criterion.weight and self._batches % self.cwd.cwd_every == 0:
            batch["teacher_maps"] = self.teacher(batch["img"])
        self._batches += 1
        return batch

    def _validation_image(self) -> torch.Tensor:
        image, *_ = self.test_loader.dataset.load_image(0)  # [H, W, C], 0 to 255
        return torch.from_numpy(image).to(self.device).permute(2, 0, 1)[None] / 255

    def _record_settings(self) -> None:
        self._say(beginning(Path(self.state.options["student"]).stem, self.teacher, self.cwd, self.weights_by_level))
        settings = {**self.state.options, "teacher": self.teacher.label}
        if self.cwd.cwd:
            settings["teacher_dtype"] = self.teacher.precision.name
            if self.teacher.names != self.data["names"]:
                self._say(
                    "the teacher's classes are not those of the data; a teacher trained on such data teaches more"
                )
        YAML.save(self.save_dir / "cwd.yaml", settings)

    def _report_outcome(self) -> None:
        with plots.never_fatal("sentence on the outcome"):
            self._say(outcome(read_curves(self.csv, self.weights_by_level)))

    def _say(self, sentence: str) -> None:
        if self.args.verbose:
            LOGGER.info(f"{colorstr('CWD:')} {sentence}")

    @property
    def weights_by_level(self) -> dict[str, float]:
        """The weight of every distilled level by its name, before the overall weight."""
        return {level.name: weight for level, weight in zip(self.levels, self.level_weights, strict=True)}

    def _plain_options(self) -> dict[str, Any]:
        teacher = self.cwd.teacher
        if isinstance(teacher, str):
            teacher = str(Path(teacher).resolve()) if Path(teacher).exists() else teacher
        else:
            teacher = None
        begun_with = unwrap_model(self.model).yaml.get("yaml_file") if self.resume else self.args.model
        student = self.state.options.get("student") or str(begun_with)
        levels, weights = [level.stride for level in self.levels], list(self.cwd.level_weights)
        return {
            **vars(self.cwd),
            "teacher": teacher,
            "student": student,
            "levels": levels,
            "level_weights": weights,
        }

    def optimizer_step(self) -> None:
        """Clip the adapters' gradient by its own norm, then step as Ultralytics does.

        By its own norm, so that the student is clipped as it would be without adapters. The gradients still carry the
        loss scale here, and so does the bound.
        """
        if adapters := list(self.adapters.parameters()):
            distributed.average_gradients(adapters)
            nn.utils.clip_grad_norm_(adapters, max_norm=STUDENT_CLIP_NORM * self.scaler.get_scale())
        super().optimizer_step()

    def label_loss_items(self, loss_items: dict[str, Any] | None = None, prefix: str = "train") -> Any:
        """Label the loss items, in training with the term of every level before their sum, and with the weight.

        The progress bar shows the sum alone. The divergences exist in training only, so validation gets no column of
        zeros.
        """
        labels = super().label_loss_items(loss_items, prefix)
        total = f"{prefix}/cwd_loss"
        if not isinstance(labels, dict):
            return [name for name in labels if name != total]
        ours = {total: labels.pop(total, 0.0)}
        if prefix == "val" or self.criterion is None:
            return labels
        levels = {f"{prefix}/{name}": mean for name, mean in self.criterion.levels_mean.items()}
        return {**labels, **levels, **ours, WEIGHT: self.criterion.weight / self.cwd.cwd_every}

    def plot_metrics(self) -> None:
        """Draw the curves as Ultralytics does, and what was distilled."""
        super().plot_metrics()
        if self.cwd.cwd:
            plots.show_end(self)

    def get_dataset(self) -> Any:
        """Resolve `data` as Ultralytics does."""
        try:
            return super().get_dataset()
        except RuntimeError as error:
            distributed.let_others_follow()  # to the same error, instead of waiting for an end that never comes
            raise unusable_data(self.args.data, error.__cause__ or error) from error

    def save_model(self) -> Any:
        """Write the checkpoints, with the optimizer's state of the student alone; ours lies beside them."""
        self.state.remember(self.epoch, self.adapters, self.optimizer)
        self.wdir.mkdir(parents=True, exist_ok=True)
        self.state.save(self.wdir)
        with self._adapters_set_aside(), checkpoints_written_whole(self):
            return super().save_model()

    def final_eval(self) -> None:
        """Strip and score the checkpoints as Ultralytics does; a finished run needs no state to go on from."""
        with optimizers_stripped_whole():
            super().final_eval()
        if RANK in {-1, 0}:
            (self.wdir / STATE_FILE).unlink(missing_ok=True)

    def resume_training(self, ckpt: Any) -> None:
        """Go on where the checkpoint stands; epochs that were begun after it are run again."""
        super().resume_training(ckpt)
        if self.resume and RANK in {-1, 0}:
            drop_rows_after(self.csv, self.start_epoch)

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        with self._adapters_set_aside():
            super()._load_checkpoint_state(ckpt)
        self.state.restore(ckpt["epoch"], self.adapters, self.optimizer)

    @contextmanager
    def _adapters_set_aside(self) -> Iterator[None]:
        """Leave in the optimizer what plain Ultralytics would have there, so that it can resume our checkpoints."""
        optimizer, adapters = self.optimizer, list(self.adapters.parameters())
        if not adapters:
            yield
            return
        group = optimizer.param_groups.pop()
        state = {p: optimizer.state.pop(p) for p in adapters if p in optimizer.state}
        try:
            yield
        finally:
            optimizer.param_groups.append(group)
            optimizer.state.update(state)

    @contextmanager
    def _leaving_nothing_behind(self) -> Iterator[None]:
        """Remove the folders that this run has made if it cannot start."""
        try:
            yield
        except BaseException:
            if self._made_folders:
                run, *parents = self._made_folders
                shutil.rmtree(run, ignore_errors=True)
                for folder in parents:
                    if folder.exists() and not any(folder.iterdir()):
                        folder.rmdir()
            raise


def _claim_folder(args: Any) -> tuple[Path, list[Path]]:
    """Make the run folder, and return it with all folders made for it, the innermost first.

    Ultralytics looks for a free name first and makes the folder later: two runs begun at once would get the same.
    """
    while True:
        folder = get_save_dir(args)
        missing = [f for f in (folder, *folder.parents) if not f.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=bool(args.exist_ok or getattr(args, "save_dir", None)))
            return folder, missing
        except FileExistsError:
            continue


def student_path(student: Any, model: Any, default: Any) -> str:
    """Return the student's path from its two names, `student` and Ultralytics' `model`.

    Raises:
        ConfigError: If both are given and differ, or if there is none.
    """
    if student and model and str(student) != str(model):
        raise ConfigError(f"student={student}: model={model} names another one; give one of the two")
    chosen = student or model or default
    if not isinstance(chosen, str | Path):
        raise ConfigError(f"student={chosen}: missing; name the model to train, such as student=yolov8n.pt")
    return with_suffix(str(chosen))


def refuse_unsupported(args: Any) -> None:
    """Refuse the Ultralytics arguments that make no sense beside a teacher.

    Raises:
        ConfigError: For the first of them.
    """
    processes = distributed.WORLD_SIZE if RANK != -1 else len(parse_device(args.device).split(","))
    refusals: tuple[tuple[str, bool, str], ...] = (
        (
            "data",
            args.data is None and not args.resume,
            "missing; give a data set, such as data=coco8.yaml or data=digits",
        ),
        ("task", args.task not in {None, "detect"}, "only task=detect can be distilled"),
        ("distill_model", args.distill_model is not None, "is Ultralytics' own distillation; use teacher= instead"),
        ("quantize", args.quantize == 8, "training for int8 takes no teacher; quantize the student at export"),
        ("batch", args.batch < 1, "the memory estimate does not know the teacher; give a number of images, batch=16"),
        (
            "batch",
            args.batch % processes != 0,
            f"does not divide over {processes} processes; give a multiple of {processes}",
        ),
    )
    for name, refused, reason in refusals:
        if refused:
            raise ConfigError(f"{name}={getattr(args, name)}: {reason}")


def _go_on_or_begin(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by which a named run goes on where it stands, or begins if it has no checkpoint yet.

    So that one command, given again by `torchrun --max-restarts` or a scheduler, brings a training to its end.
    """
    folder = get_save_dir(get_cfg(DEFAULT_CFG_DICT, {**arguments, "resume": False, "exist_ok": True}))
    last = folder / "weights" / "last.pt"
    return {"resume": str(last)} if last.is_file() else {"resume": False, "exist_ok": True}
