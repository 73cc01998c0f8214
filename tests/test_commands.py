"""Every command that the READMEs and the scripts' docstrings show, run at its smallest size; Python blocks too.

A command is known by a pattern of TABLE. One that no pattern knows fails, and so does a pattern without a command.
"""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from classroom.prompts import geneval_prompts

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", *(ROOT / "classroom" / name for name in ("README.md", "RECORDS.md"))]
READMES += sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = "acdmd.py rtdmd.py sample.py classroom/demo.py classroom/pretrain.py classroom/prompts.py".split()
SCRIPTS += ["tests/bench.py", "tests/bench_rewards.py"]

SMALL = "--batch_size 2 --consistency_batch 1 --sample_every 0 --eval_every 0 "
PARSE = "its arguments are read, no more"
TABLE = {  # pattern of a command -> flags that make it small (the last of two alike wins), PARSE, or why it cannot run
    r"^python3 -m venv|^\. |^pip install": "makes an environment",
    r"-m pytest": "these tests",
    r"--help$": "prints the flags",
    r"--nnodes": PARSE,
    r"(acdmd|rtdmd|sample)\.py.* --model ": PARSE,  # published weights
    r"tests/bench\.py --plan": PARSE,  # minutes; test_plan.py plans a small network
    r"tests/bench\.py --model": PARSE,  # published sizes
    r"tests/bench_rewards\.py": "published sizes; test_rewards.py runs it on small networks",
    r"tests/bench\.py$": "minutes; test_backbones.py runs it on small networks",
    r"tests/bench\.py --signal": PARSE,  # minutes; test_signal.py runs it on few pictures
    r"torchrun.* acdmd\.py --device cpu": SMALL + "--steps 1",
    r"demo\.py": PARSE,  # test_scripts.py runs all of it
    r"pretrain\.py": PARSE,  # test_classroom.py runs all of it
    r"out/mine": PARSE,  # a reader's own files
    r"python acdmd\.py$": SMALL + "--steps 1 --out out/acdmd",
    r"python rtdmd\.py --distilled": SMALL + "--epochs 1 --batches 1 --group_size 2 --out out/rtdmd",
    r"python sample\.py .*--export": "",
    r"python sample\.py": "--n_images 1",
    r"python classroom/prompts\.py": "--n 6",
}
PLACES = {".../": "out/classroom/", " DIR": " out/sd35/acdmd/final", " FILE": " captions.txt"}  # what is left open
GPUS = (ROOT / "docs/gpus.md").read_text(encoding="utf-8")
PLACES["$common"] = re.search(r'^common="(.+)"$', GPUS, re.M).group(1)


def text_of(path):
    """A README, or the docstring of a script."""
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".md" else text.split('"""')[1]


def commands_of(text):
    """Lines of code blocks, indented ones, and code between backticks that begin as a command does."""
    text = re.sub(r" *\\\n +", " ", text)
    begins = r"(?:python3?|torchrun|pip) "
    found = re.findall(rf"^ *({begins}[^\n]+)|`({begins}[^`\n]+)`", text, re.M)
    for line in (a or b for a, b in found):
        line = re.split(r" {2,}| #", line)[0]  # what follows explains it
        yield from (part.strip() for part in line.split("&&"))


def entry(command):
    return next((pattern for pattern in TABLE if re.search(pattern, command)), None)


COMMANDS = list(
    dict.fromkeys(c for path in (*READMES, *(ROOT / s for s in SCRIPTS)) for c in commands_of(text_of(path)))
)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that looks like the repository, so that nothing is written to the real one."""
    for path in ROOT.iterdir():
        if path.name not in ("out", ".git"):
            (tmp_path / path.name).symlink_to(path)
    rows = "".join(json.dumps(row) + "\n" for row in geneval_prompts(3))
    (tmp_path / "evaluation_metadata.jsonl").write_text(rows)
    for run in ("classroom/acdmd", "classroom/rtdmd", "sd35/acdmd", "mine/acdmd", "mine/rtdmd", "sana/acdmd"):
        shutil.copytree(ROOT / "classroom/adapters" / Path(run).name, tmp_path / "out" / run / "final")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(script, *flags):
    """A script as `python SCRIPT FLAGS` runs it."""
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def test_every_command_is_known_and_every_pattern_needed():
    assert len(COMMANDS) > 20
    assert not [command for command in COMMANDS if entry(command) is None]
    assert not set(TABLE) - {entry(command) for command in COMMANDS}


def test_every_command_runs(checkout, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python"])
    failed = []
    for command in COMMANDS:
        more = TABLE.get(entry(command), "unknown: the other test names it")
        _, script, flags = re.fullmatch(r"(.*?)(\S+\.py)(.*)", command).groups() if ".py" in command else ("", "", "")
        for name, place in PLACES.items():
            flags = flags.replace(name, place)
        try:
            if more == PARSE:
                runpy.run_path(script)["parse_args"](shlex.split(flags))
            elif not more or more.startswith("--"):
                start(script, *shlex.split(flags), *more.split())
        except (Exception, SystemExit) as error:
            failed.append((command, repr(error)))
    assert not failed


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("path", filter(python_blocks, READMES), ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(path, checkout):
    for block in python_blocks(path):
        exec(compile(block, str(path), "exec"), {})


def test_the_file_tree_is_true():
    tree = re.search(r"## The files\n\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S).group(1)
    rows = re.findall(r"^(\S+)(?: +(\d+) lines)?", tree, re.M)
    assert {name.split("/")[0] for name, _ in rows} <= {path.name for path in ROOT.iterdir()}
    for name, lines in rows:
        assert (ROOT / name).exists(), name
        if lines:
            real = len((ROOT / name).read_text(encoding="utf-8").splitlines())
            assert abs(int(lines) - real) <= 0.1 * real, (name, lines, real)
    scripts = {path.name for path in ROOT.glob("*.py")} | {
        f"classroom/{p.name}" for p in (ROOT / "classroom").glob("[a-z]*.py")
    }
    assert scripts <= {name for name, _ in rows}
