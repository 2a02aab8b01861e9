"A run survives the machine: damage is noticed, a folder has one run, what cannot be saved shows before training."
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from egrpo.base.files import check_free, hold
from egrpo.cli.commands import main
from egrpo.cli.training import check_out
from egrpo.methods.aegpo import ProfileCache
from egrpo.models.base_policy import Policy
from egrpo.models.conditions import Conditions, Embeddings
from egrpo.models.policy import load_policy
from egrpo.train.checkpoint import load_checkpoint
from egrpo.train.trainer import TrainConfig, Trainer

sizes = dict(num_steps=6, active_steps=2, num_generations=2, prompts_per_iteration=1, eval_size=2, device='cpu')
small = sizes | dict(iterations=2)
words = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]


def run(out, **changes):
    "A small run in `out`."
    trainer = Trainer(TrainConfig(out=str(out), **{**small, **changes}))
    trainer.fit()
    return trainer


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A run of two iterations, not to be changed."
    out = tmp_path_factory.mktemp('done')/'run'
    run(out)
    return out


@pytest.fixture
def copy(done, tmp_path):
    "A copy of it."
    return shutil.copytree(done, tmp_path/'run')


def resume(out, capsys, iterations=3):
    "Resume through the command line; gives the exit code and the last line."
    capsys.readouterr()
    code = main(['train', *words, '--iterations', str(iterations), '--out', str(out), '--resume'])
    err = capsys.readouterr().err
    assert 'Traceback' not in err
    return code, err.strip().split('\n')[-1]


def flip(path, at=.6):
    "Flip one bit of a file, at a share of its length."
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


def without(state, *names):
    "A state that lacks some of its fields."
    return {k: v for k, v in state.items() if k not in names}


# ---- damage

@pytest.mark.parametrize('name', ['weights', 'ema', 'optimizer'])
def test_a_flipped_bit_is_noticed(copy, capsys, name):
    flip(copy/f'checkpoint/{name}.safetensors')
    code, line = resume(copy, capsys)
    assert code == 2 and f'is damaged ({name}.safetensors is not what was written)' in line


def test_a_zeroed_block_is_noticed(copy, capsys):
    path = copy/'checkpoint/weights.safetensors'
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)
    path.write_bytes(content)
    assert resume(copy, capsys)[0] == 2


@pytest.mark.parametrize('change, says', [
    (lambda s: 'null', 'holds no object but a NoneType'),
    (lambda s: '[1,2]', 'holds no object but a list'),
    (lambda s: s[:-40], 'is damaged (state.json'),
    (lambda s: s.replace('"iteration": 2', '"iteration": 1', 1), 'state.json is not what was written'),
    (lambda s: json.dumps(without(json.loads(s), 'history', 'digest')), 'state.json has no history'),
    (lambda s: json.dumps({**json.loads(s), 'digest': None}), 'state.json is not what was written'),
    (lambda s: '[' * 100_000, 'nested too deeply'),
])
def test_a_changed_state_is_refused(copy, capsys, change, says):
    path = copy/'checkpoint/state.json'
    path.write_text(change(path.read_text()))
    code, line = resume(copy, capsys)
    assert code == 2 and says in line


def test_a_missing_tensor_or_file_is_one_line(copy, capsys):
    "Also in a checkpoint of before there were digests."
    path, folder = copy/'checkpoint/state.json', copy/'checkpoint'
    state = without(json.loads(path.read_text()), 'digest', 'digests')
    path.write_text(json.dumps(state))
    assert resume(copy, capsys)[0] == 0
    path.write_text(json.dumps(state))
    weights = load_file(folder/'weights.safetensors')
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name}, folder/'weights.safetensors')
    assert f'weights has no {name}' in resume(copy, capsys)[1]
    save_file(weights | {name: torch.ones(3)}, folder/'weights.safetensors')
    assert f'{name} of weights is (3,), not ' in resume(copy, capsys)[1]
    save_file(weights, folder/'weights.safetensors')
    (folder/'optimizer.safetensors').unlink()
    assert 'it has no optimizer.safetensors' in resume(copy, capsys)[1]


