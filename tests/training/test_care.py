"""Care in a loop of one's own, and in short real trainings of Lightning and transformers where they are installed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import normkit
from normkit.anatomy import fingerprint
from normkit.errors import ArgumentError, SurgeryError
from normkit.training import Care, lightning_callback, trainer_callback


def data(count=256):
    generator = torch.Generator().manual_seed(0)
    images = 2 + torch.randn(count, 3, 6, 6, generator=generator)
    return TensorDataset(images, (images.mean((1, 2, 3)) > 2).long())


def loader(batch_size=32):
    return DataLoader(data(), batch_size=batch_size, shuffle=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip


def epoch(model, batches, optimizer):
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def train(model, batches, epochs=2, validate=None, **settings):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Care(model, batches, **settings) as care:
        for _ in range(epochs):
            epoch(model, batches, optimizer)
            care.before_validation()
            if validate is not None:
                validate(model.eval())
    return care


@pytest.mark.parametrize("once", [iter, lambda batches: (batch for batch in batches)])
def test_batches_that_can_be_read_once_are_refused_at_the_start(once):
    with pytest.raises(ArgumentError, match=r"can be read once.* give a DataLoader or a list, or recalibrate=\(\)"):
        Care(network(), once(list(loader())))
    Care(network(), once(list(loader())), recalibrate=())


@pytest.mark.parametrize("samples", [0, -1, "a"])
def test_a_number_of_samples_that_is_none_is_refused(samples):
    with pytest.raises(ArgumentError, match="give a whole number above 0"):
        Care(network(), loader(), samples=samples)


def measured(model, batches):
    """The statistics that recalibrate finds."""
    twin = copy.deepcopy(model)
    normkit.recalibrate(twin, batches)
    return {name: buffer for name, buffer in twin.named_buffers() if "running" in name}


def assert_measured(model, batches):
    shuffled = isinstance(batches, DataLoader)
    for name, expected in measured(model, batches).items():
        if shuffled and not name.startswith("1."):
            continue  # behind a layer that normalizes by the batch it hangs on which samples went together
        torch.testing.assert_close(model.get_buffer(name), expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_measured_before_each_validation_and_at_the_end():
    model, batches, seen = network(), list(loader()), []
    care = train(model, batches, validate=lambda model: seen.append(assert_measured(model, batches)))
    assert len(seen) == 2
    assert [moment for moment, _ in care.records] == ["validation", "validation", "end"]
    assert care.diagnosis().healthy, str(care.diagnosis())
    assert care.ledger.steps == 16
    assert not any(module._forward_hooks for module in model.modules())


def test_training_is_the_same_with_and_without_care():
    states = []
    for settings in ({"recalibrate": ()}, {"recalibrate": ("validation",)}, None):
        model, batches = network(), loader()  # a loader that shuffles draws from torch's generator
        torch.manual_seed(1)
        if settings is None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                epoch(model, batches, optimizer)
        else:
            train(model, batches, **settings)
        states.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    for other in states[1:]:
        for name, parameter in states[0].items():
            assert torch.equal(parameter, other[name]), name


def test_averaged_weights_get_statistics_of_their_own():
    model, batches = network(), list(loader())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with Care(model, batches, recalibrate=("validation",)) as care:
        for _ in range(3):
            epoch(model, batches, optimizer)
            averaged.update_parameters(model)
        record = care.before_validation(averaged.module)
    assert record.model is averaged.module
    assert_measured(averaged.module, batches)
    assert normkit.diagnose(averaged.module.eval(), batches).healthy


def test_layers_are_frozen_from_the_start():
    model, batches = network(), list(loader())
    normkit.recalibrate(model, batches)
    before = model[1].running_mean.clone()
    care = train(model, batches, freeze="1", recalibrate=("end",))
    assert torch.equal(model[1].running_mean, before)
    assert care.records[0][1].touched == ("4",)


def test_failed_training_leaves_no_hook_and_measures_nothing():
    model = network()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="injected"), Care(model, loader()) as care:
        raise RuntimeError("injected")
    assert fingerprint(model) == before
    assert not care.records


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recalibrate": "end"}, r"is one word; give a tuple, such as recalibrate=\('end',\)"),
        ({"recalibrate": ("export",)}, "names the moment 'export'; known are: validation, end"),
        ({"batches": None}, "needs batches"),
    ],
)
def test_settings_of_no_use_are_refused(settings, message):
    with pytest.raises(ArgumentError, match=message):
        Care(network(), **{"batches": [], **settings})


def test_nothing_to_measure_is_refused_and_nothing_to_tell_is_said():
    with pytest.raises(SurgeryError, match="no batches"), Care(network(), []):
        pass
    with pytest.raises(ArgumentError, match="has not begun"):
        _ = Care(network(), []).ledger


def test_callbacks_say_what_is_not_installed(monkeypatch):
    import normkit.training.callbacks as callbacks

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(callbacks, "import_module", absent)
    with pytest.raises(ArgumentError, match="pip install lightning"):
        lightning_callback()
    with pytest.raises(ArgumentError, match="pip install transformers"):
        trainer_callback()


# in the frameworks


def lightning():
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return pytest.importorskip(name)
        except pytest.skip.Exception:
            continue
    pytest.skip("Lightning is not installed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("average", [False, True])
def test_care_in_a_training_of_lightning(tmp_path, average):
    framework = lightning()
    seen = []

    class Module(framework.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()

        def forward(self, images):
            return self.model(images)

        def training_step(self, batch):
            return functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch):
            seen.append(copy.deepcopy(self.model))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, batches = Module(), loader()
    care = lightning_callback()
    averaging = [framework.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)] if average else []
    trainer = framework.Trainer(
        max_epochs=3, callbacks=[*averaging, care], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, batches, loader(256))
    for model in seen[1:]:  # the first is the check before the training
        assert_measured(model, batches)
    assert_measured(module.model, batches)
    assert normkit.diagnose(module.model.eval(), batches).healthy
    assert care.diagnosis().healthy, str(care.diagnosis())
    assert care.ledger.steps >= 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("together", ["CombinedLoader", "dict"])
def test_several_loaders_of_lightning_are_read_as_the_training_step_gets_them(tmp_path, together):
    framework = lightning()
    utilities = pytest.importorskip(f"{framework.__name__}.utilities")
    steps = []

    class Module(framework.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()

        def forward(self, images):
            return self.model(images)

        def training_step(self, batch):
            steps.append(batch["second"][0])
            return functional.cross_entropy(self(batch["first"][0]), batch["first"][1])

        def validation_step(self, batch):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(module, care, interval=1.0):
        trainer = framework.Trainer(
            max_epochs=2, callbacks=[care], accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, default_root_dir=tmp_path, val_check_interval=interval,
        )  # fmt: skip
        loaders = {"first": loader(), "second": loader(64)}
        given = loaders if together == "dict" else utilities.CombinedLoader(loaders, "min_size")
        trainer.fit(module, given, loader(256))

    with pytest.raises(
        ArgumentError, match=r"a dict of 2 loaders together; .*call=lambda module, batch: module\(batch\["
    ):
        fit(Module(), lightning_callback())
    assert not steps
    module, care = Module(), lightning_callback(call=lambda module, batch: module(batch["first"][0]), samples=256)
    fit(module, care, interval=2)  # measures in the middle of an epoch, which goes on as it was
    assert len(steps) == (16 if together == "dict" else 8)
    assert [moment for moment, _ in care.care.records] == ["validation"] * (8 if together == "dict" else 4) + ["end"]
    if together == "dict":
        assert_measured(module.model, loader())


@pytest.mark.filterwarnings("ignore")
def test_care_in_a_training_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network()

        def forward(self, images, labels=None):
            scores = self.model(images)
            return {"loss": functional.cross_entropy(scores, labels), "logits": scores}

    class Named(torch.utils.data.Dataset):
        def __len__(self):
            return 256

        def __getitem__(self, index):
            return {"images": data().tensors[0][index], "labels": data().tensors[1][index]}

    model, care = Classifier(), trainer_callback()
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=32, per_device_eval_batch_size=256,
        eval_strategy="epoch", save_strategy="no", report_to=[], use_cpu=True, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=Named(), eval_dataset=Named(), callbacks=[care]).train()
    assert [moment for moment, _ in care.care.records] == ["validation", "validation", "end"]
    assert care.ledger.steps == 16
    assert care.diagnosis().healthy, str(care.diagnosis())
    assert_measured(model.model, loader())
    assert normkit.diagnose(model.model.eval(), loader()).healthy
