"""Writing weights block by block."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from composer.errors import DiskFullError, disk_errors
from composer.zoo import MappedWeights, SafetensorsWeights, TensorHeader
from composer.zoo.writing import WeightsWriter, write_description

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "b": torch.arange(10, dtype=torch.float32).bfloat16(),
    "c": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    "d": torch.randn(7, 3).half(),
}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.float16: "F16"}
HEADERS = {
    name: TensorHeader(file="", dtype=NAMES[tensor.dtype], shape=tuple(tensor.shape))
    for name, tensor in TENSORS.items()
}


def write(directory: Path, block: int = 5, **options: int) -> WeightsWriter:
    with WeightsWriter(directory, HEADERS, **options) as writer:
        for name, tensor in TENSORS.items():
            for part in tensor.flatten().split(block):
                writer.write(name, part)
    return writer


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**9, 1), (100, 3), (1, 4)])
def test_what_is_read_is_what_was_written(tmp_path: Path, shard_bytes: int, files: int) -> None:
    writer = write(tmp_path, shard_bytes=shard_bytes)
    found = sorted(tmp_path.glob("*.safetensors"))
    assert len(found) == files
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found} == writer.hashes
    ours, mapped = SafetensorsWeights(tmp_path), MappedWeights(tmp_path)
    assert set(ours.headers) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(ours.read(name, 0, tensor.shape[0]), tensor)
        assert torch.equal(mapped.flat(name), tensor.flatten())
        mapped.release(name)
        assert torch.equal(mapped.flat(name), tensor.flatten()), "pages that were given back are read again"
    for file in found:
        with safe_open(file, "pt") as theirs:
            for name in theirs.keys():  # noqa: SIM118
                assert torch.equal(theirs.get_tensor(name), TENSORS[name])


def test_what_is_mapped_cannot_be_changed_in_the_file(tmp_path: Path) -> None:
    write(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    MappedWeights(tmp_path).flat("a").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_blocks_out_of_turn_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="a block of b where 24 elements of a were due"),
        WeightsWriter(tmp_path, HEADERS) as one,
    ):
        one.write("b", TENSORS["b"])
    with pytest.raises(ValueError, match="a block of a where"), WeightsWriter(tmp_path, HEADERS) as one:
        one.write("a", torch.zeros(25))
    with pytest.raises(ValueError, match="a block of a where"), WeightsWriter(tmp_path, HEADERS) as one:
        one.write("a", torch.zeros(4, dtype=torch.float16))
    with pytest.raises(ValueError, match="tensor b was not written whole"), WeightsWriter(tmp_path, HEADERS) as one:
        one.write("a", TENSORS["a"])


def test_a_disk_that_fills_up_while_others_compute(small_disk: Path) -> None:
    big = {"big": TensorHeader(file="", dtype="F32", shape=(1 << 20,))}
    with pytest.raises(DiskFullError), disk_errors(small_disk), WeightsWriter(small_disk, big) as writer:
        for _ in range(16):
            writer.write("big", torch.zeros(1 << 16))


def test_a_configuration_keeps_what_it_has_and_says_nothing_of(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "from" / "config.json").write_text('{"sliding_window": null, "torch_dtype": "float32", "n": 1}')
    write_description(tmp_path / "from", tmp_path / "to", {"dtype": "bfloat16", "n": 2})
    found = json.loads((tmp_path / "to" / "config.json").read_text())
    assert found == {"sliding_window": None, "dtype": "bfloat16", "n": 2}, "null means something else than nothing"
