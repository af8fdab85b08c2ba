"""Checkpoints are data: tensors come back as they were, and nothing that a file says is run."""

from __future__ import annotations

import argparse
import collections
import enum
import os
import pickle
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from harken.core.errors import HarkenError
from harken.interop.unpickle import Record, plain, read_checkpoint


class Mode(enum.Enum):
    LAYER_NORM = "layer_norm"


class Options:
    __slots__ = ("width",)

    def __init__(self, width: int) -> None:
        self.width = width


class Runs:
    """Pickles as a call: what `pickle.load` does with it is up to the file."""

    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def saved(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "checkpoint.pt"
    torch.save(value, path)
    return path


def with_pickle(tmp_path: Path, data: bytes) -> Path:
    """Write a checkpoint whose pickle is `data`."""
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return path


TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_of_number_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.tensor([[0, 1, 5], [3, 0, 100]]).to(dtype)
    found = read_checkpoint(saved(tmp_path, {"value": value}))["value"]
    assert found.dtype == dtype
    assert torch.equal(found, value)


def test_views_keep_strides_and_offsets_and_share_their_storage(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    value = {"whole": whole, "turned": whole[1:3, 2:].T, "row": whole[3], "step": whole[0, ::2]}
    found = read_checkpoint(saved(tmp_path, value))
    for name, expected in value.items():
        assert torch.equal(found[name], expected)
        assert found[name].stride() == expected.stride()
        assert found[name].storage_offset() == expected.storage_offset()
    found["row"][0] = -1.0
    assert found["whole"][3, 0] == -1.0


def test_parameters_empty_tensors_scalars_and_containers(tmp_path: Path) -> None:
    value = collections.OrderedDict(
        parameter=torch.nn.Parameter(torch.ones(2)),
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(7),
        others=({1, 2}, frozenset({3}), [None, True, 2.5, "é"], b"raw"),
    )
    found = read_checkpoint(saved(tmp_path, value))
    assert isinstance(found, collections.OrderedDict)
    assert torch.equal(found["parameter"], torch.ones(2))
    assert found["empty"].shape == (0, 3)
    assert found["scalar"].item() == 7
    assert found["others"][:3] == value["others"][:3]
    assert found["others"][3].args == ("raw", "latin1")  # how protocol 2 spells bytes


def test_a_state_dict_equals_what_torch_reads(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.nn.TransformerEncoderLayer(8, 2, 16).state_dict())
    expected = torch.load(path, weights_only=True)
    found = read_checkpoint(path)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_objects_of_unknown_classes_become_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fairseq_that_is_gone")
    Dictionary = type("Dictionary", (), {"__module__": module.__name__})
    module.Dictionary = Dictionary
    monkeypatch.setitem(sys.modules, module.__name__, module)
    units = Dictionary()
    units.symbols = ["<s>", "7"]
    path = saved(tmp_path, {"units": [units], "model": torch.ones(1)})
    monkeypatch.delitem(sys.modules, module.__name__)

    found = read_checkpoint(path)
    (record,) = found["units"]
    assert isinstance(record, Record)
    assert record.path == "fairseq_that_is_gone.Dictionary"
    assert record.fields() == {"symbols": ["<s>", "7"]}
    assert "fairseq_that_is_gone" not in sys.modules


def test_configuration_objects_become_plain_data(tmp_path: Path) -> None:
    config = OmegaConf.create({"model": {"layers": 3, "sizes": [1, 2.5], "gone": "???", "rate": "${task.rate}"}})
    value = {
        "cfg": config,
        "args": argparse.Namespace(lr=[0.1], nested=argparse.Namespace(on=True)),
        "mode": Mode.LAYER_NORM,
        "slots": Options(8),
    }
    found = plain(read_checkpoint(saved(tmp_path, value)))
    assert found == {
        "cfg": {"model": {"layers": 3, "sizes": [1, 2.5], "gone": "???", "rate": "${task.rate}"}},
        "args": {"lr": [0.1], "nested": {"on": True}},
        "mode": "layer_norm",
        "slots": {"width": 8},
    }


def test_list_and_dict_subclasses_keep_their_content(tmp_path: Path) -> None:
    counter, chain = collections.Counter("aab"), collections.deque([1, 2])
    found = read_checkpoint(saved(tmp_path, [collections.defaultdict(list, a=[1]), chain, counter]))
    assert found[0].path == "collections.defaultdict"
    assert found[0].entries == {"a": [1]}
    assert found[1].items == [1, 2]
    assert found[2].args == ({"a": 2, "b": 1},)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    attacks = [
        Runs(os.system, f"touch {trace}"),
        Runs(eval, f"open({str(trace)!r}, 'w')"),
        Runs(exec, f"open({str(trace)!r}, 'w')"),
        Runs(open, str(trace), "w"),
        Runs(getattr, Runs(__import__, "os"), "system"),
        {"deep": [Runs(map, eval, [Runs(str, "1")])]},
    ]
    data = pickle.dumps({"model": attacks}, protocol=protocol)
    # the attack is real: pickle itself would leave the trace
    pickle.loads(pickle.dumps(attacks[1], protocol=protocol)).close()
    assert trace.exists()
    trace.unlink()

    found = read_checkpoint(with_pickle(tmp_path, data))["model"]
    assert not trace.exists()
    assert found[0].path.endswith(".system")
    assert found[0].args == (f"touch {trace}",)
    assert all(isinstance(item, Record) for item in found[:5])
    assert isinstance(found[5]["deep"][0], Record)


def test_no_module_is_imported(tmp_path: Path) -> None:
    data = b"\x80\x02cantigravity\ngeohash\n."
    found = read_checkpoint(with_pickle(tmp_path, data))
    assert found.path == "antigravity.geohash"
    assert "antigravity" not in sys.modules


HOSTILE = {
    # calls the result of a call
    "call of an object": b"\x80\x02cbuiltins\ngetattr\n(K\x01K\x02tR(tR.",
    # sets the defaults of the function that rebuilds tensors
    "state of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NX\x0c\x00\x00\x00__defaults__K\x01ds\x86b.",
    "state of a class": b"\x80\x02cos\nsystem\n}X\x01\x00\x00\x00aK\x01sb.",
    "storage of another kind": b"\x80\x02(X\x06\x00\x00\x00modulecos\nsystem\nK\x00K\x00K\x01tQ.",
    "stack underflow": b"\x80\x02R.",
    "no end": b"\x80\x02}",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_is_no_data_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(HarkenError, match="cannot be read as plain data"):
        read_checkpoint(with_pickle(tmp_path, HOSTILE[name]))


def test_a_tensor_may_not_leave_its_storage(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.ones(5))
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in content if name.endswith("data.pkl")]
    content[name] = content[name].replace(b"K\x05\x85", b"K\x09\x85")  # size (5,) becomes (9,)
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in content.items():
            archive.writestr(key, value)
    with pytest.raises(HarkenError, match="out of bounds"):
        read_checkpoint(path)


def test_a_storage_that_is_missing_or_short_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.ones(5))
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (storage,) = [name for name in content if name.endswith("data/0")]
    for value, message in (
        (content[storage][:8], "storage 0 must hold 5 numbers of torch.float32, found 8 bytes"),
        (None, "data/0"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for key, old in content.items():
                if key != storage:
                    archive.writestr(key, old)
                elif value is not None:
                    archive.writestr(key, value)
        with pytest.raises(HarkenError, match=message):
            read_checkpoint(path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": torch.ones(1000)})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(HarkenError, match="damaged or cut short, copy it again"):
        read_checkpoint(path)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with pytest.raises(HarkenError, match="damaged or cut short, copy it again: Bad CRC-32"):
        read_checkpoint(path)


def test_old_formats_say_how_to_convert(tmp_path: Path) -> None:
    old = tmp_path / "old.pt"
    torch.save({"model": torch.ones(1)}, old, _use_new_zipfile_serialization=False)
    older = tmp_path / "older.pt"
    with tarfile.open(older, "w") as archive:
        archive.add(old, "storages")
    for path in (old, older):
        with pytest.raises(HarkenError, match=r"before version 1\.6.*torch\.save\(torch\.load"):
            read_checkpoint(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("no checkpoint")
    with pytest.raises(HarkenError, match=r"no torch checkpoint.*b'no c'"):
        read_checkpoint(text)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(HarkenError, match=r"expected one `data\.pkl`, found 0"):
        read_checkpoint(tmp_path / "other.zip")
    with pytest.raises(HarkenError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "nowhere.pt")
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))
    with pytest.raises(HarkenError, match="TorchScript"):
        read_checkpoint(tmp_path / "script.pt")
