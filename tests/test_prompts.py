"""Prompt files as people have them: each is read, or refused with the reason in one line."""

import pytest

import models
import rewards

HF = '{"prompt": "two cats", "tag": "counting", "exclude": null, '
HF += '"include": [{"class": "cat", "count": 2, "color": null}]}'
CATS = {"tag": "counting", "include": [{"class": "cat", "count": 2}]}
ODD = "a sign\u2028in two\x85lines"  # one line to JSON and to us, three to str.splitlines

EQUAL = {  # dialect -> (file name, content, the pairs that are read; a text alone is a pair without more metadata)
    "lines": ("a.txt", "a cat\n\n  a dog  \r\n", ["a cat", "a dog"]),
    "lines of an editor that begins with a mark": ("a.txt", f"\ufeff{ODD}\na cat", [ODD, "a cat"]),
    "an ending in capitals": ("A.TXT", "a cat", ["a cat"]),
    "JSON lines": ("a.jsonl", '{"prompt": "a cat", "n": 1}\n\n{"prompt": "a dog"}\n', [("a cat", {"n": 1}), "a dog"]),
    "JSON lines with odd line ends": ("a.jsonl", f'\ufeff{{"prompt": "{ODD}"}}\n', [ODD]),
    "JSON lines of datasets with nulls": ("a.jsonl", HF, [("two cats", CATS)]),
    "JSON lines in a file named .json": ("a.json", '{"text": "a cat"}\n{"Text": "a dog"}', ["a cat", "a dog"]),
    "a JSON list of objects": ("a.json", f"\n[{HF}]\n", [("two cats", CATS)]),
    "a JSON list of texts": ("a.json", '["a cat", "  ", "a dog"]', ["a cat", "a dog"]),
    "a JSON list in a file named .jsonl": ("a.jsonl", '[{"caption": "a cat"}]', ["a cat"]),
    "captions": ("a.jsonl", '{"image": "1.png", "caption": "a cat"}', [("a cat", {"image": "1.png"})]),
    "two candidates": ("a.jsonl", '{"text": "a", "prompt": "a cat"}', [("a cat", {"text": "a"})]),
    "DrawBench's sheet": (
        "a.csv",
        'Prompts,Category\r\n"A cat, ""red"".",Colors\r\n"two\nlines",Text\r\n,Text\r\n',
        [('A cat, "red".', {"Category": "Colors"}), ("two\nlines", {"Category": "Text"})],
    ),
    "PartiPrompts": (
        "a.tsv",
        'Prompt\tCategory\tNote\na sign that says "OPEN"\tWorld\t\n',
        [('a sign that says "OPEN"', {"Category": "World", "Note": ""})],
    ),
    "a sheet with spaces in its first line": ("a.csv", "\ufeffid, PROMPT \n1,a cat\n", [("a cat", {"id": "1"})]),
}

REFUSED = {  # dialect -> (file name, content, the reason)
    "another ending": ("a.yaml", "a cat", "unknown ending '.yaml'; allowed: .txt, .jsonl, .json, .csv, .tsv"),
    "another encoding": ("a.txt", "a caf\xe9".encode("latin-1"), "is no UTF-8 text: 'utf-8' codec"),
    "a spreadsheet program's UTF-16": ("a.csv", "prompt\na cat\n".encode("utf-16"), "is no UTF-8 text"),
    "a sheet without a first line": (
        "a.csv",
        "a cat\na dog\n",
        "entry 1: no text under prompt or .* or caption, in a cat",
    ),
    "a torn row": ("a.csv", "prompt,tag\na cat,x\na do", "entry 2 has more or fewer cells than the first line"),
    "a comma that is not quoted": ("a.csv", "id,prompt\n1,a cat, red\n", "entry 1 has more or fewer cells"),
    "a quote that does not end": ("a.tsv", 'prompt\n"a cat\n', "is torn, .*: unexpected end of data"),
    "a torn line": ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "is torn, or of another format .*: line 2: Expecting"),
    "a torn list": ("a.json", '["a cat", "a do', "is torn, .*: Unterminated string"),
    "texts in a file named .json": ("a.json", "a cat\na dog\n", "is torn, or of another format .*: line 1: Expecting"),
    "columns instead of rows": ("a.json", '{"prompt": ["a", "b"]}', "entry 1: no text under .*, in prompt"),
    "numbers": ("a.jsonl", "3", "entry 1: no text under"),
    "no prompt in an entry": ("a.jsonl", '{"prompt": "a"}\n{"prompt": null, "id": 1}', "entry 2: no text .*, in id"),
    "nothing": ("a.jsonl", "", "holds no prompts"),
    "an empty list": ("a.json", "[]", "holds no prompts"),
    "blank lines": ("a.txt", "\n \n", "holds no prompts"),
    "columns alone": ("a.tsv", "prompt\ttag\n", "holds no prompts"),
}


def write(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder / name


@pytest.mark.parametrize("dialect", EQUAL)
def test_read(dialect, tmp_path):
    name, content, want = EQUAL[dialect]
    want = [(pair, {}) if isinstance(pair, str) else pair for pair in want]
    got = rewards.read_prompts(write(tmp_path, name, content))
    assert got == [(prompt, {"prompt": prompt} | metadata) for prompt, metadata in want]


@pytest.mark.parametrize("dialect", REFUSED)
def test_refused(dialect, tmp_path):
    name, content, reason = REFUSED[dialect]
    with pytest.raises(models.UserError, match=reason) as error:
        rewards.read_prompts(write(tmp_path, name, content))
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("path, reason", (("none.txt", "No such file"), ("", "Is a directory")))
def test_no_file(path, reason, tmp_path):
    with pytest.raises(models.UserError, match=reason):
        rewards.read_prompts(tmp_path / path)


def test_blank_prompts_are_counted_once(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, "a.jsonl", '{"prompt": "a cat"}\n\n{"prompt": " "}\n{"prompt": ""}\n')
    rewards.read_prompts(path)
    assert capsys.readouterr().out == f"{path}: 1 prompts, and 2 blank ones left out\n"
    monkeypatch.setenv("RANK", "1")
    rewards.read_prompts(path)
    rewards.read_prompts(write(tmp_path, "b.txt", "a cat\n"))
    assert capsys.readouterr().out == ""


def test_nulls_pass_genevals_check(tmp_path):
    rewards.check_prompts(rewards.read_prompts(write(tmp_path, "a.jsonl", HF)), ["geneval"])
