"""Devices that are refused in one line: Apple's GPU, and GPUs that compute no bfloat16."""

import pytest
import torch

import acdmd
import models
import rtdmd
import sample


@pytest.mark.parametrize("script", (acdmd, rtdmd, sample))
def test_mps_is_refused_with_what_is_known(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--device", "mps"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "argument --device: mps: torch has no 8-bit types" in said and said.endswith("give cpu")


def test_a_gpu_without_bfloat16_is_told_to_take_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(models.UserError, match="Tesla T4 computes none .*: give --dtype float32"):
        models.load("classroom", "nowhere", device="cuda", dtype=torch.bfloat16)  # before weights are looked for
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        with pytest.raises(models.UserError, match="cannot fetch nowhere"):
            models.load("classroom", "nowhere", device=device, dtype=dtype)