@pytest.mark.parametrize('change, says', [
    (lambda s: '', 'line 1 of'),
    (lambda s: s.split('\n')[0] + '\n', 'line 2 of'),
    (lambda s: s.replace('"reward_std": 0', '"reward_std": 1', 1), 'is not what the checkpoint knows'),
    (lambda s: s.replace('{', '[', 1), 'line 1 of'),
    (lambda s: s.replace('"iteration": 0', '"iteration": 5'), 'metrics'),
    (lambda s: '\0' * len(s), 'line 1 of'),
])
def test_changed_metrics_are_refused(copy, capsys, change, says):
    path = copy/'metrics.jsonl'
    before = path.read_text()
    assert change(before) != before
    path.write_text(change(before))
    code, line = resume(copy, capsys)
    assert code == 2 and line.startswith('egrpo train: error: metrics: ') and says in line


def test_metrics_that_are_gone_begin_anew(copy, capsys):
    "Nothing is computed from them; and the run can be resumed again."
    (copy/'metrics.jsonl').unlink()
    assert resume(copy, capsys)[0] == 0
    assert resume(copy, capsys, 4)[0] == 0
    assert [json.loads(o)['iteration'] for o in (copy/'metrics.jsonl').read_text().splitlines()] == [2, 3]


def test_damaged_embeddings_and_profiles_are_made_again(tmp_path):
    kept = Embeddings(tmp_path)
    kept.put('a red circle', Conditions(torch.arange(6.).view(1, 2, 3)))
    assert 'a red circle' in kept and torch.equal(kept.get('a red circle').embeds.flatten(), torch.arange(6.))
    flip(kept.path('a red circle'), .99)
    assert 'a red circle' not in kept and kept.get('a red circle') is None

    profiles = ProfileCache((1,), tmp_path/'profiles')
    profiles(['a'], lambda new: torch.ones(1, 4))
    flip(next((tmp_path/'profiles').iterdir()), .99)
    assert ProfileCache((1,), tmp_path/'profiles')(['a'], lambda new: torch.zeros(1, 4)).sum() == 0


# ---- one run, one folder

def test_a_folder_in_use_is_refused(copy, capsys, tmp_path):
    "Before anything is loaded by the command line, and by the trainer itself; nothing is changed."
    before = (copy/'metrics.jsonl').read_text()
    with hold(copy):
        code, line = resume(copy, capsys)
        assert code == 2 and f'is in use by process {os.getpid()} on ' in line
        assert main(['demo', '--scale', 'smoke', '--out', str(copy)]) == 2
        trainer = Trainer(TrainConfig(out=str(copy), **{**small, 'iterations': 3}, resume=True))
        with pytest.raises(ValueError, match='is in use by process'): trainer.fit()
    assert (copy/'metrics.jsonl').read_text() == before
    assert resume(copy, capsys)[0] == 0
    assert not (copy/'run.lock').exists()


def test_a_killed_run_leaves_its_folder_free(tmp_path):
    "The operating system lets go of the lock; a process that lives on keeps it."
    code = 'import sys; from egrpo.base.files import hold\nwith hold(sys.argv[1]): print(1, flush=True), sys.stdin.read()'
    command = [sys.executable, '-c', code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=f'in use by process {process.pid} on'): check_free(tmp_path)
        process.send_signal(signal.SIGKILL)
    check_free(tmp_path)


def test_a_run_that_comes_too_late_takes_nothing_away(tmp_path, monkeypatch, capsys):
    "Both began before there was a folder."
    out, both = tmp_path/'run', ExitStack()
    def too_late(self):
        both.enter_context(hold(out))
        (out/'checkpoint').mkdir()
        return fit(self)
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, 'fit', too_late)
    with both:
        assert main(['train', *words, '--iterations', '1', '--out', str(out)]) == 2
        assert 'is in use by process' in capsys.readouterr().err
        assert sorted(p.name for p in out.iterdir()) == ['checkpoint', 'run.lock']


