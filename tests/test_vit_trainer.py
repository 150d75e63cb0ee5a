"""The Trainer subclass: accumulation, averages, phases, resuming, teachers."""

import ast
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ONE_STAGE_ARCHITECTURES, PixelImages, random_images, tiny_config, tiny_model
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from modeling_vit_custom import ViTCustomForImageClassification
from trainers.arguments import OPTIMIZERS, LossArguments, TrainingArguments
from trainers.ema import Ema
from trainers.losses import Criterion
from trainers.mixing import Mixing
from trainers.sampling import BalancedOrder
from trainers.teachers import Teacher
from trainers.vit_trainer import (
    CheckpointNotReadError,
    TrainingDivergedError,
    ViTTrainer,
    grown_size,
    list_checkpoints,
)


IMAGES, LABELS = random_images(32), torch.arange(32) % 5


def dataset() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"pixel_values": IMAGES.numpy(), "labels": LABELS.tolist()}).with_format("torch")


def make_trainer(folder, model=None, trainer_options=None, **options) -> ViTTrainer:
    defaults = {"per_device_train_batch_size": 16, "max_steps": 4, "learning_rate": 1e-3, "eval_strategy": "no"}
    defaults |= {"save_strategy": "no", "disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1}
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    set_seed(0)
    return ViTTrainer(
        model=tiny_model(ViTCustomForImageClassification, "vit") if model is None else model,
        args=arguments,
        train_dataset=PixelImages(IMAGES, LABELS),
        eval_dataset=dataset(),
        **{"mixing": Mixing(0, 0, 1.0, 0.5, 5), "criterion": Criterion(), **(trainer_options or {})},
    )


def weights(trainer: ViTTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_running_statistics_are_averaged_with_the_weights(tmp_path):
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=5))
    ema, expected = Ema(model, 0.5), {}
    batch_norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert batch_norms
    for step, decay in enumerate((2 / 11, 3 / 12, 4 / 13, 5 / 14)):
        model.train()(random_images(8, seed=step))
        ema.update(model)
        for name, module in batch_norms.items():
            for kind, start in (("running_mean", 0.0), ("running_var", 1.0)):
                before = expected.get(f"{name}.{kind}", torch.tensor(start))
                expected[f"{name}.{kind}"] = decay * before + (1 - decay) * getattr(module, kind)
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.in_place(model):
        averaged = model.state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(averaged[name], tensor)
            assert not torch.equal(tensor, raw[name])
    ema.save(tmp_path)
    assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
    saved = load_file(tmp_path / "ema.safetensors")
    assert all(torch.equal(saved[name], averaged) for name, averaged in ema.averages.items())
    assert expected.keys() <= saved.keys()


def test_one_batch_and_accumulated_ones_end_in_the_same_weights(tmp_path):
    whole = make_trainer(tmp_path / "one", optimizer="sgd")
    whole.train()
    parts = make_trainer(
        tmp_path / "four", optimizer="sgd", per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    parts.train()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=2e-6)
    assert (weights(whole) - weights(make_trainer(tmp_path / "none"))).abs().max() > 1e-4


TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
from test_vit_trainer import make_trainer
options = {{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}}
trainer = make_trainer({folder!r}, optimizer="sgd", ema_decay=0.9, **options)
trainer.train()
trainer.save_model()
"""


def run_ranks(folder: Path, code: str) -> None:
    """In two processes, each with the output folder `ranks`."""
    script = folder / "script.py"
    (folder / "ranks").mkdir()
    script.write_text(code.format(tests=str(Path(__file__).parent), folder=str(folder / "ranks")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*launcher, str(script)], env=environment, check=True, capture_output=True, timeout=120)


@pytest.mark.slow
def test_two_ranks_end_in_the_same_weights_as_one(tmp_path):
    run_ranks(tmp_path, TWO_RANKS)
    one = make_trainer(tmp_path / "one", optimizer="sgd", ema_decay=0.9)
    one.train()
    one.save_model()
    weights_of_one, weights_of_two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "ranks"))
    for name, tensor in weights_of_one.items():
        torch.testing.assert_close(weights_of_two[name], tensor, rtol=0, atol=2e-6)


DRAWS = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_vit_trainer import make_trainer
seen = []
def look(pixels, draws):
    seen.append((round(float(pixels.sum()), 3), torch.rand(()).item()))
    return pixels
options = {{"per_device_train_batch_size": 8, "ddp_backend": "gloo"}}
trainer = make_trainer({folder!r}, trainer_options={{"augmentation": look}}, **options)
trainer.train()
open({folder!r} + "/" + str(trainer.args.process_index), "w").write(repr(seen))
"""


