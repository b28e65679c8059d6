"""State files and targets: nothing in them runs, and every fault is one line that names the file."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from normkit.anatomy import fingerprint
from normkit.anatomy.states import load_weights, read_state, write_state
from normkit.anatomy.targets import load_object, load_target
from normkit.errors import ArgumentError, DataError


def model():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_written_state_is_read_back_bit_for_bit(tmp_path, suffix):
    state = model().state_dict()
    write_state(tmp_path / f"a{suffix}", state)
    read = read_state(tmp_path / f"a{suffix}")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_state_inside_a_checkpoint_is_found(tmp_path, key):
    torch.save({key: model().state_dict(), "epoch": 3}, tmp_path / "a.ckpt")
    assert "1.running_mean" in read_state(tmp_path / "a.ckpt")


def test_existing_file_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"precious")
    with pytest.raises(ArgumentError, match="--force"):
        write_state(path, model().state_dict())
    assert path.read_bytes() == b"precious"
    write_state(path, model().state_dict(), force=True)
    assert len(read_state(path)) == 7


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(b"precious")

    def fill_the_disk(state, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        write_state(path, model().state_dict(), force=True)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("a.pt", b"precious")]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02", b"PK\x03\x04", b"\xff" * 64, "cut", "flipped"])
def test_malformed_file_is_named_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    if isinstance(content, str):
        write_state(path, model().state_dict())
        whole = path.read_bytes()
        start = max(whole.find(b"\x80\x02"), 0)
        flipped = whole[:start] + b"\xee" * 8 + whole[start + 8 :]
        content = whole[: len(whole) // 2] if content == "cut" else flipped
    path.write_bytes(content)
    with pytest.raises(DataError, match="bad") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)


def test_code_in_a_file_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"weight": Payload()}, tmp_path / "evil.pt")
        with pytest.raises(DataError, match="weights_only"):
            read_state(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_file_that_holds_no_state_says_what_it_holds(tmp_path):
    torch.save({"loss": 3.0}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="'loss'"):
        read_state(tmp_path / "a.pt")
    with pytest.raises(DataError, match="no such file"):
        read_state(tmp_path / "b.pt")
    with pytest.raises(DataError, match="ends in"):
        read_state(tmp_path / "b.txt")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_load_through_a_wrappers_prefix(prefix):
    source, target = model(), model()
    load_weights(target, {prefix + name: tensor for name, tensor in source.state_dict().items()})
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_lost_statistics_are_refused_and_a_lost_counter_is_not():
    state, target = model().state_dict(), model()
    del state["1.num_batches_tracked"]
    load_weights(target, state)
    del state["1.running_var"]
    other = model().state_dict() | {"0.bias": torch.zeros(4)}
    before = fingerprint(target)
    with pytest.raises(DataError, match=r"1 missing \(1.running_var\)"):
        load_weights(target, state)
    with pytest.raises(DataError, match="of another shape"):
        load_weights(target, other)
    assert fingerprint(target) == before


def test_target_is_a_function_a_class_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sick_app.py").write_text(
        "from torch import nn\ndef build():\n    return nn.BatchNorm1d(3)\nready = build()\nnumber = 3\n"
    )
    state = nn.BatchNorm1d(3).state_dict() | {"weight": torch.full((3,), 2.0)}
    save_file(state, tmp_path / "w.safetensors")
    assert isinstance(load_target("sick_app:build").model, nn.BatchNorm1d)
    assert load_target("sick_app:ready").model is load_object("sick_app:ready")
    assert load_target("sick_app:build", weights="w.safetensors").state["weight"].tolist() == [2.0] * 3
    assert load_target("w.safetensors").model is None
    with pytest.raises(ArgumentError, match="did you mean build"):
        load_target("sick_app:buidl")
    with pytest.raises(ArgumentError, match="gives a int"):
        load_target("sick_app:number")
    with pytest.raises(ArgumentError, match="no module named 'sick_apps'"):
        load_target("sick_apps:build")
    with pytest.raises(ArgumentError, match="neither package"):
        load_target("sick_app")
    with pytest.raises(ArgumentError, match="is a state file itself"):
        load_target("w.safetensors", weights="w.safetensors")
