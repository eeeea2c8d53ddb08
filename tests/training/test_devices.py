"""In which arithmetic a run computes: chosen by the instruction set, said, recorded, and kept."""

from __future__ import annotations

import pytest
import torch
import yaml

from improved_diffusion.training.devices import choose_precision, sampling_precision

CPU = torch.device("cpu")
ALL = {"amx": True, "avx512_bf16": True}


@pytest.fixture
def pretend(monkeypatch):
    """Let this CPU seem to have AMX or AVX512-BF16, or neither, with a limit to what oneDNN may use."""

    def set_up(amx: bool = False, avx512_bf16: bool = False, limit: str | None = None) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        if limit is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)

    return set_up


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ({}, "float32, for there is neither AMX nor AVX512-BF16"),
        (ALL, "bf16, for there is AMX"),
        ({"avx512_bf16": True}, "bf16, for there is AVX512-BF16"),
        ({**ALL, "limit": "avx2"}, "float32, for there is neither AMX nor AVX512-BF16"),
        ({**ALL, "limit": "AVX512_CORE"}, "float32, for there is neither AMX nor AVX512-BF16"),
        ({**ALL, "limit": "AVX512_CORE_BF16"}, "bf16, for there is AVX512-BF16"),
        ({**ALL, "limit": "AVX512_CORE_AMX"}, "bf16, for there is AMX"),
        ({"avx512_bf16": True, "limit": "AVX10_1_512"}, "bf16, for there is AVX512-BF16"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_auto_is_decided_by_the_instruction_set(pretend, cpu, expected):
    pretend(**cpu)
    precision, why = choose_precision("auto", CPU)
    assert (precision, why) == (expected.split(",")[0], expected)


def test_what_was_set_is_kept_and_said(pretend):
    pretend(amx=True)
    assert choose_precision("float32", CPU) == ("float32", "float32, as the settings say")
    assert choose_precision("bf16", CPU) == ("bf16", "bf16, as the settings say")
    pretend()
    assert choose_precision("bf16", CPU)[0] == "bf16"
    assert "emulated and slow" in choose_precision("bf16", CPU)[1]


def test_pictures_are_drawn_as_trained_but_never_emulated(pretend):
    pretend(amx=True)
    assert [sampling_precision(trained, CPU) for trained in ("float32", "bf16", "auto")] == ["float32", "bf16", "bf16"]
    pretend()
    assert {sampling_precision(trained, CPU) for trained in ("float32", "bf16", "auto")} == {"float32"}


def test_a_run_keeps_its_arithmetic_on_another_machine(pretend, run_script, tiny_config_file, tmp_path):
    out = tmp_path / "run"

    def precision() -> str:
        return yaml.safe_load((out / "config.yaml").read_text())["training"]["precision"]

    pretend(avx512_bf16=True)
    flags = ("--config", tiny_config_file, "--training.precision=auto", "--training.steps=2")
    outcome = run_script("train.py", *flags, "--out", out)
    assert "arithmetic: bf16, for there is AVX512-BF16" in outcome.out.splitlines()[:3], outcome.err
    assert precision() == "bf16"

    pretend()
    outcome = run_script("train.py", "--resume", out, "--training.steps=4")
    assert outcome.code == 0, outcome.err
    assert "arithmetic: bf16, as the settings say; it is emulated" in outcome.out
    assert precision() == "bf16"
    outcome = run_script("train.py", "--resume", out, "--training.steps=6", "--training.precision=auto")
    assert outcome.is_one_clear_line()
    assert "cannot change training.precision from bf16 to float32" in outcome.err
    drawn = run_script("sample.py", "--run", out, "--class=waffles", "--n=1", f"--out={tmp_path / 'drawn'}")
    assert "drawn in float32" in drawn.out


def test_a_run_that_did_not_record_its_arithmetic_is_told(pretend, run_script, tiny_config_file, tmp_path):
    out = tmp_path / "run"
    pretend()
    run_script("train.py", "--config", tiny_config_file, "--training.steps=2", "--out", out)
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["training"]["precision"] = "auto"  # as runs recorded it before
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    outcome = run_script("train.py", "--resume", out, "--training.steps=4")
    assert outcome.code == 0, outcome.err
    assert "arithmetic: float32, for there is neither AMX nor AVX512-BF16" in outcome.out
    assert yaml.safe_load((out / "config.yaml").read_text())["training"]["precision"] == "float32"