@pytest.mark.parametrize('command', [True, False])
def test_a_new_run_replaces_nothing(copy, tmp_path, capsys, command):
    "No checkpoint without metrics, and no model of the user's own."
    def refused(out, why):
        before = {p: p.stat().st_mtime_ns for p in out.rglob('*') if p.is_file()}
        with pytest.raises(ValueError, match=why): check_out(str(out)) if command else run(out)
        assert {p: p.stat().st_mtime_ns for p in out.rglob('*') if p.is_file()} == before
    (copy/'metrics.jsonl').unlink()
    refused(copy, 'already holds a run')
    (tmp_path/'mine/model').mkdir(parents=True)
    (tmp_path/'mine/model/weights.bin').write_text('years of work')
    refused(tmp_path/'mine', "holds 'model', which is not this run's")


def test_metrics_without_a_checkpoint_are_kept(copy, capsys):
    "It may only have been left behind on another machine."
    before = (copy/'metrics.jsonl').read_text()
    shutil.rmtree(copy/'checkpoint')
    assert resume(copy, capsys)[0] == 0
    assert (copy/'metrics.old.jsonl').read_text() == before


def test_links_stay_links(tmp_path):
    "Checkpoints on another disk, twice replaced; also after a kill between the renames."
    out, disk = tmp_path/'run', tmp_path/'disk'
    disk.mkdir()
    out.mkdir()
    for name in ('checkpoint', 'model'):
        (disk/name).mkdir()
        (out/name).symlink_to(disk/name)
    run(out)
    assert sorted(p.name for p in disk.iterdir()) == ['checkpoint', 'model'] and (disk/'model/model_index.json').exists()
    (disk/'checkpoint').rename(disk/'checkpoint.old')
    assert run(out, iterations=3, resume=True).iteration == 3
    assert (out/'checkpoint').is_symlink() and sorted(p.name for p in disk.iterdir()) == ['checkpoint', 'model']