@pytest.mark.slow
def test_ranks_draw_for_their_own_images(tmp_path):
    run_ranks(tmp_path, DRAWS)
    one, two = (ast.literal_eval((tmp_path / "ranks" / name).read_text()) for name in "01")
    assert len(one) == len(two) == 4
    assert not {image for image, _ in one[:2]} & {image for image, _ in two[:2]}  # an epoch is two steps
    assert not {draw for _, draw in one} & {draw for _, draw in two}


def test_the_loss_that_is_logged_is_a_mean_over_images(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    expected = tiny_model(ViTCustomForImageClassification, "vit")(IMAGES, labels=LABELS).loss.item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("keeps_best", [False, True])
def test_only_checkpoints_of_the_run_are_deleted(tmp_path, keeps_best):
    theirs = [tmp_path / name for name in ("checkpoint-mine", "checkpoint-2-mine", "checkpoint-old.bak")]
    for folder in theirs:
        folder.mkdir()
        (folder / "weights").touch()
        os.utime(folder, (0, 0))  # older than all that comes
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    if keeps_best:
        options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 1e-2}
        options |= {"metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    assert all((folder / "weights").exists() for folder in theirs)
    (left,) = list_checkpoints(tmp_path)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert left == (max(losses, key=losses.get) if keeps_best else 4)
    assert not keeps_best or left < 4
    assert trainer.args.save_total_limit == 1


@pytest.mark.parametrize(("limit", "left"), [(None, 4), (2, 2), (0, 4), (-1, 4)])
def test_so_many_checkpoints_stay(tmp_path, limit, left):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=limit).train()
    assert sorted(list_checkpoints(tmp_path)) == list(range(5 - left, 5))


def test_checkpoints_of_the_run_that_one_goes_on_from_stay(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1e-2}
    make_trainer(tmp_path / "first", **options, save_total_limit=4).train()
    state_file = tmp_path / "first" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state |= {
        "best_metric": 0.0,
        "best_model_checkpoint": str(tmp_path / "first" / "checkpoint-1"),
        "best_global_step": 1,
    }
    state_file.write_text(json.dumps(state))
    trainer = make_trainer(tmp_path / "second", **options, save_total_limit=1)
    trainer.train(resume_from_checkpoint=str(state_file.parent))
    assert trainer.state.best_model_checkpoint == str(tmp_path / "first" / "checkpoint-1")
    assert sorted(list_checkpoints(tmp_path / "first")) == [1, 2, 3, 4]
    assert sorted(list_checkpoints(tmp_path / "second")) == [4]


def test_averaged_weights_are_evaluated_and_published(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.9, learning_rate=1e-2)
    history = []
    step = trainer.ema.update
    trainer.ema.update = lambda model: (history.append(weights(trainer).clone()), step(model))
    start = weights(trainer).clone()
    trainer.train()
    expected = start
    for index, current in enumerate(history, start=1):
        decay = min(0.9, (1 + index) / (10 + index))
        expected = decay * expected + (1 - decay) * current
    with trainer.averaged_weights():
        torch.testing.assert_close(weights(trainer), expected)
        loss = trainer.model(IMAGES, labels=LABELS).loss.item()
    assert torch.equal(weights(trainer), history[-1])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)
    trainer.save_model()
    published = ViTCustomForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in published.parameters()]), expected)
    assert torch.equal(weights(trainer), history[-1])


def tiny_vit_of_transformers() -> ViTForImageClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5))


@pytest.mark.parametrize(
    ("make_model", "optimizer"),
    [
        (partial(tiny_model, ViTCustomForImageClassification, "vit"), "adamw"),
        (partial(tiny_model, ViTCustomForImageClassification, "vit"), "muon"),
        (partial(tiny_model, ViTCustomForImageClassification, "vit"), "lamb"),
        (tiny_vit_of_transformers, "adamw"),  # whose files have other names than its weights
    ],
    ids=["adamw", "muon", "lamb", "transformers"],
)
def test_a_resumed_run_ends_where_an_unbroken_one_ends(tmp_path, make_model, optimizer):
    options = {"ema_decay": 0.9, "optimizer": optimizer, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    mixing = {"mixing": Mixing(0.8, 1.0, 1.0, 0.5, 5)}
    whole = make_trainer(tmp_path / "whole", make_model(), mixing, **options, save_total_limit=5)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", make_model(), mixing, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    one, two = (load_file(tmp_path / name / "checkpoint-6" / "ema.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("make_model", [None, tiny_vit_of_transformers], ids=["vit_custom", "transformers"])
def test_the_best_model_comes_back(tmp_path, make_model):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 5}
    trainer = make_trainer(tmp_path, make_model and make_model(), **options, ema_decay=0.5, learning_rate=0.3)
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = min(losses, key=losses.get)
    assert best != 3  # so that something must be loaded
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_a_resumed_run_has_the_learning_rate_that_it_was_given(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 5, "max_steps": 6}
    options |= {"layer_decay": 0.5, "warmup_steps": 0}
    logged = {}
    for rate in (1e-3, 1e-4):
        trainer = make_trainer(tmp_path, learning_rate=rate, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if logged else None)
        history = {log["step"]: log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log}
        logged[rate] = [history[step] for step in (3, 4, 5)]
    assert logged[1e-4] == pytest.approx([rate / 10 for rate in logged[1e-3]])
    # That of the head, not of the layer that learns most slowly.
    assert logged[1e-3][0] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 2 / 6)) / 2)


