"""What all trainers share: checkpoints, Ctrl-C, the best parameters, the bar."""

import builtins
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from implicitdl import ImplicitLayer, lifted
from implicitdl.lifted.report import Report


def data():
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(60, 5, generator=generator)
    return u, (u[:, 0] + u[:, 1] > 0).long() + (u[:, 2] > 0.5).long()


def mlp():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def rich():
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def implicit():
    torch.manual_seed(7)
    return ImplicitLayer(5, 3, 6)


def adam(net):
    return torch.optim.Adam(net.parameters(), lr=0.01, amsgrad=True)


def momentum(net):
    first, rest = list(net.parameters())[:1], list(net.parameters())[1:]
    return torch.optim.SGD(
        [{"params": first, "lr": 0.1}, {"params": rest}], lr=0.05, momentum=0.9, weight_decay=1e-3
    )


def local(make, optimizer=None):
    def train(**options):
        net = make()
        own = None if optimizer is None else optimizer(net)
        return lifted.local(net, *data(), epochs=6, batch_size=16, optimizer=own, **options)

    return train


def blocks(make, **own):
    return lambda **options: lifted.blocks(make(), *data(), sweeps=6, **own, **options)


def admm(variant):
    return lambda **options: lifted.admm(mlp(), *data(), variant=variant, sweeps=6, **options)


TRAININGS = {
    "local": local(mlp),
    "local, dropout": local(rich, adam),
    "local, groups": local(mlp, momentum),
    "local, no state": local(mlp, lambda net: torch.optim.SGD(net.parameters(), lr=0.1)),
    "local, implicit": local(implicit),
    "blocks": blocks(mlp, growth=1.3, mu=1.0),
    "blocks, implicit": blocks(implicit, mu=1.0),
    "zeng": admm("zeng"),
    "taylor": admm("taylor"),
    "dladmm": admm("dladmm"),
}


def state(report):
    return {name: t.clone() for name, t in report.model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Killed(BaseException):
    """What a killed process does to its Python code, as far as this can be had in one process."""


def kill_after(epochs):
    def watch(report):
        if report.epochs == epochs:
            raise Killed

    return watch


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_killed_run_resumes_bit_for_bit(name, keep, tmp_path):
    train, path = TRAININGS[name], tmp_path / "run.safetensors"
    held = {"validation": tuple(t[:20] for t in data())} if keep == "best" else {}
    whole = train(**held)
    for epochs in (2, 3):
        with pytest.raises(Killed):
            train(checkpoint=path, on_epoch=kill_after(epochs), **held)
    torch.randn(5)  # the global generator is elsewhere now
    resumed = train(checkpoint=path, **held)
    same(state(whole), state(resumed))
    for series in ("objective", "loss", "penalties", "feasibility", "accuracy", "validation"):
        assert repr(getattr(whole, series)) == repr(getattr(resumed, series)), series
    assert whole.best == resumed.best and len(resumed.seconds) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.safetensors"]
    again = train(checkpoint=path, **held)  # it has ended: nothing is left to do
    same(state(whole), state(again))


def test_a_run_without_a_checkpoint_is_the_same_run(tmp_path):
    same(
        state(TRAININGS["local"]()),
        state(TRAININGS["local"](checkpoint=tmp_path / "a", on_epoch=lambda r: None)),
    )


def interrupted_after(epochs, monkeypatch, where, name):
    """Ctrl-C in the middle of the epoch after so many."""
    original, count = getattr(where, name), [0]

    def wrapped(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        count[0] += 1
        if count[0] > epochs:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(where, name, wrapped)


@pytest.mark.parametrize("name", ["local", "blocks", "zeng"])
def test_ctrl_c_keeps_the_best_and_a_checkpoint_goes_on(name, tmp_path, monkeypatch):
    from implicitdl.lifted.admm import _Splitting
    from implicitdl.lifted.blocks import _ChainBlocks
    from implicitdl.lifted.local import _Local

    train, path = TRAININGS[name], tmp_path / "run.safetensors"
    best = []

    def watch(report):
        if report.best == report.epochs - 1:
            best[:] = [state(report)]

    with monkeypatch.context() as patch:
        where = {"local": _Local, "blocks": _ChainBlocks, "zeng": _Splitting}[name]
        interrupted_after(3, patch, where, "epoch")
        report = train(checkpoint=path, on_epoch=watch)
    assert report.interrupted and report.epochs == 3 and report.kept == "best"
    assert "interrupted" in str(report)
    same(state(report), best[0])
    same(state(train(checkpoint=path)), state(train()))


def test_ctrl_c_before_the_first_epoch_leaves_the_model_alone(monkeypatch):
    from implicitdl.lifted.local import _Local

    monkeypatch.setattr(torch.optim.AdamW, "step", _interrupt_at_second_call())
    report = TRAININGS["local"]()
    assert report.interrupted and report.epochs == 0 and report.best == -1
    same(state(report), mlp().state_dict())
    assert "no epoch finished" in str(report) and _Local is not None


def _interrupt_at_second_call():
    original, calls = torch.optim.AdamW.step, [0]

    def step(self, closure=None):
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return original(self)

    return step


def test_the_best_epoch_is_kept_and_training_can_end_early():
    u, y = data()
    scores, states = [], []

    def watch(report):
        scores.append(report.validation[-1])
        states.append(state(report))
        return report.epochs == 4

    report = lifted.local(
        mlp(), u, y, epochs=50, batch_size=8, validation=(u[:15], y[:15]), on_epoch=watch,
        optimizer=None,
    )  # fmt: skip
    assert report.epochs == 4 and report.best == scores.index(max(scores))
    same(state(report), states[report.best])


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    u, y = data()

    def train(u=u, y=y, make=mlp, **options):
        net = make()
        before = {name: t.clone() for name, t in net.state_dict().items()}
        try:
            return lifted.local(net, u, y, epochs=2, checkpoint=path, **options)
        except ValueError:
            same(before, net.state_dict())
            raise

    train()
    for options, match in (
        ({"c": 0.25}, "c: 0.5 in the file, 0.25 here"),
        ({"u": u + 1e-9}, "data: "),
        ({"y": (y + 1) % 3}, "data: "),
        ({"seed": 1}, "seed: 0 in the file, 1 here"),
        ({"validation": (u[:5], y[:5])}, "data: "),
        ({"make": lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))}, "model: "),
        ({"make": lambda: nn.Sequential(nn.Linear(5, 3))}, "model: "),
    ):
        with pytest.raises(ValueError, match=match):
            train(**options)
    with pytest.raises(ValueError, match="optimizer: "):
        net = mlp()
        lifted.local(net, u, y, epochs=2, checkpoint=path,
                     optimizer=torch.optim.SGD(net.parameters(), lr=0.1))  # fmt: skip
    with pytest.raises(ValueError, match="method: 'local' in the file, 'blocks' here"):
        lifted.blocks(mlp(), u, y, checkpoint=path)


