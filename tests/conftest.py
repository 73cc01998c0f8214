import os
from importlib.metadata import version

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may wait for a download
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: -n 2 fills two cores with one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=["cpu", "cuda"], help="of the tests marked gpu (default: cuda if there is one)"
    )


@pytest.fixture(scope="session")
def device(request):
    """The device of the tests marked gpu: a GPU, or the CPU at whose hand the same code is tested."""
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # before CUDA starts: they compare with a CPU's float32
    import torch

    found = torch.cuda.is_available()
    name = request.config.getoption("--device") or ("cuda" if found else "cpu")
    if name == "cuda" and not found:
        pytest.exit("--device cuda was given, but torch sees no GPU", returncode=2)
    request.config.stash[DEVICE] = torch.cuda.get_device_name() if name == "cuda" else "cpu"
    return torch.device(name)


DEVICE = pytest.StashKey()


def pytest_terminal_summary(terminalreporter, config):
    """With -m gpu: one table to paste."""
    if config.option.markexpr != "gpu":
        return
    print, device = terminalreporter.write_line, config.stash.get(DEVICE, "-")
    print(f"\n| check | {device}, torch {version('torch')} | seconds | |\n|---|---|---|---|")
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            why = report.longrepr[2].removeprefix("Skipped: ") if outcome == "skipped" else ""
            noted = ", ".join(f"{name} {value}" for name, value in report.user_properties) or why
            print(f"| {report.nodeid.split('::test_')[-1]} | {outcome} | {report.duration:.1f} | {noted} |")