def test_a_checkpoint_of_something_else_is_not_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 5}
    make_trainer(tmp_path, **options).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    wider = tiny_model(ViTCustomForImageClassification, "vit", hidden_size=48)
    with pytest.raises(CheckpointNotReadError, match=r"checkpoint-2 is of another model \(.*size mismatch"):
        make_trainer(tmp_path, wider, **options).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(CheckpointNotReadError, match="checkpoint-2 is of another optimizer"):
        make_trainer(tmp_path, optimizer="sgd", **options).train(resume_from_checkpoint=checkpoint)


def test_the_last_images_of_a_stream_count_as_much_as_the_first(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=12)
    expected = trainer.evaluate()["eval_loss"]
    trainer.eval_dataset = dataset().to_iterable_dataset()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_the_last_epochs_see_whole_unmixed_images(tmp_path):
    model = ViTCustomForImageClassification(tiny_config("vit", patch_dropout=0.5))
    options = {"max_steps": -1, "num_train_epochs": 4, "unmixed_epochs": 2, "unmasked_epochs": 1}
    mixing, seen = Mixing(0.8, 0, 1.0, 0.5, 5), []
    trainer = make_trainer(tmp_path, model, {"mixing": mixing}, **options)
    positions = model.model.stages[0].position_embedding
    positions.register_forward_hook(lambda module, args, output: seen.append((mixing.is_on, output.shape[1])))
    trainer.train()
    assert seen == [(True, 8)] * 4 + [(False, 8)] * 2 + [(False, 16)] * 2


def test_images_grow_to_the_native_size(tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 4, "initial_image_size": 16, "full_size_epochs": 2}
    model, seen = tiny_model(ViTCustomForImageClassification, "vit"), []
    trainer = make_trainer(tmp_path, model, **options)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape[2:]), with_kwargs=True
    )
    trainer.train()
    native, patch = model.config.native_size, model.config.patch_size
    assert seen[0] == (16, 16)
    assert seen[4:] == [native] * 4
    sides = [size[0] for size in seen]
    assert sides == sorted(sides)
    assert all(side % patch == 0 for side in sides)
    assert 16 < sides[3] < native[0]
    trainer.evaluate()
    assert seen[-1] == native


def test_small_images_are_the_large_ones_made_smaller():
    config = tiny_config("swin", image_size=(32, 48))
    assert grown_size(16, config, 0.0) == (16, 24)
    assert grown_size(16, config, 0.5) == (24, 36)
    assert grown_size(16, config, 1.0) is None


@pytest.mark.parametrize(("size", "message"), [(0, "must lie between 1 and 32"), (33, "must lie between 1 and 32")])
def test_a_start_size_out_of_range_is_refused(tmp_path, size, message):
    with pytest.raises(ValueError, match=rf"initial_image_size={size} {message}"):
        make_trainer(tmp_path, initial_image_size=size)


def test_the_learning_rate_warms_up_stays_and_decays(tmp_path):
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "decay_steps": 0.4}
    trainer = make_trainer(tmp_path, max_steps=10, learning_rate=1.0, optimizer="sgd", **schedule)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[:2] == [0.0, 0.5]
    assert rates[2:7] == [1.0] * 5
    assert rates[7:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 4)) for step in (1, 2, 3)])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_floor_of_the_learning_rate_is_the_one_asked_for(tmp_path, optimizer):
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 2e-5}}
    trainer = make_trainer(tmp_path, learning_rate=4e-3, layer_decay=0.5, optimizer=optimizer, **schedule)
    trainer.train()
    assert max(group["lr"] for group in trainer.optimizer.param_groups) == pytest.approx(2e-5)


class Noise(ViTCustomForImageClassification):
    """Draws a number in every forward pass."""

    def forward(self, *args, **kwargs):
        self.drawn = torch.rand(()).item()
        return super().forward(*args, **kwargs)


