"What `pip install` gives a user: every module, every asset byte for byte, and the command."
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import sync

cfg = ConfigParser(delimiters=['='])
cfg.read(sync.root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel of a copy, so that nothing is left in the working tree."
    tmp = tmp_path_factory.mktemp('wheel')
    copied = 'settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE PAPERS.md CONTRIBUTING.md'
    for f in copied.split(): shutil.copy(sync.root/f, tmp/f)
    shutil.copytree(sync.root/'egrpo', tmp/'egrpo', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('nbs', 'figures'):
        shutil.copytree(sync.root/name, tmp/name, ignore=shutil.ignore_patterns('.*', '*.run', '*.lock'))
    (tmp/'egrpo/assets/deep/er').mkdir(parents=True)
    (tmp/'egrpo/assets/deep/er/any.thing').write_bytes(b'packed')
    build = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', tmp/'dist', tmp]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((tmp/'dist').glob('*.whl'))) as z: return {n: z.read(n) for n in z.namelist()}


def test_holds_every_file(wheel):
    ours = {p for p in (sync.root/'egrpo').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    for p in ours: assert wheel.get(p.relative_to(sync.root).as_posix()) == p.read_bytes(), f'{p} is not in the wheel as it is here'


def test_notebooks_of_the_wheel_find_their_records(wheel, tmp_path):
    "What is installed knows the claims anywhere, and `egrpo notebooks` copies notebooks and records for one's own use."
    for name in (n for n in wheel if n.startswith('egrpo/')):
        path = tmp_path/'site'/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wheel[name])
    empty = tmp_path/'empty'
    empty.mkdir()
    env = os.environ | {'PYTHONPATH': str(tmp_path/'site'), 'COLUMNS': '200'}
    def egrpo(*words): return subprocess.run([sys.executable, '-m', 'egrpo', *words], cwd=empty, env=env, capture_output=True, text=True)
    assert '✓ holds' in egrpo('claims').stdout
    done = egrpo('notebooks', 'here')
    # the root holds records and pictures, too, to which notebooks link
    assert done.returncode == 0 and 'jupyter lab here --LabApp.default_url=/lab/tree/nbs/index.ipynb' in done.stdout, done.stderr
    copied = sorted(p.relative_to(empty/'here/nbs') for p in (empty/'here/nbs').rglob('*.ipynb'))
    assert copied == sorted(p.relative_to(sync.root/'nbs') for p in sync.notebooks())
    for page in ('PAPERS.md', 'CONTRIBUTING.md'): assert (empty/'here'/page).read_bytes() == (sync.root/page).read_bytes()
    code = "from egrpo.paper.records import figures_dir, load_record; print(figures_dir()); load_record('tau')"
    found = subprocess.run([sys.executable, '-c', code], cwd=empty/'here/nbs/guides', env=env, capture_output=True, text=True)
    assert Path(found.stdout.strip()).resolve() == (empty/'here/figures').resolve(), found.stderr
    assert egrpo('notebooks', 'here').returncode == 2


def test_a_source_distribution_holds_what_the_wheel_is_made_of(wheel, tmp_path_factory):
    "Settings, notebooks and records; a wheel is mostly built from it."
    built = tmp_path_factory.getbasetemp()/'wheel0'
    done = subprocess.run([sys.executable, 'setup.py', '-q', 'sdist'], cwd=built, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((built/'dist').glob('*.tar.gz'))) as tar: names = {n.partition('/')[2] for n in tar.getnames()}
    assert {'settings.ini', 'setup.py', 'nbs/index.ipynb', 'figures/tau.json', 'figures/demo.png', 'egrpo/recipes/miniature.yaml'} <= names


def test_is_small(wheel, tmp_path_factory):
    built, = (tmp_path_factory.getbasetemp()/'wheel0/dist').glob('*.whl')
    assert built.stat().st_size < 30 * 2**20


def test_holds_assets_of_any_depth_and_name(wheel): assert wheel['egrpo/assets/deep/er/any.thing'] == b'packed'


def test_holds_nothing_else(wheel):
    strange = [n for n in wheel if not n.startswith(('egrpo/', f'egrpo-{cfg["version"]}.dist-info/'))]
    assert not strange, strange


def test_names_the_command_and_requirements(wheel):
    info = f'egrpo-{cfg["version"]}.dist-info'
    assert 'egrpo = egrpo.cli.commands:main' in wheel[f'{info}/entry_points.txt'].decode()
    meta = wheel[f'{info}/METADATA'].decode()
    needs = re.findall(r'^Requires-Dist: ([\w-]+)[^;\n]*$', meta, re.M)
    wanted = 'torch diffusers transformers accelerate peft safetensors numpy scipy scikit-image matplotlib'.split()
    assert sorted(needs) == sorted([*wanted, 'seaborn', 'pandas', 'fastcore', 'tqdm', 'filelock', 'pillow', 'pyyaml'])
    assert set(re.findall(r'^Provides-Extra: (\S+)', meta, re.M)) == {'dev', 'int8', 'hpsv2', 'ocr'}


def test_constraints_pin_every_requirement():
    "What `make` installs is decided by constraints.txt alone, on each Python."
    from packaging.requirements import Requirement
    lines = (sync.root/'constraints.txt').read_text(encoding='utf-8').splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith('#')]
    for key in ('requirements', 'dev_requirements'):
        for need in map(Requirement, cfg[key].split()):
            for python in ('3.10', '3.11', '3.13'):
                here = {'python_version': python}
                pinned = [p for p in pins if p.name == need.name and (p.marker is None or p.marker.evaluate(here))]
                assert len(pinned) == 1, f'{need.name} on Python {python}: {len(pinned)} pins'
                version = str(pinned[0].specifier).removeprefix('==')
                assert need.specifier.contains(version), f'{need.name}: {version} is outside {need.specifier}'


def test_models_do_not_tell_where_they_were_made():
    "A saved configuration may hold the path of its folder."
    files = [*(sync.root/'egrpo/assets').rglob('*.json')]
    assert files and not [f for f in files if re.search(r'"/\w+/', f.read_text())]