def test_damaged_files_are_refused_before_anything_is_used(tmp_path):
    path, good = tmp_path / "run.safetensors", tmp_path / "good.safetensors"
    TRAININGS["local"](checkpoint=good)
    whole = good.read_bytes()
    from safetensors import safe_open

    with safe_open(good, framework="pt") as file:
        header = file.metadata()["implicitdl.lifted"]
    tensors = load_file(good)

    def write(header=header, tensors=tensors):
        save_file(tensors, path, metadata={"implicitdl.lifted": header})

    def refused(match):
        with pytest.raises(ValueError, match=match) as error:
            TRAININGS["local"](checkpoint=path)
        assert str(path) in str(error.value)

    path.write_bytes(whole[:-10])
    refused("not a safetensors file")
    path.write_bytes(b"nothing")
    refused("not a safetensors file")
    save_file(tensors, path)
    refused("no checkpoint of lifted training")
    write(header='{"version": 2}')
    refused("version 2, expected 1")
    write(header="[")
    refused("Take another path")
    write(header=header.replace('"best": ', '"best": 99'))
    refused("its best epoch is")
    write(header=header.replace('"loss": [', '"loss": ["x", ', 1))
    refused("another training|no list of numbers")
    write(tensors={k: v for k, v in tensors.items() if "weight" not in k})
    refused("its tensors are others than expected")
    write(tensors={k: v[:1] if v.dim() else v for k, v in tensors.items()})
    refused("expected torch.float64")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        TRAININGS["local"](checkpoint=tmp_path / "no" / "run")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        TRAININGS["local"](checkpoint=tmp_path)
    with pytest.raises(TypeError, match="expected a path"):
        TRAININGS["local"](checkpoint=3)


def test_the_bar_and_the_lines_without_tqdm(capsys, monkeypatch):
    TRAININGS["blocks"](progress=True)
    shown = capsys.readouterr()
    assert "6/6" in shown.err and "objective" in shown.err
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "tqdm":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    TRAININGS["blocks"](progress=True)
    assert capsys.readouterr().out.count("objective") == 6


def test_reports_rank_epochs_with_and_without_validation():
    report = Report(method="local", model=None)
    record = {"loss": 1.0, "penalties": [], "feasibility": 0.0, "accuracy": 0.5, "seconds": 1.0}
    for objective in (3.0, math.nan, 1.0, 2.0):
        report.add(record | {"objective": objective, "validation": math.nan})
    assert report.best == 2
    report = Report(method="local", model=None)
    for share in (0.5, 0.9, 0.9):
        report.add(record | {"objective": -share, "validation": share})
    assert report.best == 1 and report.score(1) == 0.9