def test_evaluation_draws_the_same_numbers_and_none_of_training_s(tmp_path):
    trainer = make_trainer(tmp_path, Noise(tiny_config("vit")))
    state = torch.get_rng_state()
    trainer.evaluate()
    first = trainer.model.drawn
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    trainer.evaluate()
    assert trainer.model.drawn == first


FULL_DISK = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_vit_trainer import make_trainer
from trainers.vit_trainer import CheckpointNotWrittenError
options = {{"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "ema_decay": 0.9}}
trainer = make_trainer({folder!r}, max_steps=4, **options)
step = trainer.training_step
def fill_the_disk(*args, **kwargs):
    if trainer.state.global_step == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    return step(*args, **kwargs)
trainer.training_step = fill_the_disk
try:
    trainer.train()
except CheckpointNotWrittenError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("limit", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_whole_checkpoints_only(tmp_path, limit):
    code = FULL_DISK.format(tests=str(Path(__file__).parent), folder=str(tmp_path), limit=limit)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"refused: .*checkpoint-3 could not be written, with [\d.]+ GB left on the disk \(", done.stdout)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    resumed = make_trainer(tmp_path, ema_decay=0.9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_last_epochs_are_whole_ones_of_a_run_of_steps(tmp_path):
    """Five steps are two and a half epochs of two steps each, of which the last one is not mixed."""
    mixing, seen = Mixing(0.8, 0, 1.0, 0.5, 5), []
    trainer = make_trainer(tmp_path, trainer_options={"mixing": mixing}, max_steps=5, unmixed_epochs=1)
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(mixing.is_on))
    trainer.train()
    assert seen == [True] * 3 + [False] * 2


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_diverged_run_stops_and_keeps_what_was_good(tmp_path, strategy):
    trainer = make_trainer(tmp_path, learning_rate=1e30, save_strategy=strategy, save_steps=1, max_steps=10)
    with pytest.raises(TrainingDivergedError, match=r"at step [1-9]"):
        trainer.train()
    for folder in tmp_path.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_the_order_is_used(tmp_path):
    order = BalancedOrder(LABELS.tolist(), seed=3)
    trainer = make_trainer(tmp_path, trainer_options={"order": order})
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].tolist() == LABELS[order.numbers(0)[:16] % 32].tolist()


@pytest.fixture
def teacher_folder(tmp_path):
    model = tiny_model(ViTCustomForImageClassification, "swin", seed=3, image_size=16)
    model.config.id2label = dict(enumerate("edcba"))
    model.save_pretrained(tmp_path / "teacher")
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1] * 3, image_std=[0.3] * 3).save_pretrained(
        tmp_path / "teacher"
    )
    return tmp_path / "teacher"


def test_a_teacher_sees_its_own_size_and_normalisation(teacher_folder):
    teacher = Teacher(LossArguments(teacher=str(teacher_folder)), "abcde", [0.5] * 3, [0.5] * 3, torch.device("cpu"))
    raw = torch.rand(2, 3, 32, 32)
    small = torch.nn.functional.interpolate((raw - 0.1) / 0.3, (16, 16), mode="bilinear", antialias=True)
    expected = ViTCustomForImageClassification.from_pretrained(teacher_folder)(small).logits.flip(1)
    torch.testing.assert_close(teacher((raw - 0.5) / 0.5), expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_other_classes_is_refused(teacher_folder):
    with pytest.raises(ValueError, match="does not know 1 of the data set's 2 classes, such as 'x'"):
        Teacher(LossArguments(teacher=str(teacher_folder)), "ax", [0.5] * 3, [0.5] * 3, torch.device("cpu"))


@pytest.mark.parametrize("name", ONE_STAGE_ARCHITECTURES)
def test_a_student_follows_its_teacher(name, teacher_folder, tmp_path):
    teacher = Teacher(LossArguments(teacher=str(teacher_folder)), "abcde", [0.5] * 3, [0.5] * 3, torch.device("cpu"))
    criterion = Criterion(distillation="hard", distillation_weight=1.0)
    trainer = make_trainer(
        tmp_path / "student",
        ViTCustomForImageClassification(tiny_config(name)),
        {"teacher": teacher, "criterion": criterion},
        max_steps=60,
        learning_rate=3e-3,
    )
    frozen = [parameter.clone() for parameter in teacher.model.parameters()]
    trainer.train()
    trainer.model.eval()
    outputs = trainer.model(IMAGES)
    student = outputs.distillation_logits if name == "deit" else outputs.logits
    assert (student.argmax(1) == teacher(IMAGES).argmax(1)).float().mean() > 0.8
    assert all(torch.equal(one, two) for one, two in zip(frozen, teacher.model.parameters()))
    trainer.save_model()
    assert not [key for key in load_file(tmp_path / "student" / "model.safetensors") if "teacher" in key]