@pytest.mark.skipif(sys.platform == 'win32', reason='locks of POSIX')
@pytest.mark.parametrize('error', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks(tmp_path, monkeypatch, error):
    "The run warns and goes on; nothing stays that would keep the folder in use after a kill."
    def flock(handle, operation): raise OSError(error, os.strerror(error))
    monkeypatch.setattr('fcntl.flock', flock)
    with pytest.warns(UserWarning, match='has no locks'), hold(tmp_path):
        assert not list(tmp_path.iterdir())
        check_free(tmp_path)


# ---- before the first iteration

@pytest.mark.parametrize('lora', [0, 2])
@pytest.mark.parametrize('error', [OSError('No space left on device'), SafetensorError('I/O error')])
def test_a_model_that_cannot_be_saved_fails_at_once(tmp_path, monkeypatch, capsys, lora, error):
    def save(self, folder): raise error
    monkeypatch.setattr(Policy, 'save', save)
    monkeypatch.setattr(Trainer, 'step', lambda self, iteration: pytest.fail('trained'))
    assert main(['train', *words, '--lora-rank', str(lora), '--out', str(tmp_path/'run')]) == 2
    line = capsys.readouterr().err.strip().split('\n')[-1]
    assert "could not be written" in line and 'free some space' in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_at_the_end_is_one_line(copy, monkeypatch, capsys):
    "The last checkpoint is kept, and the run can be ended when there is space."
    whole = {p.name: p.read_bytes() for p in (copy/'checkpoint').iterdir()}
    save, full = Policy.save, []
    def save_or_fail(self, folder):
        save(self, folder)
        if not full: raise SafetensorError('I/O error: no space left')
    monkeypatch.setattr(Policy, 'save', save_or_fail)
    code, line = resume(copy, capsys, 2)
    assert code == 2 and 'could not be written' in line
    assert {p.name: p.read_bytes() for p in (copy/'checkpoint').iterdir()} == whole
    full.append('no longer')
    assert resume(copy, capsys, 2)[0] == 0
    assert not list(copy.glob('*.new')) and (copy/'model/model_index.json').exists()


# ---- and after

def test_files_have_the_users_umask(tmp_path):
    "safetensors' own writer lets their owner alone read them: neither a group's model nor its cache of embeddings."
    before = os.umask(0o027)
    try:
        run(tmp_path/'run', lora_rank=2, iterations=1, embeddings=str(tmp_path/'embeddings'))
        load_policy(device='cpu').save(tmp_path/'whole')
    finally: os.umask(before)
    files = [p for p in tmp_path.rglob('*') if p.is_file()]
    folders = {p.parent.name for p in files if p.suffix == '.safetensors'}
    assert folders >= {'checkpoint', 'model', 'embeddings', 'transformer', 'vae'}
    assert {oct(p.stat().st_mode & 0o777) for p in files} == {'0o640'}


def test_a_budget_counts_probes_as_if_measured(tmp_path):
    "A run that finds profiles on the disk, as after SIGKILL, ends where one that measures all ends."
    settings = dict(method='aegpo', active_steps=None, num_steps=4, num_generations=4, prompts_per_iteration=2,
                    iterations=50, budget=80, eval_every=0)
    first = run(tmp_path/'first', **settings)
    shutil.copytree(tmp_path/'first/profiles', tmp_path/'second/profiles')
    (tmp_path/'second/profiles/left.0123abcd.new').write_text('a draft of a process that was killed')
    second = run(tmp_path/'second', **settings)
    assert 1 < first.iteration == second.iteration < 50 and first.nfe == second.nfe
    assert not list((tmp_path/'second/profiles').glob('*.new'))

    half = run(tmp_path/'half', **{**settings, 'iterations': first.iteration - 1})
    assert half.nfe < first.nfe
    resumed = run(tmp_path/'half', **settings, resume=True)
    assert (resumed.iteration, resumed.nfe) == (first.iteration, first.nfe)
    for name, weights in first.parameters.items(): assert torch.equal(weights, resumed.parameters[name])


def test_metrics_hold_no_infinity(tmp_path, monkeypatch):
    step = Trainer.step
    monkeypatch.setattr(Trainer, 'step', lambda self, i: step(self, i) | dict(kl=float('inf')))
    run(tmp_path/'run', iterations=1)
    text = (tmp_path/'run/metrics.jsonl').read_text()
    assert 'Infinity' not in text and json.loads(text)['kl'] is None


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    "Each of its files is flushed, and the folder, before the rename; metrics before the checkpoint that counts on them."
    run(tmp_path/'run', iterations=1)
    seen, fsync, replace = [], os.fsync, os.replace
    def flushed(handle):
        seen.append(Path(os.readlink(f'/proc/self/fd/{handle}')).name if sys.platform == 'linux' else '')
        fsync(handle)
    def renamed(a, b):
        seen.append(f'{Path(a).name} -> {Path(b).name}')
        replace(a, b)
    monkeypatch.setattr(os, 'fsync', flushed)
    monkeypatch.setattr(os, 'replace', renamed)
    run(tmp_path/'run', iterations=2, resume=True)
    at = seen.index('checkpoint.new -> checkpoint')
    before, files = seen[:at], [f'{n}.safetensors' for n in ('weights', 'ema', 'optimizer')]
    assert all(name in before for name in (*files, 'state.json', 'checkpoint.new', 'metrics.jsonl')), seen
    assert before.index('metrics.jsonl') < before.index('state.json') and seen[at + 1] == 'run'
    assert load_checkpoint(tmp_path/'run/checkpoint')[1]['iteration'] == 2


