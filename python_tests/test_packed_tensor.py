"""`PackedTensor`: what it holds, how it moves, and what it refuses to load."""

from __future__ import annotations

import copy
import json
import pickle

import oracle
import pytest
import torch
from helpers import BACKENDS, DEVICES, FORMATS, SHAPES, gaussian, load_file, same_packed, save_file

import loftq_kernels as lk


@pytest.fixture
def packed() -> lk.PackedTensor:
    return lk.quantize(gaussian(5, 130), "int4")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_dequantize(format, dtype, backend):
    """Computed in float32 (float64 for float64) and rounded once."""
    for rows, columns in SHAPES:
        packed = lk.quantize(gaussian(rows, columns), format, 32)
        exact = oracle.dequantize(packed)
        dense = packed.dequantize(dtype, backend=backend)
        assert dense.dtype == dtype and dense.shape == (rows, columns)
        if dtype == torch.float64:
            assert torch.equal(dense, exact)
        else:
            # codebook * scale is exact in float64: rounding it to float32 is what one float32 product gives.
            scale = packed.scale.float().repeat_interleave(32, 1)[:, :columns]
            table = packed.codebook[torch.from_numpy(oracle.decode_codes(packed.codes, columns, packed.bits))]
            offset = 0 if packed.offset is None else packed.offset.float().repeat_interleave(32, 1)[:, :columns]
            assert torch.equal(dense, (table * scale + offset).to(dtype))
            torch.testing.assert_close(dense.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("format", FORMATS)
def test_sizes(format):
    packed = lk.quantize(gaussian(5, 130), format, 32, scale_dtype=torch.float32)
    bits = oracle.BITS[format]
    scales = 5 * 5 * 4 * (2 if packed.format.affine else 1)
    assert packed.nbytes == 5 * 192 * bits // 8 + scales + 4 * 2**bits
    assert packed.bits_per_weight == pytest.approx(8 * packed.nbytes / 650)
    assert packed.shape == (5, 130) and packed.bits == bits and packed.group_size == 32
    assert packed.codes.is_contiguous() and packed.scale.shape == (5, 5)


@pytest.mark.parametrize("format", FORMATS)
def test_copies(format, tmp_path):
    packed = lk.quantize(gaussian(5, 130), format, -1)
    packed.save(tmp_path / "w.safetensors")
    copies = {
        "deepcopy": copy.deepcopy(packed),
        "clone": packed.clone(),
        "pickle": pickle.loads(pickle.dumps(packed)),
        "safetensors": lk.PackedTensor.load(tmp_path / "w.safetensors"),
        "to": packed.to("cpu"),
    }
    for how, other in copies.items():
        assert same_packed(packed, other), how
        assert torch.equal(packed.dequantize(), other.dequantize()), how
    for how in ("deepcopy", "clone"):
        copies[how].codes.zero_()
        assert packed.codes.any(), how


def test_torch_save(packed, tmp_path):
    torch.save({"w": packed}, tmp_path / "w.pt")
    assert same_packed(packed, torch.load(tmp_path / "w.pt", weights_only=False)["w"])


@pytest.mark.parametrize("device", DEVICES)
def test_moves(packed, device):
    moved = packed.to(device)
    assert all(tensor.device.type == device for tensor in moved.tensors().values())
    assert same_packed(packed, moved.cpu())
    assert torch.equal(moved.dequantize().cpu(), packed.dequantize())


def test_to_meta_keeps_shapes(packed):
    meta = packed.to("meta")
    assert meta.codes.shape == packed.codes.shape and meta.device.type == "meta"


def test_to_dtype_is_refused(packed):
    with pytest.raises(TypeError, match="torch.float16"):
        packed.to(torch.float16)


def test_dequantize_to_integers_is_refused(packed):
    with pytest.raises(TypeError, match="torch.int8"):
        packed.dequantize(torch.int8)


def test_repr(packed):
    text = repr(packed)
    for part in ("int4", "(5, 130)", "group_size=64", "float16", "bits/weight", "cpu"):
        assert part in text


class TestLoad:
    @pytest.fixture
    def file(self, packed, tmp_path):
        packed.save(tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    def rewrite(self, file, *, tensors=None, **metadata):
        """Write the file again with some tensors or metadata changed; None removes."""
        stored = {**load_file(file), **(tensors or {})}
        described = {"format": "int4", "in_features": 130, "group_size": 64, **metadata}
        save_file(
            {name: tensor for name, tensor in stored.items() if tensor is not None},
            file,
            {"loftq_packed_tensor": json.dumps(described)},
        )

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
            lk.PackedTensor.load(tmp_path / "nothing.safetensors")

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_truncated(self, file, kept):
        data = file.read_bytes()
        file.write_bytes(data[:kept])
        with pytest.raises(ValueError, match="w.safetensors.*truncated"):
            lk.PackedTensor.load(file)

    def test_not_safetensors(self, file):
        file.write_bytes(b"PK" + bytes(500))
        with pytest.raises(ValueError, match="w.safetensors"):
            lk.PackedTensor.load(file)

    def test_absurd_header_length(self, file):
        data = file.read_bytes()
        file.write_bytes((2**62).to_bytes(8, "little") + data[8:])
        with pytest.raises(ValueError, match="w.safetensors"):
            lk.PackedTensor.load(file)

    def test_another_file(self, file):
        save_file({"weight": torch.zeros(3)}, file)
        with pytest.raises(ValueError, match="w.safetensors is not a saved PackedTensor"):
            lk.PackedTensor.load(file)

    @pytest.mark.parametrize("described", ["{", "[]", "null", "{}"])
    def test_bad_metadata(self, file, described):
        save_file(load_file(file), file, {"loftq_packed_tensor": described})
        with pytest.raises(ValueError, match="w.safetensors"):
            lk.PackedTensor.load(file)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("format", "nf4"),  # another format of as many bits, without an offset
            ("format", "int2"),
            ("format", "int4_sym"),
            ("format", "nf9"),
            ("in_features", 64),
            ("in_features", -130),
            ("in_features", 10**15),
            ("in_features", "130"),
            ("in_features", 130.0),
            ("group_size", 48),
            ("group_size", 32),
            ("group_size", None),
        ],
    )
    def test_fields_that_do_not_fit(self, file, field, value):
        self.rewrite(file, **{field: value})
        with pytest.raises(ValueError, match="w.safetensors"):
            lk.PackedTensor.load(file)

    @pytest.mark.parametrize(
        "tensors",
        [
            {"scale": None},
            {"codes": torch.zeros(5, 96)},
            {"codes": torch.zeros(5, 95, dtype=torch.uint8)},
            {"scale": torch.zeros(5, 2, dtype=torch.float16)},
            {"offset": torch.zeros(5, 3, dtype=torch.float32)},
            {"offset": None},
            {"codebook": torch.zeros(15)},
            {"codebook": torch.zeros(16)},
        ],
        ids=str,
    )
    def test_tensors_that_do_not_fit(self, file, tensors):
        self.rewrite(file, tensors=tensors)
        with pytest.raises(ValueError, match="w.safetensors"):
            lk.PackedTensor.load(file)

    def test_same_shapes_of_another_format(self, tmp_path):
        """nf2 and uniform2 store tensors of the same shapes: the code book tells them apart."""
        file = tmp_path / "w.safetensors"
        lk.quantize(gaussian(5, 130), "nf2").save(file)
        described = {"format": "uniform2", "in_features": 130, "group_size": 64}
        save_file(load_file(file), file, {"loftq_packed_tensor": json.dumps(described)})
        with pytest.raises(ValueError, match="code ?book.*uniform2"):
            lk.PackedTensor.load(file)

    def test_failed_save_keeps_the_old_file(self, packed, file, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError("disk full")

        for what in ("safetensors.torch.save_file", "os.replace"):
            with monkeypatch.context() as patch:
                patch.setattr(what, fail)
                with pytest.raises(OSError, match="disk full"):
                    lk.quantize(gaussian(5, 130, seed=9), "nf2").save(file)
            assert same_packed(lk.PackedTensor.load(file), packed)
            assert [path.name for path in file.parent.iterdir()] == [file.name]
