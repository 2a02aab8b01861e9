"Output in another encoding: no command dies of a sign that a stream cannot show, and files are UTF-8 on every machine."
import ast
import io
import re
import sys

import pytest
import sync

from egrpo.cli.commands import COMMANDS, main

ENCODINGS = ['cp1252', 'cp437', 'cp932', 'gbk', 'ascii']
PRINTING = [['plan'], ['methods'], ['claims'], ['rewards'], ['train', '--dry-run'], *([name, '--help'] for name in COMMANDS)]


def output(words, encoding, monkeypatch):
    "Text that a command prints to a stream of an encoding; the command must end well."
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, 'stdout', stream)
    try: code = main(words)
    except SystemExit as e: code = e.code
    assert code == 0, words
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.fixture(scope='module')
def everything():
    "Texts of the commands where all signs can be shown."
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('EGRPO_SCALE', raising=False)
        return [output(words, 'utf-8', patch) for words in PRINTING]


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_every_sign_has_a_plain_one(encoding, everything, monkeypatch):
    "Signs that a stream lacks are written in plain ones; a ? stands nowhere but where one is meant."
    monkeypatch.delenv('EGRPO_SCALE', raising=False)
    for words, wanted in zip(PRINTING, everything):
        found = output(words, encoding, monkeypatch)
        assert found.count('?') == wanted.count('?'), words
        assert found.count('\n') == wanted.count('\n'), words


def test_an_error_is_shown_in_plain_signs(monkeypatch, tmp_path):
    "Signs of the user's own, too: a name that cannot be shown, or is no text at all."
    monkeypatch.chdir(tmp_path)
    stream = io.TextIOWrapper(io.BytesIO(), 'ascii')
    monkeypatch.setattr(sys, 'stderr', stream)
    assert main(['evaluate', '--prompts', 'naïve → プロンプト.txt']) == 2
    stream.flush()
    said = stream.buffer.getvalue().decode('ascii')
    assert said.startswith("egrpo evaluate: error: prompts: 'na?ve -> ?????.txt' could not be read") and said.count('\n') == 1


# ---- files

def text_files(tree):
    "Calls that open a file as text and do not say its encoding: (function, line) of each."
    for function in (o for o in ast.walk(tree) if isinstance(o, ast.FunctionDef)):
        for call in (o for o in ast.walk(function) if isinstance(o, ast.Call)):
            name = getattr(call.func, 'attr', None) or getattr(call.func, 'id', None)
            modes = [a.value for a in call.args if isinstance(a, ast.Constant) and re.fullmatch('[rwaxtb+]+', str(a.value))]
            binary = any('b' in mode for mode in modes)
            method = isinstance(call.func, ast.Attribute) # `egrpo.base.files.write_text` is a function, and says its own
            opens = (name in ('read_text', 'write_text') and method) or (name == 'open' and not binary and (modes or not method))
            if opens and not any(k.arg == 'encoding' for k in call.keywords): yield function.name, call.lineno


def test_text_files_are_utf8():
    modules = [p for p in (sync.root/'egrpo').rglob('*.py') if p.name != '_modidx.py']
    assert len(modules) > 25
    for path in modules:
        found = [*text_files(ast.parse(path.read_text(encoding='utf-8')))]
        assert not found, f"{path.name}: {found} do not say encoding='utf-8'"


@pytest.mark.parametrize('code, found', [
    ("open(path)", 1), ("open(path, 'w')", 1), ("path.open('a')", 1), ("path.read_text()", 1), ("(a/b).write_text(text)", 1),
    ("open(path, encoding='utf-8')", 0), ("path.open('wb')", 0), ("open(path, 'rb')", 0), ("Image.open(path)", 0),
    ("path.read_text(encoding='utf-8')", 0)])
def test_text_files_sees_every_form(code, found):
    assert len([*text_files(ast.parse(f'def f():\n    {code}'))]) == found
