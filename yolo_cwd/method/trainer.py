# SPDX-License-Identifier: AGPL-3.0-or-later
"""Training of a student under a teacher. Read this file first: it shows the whole method.

`DistillingTrainer` is Ultralytics' trainer of a task whose student has its criterion wrapped. One training step is

    teacher(images)  ->  pyramid, class maps           frozen, without boxes, no gradient           (teacher.py)
    student(images)  ->  predictions and pyramid       as without us                                (fpn.py)
    loss  =  the task's own loss                       as without us
          +  weight * divergence(adapter(student map), teacher map)  for every shared level         (loss.py)
          +  weight * divergence(student class maps, teacher class maps)

The weights are such that every divergence has a share of the gradient at the student's maps (balance.py). Before the
first step the adapters are fitted to some batches (prepare.py).

Teacher and adapters belong to the trainer, never to the student: every checkpoint is a plain Ultralytics model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules.head import Detect
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, colorstr
from ultralytics.utils.torch_utils import unwrap_model

from yolo_cwd import digits
from yolo_cwd.config import ConfigError, unusable_data
from yolo_cwd.method import columns
from yolo_cwd.method.balance import clip_gradients
from yolo_cwd.method.fpn import (
    HeadTap,
    Level,
    build_adapters,
    class_maps_agree,
    hooks_set_aside,
    match_levels,
    pyramid_taps,
    student_features,
)
from yolo_cwd.method.lesson import LessonWatch
from yolo_cwd.method.loss import CLASS_MAPS, CWDLoss
from yolo_cwd.method.memory import DistilledStep
from yolo_cwd.method.prepare import choose_precision, measure, prepare
from yolo_cwd.method.student import as_it_is, is_reshaped
from yolo_cwd.method.teacher import load_teacher
from yolo_cwd.pool.pool import Labeler, Pool
from yolo_cwd.run import distributed, request
from yolo_cwd.run.refusal import require_autocast, require_streams, unusable_student
from yolo_cwd.run.resumable import ResumableTrainer
from yolo_cwd.tasks import Task, task_of_trainer

OTHER_TEACHER = "not the network that the run began with, and to which its adapters have been fitted; better begin anew"
STUDENT_CLIP_NORM = 10.0  # what Ultralytics clips the student's gradient norm to


class DistillingTrainer(ResumableTrainer):
    """Train a model with channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

    A class that is also derived from Ultralytics' trainer of a task (tasks.py) trains for that task.

    Attributes:
        task: The task it trains for.
        cwd: The checked options.
        pool: The images that the teacher has labeled; None if there are none.
        teacher: The frozen teacher.
        levels: The distilled levels, finest first; known once the student is built.
        level_weights: The weight of each of them, before the overall weight.
        adapters: One module a level, from student to teacher channels, trained with the student.
        reshaped: Whether the student keeps the shape of its checkpoint, which its YAML no longer describes.
        criterion: The student's criterion, once the training has begun.
    """

    task: Task
    pool: Pool | None = None

    def __init__(
        self,
        cfg: Any = DEFAULT_CFG_DICT,
        overrides: dict[str, Any] | None = None,
        _callbacks: dict[str, Any] | None = None,
    ) -> None:
        """Check all that can be checked before a run folder exists, then hand over to Ultralytics.

        Args:
            cfg: Base configuration: a YAML path, a dictionary or a namespace, with our options in it or without.
            overrides: Arguments and options that take precedence; `teacher` may be a path, a `YOLO` or a module,
                `data` may be `digits`.
            _callbacks: Ultralytics' callbacks by event.

        Raises:
            ConfigError: If an option or a model cannot be used.
        """
        self.task = task_of_trainer(type(self))
        asked = request.read(cfg, {**(overrides or {}), "task": self.task.name})
        arguments = {**asked.arguments, "device": distributed.join(asked.args.device)}
        self.cwd = asked.settings
        with distributed.first_here_first():
            self.teacher = load_teacher(self.cwd.teacher, self.cwd.trust_teacher)
            arguments["data"] = digits.resolve(arguments.get("data", asked.base["data"]), self.task.name)
        self.labeler = self.make_labeler(get_cfg(asked.base, arguments)) if self.cwd.labeling else None
        if self.labeler:
            self.labeler.refuse()
        self.levels: list[Level] = []
        self.level_weights: list[float] = []
        self.classes: list[int] = []
        self.class_weight = 0.0
        self.criterion: CWDLoss | None = None
        self._batches = 0
        self.explained: list[float] = []
        self.reshaped = False
        super().__init__(asked, arguments, _callbacks)

    def make_labeler(self, args: Any) -> Labeler:
        """Return what lets the teacher label images for these arguments."""
        return Labeler(self.cwd, self.task, args)

    def label_images(self) -> None:
        """Let the teacher label the images of `unlabeled` and complete the labels of the others, and train on these."""
        if self.labeler:
            self.pool = self.labeler.label()
            self.labeler.release()
            self.data["train"] = self.pool.train

    def get_dataset(self) -> Any:
        """Resolve `data` as Ultralytics does."""
        try:
            return super().get_dataset()
        except RuntimeError as error:
            distributed.let_others_follow()  # to the same error, instead of waiting for an end that never comes
            raise unusable_data(self.args.data, error.__cause__ or error) from error

    def build_dataset(self, img_path: Any, mode: str = "train", batch: int | None = None) -> Any:
        """Build a dataset as Ultralytics does; with a pool, `fraction` has already been applied."""
        fraction = self.args.fraction
        self.args.fraction = 1.0 if self.pool and mode == "train" else fraction
        try:
            return super().build_dataset(img_path, mode, batch)
        finally:
            self.args.fraction = fraction

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Prepare a batch as Ultralytics does, and add the teacher's pyramid of its images for the criterion.

        Before the student's forward pass, so that the teacher's passing memory and the activations the student keeps
        for its gradient are never needed at once, unless the teacher has a stream of its own.
        """
        batch = super().preprocess_batch(batch)
        if self.criterion is not None and self.criterion.weight and self._batches % self.cwd.cwd_every == 0:
            # what flows inside a compiled graph cannot be watched, nor a term without a weight
            if self._batches == 0 and ((self.args.compile and self.cwd.balanced) or self.criterion.unknown):
                measure(self.criterion, unwrap_model(self.model), self.teacher, batch, self.scaler.get_scale())
            batch["lesson"] = self.teacher.lesson(batch["img"])
        self._batches += 1
        return batch

    def optimizer_step(self) -> None:
        """Clip the adapters' gradient by its own norm, then step as Ultralytics does.

        By its own norm, so that the student is clipped as it would be without adapters. The gradients still carry the
        loss scale here, and so does the bound.
        """
        scale = self.scaler.scale(torch.ones((), device=self.device))  # read as a number, it would wait for the step
        if self.criterion is not None and self.cwd.cwd:
            self.criterion.meter.step(self.criterion.weights, scale)
        if adapters := list(self.adapters.parameters()):
            distributed.average_gradients(adapters)
            clip_gradients(adapters, STUDENT_CLIP_NORM * scale)
        super().optimizer_step()

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Build the student as Ultralytics does, unless its checkpoint is of another shape than its YAML."""
        rebuilt: nn.Module = super().get_model(cfg=cfg, weights=weights, verbose=verbose)
        self.reshaped = weights is not None and cfg is weights.yaml and is_reshaped(weights, rebuilt)
        if weights is None or not self.reshaped:
            return rebuilt
        return as_it_is(weights, rebuilt, self.args.model, self.args.data)

    def setup_model(self) -> Any:
        """Build the student, match its pyramid with the teacher's, and make the adapters."""
        try:
            with distributed.first_here_first():
                checkpoint = super().setup_model()
        except ConfigError:
            raise
        except Exception as error:
            raise unusable_student(vars(self.args), error) from error
        student = pyramid_taps(self.model, f"student={self.args.model}")
        self.levels = match_levels(student, self.teacher.taps, self.cwd.levels)
        self.level_weights = self.cwd.weights_of([level.name for level in self.levels])
        self.teacher.require_channels(self.data.get("channels", 3), self.args.data)
        require_autocast(self.args.amp, self.device)
        require_streams(self.cwd.teacher_forward, self.device)
        self.adapters = build_adapters(self.levels, self.cwd.adapter).to(self.device)
        distributed.spread(self.adapters)
        if self.cwd.cwd:
            self.class_weight = self.cwd.class_share / self.cwd.strength
            if self.class_weight and self._class_maps_agree():
                self.classes = self.teacher.show_classes(self._trained_classes())
            self.teacher.settle(self.device, beside=self.cwd.teacher_forward == "stream")
        return checkpoint

    def _trained_classes(self) -> list[str]:
        """Return the data's classes by index, without the names of those that the argument `classes` leaves out."""
        return [name if request.is_trained(i, self.args) else "" for i, name in sorted(self.data["names"].items())]

    def _class_maps_agree(self) -> bool:
        """Return whether the class maps of both sides mean the same, and lie at a level that is distilled."""
        student, teacher = self.model.model[-1], self.teacher.head
        agree = teacher is not None and class_maps_agree(student, teacher)
        return agree and (self.task.name != "semantic" or self.levels[0].student_index == 0)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Add the adapters to Ultralytics' optimizer as the last group, so that warm-up and schedule apply to them."""
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        if adapters := list(self.adapters.parameters()):
            plain = [group for group in optimizer.param_groups if group["param_group"] == "weight"]
            optimizer.add_param_group({**min(plain, key=lambda group: float(group["lr"])), "params": adapters})
        return optimizer

    def _setup_train(self) -> None:
        with self.folder.removed_on_failure():
            self.label_images()
            super()._setup_train()
            self._wrap_criterion()
            self._prepare()
        self.add_callback("on_train_epoch_start", DistillingTrainer._begin_epoch)
        LessonWatch(self)

    def _wrap_criterion(self) -> None:
        student = unwrap_model(self.model)
        own = getattr(student, "criterion", None) or student.init_criterion()
        self.criterion = student.criterion = self._wrapped(own, student, self.adapters)

    def _wrapped(self, own: Any, student: Any, adapters: nn.ModuleList) -> CWDLoss:
        """Return a criterion of the student's task with the divergences added, of weight 0 until an epoch begins."""
        features = student_features
        if not isinstance(student.model[-1], Detect):  # others do not return what they have received
            features = (tap := HeadTap()).take
            student.model[-1].register_forward_pre_hook(tap)
        return CWDLoss(
            own,
            adapters=adapters,
            levels=self.levels,
            level_weights=self.level_weights,
            tau=self.cwd.tau,
            normalize=self.cwd.normalize,
            weight=0.0,
            balanced=self.cwd.balanced,
            classes=self.classes,
            class_weight=self.class_weight,
            device=self.device,
            features=features,
        )

    def auto_batch(self) -> int:
        """Estimate the batch as Ultralytics does, by what a distilled step needs instead of the student alone."""
        student = self.model
        if self.cwd.cwd:
            self.model = DistilledStep(unwrap_model(student), self.adapters, self.teacher, self._wrapped)
        try:
            return int(super().auto_batch())
        finally:
            self.model = student

    def _prepare(self) -> None:
        """Choose the precision, fit the adapters and measure first gradients, or take up what the run had."""
        assert self.criterion is not None
        if self.cwd.cwd:
            choose_precision(self)
            if self.cwd.teacher_forward == "compile":
                self.teacher.speed_up(self.device)
        if self.cwd.cwd and self.resume:
            self.criterion.meter.restore(self.state.measured)
            if self.state.teacher not in {"", self.teacher.content}:
                LOGGER.warning(f"{colorstr('CWD:')} {self.teacher.argument}: {OTHER_TEACHER}")
        elif self.cwd.cwd:
            self.explained = prepare(self, self.criterion)
        begun_with = unwrap_model(self.model).yaml.get("yaml_file") if self.resume else self.args.model
        begun_with = self.state.options.get("student") or str(begun_with)
        self.state.options = request.plain_options(self.cwd, begun_with, [level.stride for level in self.levels])
        self.state.teacher = self.teacher.content
        if self.cwd.cwd:  # a resumed run keeps the precision, wherever it continues
            self.state.options["teacher_dtype"] = self.teacher.precision.name

    def _begin_epoch(self) -> None:
        assert self.criterion is not None
        self.teacher.eval().requires_grad_(False)  # whatever a callback has done to it
        self.criterion.features(None)  # forget the maps of a step that ran out of memory
        self.criterion.begin_epoch(self.cwd.weight(self.epoch, self.epochs) * self.cwd.cwd_every)
        self._batches = 0

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        with hooks_set_aside(unwrap_model(self.model).model[-1]):  # the EMA is made anew, as a copy of the student
            super()._load_checkpoint_state(ckpt)

    def measured(self) -> list[list[float]]:
        """Return what the meter has measured, from which a resumed run continues."""
        return self.criterion.meter.means.tolist() if self.criterion is not None else []

    def own_columns(self) -> set[str]:
        """Return the names of our columns in `results.csv`."""
        return columns.names(self.criterion)

    def label_loss_items(self, loss_items: dict[str, Any] | None = None, prefix: str = "train") -> Any:
        """Label the loss items as Ultralytics does, and in training with what `results.csv` has of every level."""
        labels = super().label_loss_items(loss_items, prefix)
        weight = self.criterion.weight / self.cwd.cwd_every if self.criterion is not None else 0.0
        return columns.label(labels, prefix, self.criterion, weight)

    @property
    def weights_by_level(self) -> dict[str, float]:
        """The weight of every distilled level by its name, and of the class maps, before the overall weight."""
        weights = {level.name: weight for level, weight in zip(self.levels, self.level_weights, strict=True)}
        return {**weights, CLASS_MAPS: self.class_weight} if self.classes else weights
