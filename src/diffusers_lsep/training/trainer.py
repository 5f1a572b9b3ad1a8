# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The training loop: what a step does, what is reported, measured, drawn and saved."""

import math
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, broadcast_object_list, gather_object, send_to_device, set_seed
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor

from ..autoencoders import get_normalization
from ..data.stream import SampleStream, keep_batch
from ..data.streamed import StreamedSamples
from ..files import whole_folder
from ..objective import LSEPObjective
from ..pipeline_lsep import LSEPPipeline
from ..progress import make_progress_bar, shows_bars
from ..regularizers.teachers import Teacher
from ..scheduling_flow_map import FlowMapScheduler
from ..scheduling_flow_match_sde import FlowMatchSDEScheduler
from ..transformer_sit import SiTTransformer2DModel
from .average import WeightAverage
from .checkpoint_writer import CheckpointWriter
from .checkpoints import checkpoint_tensors, load_checkpoint, named_averages, read_state
from .errors import collect_errors, report_errors
from .fine_tuning import LORA_FOLDER, fill_classes, merge_lora, save_lora
from .flow_map import NUM_DRAWS
from .inputs import make_teachers, objective_inputs
from .log import MetricsFile, StepMetrics, batch_means, draw_curves
from .non_finite import NonFiniteSteps
from .post_hoc_ema import PowerFunctionEMA
from .results import choose_validation_labels, describe_hardware, describe_training, draw_samples, write_cards
from .setup import Setup, build_objective
from .stopping import StopSignal, outlive_signals
from .unreadable import UnreadableImages


