# SPDX-License-Identifier: AGPL-3.0-or-later
"""Training of a student under a teacher: every seam with Ultralytics. Read this file first.

`CWDTrainer` is Ultralytics' trainer of a task whose student has its criterion wrapped. One training step is

    teacher(images)  ->  pyramid, class maps           frozen, without boxes, no gradient      (method/teacher.py)
    student(images)  ->  predictions and pyramid       as without us                           (method/fpn.py)
    loss  =  the task's own loss                       as without us
          +  weight * divergence                       for every term: each shared level, and the class maps
                                                       (method/terms.py, method/loss.py)

The weights are such that every divergence has a share of the gradient at the student's maps (method/balance.py). Before
the first step the adapters are fitted to some batches (method/prepare.py).

Teacher and adapters belong to the trainer, never to the student: every checkpoint is a plain Ultralytics model. The
trainer asks objects that know nothing of it: the distillation, the labeler of images without labels, the training of
the teacher before the student's, and the state that lies beside the checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT, LOCAL_RANK, RANK
from ultralytics.utils.torch_utils import autocast, unwrap_model

from yolo_cwd import bccd
from yolo_cwd.config import ConfigError, refused_as, unusable_data
from yolo_cwd.log import warn
from yolo_cwd.method import columns
from yolo_cwd.method.distillation import Distillation
from yolo_cwd.method.fpn import hooks_set_aside
from yolo_cwd.method.guard import DistillationGuard, require_reachable
from yolo_cwd.method.student import KeepsShape
from yolo_cwd.method.teacher import load_teacher
from yolo_cwd.pool.pool import Labeler, Pool
from yolo_cwd.run import distributed, request, results, teacher_stage, torchrun
from yolo_cwd.run.files import atomic_checkpoints, content_of
from yolo_cwd.run.folder import RunFolder
from yolo_cwd.run.refusal import require_autocast, require_models, unusable_student
from yolo_cwd.run.state import FILE as STATE_FILE
from yolo_cwd.run.state import set_aside
from yolo_cwd.run.whole_run import WholeRun, for_task
from yolo_cwd.tasks import task_of_trainer
from yolo_cwd.two_stages import train_teacher
from yolo_cwd.view.attach import attach

ANEW = (
    "{file} has no adapters for {checkpoint}, which is older, or which plain Ultralytics has written since; "
    "the student goes on under its teacher, and the adapters begin anew"
)
OTHER_TEACHER = "not the network that the run began with, and to which its adapters have been fitted; better begin anew"


class CWDTrainer(KeepsShape, WholeRun):
    """Train a model with channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

    Takes every argument of Ultralytics' trainer for the student's task (detect, segment, pose, obb, semantic or depth),
    plus the options of `cfg/default.yaml`. An instance is also an instance of that trainer.

    Attributes:
        task: The task it trains for.
        settings: The checked options.
        distillation: The teacher, the levels, the terms and the criterion.
        stage: The training of the teacher before the student's; None if there is none.
        labeler: Lets the teacher label images; None if no option asks for it.
        pool: The images that the teacher has labeled; None if there are none.
        state: What a resumed training needs beside the student's checkpoint.
        folder: What this run has made, to be removed if it cannot begin.
        finished: Whether all epochs are trained: what is left is the last validation and the pictures.

    Examples:
        >>> YOLO("yolov8n.pt").train(trainer=CWDTrainer, teacher="yolov8l.pt", data="coco8.yaml", epochs=10)
        >>> YOLO("yolov8n-seg.pt").train(trainer=CWDTrainer, teacher="yolov8l-seg.pt", data="coco8-seg.yaml")
        >>> CWDTrainer(overrides={"model": "yolov8n.pt", "teacher": "yolov8l.pt", "data": "coco8.yaml"}).train()
    """

    device: torch.device
    optimizer: torch.optim.Optimizer
    epoch: int
    epochs: int

    def __new__(
        cls,
        cfg: Any = DEFAULT_CFG_DICT,
        overrides: dict[str, Any] | None = None,
        _callbacks: dict[str, Any] | None = None,
    ) -> CWDTrainer:
        """Make a trainer for the student's task."""
        trainer: CWDTrainer = super().__new__(for_task(cls, request.task_of(cfg, overrides or {}).name))
        return trainer

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
                `data` may be `bccd`.
            _callbacks: Ultralytics' callbacks by event.

        Raises:
            ConfigError: If an option or a model cannot be used.
        """
        self.task = task_of_trainer(type(self))
        asked = request.read(cfg, {**(overrides or {}), "task": self.task.name})
        arguments = {**asked.arguments, "device": torchrun.join(asked.args.device)}
        self.settings, self.state, self.given_options = asked.settings, asked.state, asked.options
        with distributed.local_zero_first():
            teacher = load_teacher(self.settings.teacher, self.settings.trust_teacher)
            arguments["data"] = bccd.resolve(arguments.get("data", asked.base["data"]), self.task.name)
            args = get_cfg(asked.base, arguments)
            require_models(vars(args))
            self.stage, self.settings = self.plan_teacher(teacher, args, asked.goes_on)
        self.labeler = self.make_labeler(args) if self.settings.labeling else None
        if self.labeler:
            self.labeler.refuse(will_be_trained=self.stage is not None)
        self.distillation = Distillation(self.settings, teacher)
        self.pool: Pool | None = None
        self.finished = False
        self.folder = RunFolder()
        if RANK in {-1, 0} and not asked.args.resume:
            arguments["save_dir"] = self.folder.claim(asked.args)
        with self.folder.removed_on_failure():
            if folder := distributed.broadcast_object(arguments.get("save_dir")):
                arguments["save_dir"] = folder
            super().__init__(asked.base, arguments, _callbacks)
        distributed.check_folder(self.save_dir)
        attach(self)

    def plan_teacher(self, teacher: Any, args: Any, goes_on: bool) -> teacher_stage.Planned:
        """Return the training of a teacher that does not know the data (None if there is none), and the options."""
        return teacher_stage.planned(teacher, self.settings, self.given_options, args, self.task, goes_on)

    def make_labeler(self, args: Any) -> Labeler:
        """Return what lets the teacher label images for these arguments."""
        return Labeler(self.settings, self.task, args)

    @property
    def has_begun(self) -> bool:
        """Whether the training of the student, or of its teacher, has begun: what fails now is no bad input."""
        stage = self.stage is not None and self.stage.begun
        return stage or (self.distillation is not None and self.distillation.criterion is not None)

    # The run as a whole

    def train(self) -> None:
        """Train the teacher first, if it does not know the data, then the student.

        Where `device` names several GPUs, Ultralytics starts processes, and each rebuilds the trainer from its
        arguments.

        Raises:
            ChildProcessError: If one of them fails.
        """
        if self.stage is not None:
            train_teacher(self, self.stage)
        if self.ddp:
            for name, value in self.given_options.items():
                setattr(self.args, name, value)
        with distributed.failed_children(self.args.device):
            super().train()
        torchrun.leave()

    def run_callbacks(self, event: str) -> None:
        """Run the callbacks of an event; the loggers begin with the student once its teacher is trained."""
        if self.stage is None or not self.stage.holds_back(self, event):
            super().run_callbacks(event)

    # Data

    def get_dataset(self) -> Any:
        """Resolve `data` as Ultralytics does."""
        try:
            return super().get_dataset()
        except RuntimeError as error:
            distributed.let_others_follow()  # to the same error, instead of waiting for an end that never comes
            raise unusable_data(self.args.data, error.__cause__ or error) from error

    def label_images(self) -> None:
        """Let the teacher label the images of `unlabeled` and complete the labels of the others, and train on these."""
        if self.labeler:
            teacher = self.settings.teacher
            self.pool = self.labeler.label(teacher if self.stage is not None else None)
            self.labeler.release()
            self.data["train"] = self.pool.train

    def build_dataset(self, img_path: Any, mode: str = "train", batch: int | None = None) -> Any:
        """Build a dataset as Ultralytics does; with a pool, `fraction` has already been applied."""
        fraction = self.args.fraction
        self.args.fraction = 1.0 if self.pool and mode == "train" else fraction
        try:
            return super().build_dataset(img_path, mode, batch)
        finally:
            self.args.fraction = fraction

    # Models

    def setup_model(self) -> Any:
        """Build the student, and match it with the teacher."""
        with refused_as(lambda error: unusable_student(vars(self.args), error)), distributed.local_zero_first():
            checkpoint = super().setup_model()
        self.distillation.teacher.require_channels(self.data.get("channels", 3), self.args.data)
        require_autocast(self.args.amp, self.device)
        names = [name if request.is_trained(i, self.args) else "" for i, name in sorted(self.data["names"].items())]
        self.distillation.build(self.model, f"student={self.args.model}", names, self.device)
        return checkpoint

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Build the optimizer as Ultralytics does, and add the adapters to it."""
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        self.distillation.join_optimizer(optimizer)
        return optimizer

    def auto_batch(self) -> int:
        """Estimate the batch as Ultralytics does, by what a distilled step needs instead of the student alone."""
        student = self.model
        self.model = self.distillation.as_module(unwrap_model(student))
        try:
            return int(super().auto_batch())
        finally:
            self.model = student

    # Steps

    def _setup_train(self) -> None:
        with self.folder.removed_on_failure():
            self.label_images()
            super()._setup_train()
            self.distillation.attach(unwrap_model(self.model))
            if self.distillation.is_on:
                require_reachable(self)
            self._prepare()
        self.add_callback("on_train_epoch_start", CWDTrainer._begin_epoch)
        assert self.distillation.criterion is not None
        self.guard = DistillationGuard(self.distillation.criterion, self.distillation.teacher.argument)
        self.add_callback("on_train_batch_end", CWDTrainer._require_taught)
        self.add_callback("on_train_epoch_end", CWDTrainer._end_epoch)
        self.add_callback("on_train_epoch_end", self.guard.report_skipped_terms)

    def _prepare(self) -> None:
        teacher = self.distillation.teacher
        self._fit_or_restore()
        if self.resume and self.distillation.is_on:
            if not self.state.measured:
                warn(ANEW.format(checkpoint=self.args.resume, file=STATE_FILE))
            elif self.state.teacher not in {"", teacher.content}:
                warn(f"{teacher.argument}: {OTHER_TEACHER}")
        begun_with = unwrap_model(self.model).yaml.get("yaml_file") if self.resume else self.args.model
        begun_with = self.state.options.get("student") or str(begun_with)
        strides = [level.stride for level in self.distillation.levels]
        self.state.options = request.plain_options(self.settings, begun_with, strides)
        self.state.teacher = teacher.content
        if self.distillation.is_on:  # a resumed run keeps the precision, wherever it continues
            self.state.options["teacher_dtype"] = teacher.precision.name

    def _fit_or_restore(self) -> None:
        self.distillation.prepare(
            unwrap_model(self.model),
            self.test_loader.dataset,
            self._batches,
            self.batch_size // max(self.world_size, 1),
            self.autocast,
            self.scaler.get_scale(),
            self.state.measured,
        )

    def autocast(self) -> Any:
        """Return the mixed precision that Ultralytics has a trainer's steps run in, as a context manager."""
        return autocast(torch.bfloat16 if self.args.amp == "bf16" else self.amp, device=self.device.type)

    def _batches(self, size: int) -> Iterator[dict[str, Any]]:
        """Yield batches of so many training images endlessly, from a separate loader in this process."""
        kept = self.args.cache, self.args.workers
        self.args.cache, self.args.workers = False, 0
        loader = self.get_dataloader(self.data["train"], batch_size=size, rank=LOCAL_RANK, mode="train")
        self.args.cache, self.args.workers = kept
        while True:
            yield from map(super().preprocess_batch, loader)

    def _require_taught(self) -> None:
        try:
            self.guard.require(self)
        except ConfigError:
            self.folder.remove()
            raise

    def _begin_epoch(self) -> None:
        self.distillation.begin_epoch(self.epoch, self.epochs)

    def _end_epoch(self) -> None:
        self.distillation.end_epoch(self._scale())

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Prepare a batch as Ultralytics does, and let the teacher see it."""
        batch = super().preprocess_batch(batch)
        self.distillation.teach(batch, unwrap_model(self.model), bool(self.args.compile), self.scaler.get_scale)
        return batch

    def optimizer_step(self) -> None:
        """Let the distillation prepare the adapters' gradients, then step as Ultralytics does."""
        self.distillation.step(self._scale())
        super().optimizer_step()

    def _scale(self) -> torch.Tensor:
        """Return the loss scale on the device; `.item()` would synchronize."""
        scale: torch.Tensor = self.scaler.scale(torch.ones((), device=self.device))
        return scale

    # Results, checkpoints, resuming

    def label_loss_items(self, loss_items: dict[str, Any] | None = None, prefix: str = "train") -> Any:
        """Label the loss items as Ultralytics does, and in training with what `results.csv` has of every term."""
        return columns.label(super().label_loss_items(loss_items, prefix), prefix, self.distillation.criterion)

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a row to `results.csv`, our columns last."""
        ours = columns.names(self.distillation.criterion)
        super().save_metrics(results.ordered(metrics, ours, self.csv, bool(self.resume)))

    def save_model(self) -> Any:
        """Write the checkpoints, with the optimizer's state of the student alone; ours lies beside them."""
        terms, folder = self.distillation.terms, self.wdir
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_checkpoints(self):
            with set_aside(self.optimizer, list(terms.parameters())):
                saved = super().save_model()
            if self.last.exists():
                measured = self.distillation.measured()
                self.state.remember(self.epoch, terms, self.optimizer, measured, content_of(self.last))
                self.state.first_time = results.first_time(self.csv)
                self.state.save(folder)
        return saved

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        terms, head = self.distillation.terms, unwrap_model(self.model).model[-1]
        with hooks_set_aside(head), set_aside(self.optimizer, list(terms.parameters())):
            super()._load_checkpoint_state(ckpt)  # makes the EMA anew, as a copy of the student
        # The first process alone remembers what it saves.
        self.state.epochs = distributed.broadcast_object(self.state.epochs)
        self.state.restore(ckpt["epoch"], terms, self.optimizer)
        if self.distillation.criterion is not None and not self.state.measured:  # after a loss that was not finite
            self._fit_or_restore()

    def final_eval(self) -> None:
        """Strip and score the checkpoints as Ultralytics does; a finished run needs no state to continue from."""
        self.finished = True
        if RANK in {-1, 0}:
            (self.wdir / STATE_FILE).unlink(missing_ok=True)
        super().final_eval()
