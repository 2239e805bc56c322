"""Show-o's MAGVIT-v2 against numbers that upstream's code produced at a tiny size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_unigrpo.adapters.showo.vq import Levels, ShowOVQ
from tests.conftest import golden_folder

FOLDER = golden_folder("showo1")
INFO = json.loads((FOLDER / "vq.json").read_text())
FILE = load_file(FOLDER / "vq.safetensors")
STATE = {k.removeprefix("state."): v for k, v in FILE.items() if k.startswith("state.")}
ATOL = 1e-5
"""Numbers up to 4 in float32."""


def levels(found: dict[str, Any]) -> Levels:
    assert found["ch"] == 32
    return Levels(tuple(found["ch_mult"]), tuple(found["num_res_blocks"]))


@pytest.fixture(scope="module")
def vq() -> ShowOVQ:
    sizes = INFO["sizes"]
    vq = ShowOVQ(
        base=32,
        encoder=levels(sizes["encoder"]),
        decoder=levels(sizes["decoder"]),
        bits=sizes["bits"],
    )
    vq.load_state_dict({k: v.float() / 64 for k, v in STATE.items() if "quantize." not in k})
    return vq.eval()


def close(got: Tensor, name: str) -> None:
    torch.testing.assert_close(got, FILE[name], atol=ATOL, rtol=ATOL)


def test_encoding(vq: ShowOVQ) -> None:
    """No number before the sign is near 0, so that codes are the same to the bit."""
    assert INFO["smallest_z"] > 50 * ATOL
    with torch.no_grad():
        close(vq.encoder(FILE["pixels"]), "z")
    codes = vq.encode(FILE["pixels"])
    assert codes.dtype == torch.int64
    assert torch.equal(codes, FILE["codes"])


def test_decoding(vq: ShowOVQ) -> None:
    """Of codes that were found, on a grid that is no square; and of every code there is."""
    height, width = (n // vq.stride for n in FILE["pixels"].shape[2:])
    found = vq.decode(FILE["codes"], (height, width))
    assert found.shape == FILE["pixels"].shape
    close(found, "decoded")
    assert sorted(FILE["all_codes"].flatten().tolist()) == [*range(vq.num_codes)]
    close(vq.decode(FILE["all_codes"], (4, 8)), "all_decoded")


def test_bits_are_upstreams_table(vq: ShowOVQ) -> None:
    """The published file has the table of signs and the powers of two as tensors; here both are computed."""
    seen: list[Tensor] = []
    hook = vq.decoder.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    vq.decode(torch.arange(vq.num_codes).unsqueeze(0), (4, 8))
    hook.remove()
    (signs,) = seen
    assert torch.equal(signs[0].flatten(1).T, STATE["quantize.embedding"])
    assert torch.equal(2 ** vq._shifts(seen[0].device).flatten(), STATE["quantize.power_vals"])


def test_reduced_precision_changes_no_code(vq: ShowOVQ) -> None:
    """Under autocast all runs in float32; weights in bfloat16 give pixels in float32."""
    seen: list[Tensor] = []
    hook = vq.encoder.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq.encode(FILE["pixels"]), FILE["codes"])
        hook.remove()
        close(seen[0], "z")
        close(vq.decode(FILE["all_codes"], (4, 8)), "all_decoded")
    assert deepcopy(vq).bfloat16().decode(FILE["all_codes"], (4, 8)).dtype == torch.float32


def test_the_releases_names_and_shapes() -> None:
    """Those of upstream's class, and of its file, but for the two tables that are computed."""
    with torch.device("meta"):
        vq = ShowOVQ()
    found = {name: list(p.shape) for name, p in vq.state_dict().items()}
    tables = {"quantize.embedding": [8192, 13], "quantize.power_vals": [13]}
    names = json.dumps(sorted((found | tables).items()))
    expected = INFO["release"]
    assert hashlib.sha256(names.encode()).hexdigest() == expected["sha256_of_names_and_shapes"]
    assert len(found) + len(tables) == expected["num_tensors"]
    assert sum(p.numel() for p in vq.parameters()) == expected["num_parameters"]
    assert (vq.num_codes, vq.stride) == (8192, 16)


Mistake = Callable[[Any, pytest.MonkeyPatch], None]
MISTAKES: dict[str, Mistake] = {}


def mistake(make: Mistake) -> Mistake:
    MISTAKES[make.__name__] = make
    return make


@mistake
def the_lowest_bit_first(vq: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShowOVQ, "_shifts", lambda self, _device: torch.arange(self.bits).view(-1, 1))


@mistake
def columns_before_rows(vq: Any, patch: pytest.MonkeyPatch) -> None:
    for p in vq.parameters():
        if p.ndim == 4:
            p.data = p.data.mT.contiguous()


@mistake
def padded_on_all_sides(vq: Any, patch: pytest.MonkeyPatch) -> None:
    conv = vq.encoder.down[0].downsample.conv
    vq.encoder.down[0].downsample = conv
    conv.padding = (1, 1)


@mistake
def no_attention(vq: Any, patch: pytest.MonkeyPatch) -> None:
    vq.encoder.mid.attn_1 = vq.decoder.mid.attn_1 = nn.Identity()


@mistake
def another_eps(vq: Any, patch: pytest.MonkeyPatch) -> None:
    for module in vq.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-3


@mistake
def no_last_norm(vq: Any, patch: pytest.MonkeyPatch) -> None:
    vq.encoder.norm_out = vq.decoder.norm_out = nn.Identity()


@mistake
def convolutions_around_the_codes_left_out(vq: Any, patch: pytest.MonkeyPatch) -> None:
    vq.encoder.quant_conv = vq.decoder.post_quant_conv = nn.Identity()


@mistake
def smooth_upsampling(vq: Any, patch: pytest.MonkeyPatch) -> None:
    up = vq.decoder.up[1]
    up.upsample = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), up.upsample.conv)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(vq: ShowOVQ, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wrong = deepcopy(vq)
    MISTAKES[name](wrong, monkeypatch)
    with torch.no_grad():
        z = wrong.encoder(FILE["pixels"]) - FILE["z"]
    pixels = wrong.decode(FILE["all_codes"], (4, 8)) - FILE["all_decoded"]
    assert max(float(z.abs().max()), float(pixels.abs().max())) > 100 * ATOL


def test_every_eps() -> None:
    """1e-6, as upstream has it: the vectors cannot tell it from one ten times as large."""
    with torch.device("meta"):
        norms = [m for m in ShowOVQ().modules() if isinstance(m, nn.GroupNorm)]
    assert {(norm.eps, norm.num_groups) for norm in norms} == {(1e-6, 32)}
