"For every test: hypothesis draws the same examples each time, slow machines are not failures, imports end with it, figures are printed."
import shlex
import signal
import sys

import pytest
from hypothesis import settings

settings.register_profile('egrpo', deadline=None, derandomize=True, print_blob=True)
settings.load_profile('egrpo')

signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background job ignores Ctrl-C, and so would what tests start


def pytest_addoption(parser):
    parser.addoption('--trials', action='store_true', help='run also what costs more than a test may (`make trials`)')


def pytest_collection_modifyitems(config, items):
    "Leave trials out, unless they are asked for."
    if config.getoption('--trials'): return
    left_out = [item for item in items if item.get_closest_marker('trial')]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def imports(tmp_path_factory):
    "What a test imports from its folder, and the folder on `sys.path`, must not be found by the next one in this process."
    path, base = [*sys.path], str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, '__file__', None)).startswith(base): del sys.modules[name]


@pytest.fixture
def measured(record_property):
    "Print figures below the results: `measured('largest difference of 2 processes from 1', rewards=1e-6, weights=3e-7)`."
    def keep(what, **figures): record_property('measured', f'{what}: ' + ', '.join(f'{k} {float(v):.2g}' for k, v in figures.items()))
    return keep


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty current folder, no scale in the environment."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('EGRPO_SCALE', raising=False)
    return tmp_path


@pytest.fixture
def configured(monkeypatch):
    "A function from the words after `egrpo train` to the configuration that they come to."
    from egrpo.cli import training
    from egrpo.cli.commands import main
    def arrive(words):
        seen = []
        def check(config):
            seen.append(config)
            raise ValueError('seen')
        monkeypatch.setattr(training, 'check_run', check)
        assert main(['train', *shlex.split(words)]) == 2
        return seen[0]
    return arrive


def pytest_terminal_summary(terminalreporter):
    "What tests have measured, failed ones too; under pytest-xdist reports bring it from its workers."
    reports = [r for outcome in ('passed', 'failed') for r in terminalreporter.getreports(outcome) if r.when == 'call']
    lines = [value for r in reports for name, value in r.user_properties if name == 'measured']
    if lines: terminalreporter.section('measured')
    for line in sorted(lines): terminalreporter.line(line)