class Trainer:
    """
    Model, optimiser, average and stream of one run, and what is done with them: [`prepare_training`], [`train`] and
    [`save_result`], called by all processes.

    Args:
        setup ([`Setup`]): What the flags come to.
        accelerator (`Accelerator`): This process among the others.
        settings (`dict`): What is to be kept in checkpoints, for a run that continues: flags and facts, as JSON.
        load (`bool`): Whether to load the weights that the run starts from, if there are any.

    Raises:
        `ValueError`: if the data, the models or the classes to draw are not what the flags say.
    """

    def __init__(self, setup: Setup, accelerator: Accelerator, settings: dict[str, Any], load: bool):
        args, data = setup.args, setup.data
        self.args, self.accelerator, self.setup, self.settings = args, accelerator, setup, settings
        self.output_dir = Path(args.output_dir)

        # 1. Transformer, probe and objective
        set_seed(args.seed)
        self.objective = build_objective(setup, load=load)
        transformer = self.objective.transformer
        self.validation_labels = choose_validation_labels(args, data.names)
        self.normalization: dict[str, Any] = {}
        if setup.vae is not None:
            setup.vae.to(accelerator.device)
            if hasattr(setup.vae, "use_slicing"):  # nearly all have it
                setup.vae.enable_slicing()
            self.normalization = get_normalization(setup.vae, accelerator.device)
        for frozen in (setup.encoder, setup.teacher):
            if frozen is not None:
                frozen.to(accelerator.device)

        # 2. The stream of samples
        grid_size = transformer.config.sample_size // transformer.config.patch_size
        latent_shape = (transformer.config.in_channels, transformer.config.sample_size, transformer.config.sample_size)
        stream_options = {
            "latent_shape": latent_shape,
            "seed": args.seed,
            "samples_per_step": setup.samples_per_step,
            "grid_size": grid_size,
            "crop_size_min": args.crop_size_min,
            "class_dropout_prob": args.class_dropout_prob,
            "probe_dropout_prob": args.probe_dropout_prob,
            "coupled_dropout": args.coupled_dropout,
            "probe_fraction": args.probe_fraction,
            "path_type": args.path_type,
            "timestep_sampling": args.timestep_sampling,
            "random_flip": args.random_flip,
            "posterior_noise": setup.vae is not None,
            "replace_unreadable": args.max_errors > 0,
            "num_regularizer_draws": sum(module.num_draws for module in self.objective.regularizers.values())
            + (NUM_DRAWS if args.flow_map else 0),
        }
        make_stream = StreamedSamples if args.streaming else SampleStream
        self.stream = make_stream(data.source, **stream_options, image_source=data.images)
        self.held_out = None
        if data.held_out is not None:
            self.held_out = SampleStream(data.held_out, **stream_options, image_source=data.held_out_images)
        self.stream.__getitems__([0])  # to find now what would go wrong later
        self.unreadable = UnreadableImages(self.output_dir, args.max_errors)

    def prepare_training(self, checkpoint: Path | None):
        """Makes the optimiser and the average, restores the checkpoint, and lets accelerate wrap what it has to."""
        args, accelerator, objective = self.args, self.accelerator, self.objective
        objective.to(accelerator.device)
        self.teachers = make_teachers(objective, args.flow_map, lambda: self.ema)
        parameters = [*objective.transformer.parameters(), *objective.regularizers.parameters()]
        groups = [{"params": [p for p in parameters if p.requires_grad], "lr": args.learning_rate}]
        if objective.probe is not None:
            groups.append({"params": list(objective.probe.parameters()), "lr": args.probe_learning_rate})
        self.optimizer = torch.optim.AdamW(
            groups,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
            fused=True,
        )
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        self.step = 0 if checkpoint is None else read_state(checkpoint)["step"]
        # For all processes: accelerate hands the batches out in turn.
        per_step = self.setup.samples_per_step
        samples = range(self.step * per_step, max(self.step, args.max_train_steps) * per_step)
        loader = torch.utils.data.DataLoader(
            self.stream,
            batch_sampler=torch.utils.data.BatchSampler(samples, args.train_batch_size, drop_last=True),
            collate_fn=keep_batch,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=outlive_signals,
            pin_memory=accelerator.device.type == "cuda",
        )
        # FSDP2 cuts the parameters up here; average and checkpoint come after it, in the pieces of this process.
        self.model, self.optimizer, self.loader = accelerator.prepare(objective, self.optimizer, loader)
        self.unreadable.read()
        # A checkpoint is written before its step is validated, and what comes after it may have been cut off.
        self.owes_validation = checkpoint is not None and self.validates_at(self.step)
        if self.owes_validation:
            done = [(self.output_dir / self.samples_file).exists()] if accelerator.is_main_process else [None]
            self.owes_validation = not broadcast_object_list(done)[0]
        if accelerator.is_main_process:
            self.metrics_file = MetricsFile(self.output_dir / "metrics.jsonl", self.step, self.owes_validation)
        self.ema = None
        if args.use_ema:
            min_decay = 0.0 if args.ema_warmup else args.ema_decay
            self.ema = WeightAverage(
                self.trained_parameters(), decay=args.ema_decay, min_decay=min_decay, foreach=True
            )
            # EMAModel forgets the initial weights at its step 1, whatever `min_decay` says.
            self.ema.optimization_step = 0 if args.ema_warmup else 1
        self.post_hoc_ema = PowerFunctionEMA(objective, args.post_hoc_ema_sigmas or ())
        self.non_finite_steps = NonFiniteSteps(args.max_skipped_steps, scaled=accelerator.scaler is not None)
        if checkpoint is not None:
            averages = (self.ema, self.post_hoc_ema.averages)
            state = load_checkpoint(checkpoint, objective, self.optimizer, *averages)
            self.non_finite_steps.num_skipped = state.get("skipped_steps", 0)
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr()):
                group["lr"] = rate
            if self.ema is not None:
                self.ema.optimization_step = state["ema_step"]
            if accelerator.scaler is not None and state["scaler"]:
                accelerator.scaler.load_state_dict(state["scaler"])
        with torch.device("meta"):
            self.saved_objective = build_objective(self.setup, load=False)
        limits = (args.checkpoints_total_limit, args.milestone_steps)
        self.checkpoints = CheckpointWriter(accelerator, self.output_dir, self.save_average, checkpoint, *limits)
        self.probe_weight_scale = torch.ones((), device=accelerator.device)
        self.regularizer_weights = {name: torch.ones((), device=accelerator.device) for name in objective.regularizers}

    @property
    def saves(self) -> bool:
        """Whether this process takes part in saving: all do where each has only a part of the weights."""
        return self.accelerator.is_main_process or self.accelerator.is_fsdp2

    @property
    def samples_file(self) -> Path:
        """The samples of this step, in the output folder."""
        return Path("samples", f"step-{self.step}.png")

    @property
    def problems_file(self) -> Path:
        """What went wrong with the validation of this step."""
        return self.output_dir / self.samples_file.with_name(f"step-{self.step}-error.txt")

    def validates_at(self, step: int) -> bool:
        return step % self.args.validation_steps == 0 or step == self.args.max_train_steps

    @property
    def compiled(self) -> bool:
        """Whether `accelerate launch --dynamo_backend ...` has the step compiled."""
        return self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.objective.parameters() if parameter.requires_grad]

    def inputs(self, batch: dict[str, Any], teachers: dict[str, Teacher], idle: Collection[str]) -> dict[str, Any]:
        """[`objective_inputs`] for a batch, with the losses' weights."""
        self.unreadable.add(batch.pop("unreadable", ()))
        if self.compiled:
            # Their number is another one in every step, which is better known before the first is compiled.
            for name in ("separate_rows", "probe_rows"):
                if name in batch:
                    torch._dynamo.maybe_mark_dynamic(batch[name], 0)
        options = (self.objective, self.setup, self.normalization, teachers, idle, self.accelerator.autocast)
        weights = {"probe_weight_scale": self.probe_weight_scale, "regularizer_weights": self.regularizer_weights}
        return objective_inputs(batch, *options) | weights

    def train(self) -> bool:
        """Trains to the end, and returns True, or until a signal arrives."""
        with StopSignal(self.accelerator) as stop, self.checkpoints:
            return self.train_until(stop)

    def train_until(self, stop: StopSignal) -> bool:
        args, accelerator = self.args, self.accelerator
        self.metrics = StepMetrics(accelerator, args.gradient_accumulation_steps)
        self.progress = make_progress_bar(
            total=args.max_train_steps,
            initial=self.step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        batches = iter(self.loader)
        self.collected_at = self.step
        if self.owes_validation:
            self.validate()
            self.metrics.restart_clock()
        while self.step < args.max_train_steps:
            self.take_step(batches)
            self.progress.update()

            # Reports and checkpoints. Nothing is saved or measured before all losses up to here are known.
            last = self.step == args.max_train_steps
            stopped = stop.arrived(self.checkpoints.has_failed) and not last
            if stopped:
                self.checkpoints.finish()  # which raises what has failed
            saves = self.step % args.checkpointing_steps == 0 or last or stopped
            validates = self.validates_at(self.step)
            snaps = bool(args.post_hoc_ema_sigmas) and (self.step % args.post_hoc_ema_steps == 0 or last)
            if self.step % args.logging_steps == 0 or saves or validates or snaps:
                self.log()
            if snaps:
                dtype = args.post_hoc_ema_dtype
                self.post_hoc_ema.save_snapshot(self.output_dir, self.step, dtype, accelerator.is_main_process)
            if saves:
                self.save_checkpoint()
            if validates:
                self.validate()
            if snaps or saves or validates:
                self.metrics.restart_clock()
            if stopped:
                self.progress.close()
                self.checkpoints.finish()
                accelerator.print(
                    f"Stopped by {stop.name or 'a signal'} after step {self.step}; {self.checkpoints.last} is"
                    " complete. Continue with the same flags and `--resume_from_checkpoint latest`."
                )
                return False
        self.progress.close()
        return True

    def take_step(self, batches: Iterator[dict[str, torch.Tensor]]):
        """One step of the optimiser, for which `gradient_accumulation_steps` batches are taken."""
        args, accelerator = self.args, self.accelerator
        idle = self.set_weights()

        # 1. Gradients
        for _ in range(args.gradient_accumulation_steps):
            start = time.perf_counter()
            batch = next(batches)
            data_wait = time.perf_counter() - start
            with accelerator.accumulate(self.model):
                with accelerator.autocast():  # accelerate forgets it with FSDP2
                    output = self.model(**self.inputs(batch, self.teachers, idle))
                accelerator.backward(output.loss)
                rows = batch.get("probe_rows", slice(None))
                self.metrics.add_batch(output, batch["timesteps"][rows], data_wait)
                if accelerator.sync_gradients:
                    limit = args.max_grad_norm or math.inf
                    grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), limit)
                    if isinstance(grad_norm, DTensor):  # of sharded parameters
                        grad_norm = grad_norm.full_tensor()
                    self.metrics.add_step(grad_norm)
                    self.non_finite_steps.guard(self.optimizer, grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()

        # 2. Learning rate and average
        self.learning_rates = self.lr_scheduler.get_last_lr()
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.trained_parameters())
        self.step += 1
        self.post_hoc_ema.step(self.step)

    def set_weights(self) -> set[str]:
        """
        Sets the losses' weights after the steps so far; the probe's is constant, or decays late (fractions of epochs
        count). Returns the regularizers that have none.
        """
        args, epoch = self.args, self.step / self.setup.steps_per_epoch
        if args.probe_decay_start_epoch is not None:
            late = max(0.0, epoch - args.probe_decay_start_epoch)
            self.probe_weight_scale.fill_(0.1 ** (late / args.probe_decay_epochs))
        weights = self.objective.weights_at(self.step, epoch)
        for name, weight in weights.items():
            self.regularizer_weights[name].fill_(weight)
        return {name for name, weight in weights.items() if weight == 0}

    def log(self):
        """Brings the metrics since the last call to the host, writes them, and stops at a loss that is not finite."""
        self.unreadable.count(self.accelerator, self.checkpoints)
        metrics, losses, grad_norms = self.metrics.collect()
        numbers = (self.collected_at + 1, losses, grad_norms)
        metrics |= self.non_finite_steps.count(*numbers, self.checkpoints, self.accelerator.print)
        self.collected_at = self.step
        metrics["images_per_second"] = self.setup.samples_per_step / metrics["seconds_per_step"]
        metrics["learning_rate"] = self.learning_rates[0]
        if self.objective.probe is not None:
            metrics["probe_learning_rate"] = self.learning_rates[1]
        self.report(metrics)
        shown = {"loss": "loss", "probe_loss": "probe", "probe_accuracy": "accuracy"}
        values = {label: f"{metrics[key]:.3f}" for key, label in shown.items() if key in metrics}
        values["images/s"] = f"{metrics['images_per_second']:.4g}"
        values["waits"] = f"{metrics['data_wait']:.0%}"  # for data
        values["GB"] = f"{metrics['memory_gb']:.1f}"
        self.progress.set_postfix(values, refresh=False)

    def report(self, metrics: dict[str, Any]):
        if self.accelerator.is_main_process:
            self.metrics_file.append({"step": self.step, "epoch": self.step / self.setup.steps_per_epoch, **metrics})
        scalars = {name: value for name, value in metrics.items() if isinstance(value, float | int)}
        self.accelerator.log(scalars, step=self.step)

    @contextmanager
    def averaged_objective(self) -> Iterator[LSEPObjective]:
        """The objective with the averaged weights, for a while, and whole on every process."""
        if self.accelerator.is_fsdp2:
            weights = self.objective.state_dict()
            if self.ema is not None:
                weights |= named_averages(self.objective, self.ema)
            with self.accelerator.device:
                objective = build_objective(self.setup, load=False)
            # Sharded ones are put together by all processes in step.
            whole = {k: v.full_tensor().cpu() if isinstance(v, DTensor) else v for k, v in weights.items()}
            objective.load_state_dict(whole)
            if self.args.unconditional:
                fill_classes(objective.transformer)
            yield objective.eval()
            return
        with self.ema.in_place_of(self.trained_parameters()) if self.ema is not None else nullcontext():
            if self.args.unconditional:
                fill_classes(self.objective.transformer)
            self.objective.eval()
            try:
                yield self.objective
            finally:
                self.objective.train()

    def validate(self):
        """
        Measures the averaged weights on held-out images, draws the curves, and draws samples from them. What goes
        wrong with one of these is reported, and is not worth the run.
        """
        accelerator = self.accelerator
        if accelerator.is_main_process:  # of a run that was stopped after this step, and goes on from it
            self.problems_file.unlink(missing_ok=True)
        with self.averaged_objective() as objective, torch.no_grad():
            if self.held_out is not None:
                measured = self.measure(objective, self.held_out)
                if measured:
                    self.report(measured)
                self.unreadable.count(accelerator, self.checkpoints)
            if accelerator.is_main_process:
                with collect_errors() as problems:
                    draw_curves(self.output_dir)
                self.report_problems("curves", problems)
                # Last: where they are, a run that goes on from here owes nothing.
                with collect_errors() as problems:
                    pipeline, path = self.make_pipeline(objective.transformer), self.output_dir / self.samples_file
                    path.parent.mkdir(exist_ok=True)
                    draw_samples(path, pipeline, self.args, self.validation_labels, accelerator, self.step)
                self.report_problems("samples", problems)
        accelerator.wait_for_everyone()

    def report_problems(self, what: str, problems: list[tuple[str, str]]):
        if self.accelerator.is_main_process:
            report_errors(problems, f"{what} of step {self.step}", self.problems_file)

    def measure(self, objective: LSEPObjective, held_out: SampleStream) -> dict[str, float]:
        """
        Losses and probe accuracy on the held-out images, which the processes share out; nothing if one of them fails.
        """
        args, accelerator = self.args, self.accelerator
        num_rows = len(held_out.source.labels)
        rows = range(accelerator.process_index, num_rows, accelerator.num_processes)
        names = ["denoising_loss"]
        if objective.probe is not None:
            names += ["probe_loss", "probe_accuracy"]
        names += [f"{name}_loss" for name in objective.regularizers]
        idle, sums = self.set_weights(), torch.zeros(len(names), device=accelerator.device)
        with collect_errors() as problems:  # the others would wait for this process
            for first in range(0, len(rows), args.train_batch_size):
                batch = held_out.held_out_batch(list(rows[first : first + args.train_batch_size]))
                batch = send_to_device(batch, accelerator.device)
                teachers = dict.fromkeys(("average", "student"), Teacher(objective.transformer))
                with accelerator.autocast():  # as in training: with FSDP2 this objective is none that accelerate knows
                    output = objective(**self.inputs(batch, teachers, idle))
                means = batch_means(output)
                sums += torch.stack([means[name] for name in names]) * len(output.denoising_losses)
        problems = gather_object(problems)
        self.report_problems("held-out losses", problems)
        if problems:
            return {}
        means = (accelerator.reduce(sums, reduction="sum") / num_rows).tolist()
        return {f"validation_{name}": mean for name, mean in zip(names, means)}

    def make_pipeline(self, transformer: SiTTransformer2DModel) -> LSEPPipeline:
        scheduler_class = FlowMapScheduler if self.args.flow_map else FlowMatchSDEScheduler
        pipeline = LSEPPipeline(
            transformer=transformer,
            scheduler=scheduler_class(path_type=self.args.path_type),
            vae=self.setup.vae,
            id2label=dict(enumerate(self.setup.data.names)),
        )
        disable = not (self.accelerator.is_local_main_process and shows_bars())
        pipeline.set_progress_bar_config(disable=disable, desc="Samples", leave=False)
        return pipeline

    def write_pipeline(self, folder: Path, objective: LSEPObjective):
        """Writes the weights of an objective as a pipeline, and the probe beside it."""
        self.make_pipeline(merge_lora(objective.transformer)).save_pretrained(folder)
        if objective.probe is not None:
            objective.probe.save_pretrained(folder / "probe")

    def save_average(self, folder: Path, weights: dict[str, torch.Tensor]):
        """The same of weights on the host, by their names. While training goes on."""
        self.saved_objective.load_state_dict(weights, assign=True)
        if self.args.unconditional:
            fill_classes(self.saved_objective.transformer)
        self.write_pipeline(folder, self.saved_objective)

    def save_pipeline(self, folder: Path, with_lora: bool = False):
        """Writes the averaged weights as a pipeline, the probe and LoRA layers beside it. A call for all processes."""
        with self.averaged_objective() as objective:
            if self.accelerator.is_main_process:
                self.write_pipeline(folder, objective)
                if with_lora and self.setup.start is not None:
                    save_lora(folder / LORA_FOLDER, objective.transformer, self.setup.start)

    def save_checkpoint(self):
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "ema_step": self.ema.optimization_step if self.ema is not None else None,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "skipped_steps": self.non_finite_steps.num_skipped,
            "settings": self.settings,
        }
        kept = (self.objective, self.optimizer, self.ema, self.post_hoc_ema.averages)
        self.checkpoints.save(self.step, checkpoint_tensors(*kept) if self.saves else {}, state)

    def save_result(self):
        """Writes the pipeline into the root of the output folder, `model_index.json` last, and its model card."""
        args, source = self.args, self.output_dir / ".pipeline"
        if not self.accelerator.is_main_process:
            if self.saves:
                self.save_pipeline(source)
            return
        with whole_folder(source) as partial:
            self.save_pipeline(partial, with_lora=args.lora_rank is not None)
        (self.output_dir / "model_index.json").unlink(missing_ok=True)
        for path in sorted(source.iterdir(), key=lambda path: path.name == "model_index.json"):
            target = self.output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        source.rmdir()

        names = [self.setup.data.names[index] for index in self.validation_labels * args.num_validation_images]
        num_images = len(self.setup.data.source.labels)
        hardware = describe_hardware(self.accelerator)
        facts = describe_training(self.output_dir, args, self.setup.samples_per_step, num_images, hardware)
        write_cards(self.output_dir, args, self.samples_file, names, facts)
