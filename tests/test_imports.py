"What importing costs and needs, and that data flows one way: between rooms, and within a room from notebook to notebook."
import ast
import importlib
import os
import re
import resource
import subprocess
import sys

import pytest
import sync

import egrpo

# A room may import those before it. base and testing import nothing of egrpo.
ROOMS = 'base core models methods miniature rewards show train paper cli'.split()
ALONE = ['base', 'testing']

package = sync.root/'egrpo'
modules = sorted('.'.join(p.relative_to(package).with_suffix('').parts) for p in package.glob('*/[a-z]*.py') if p.parent.name != 'assets')
every = pytest.mark.parametrize('module', modules)
maths = [m for m in modules if m.startswith('core.')]
dev_only = ['nbdev', 'execnb', 'ghapi', 'fastgit', 'pytest', 'hypothesis', 'nbclient', 'nbconvert', 'tensorboard']


def python(code):
    "Run `code` in a fresh interpreter, away from the repository, where it must not complain, and return what it printed."
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=os.path.expanduser('~'))
    assert (done.returncode, done.stderr) == (0, '')
    return done.stdout.strip()


def seconds(code):
    "CPU time of a fresh interpreter, the least of three: the first may wait for the disk, and what else the machine does must not count."
    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return min(once() for _ in range(3))


def test_entropy_imports_fast():
    torch, ours = seconds('import torch'), seconds('import egrpo.core.entropy')
    assert ours < 1.3 * torch, f'import egrpo.core.entropy takes {ours:.1f} s, torch alone {torch:.1f} s'


def test_package_imports_fast():
    ours = seconds('import egrpo') - seconds('pass')
    assert ours < .1, f'import egrpo takes {ours:.2f} s'


def test_configuration_imports_fast():
    "Without torch: `egrpo --help` shows every field."
    light = "import sys, egrpo.train.config; assert not {'torch', 'numpy', 'accelerate'} & {*sys.modules}"
    ours = seconds(light) - seconds('pass')
    assert ours < .1, f'import egrpo.train.config takes {ours:.2f} s'


def test_public_names_are_loaded_when_asked_for():
    python("import sys, egrpo; assert {'Trainer', 'rollout'} <= set(dir(egrpo)) and 'torch' not in sys.modules")
    python("import sys; from egrpo import Plan, flow_sigmas; assert 'diffusers' not in sys.modules")
    assert len(egrpo.__all__) == 17
    for name in egrpo.__all__: assert getattr(egrpo, name)
    with pytest.raises(AttributeError, match="no attribute 'trainer_'"): egrpo.__getattr__('trainer_')


def test_public_names_are_few():
    "A reader of the API meets about 100 names beside the methods; the rest is exported for other modules alone (`#| exporti`)."
    from egrpo.methods.registry import METHODS
    names = {n for module in modules for n in getattr(importlib.import_module(f'egrpo.{module}'), '__all__', [])}
    assert set(egrpo.__all__) <= names and METHODS.keys() <= names
    assert 80 < len(names - METHODS.keys()) <= 111, sorted(names - METHODS.keys())


def test_maths_needs_torch_alone():
    "Whatever else the package requires is made impossible to import, but numpy, which torch itself tries."
    settings = (sync.root/'settings.ini').read_text(encoding='utf-8')
    required = [re.match(r'[\w-]+', o)[0] for o in re.search(r'^requirements = (.*)', settings, re.M)[1].split()]
    other = {dict(pillow='PIL').get(o, o.replace('scikit-image', 'skimage')) for o in required} - {'torch', 'numpy'}
    assert maths and {'diffusers', 'matplotlib', 'pandas', 'PIL', 'skimage'} < other
    python(f'import sys; sys.modules.update(dict.fromkeys({other})); import ' + ', '.join(f'egrpo.{m}' for m in maths))


def test_runs_without_development_tools():
    "A user has the run-time requirements only: here the rest is made impossible to import."
    names = ', '.join(f'egrpo.{m}' for m in modules)
    python(f'import sys; sys.modules.update(dict.fromkeys({dev_only})); import {names}')


def absolute(name, level, module):
    "The module that `from ..x.y import` names, from the top level, without `egrpo`; None for another package's."
    if not level: return name.removeprefix('egrpo').removeprefix('.') if name == 'egrpo' or name.startswith('egrpo.') else None
    return '.'.join([*module.split('.')[:-level], *filter(None, [name])])


def imported(path, module):
    "Modules of egrpo, as room.name, that the source of `module` imports anywhere, also inside functions."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): names = [absolute(a.name, 0, module) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or '', node.level, module)
            names = [base if base is None or '.' in base else f'{base}.{a.name}'.strip('.') for a in node.names]
        else: continue
        yield from filter(None, names)


def number(module):
    "Position of a module in its room: its notebook's number."
    room, name = module.split('.')
    return int(re.search(r'File to edit: [./]*nbs/\w+/(\d+)_', (package/room/f'{name}.py').read_text(encoding='utf-8'))[1])


def source(module): return package.joinpath(*module.split('.')).with_suffix('.py')


def test_every_room_is_in_order(): assert {m.split('.')[0] for m in modules} == {*ROOMS, *ALONE}


@every
def test_arrows_go_one_way(module):
    room = module.split('.')[0]
    allowed = [] if room in ALONE else ROOMS[:ROOMS.index(room)]
    for other in imported(source(module), module):
        if '.' not in other or not source(other).exists(): continue
        there = other.split('.')[0]
        if there == room: assert number(other) < number(module), f'egrpo.{module} imports egrpo.{other}, a later notebook'
        else: assert there in allowed, f'egrpo.{module} imports egrpo.{other}: {room} may import {allowed or "no other room"}'


def test_imported_sees_every_form(tmp_path):
    code = ['from egrpo.a.x import y', 'import egrpo.b.x as b', 'from egrpo.c import x', 'from ..d import x', 'from ..e.x import y']
    code += ['from .x import y', 'from egrpo import other', 'import torch', 'from torch import nn', 'def f():', '    import egrpo.g.x']
    (tmp_path/'m.py').write_text('\n'.join(code))
    assert set(imported(tmp_path/'m.py', 'room.m')) == {*(f'{o}.x' for o in 'abcdeg'), 'room.x', 'other'}
