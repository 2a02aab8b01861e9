"`make gpu-check` rehearsed, tiny, on a GPU that nobody has here (`fake_device`)."
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from fake_device import COMPILER

from egrpo.paper.cells import load_cell
from egrpo.paper.records import load_record

SCRIPT = Path(gpu_check.__file__)


@pytest.mark.trial
@pytest.mark.skipif(not COMPILER or torch.cuda.is_available(), reason='needs a C++ compiler, and no GPU')
def test_rehearsal(tmp_path):
    "All that is to come back is there, whole; a stage that is over its limit and a job that fails stop nothing."
    words = ['--out', tmp_path, '--size', 'tiny', '--minutes', '3', '--workers', '2', '--limits', 'attention=1.5',
             '--stages', 'about,attention,flux,speed,jobs']
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True,
                          env={**os.environ, 'EGRPO_FAKE_GPU': '1'})
    record = load_record(tmp_path/'gpu_check.json')
    stages = record['data']['stages']
    assert record['device'] == 'Fake' and list(stages) == ['about', 'attention', 'flux', 'speed', 'jobs'], done.stderr
    assert [name for name, row in stages.items() if not row['ok']] == ['attention'], {k: v['error'] for k, v in stages.items()}
    assert stages['attention']['error'].startswith('ended after its 2 s') and done.returncode == 1
    assert 'attention  NO' in done.stdout.splitlines()[-4]
    check_figures(stages)
    check_files(tmp_path)


def check_figures(stages):
    "What stages have found."
    about, flux, speed, jobs = (stages[name]['found'] for name in ('about', 'flux', 'speed', 'jobs'))
    assert about['matmul_tflops_bf16'] > 0 and not speed['tf32_once_a_policy_is_loaded']['convolutions']
    assert flux['iteration']['nfe_gradient'] == 2 and flux['iteration']['peak_bytes'] > flux['held_bytes']
    assert flux['recording'].keys() == {'plain', 'every_1', 'every_4', 'every_16'}
    assert speed['2 prompts, fp32, micro-batch 256']['nfe'] == 24
    assert (jobs['planned'], jobs['done'], jobs['left']) == (4, 3, 0)
    assert list(jobs['failed']) == ['failing'] and "unknown scale 'huge'" in jobs['failed']['failing']


def check_files(out):
    "Eight files at most, and the cells in them can be loaded."
    assert sorted(p.name for p in out.iterdir()) == ['cells_0.tar.gz', 'gpu_check.json', 'logs_0.tar.gz']
    with tarfile.open(out/'cells_0.tar.gz') as tar: tar.extractall(out/'cells', filter='data')
    names = {job.name for job in gpu_check.jobs('tiny')} - {'failing'}
    assert names <= {p.stem for p in (out/'cells').iterdir()}
    assert 'torch' in json.loads((out/'cells/versions.json').read_text())
    for job in gpu_check.jobs('tiny')[:2]:
        cell = load_cell(out/f'cells/{job.name}.json')
        assert cell['device'] == 'Fake' and cell['config']['seed'] == job.seed
    with tarfile.open(out/'logs_0.tar.gz') as tar: logs = tar.getnames()
    assert {'flux.log', 'jobs.log', 'worker_1.log', 'worker_2.log'} <= set(logs)


def test_files_are_packed_by_their_limit(tmp_path, monkeypatch):
    "What does not fit into a tar file begins the next."
    monkeypatch.setattr(gpu_check, 'PACKED_BYTES', 30_000)
    (tmp_path/'out').mkdir()
    for i in range(6): (tmp_path/f'{i}.json').write_bytes(os.urandom(20_000)) # which nothing compresses
    names = gpu_check.pack([*tmp_path.glob('*.json')], tmp_path/'out', 'cells', tmp_path)
    assert names == ['cells_0.tar.gz', 'cells_1.tar.gz', 'cells_2.tar.gz']
    packed = [tarfile.open(tmp_path/'out'/name).getnames() for name in names]
    assert packed == [['0.json', '1.json'], ['2.json', '3.json'], ['4.json', '5.json']]


def test_a_job_that_cannot_end_in_time_is_not_begun(tmp_path):
    "By the slowest of its kind; others are."
    crew = gpu_check.Crew(gpu_check.Stage('tiny', tmp_path, tmp_path, 0, 0, None), time.time() + 60)
    slow, new = (gpu_check.Job(kind, kind) for kind in ('slow', 'new'))
    crew.todo, crew.durations = [slow, new], dict(slow=[10., 90.])
    assert [crew.next_job() for _ in range(2)] == [new, None] and crew.todo == [slow]


def test_what_a_record_refuses_is_taken_out():
    found = gpu_check.plain({'a': [float('nan'), 1.5], 2: 'File "/home/x/y.py", line 3: no /tmp/z', 'b': True})
    assert found == {'a': [None, 1.5], '2': 'File "y.py", line 3: no z', 'b': True}
