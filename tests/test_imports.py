"What importing costs and needs, and that data flows one way: nothing imports rightwards."
import ast
import os
import re
import resource
import subprocess
import sys

import pytest
import sync

package = sync.root/'egrpo'
modules = sorted(p for p in package.glob('*.py') if not p.name.startswith('_'))
every = pytest.mark.parametrize('module', [p.stem for p in modules])
maths = [p.stem for p in modules if re.search(r'File to edit: \.\./nbs/0[0-7]_', p.read_text(encoding='utf-8'))]
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
    torch, ours = seconds('import torch'), seconds('import egrpo.entropy')
    assert ours < 1.3 * torch, f'import egrpo.entropy takes {ours:.1f} s, torch alone {torch:.1f} s'


def test_maths_needs_torch_alone():
    "Whatever else the package requires is made impossible to import, but numpy, which torch itself tries."
    settings = (sync.root/'settings.ini').read_text(encoding='utf-8')
    required = [re.match(r'[\w-]+', o)[0] for o in re.search(r'^requirements = (.*)', settings, re.M)[1].split()]
    other = {dict(pillow='PIL').get(o, o.replace('scikit-image', 'skimage')) for o in required} - {'torch', 'numpy'}
    assert maths and {'diffusers', 'matplotlib', 'pandas', 'PIL', 'skimage'} < other
    python(f'import sys; sys.modules.update(dict.fromkeys({other})); import ' + ', '.join(f'egrpo.{m}' for m in maths))


def test_runs_without_development_tools():
    "A user has the run-time requirements only: here the rest is made impossible to import."
    names = ', '.join(f'egrpo.{p.stem}' for p in modules)
    python(f'import sys; sys.modules.update(dict.fromkeys({dev_only})); import {names}')


def imported(path):
    "Modules of egrpo that `path` imports anywhere, also inside functions."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('egrpo.'): yield node.module.split('.')[1]
        elif isinstance(node, ast.ImportFrom) and (node.module == 'egrpo' or node.level == 1):
            yield from [node.module.split('.')[0]] if node.level and node.module else [a.name for a in node.names]
        elif isinstance(node, ast.Import): yield from (a.name.split('.')[1] for a in node.names if a.name.startswith('egrpo.'))


def number(name):
    "Position of a module in the flow of data: its notebook's number."
    found = re.search(r'File to edit: \.\./nbs/(\d+)_', (package/f'{name}.py').read_text(encoding='utf-8'))
    return int(found[1]) if found else -1


@every
def test_nothing_imports_rightwards(module):
    ours = {m for m in imported(package/f'{module}.py') if (package/f'{m}.py').exists() and not m.startswith('_')}
    right = sorted(m for m in ours if number(m) >= number(module))
    assert not right, f'egrpo.{module} ({number(module):02}) imports {right}'


def test_imported_sees_every_form(tmp_path):
    code = ['from egrpo.a import x', 'import egrpo.b as b', 'from egrpo import c', 'from . import d', 'from .e import y']
    code += ['def f():', '    import egrpo.g']
    (tmp_path/'m.py').write_text('\n'.join(code))
    assert set(imported(tmp_path/'m.py')) == set('abcdeg')
