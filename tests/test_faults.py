"""What goes wrong by a user's hand or a machine's: one line that names the argument and the remedy, exit code 2, nothing left behind.

Most cases run in this process through `main`; what only a process of its own can show (signals, the environment) is started as one."""
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from egrpo.cli import planning
from egrpo.cli.commands import main
from egrpo.models.pipeline import limit_hub_waiting
from egrpo.models.policy import load_policy
from egrpo.rewards.reward import RewardError, get_reward
from egrpo.train import checkpoint as checkpoint_module
from egrpo.train.checkpoint import load_checkpoint, read_state, save_checkpoint
from egrpo.train.prepare import training_nfe
from egrpo.train.trainer import Loop, TrainConfig, Trainer

command = Path(sys.executable).parent/'egrpo'
small = '--num-steps 6 --active-steps 2 --num-generations 2 --prompts-per-iteration 1 --eval-size 2 --device cpu'


def tree(folder):
    "Everything under a folder: name → bytes, None for a folder."
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob('*'))}


def fails(words, says, capsys, code=2):
    "Run a command that must fail with one line; returns that line."
    capsys.readouterr()
    words = shlex.split(words)
    assert main(words) == code
    err = capsys.readouterr().err
    lines = [line.split('\r')[-1] for line in err.strip().split('\n')]
    assert lines[-1].startswith(f'egrpo {words[0]}: error: '), err
    assert says in lines[-1], lines[-1]
    assert 'Traceback' not in err
    return lines


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A current folder with the files the cases name; rewards are found in it."
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv('EGRPO_SCALE', raising=False)
    monkeypatch.delenv('EGRPO_DEBUG', raising=False)
    (tmp_path/'empty.txt').write_text('')
    (tmp_path/'blank.txt').write_text('a red circle\n \na blue square\n')
    (tmp_path/'latin.txt').write_bytes('café'.encode('latin-1'))
    (tmp_path/'file').write_text('')
    (tmp_path/'file.safetensors').write_text('plain text')
    (tmp_path/'none.json').write_text('[]')
    (tmp_path/'none.csv').write_text('prompt,style\n')
    (tmp_path/'folder').mkdir()
    (tmp_path/'loop').symlink_to('loop')
    (tmp_path/'deep.json').write_text('[' * 100_000)
    (tmp_path/'utf16.txt').write_text('a fox', encoding='utf-16')
    (tmp_path/'semicolons.csv').write_text('style;prompt\nphoto;a fox\n')
    (tmp_path/'zipped.gz').write_bytes(b'\x1f\x8b')
    os.mkfifo(tmp_path/'fifo')
    return tmp_path


def reward(code):
    "Write a module `mine` with the function `score`."
    Path('mine.py').write_text(f'import torch\ncalls = []\ndef score(images, prompts):\n    calls.append(len(prompts))\n    {code}\n')
    sys.modules.pop('mine', None)
    __import__('importlib').invalidate_caches()


def forget_sources(run):
    "Make a checkpoint one that does not say what its run was made of."
    state = Path(run, 'checkpoint/state.json')
    state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != 'sources'}))


@contextmanager
def one_thread():
    "Inside: one thread here, as in the processes we start, so that sums are the same to the last bit."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield {**os.environ, 'OMP_NUM_THREADS': '1'}
    finally: torch.set_num_threads(threads)


# ---- bad settings

@pytest.mark.parametrize('words, says', [
    ('--method dppo', "method must be one of flow_grpo"),
    ('--tau -1', 'tau must be a finite number >= 0, got -1.0'),
    ('--tau nan', 'argument --tau: must be a finite number of at most 1e+15, got nan'),
    ('--lr 1e38', 'argument --lr: must be a finite number'),
    ('--clip-range inf', 'argument --clip-range: must be a finite number'),
    ('--iterations 99999999999999999999', 'argument --iterations: must be a whole number of at most 1,000,000'),
    ('--num-steps 10001', 'argument --num-steps: must be a whole number of at most 10,000'),
    ('--merge-length 0', 'merge_length must be a whole number from 1'),
    ('--method=--', "argument --method: expected a value, got '--'"),
    ('--prompts loop', "argument --prompts: 'loop' is no path (Too many levels"),
    ('--out loop/run', "argument --out: 'loop/run' is no path"),
    ('--out "a\0b"', 'argument --out: holds a NUL character'),
    ('--reward \udcff', 'argument --reward: is no text in UTF-8'),
    ('--prompts fifo', "prompts: 'fifo' could not be read (it is no regular file)"),
    ('--prompts /dev/zero', "prompts: '/dev/zero' could not be read (it is no regular file)"),
    ('--prompts /proc/self/maps', "prompts: '/proc/self/maps' is empty"),
    ('--prompts deep.json', 'it is nested too deeply'),
    ('--prompts utf16.txt', 'it is in UTF-16): save it in UTF-8'),
    ('--prompts semicolons.csv', "its columns are separated by ';'"),
    ('--prompts zipped.gz', 'is of a kind that is not read'),
    ('--tau 9', 'cannot be reached from step'),
    ('--tau much', "argument --tau: invalid number value: 'much'"),
    ('--active-steps 6', 'active_steps must be from 1 to num_steps - 1 = 5'),
    ('--active-steps 0', 'active_steps must be from 1'),
    ('--num-generations 1', 'num_generations must be >= 2, got 1'),
    ('--num-generations 2.5', 'invalid whole number value'),
    ('--merge-length 9', "from 1 to the schedule's 6 steps, got 9"),
    ('--kernel euler', 'kernel must be one of flow, dance, cps'),
    ('--shift 0', 'shift must be a finite number > 0'),
    ('--noise-level -1', 'noise_level must be a finite number >= 0'),
    ('--prompts nothing.txt', "prompts: 'nothing.txt' could not be read"),
    ('--prompts empty.txt', "prompts: 'empty.txt' is empty"),
    ('--prompts none.json', "prompts: 'none.json' is empty: write one prompt a line"),
    ('--prompts none.csv', "prompts: 'none.csv' is empty"),
    ('--prompts blank.txt', "prompts: line 2 of 'blank.txt' is blank"),
    ('--prompts latin.txt', "prompts: 'latin.txt' could not be read"),
    ('--prompts folder', "prompts: 'folder' could not be read"),
    ('--eval-prompts nothing.txt', "eval_prompts: 'nothing.txt' could not be read"),
    ('--model folder', "model 'folder' is a folder without a model_index.json"),
    ('--model ./flux', "model './flux' is no folder here and no hub id (owner/name)"),
    ('--model flux.1-dev', 'no hub id (owner/name), a size that `egrpo plan` counts'),
    ('--lora-from file.safetensors', "lora_from: 'file.safetensors' cannot be read"),
    ('--reward "hpsv2.1(folder)"', "reward 'hpsv2.1': 'folder' holds no weights: put HPS_v2.1_compressed.pt there"),
    ('--reward "hpsv2.1(file.safetensors)"', "reward 'hpsv2.1': weights: 'file.safetensors' could not be read as plain tensors"),
    ('--eval-rewards "imagereward(blank.txt)"', "reward 'imagereward': weights: 'blank.txt' could not be read as plain tensors"),
    ('--reward beauty', "unknown reward 'beauty'"),
    ('--reward verifier+', "is not a weighted sum of names"),
    ('--reward nowhere:f', "reward 'nowhere:f' cannot be imported"),
    ('--eval-rewards beauty', "unknown reward 'beauty'"),
    ('--combine between', 'combine must be one of after, before'),
    ('--advantage-std median', 'advantage_std must be one of group, batch, none'),
    ('--lr 0', 'lr must be > 0'),
    ('--adam-beta1 1', 'adam_beta1 must be >= 0 and < 1'),
    ('--iterations 0', 'iterations must be >= 1'),
    ('--updates-per-iteration 2', 'updates_per_iteration (2) must not exceed'),
    ('--dtype int4', 'dtype must be one of'),
    ('--resolution -16', 'resolution must be > 0'),
    ('--device gpu0', "device 'gpu0' cannot be used"),
    ('--tracker crystalball', "tracker must be one of"),
    ('--scale giant', "unknown scale 'giant'"),
    ('--resume', "resume: no checkpoint in 'new/run/checkpoint'"),
    ('--out file', "out: 'file/metrics.jsonl' cannot be written"),
    ('--out /proc/egrpo/run', 'cannot be written'),
    ('--out ""', 'out is blank'),
    ('--learning-rate 1', 'unrecognized arguments: --learning-rate'),
])
def test_bad_setting(words, says, here, capsys):
    before = tree(here)
    lines = fails(f'train {small} --out new/run {words}', says, capsys)
    assert len(lines) == 1
    assert tree(here) == before


@pytest.mark.parametrize('words, says', [
    ('sample --prompt ""', 'prompt is blank'),
    ('sample --images 0', 'images must be >= 1'),
    ('sample --prompt a --prompts blank.txt', 'prompt and prompts were both given'),
    ('sample --prompts empty.txt', 'is empty'),
    ('sample --lora nothing', "lora: 'nothing' does not exist"),
    ('sample --lora folder', "lora: 'folder' has no .safetensors file"),
    ('sample --num-steps 0', 'num_steps'),
    ('sample --device cpu --prompt a --embeddings /dev/null', "embeddings: '/dev/null' cannot be written"),
    ('sample --images 99999999999999999999', 'argument --images: must be a whole number of at most 10,000'),
    ('rewards verifier --image /dev/zero', "image: '/dev/zero' could not be read (it is no regular file)"),
    ('rewards verifier --image blank.txt', "image: 'blank.txt' could not be read (cannot identify"),
    ('rewards verifier --image empty.txt', "image: 'empty.txt' is empty"),
    ('plan --iteration -1', 'iteration must be >= 0'),
    ('tune --most 0', 'most must be >= 1'),
    ('demo --out " "', 'out is blank'),
    ('sample --seed -1', 'seed must be a whole number from 0 to 2**64 - 1, got -1'),
    ('evaluate --seed 18446744073709551616', 'argument --seed: must be a whole number of at most 18,446,744,073,709,551,615'),
    ('train --seed -1', 'seed must be a whole number from 0 to 2**64 - 1, got -1'),
    ('sample --out /proc/grid.png', "--out: '/proc/grid.png' cannot be written"),
    ('sample --out folder', "'folder' is a folder"),
    ('evaluate --size 0', 'size must be >= 1'),
    ('evaluate --rewards beauty', "unknown reward 'beauty'"),
    ('evaluate --prompts blank.txt', 'line 2'),
    ('evaluate --model folder', "model 'folder' is a folder without a model_index.json"),
    ('evaluate --out file/scores.csv', 'cannot be written'),
    ('notebooks file', "folder: 'file' is a file: name a folder"),
    ('sample --lora file.safetensors', "lora: 'file.safetensors' cannot be read"),
    ('plan --lora-from file.safetensors', "lora_from: 'file.safetensors' cannot be read"),
    ('plan --tau -1', 'tau must be'),
    ('plan --method dppo', 'method must be one of'),
    ('plan --picture /proc/plan.png', 'cannot be written'),
    ('plan --picture plan.unheard', "'plan.unheard' must end in one of .png"),
    ('sample --out grid', "--out: 'grid' must end in one of .png"),
    ('reproduce fig99', 'experiment must be one of'),
    ('reproduce tau --workers -1', 'workers must be >= 0'),
    ('reproduce tau --scale giant', "unknown scale 'giant'"),
    ('demo --scale flux', "scale 'flux' has no demonstration: it runs at smoke, mini or gpu"),
    ('demo --minutes 0', 'minutes must be > 0'),
    ('demo --out folder/../file', 'is a file'),
])
def test_bad_word_to_another_command(words, says, here, capsys):
    before = tree(here)
    assert len(fails(words, says, capsys)) == 1
    assert tree(here) == before


@pytest.mark.parametrize('words', ['train --tau {}', 'train --prompts {}', 'train --device {}', 'train --{} 3', 'plan --method {}',
                                   'reproduce {}', '{}'])
def test_an_error_is_short(words, here, capsys):
    "However long the word, whatever it holds; it is quoted in at most 200 characters."
    for word in ('x' * 100_000, '\x1b]0;title\x07' * 1000):
        assert main(words.format(word).split()) == 2
        line = capsys.readouterr().err.rstrip('\n')
        assert line.isprintable() and len(line) < 1000 and 'x' * 201 not in line, line[:300]


@pytest.mark.parametrize('settings, says', [
    ('null', 'it holds no object but a NoneType'),
    ('[1, 2]', 'it holds no object but a list'),
    ('{"tau": "2.2"}', "tau must be a number, got '2.2'"),
    ('{"num_steps": 2.5}', 'num_steps must be a whole number, got 2.5'),
    ('{"resume": 1}', 'resume must be true or false, got 1'),
    ('{"lr": NaN}', 'lr must be a finite number'),
    ('{"prompts": null}', 'prompts must be text, got None'),
    ('{"unheard": 1}', "it sets 'unheard', which this version does not know"),
    ('[' * 100_000, 'it is nested too deeply'),
    ('{"tau"', 'Expecting'),
])
def test_settings_of_a_run_that_are_none(settings, says, here, capsys):
    Path('run').mkdir()
    Path('run/metrics.jsonl').write_text('')
    Path('run/config.json').write_text(settings)
    line = fails('train --resume --dry-run --out run', says, capsys)[0]
    assert "resume: 'run/config.json' cannot be read" in line and 'delete it and give all options again' in line


@pytest.mark.parametrize('settings, says', [
    (dict(iterations=10**20), 'iterations must be a whole number of at most 1,000,000'),
    (dict(num_steps=6.), 'num_steps must be a whole number, got 6.0'),
    (dict(lr='1e-4'), "lr must be a number, got '1e-4'"),
    (dict(seed=None), 'seed must be a whole number, got None'),
    (dict(out='a\0b'), 'out holds a NUL character'),
    (dict(vae_tiling='yes'), "vae_tiling must be true or false, got 'yes'"),
])
def test_bad_setting_in_python(settings, says):
    with pytest.raises(ValueError, match=says): Trainer(TrainConfig(**settings))


def test_the_home_folder_is_expanded(here, monkeypatch, capsys):
    "In quotes the shell leaves ~ to us, and so does Python; a run must not end in two places."
    monkeypatch.setenv('HOME', str(here))
    Path('p.txt').write_text('a red circle\n')
    assert main(f"train {small} --iterations 1 --prompts ~/p.txt --eval-rewards verifier --embeddings ~/kept --out ~/run".split()) == 0
    assert {'model', 'evaluations.csv', 'metrics.jsonl', 'checkpoint'} <= {p.name for p in Path('run').iterdir()}
    assert main('evaluate --size 1 --num-steps 2 --device cpu --model ~/run/model --out ~/scores.csv'.split()) == 0
    assert main('plan --picture ~/plan.png'.split()) == 0
    assert Path('scores.csv').exists() and Path('plan.png').exists() and not Path('~').exists()
    config = TrainConfig(out=Path('~/run'), lora_from='~/lora', eval_prompts='~/p.txt')
    assert (config.out, config.lora_from, config.eval_prompts) == tuple(str(here/o) for o in ('run', 'lora', 'p.txt'))


def test_unknown_command(capsys):
    assert main(['trian']) == 2
    assert capsys.readouterr().err.startswith("egrpo: error: argument COMMAND [options]: invalid choice: 'trian'")


def test_debug_shows_the_traceback(here, monkeypatch):
    monkeypatch.setenv('EGRPO_DEBUG', '1')
    with pytest.raises(ValueError, match='tau must be'): main(['plan', '--tau', '-1'])


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def bug(*args): raise TypeError('ours')
    monkeypatch.setattr(planning, 'plan_table', bug)
    with pytest.raises(TypeError): main(['plan'])


def test_out_of_memory_is_one_line(here, monkeypatch, capsys):
    def full(*args): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
    monkeypatch.setattr(Trainer, 'step', full)
    fails(f'train {small} --out new --micro-batch 6', 'not enough memory for micro_batch 6: lower micro_batch to 3', capsys)
    fails(f'train {small} --out new --micro-batch 1', 'take gradient_checkpointing, a LoRA, or a lower resolution', capsys)
    assert not Path('new').exists()


FAILURES = {'memory': torch.OutOfMemoryError('CUDA'), 'nan': FloatingPointError('the gradient is nan'),
            'memory of the CPU': RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")}


@pytest.mark.parametrize('error', FAILURES.values(), ids=FAILURES)
def test_a_failure_before_an_update_keeps_what_was_before(here, monkeypatch, capsys, error):
    "The third iteration fails when its gradient is taken: a checkpoint of two, from which a run with less memory goes on."
    words, real = f'{small} --iterations 4 --checkpoint-every 0 --eval-every 0', Trainer.update
    def update(self, *args):
        if self.iteration == 2: raise error
        return real(self, *args)
    monkeypatch.setattr(Trainer, 'update', update)
    fails(f'train {words} --out run', 'nan' if isinstance(error, FloatingPointError) else 'micro_batch', capsys)
    assert json.loads(Path('run/checkpoint/state.json').read_text())['iteration'] == 2
    monkeypatch.setattr(Trainer, 'update', real)
    assert main(f'train {words} --out run --resume --micro-batch 3'.split()) == 0


def test_a_step_that_fails_half_way_is_not_kept(here, monkeypatch, capsys):
    "It has changed weights: what is there is no longer what was before."
    real = torch.optim.AdamW.step
    def step(self, *args):
        real(self, *args)
        if next(iter(self.state.values()))['step'] == 3: raise torch.OutOfMemoryError('CUDA')
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    fails(f'train {small} --iterations 4 --checkpoint-every 2 --eval-every 0 --out run', 'micro_batch', capsys)
    assert json.loads(Path('run/checkpoint/state.json').read_text())['iteration'] == 2
    assert load_file('run/checkpoint/optimizer.safetensors')['proj_out.bias|step'] == 2


def test_an_evaluation_that_does_not_end_loses_nothing(here, monkeypatch, capsys):
    "Killed, out of memory or interrupted: the checkpoint was written before, and the evaluation is made when resumed."
    words, real = f'{small} --iterations 2 --checkpoint-every 0 --eval-every 1', Trainer.evaluate
    def evaluate(self):
        if self.iteration == 1: raise torch.OutOfMemoryError('CUDA')
        return real(self)
    monkeypatch.setattr(Trainer, 'evaluate', evaluate)
    fails(f'train {words} --out run', 'not enough memory', capsys)
    assert json.loads(Path('run/checkpoint/state.json').read_text())['iteration'] == 1
    monkeypatch.setattr(Trainer, 'evaluate', real)
    for command in ('run --resume', 'straight'): assert main(f'train {words} --out {command}'.split()) == 0
    assert Path('run/evaluations.csv').read_text() == Path('straight/evaluations.csv').read_text()


def test_resume_wants_the_model_it_began_with(here, capsys):
    "A folder whose weights were changed since is another model, whatever it is called."
    policy = load_policy(device='cpu')
    policy.save('model')
    words = f'{small} --model model --lora-rank 2 --iterations 1'
    assert main(f'train {words} --out run'.split()) == 0
    with torch.no_grad(): policy.transformer.proj_out.weight.mul_(1.05)
    policy.save('model')
    fails(f'train {words} --out run --iterations 2 --resume', 'resume: the checkpoint is of another configuration (weights was', capsys)
    config = TrainConfig(**json.loads(Path('run/checkpoint/state.json').read_text())['config'] | dict(resume=True))
    with pytest.raises(ValueError, match='guidance was 3.5, is 7.0'): # of a policy that no configuration describes
        Trainer(config, policy=load_policy('model', 'cpu', lora_rank=2, guidance=7.)).fit()


def test_resume_wants_the_prompts_it_began_with(here, capsys):
    "A file that has changed is another, whatever it is called; one that is only written in another way is the same."
    Path('prompts.txt').write_text('a red circle\na blue square\n')
    words = f'{small} --prompts prompts.txt --out run --eval-rewards verifier'
    assert main(f'train {words} --iterations 1'.split()) == 0
    Path('prompts.txt').write_text('a red circle\r\na blue square')
    assert main(f'train {words} --iterations 2 --resume'.split()) == 0
    before = tree(here)
    Path('prompts.txt').write_text('a red circle\n')
    line = fails(f'train {words} --iterations 3 --resume', 'resume: since the checkpoint prompts was', capsys)[-1]
    assert 'eval_prompts was' in line and 'put it back, or use another `out`' in line
    Path('prompts.txt').write_bytes(before['prompts.txt'])
    fails(f'train {words} --iterations 1 --resume', 'iterations is 1, but the checkpoint is at iteration 2: ask for more', capsys)
    assert tree(here) == before


def test_resume_of_a_checkpoint_that_says_less(tmp_path):
    "One of an earlier version does not know what its run was made of."
    settings = dict(num_steps=6, active_steps=2, num_generations=2, prompts_per_iteration=1, eval_size=2, device='cpu', out=str(tmp_path))
    def dark(images, prompts): return -images.mean((1, 2, 3))
    Trainer(TrainConfig(**settings, iterations=1), reward=dark).fit()
    again = TrainConfig(**settings, iterations=2, resume=True)
    with pytest.raises(ValueError, match='reward was dark, is verifier'): Trainer(again).fit()
    forget_sources(tmp_path)
    Trainer(again).fit()
    assert json.loads((tmp_path/'checkpoint/state.json').read_text())['sources']['reward'] == 'verifier'


# ---- the hub

def test_hub_id_out_of_reach(here, capsys, monkeypatch):
    "As in `make test`, where the hub is switched off."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    before = tree(here)
    lines = fails(f'train {small} --out new --model nobody/nothing', "model 'nobody/nothing' could not be loaded as a hub id", capsys)
    assert len(lines) == 1
    assert tree(here) == before


def test_hub_that_never_answers(here, capsys, monkeypatch):
    "A server that accepts and stays silent: the Hub's own client would wait for ever."
    import huggingface_hub
    from huggingface_hub.utils import _http
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr(limit_hub_waiting, '__defaults__', (.3,))
    with socket.create_server(('127.0.0.1', 0)) as server:
        monkeypatch.setattr(huggingface_hub.model_info.__self__, 'endpoint', f'http://127.0.0.1:{server.getsockname()[1]}')
        began = time.monotonic()
        try: fails('evaluate --model nobody/nothing', 'could not be loaded as a hub id (is the network up', capsys)
        finally: huggingface_hub.set_client_factory(_http.default_client_factory)
    assert time.monotonic() - began < 15


# ---- rewards

@pytest.mark.parametrize('code, says', [
    ('return torch.zeros(len(prompts), 1)', "reward 'mine:score' must return shape (2,), one score per image, got (2, 1)"),
    ('return 0.5', 'must return shape (2,)'),
    ('return "good"', 'must return 2 numbers'),
    ('return torch.full((len(prompts),), float("nan"))', "reward 'mine:score' gave nan for prompt"),
    ('return [float("inf")] * len(prompts)', "reward 'mine:score' gave inf for prompt"),
    ('return undefined', "reward 'mine:score' raised NameError"),
    ('raise OSError("weights.pt is not here: download it")', 'weights.pt is not here: download it'),
])
def test_bad_reward(code, says, here, capsys, monkeypatch):
    "Known before the model is loaded."
    monkeypatch.setattr('egrpo.models.policy.load_pipeline', lambda *args: pytest.fail('the model was loaded'))
    reward(code)
    before = tree(here)
    assert len(fails(f'train {small} --out new --reward mine:score', says, capsys)) == 1
    assert {k: v for k, v in tree(here).items() if '__pycache__' not in k} == before


def test_reward_that_fails_in_the_first_iteration(here, capsys):
    "After the evaluation, before anything is learnt: still nothing is left."
    reward('if len(calls) > 1: raise RuntimeError("no more")\n    return [0.] * len(prompts)')
    fails(f'train {small} --out deep/new/run --reward mine:score', 'raised RuntimeError', capsys)
    assert not Path('deep').exists()
    assert 'no more' in fails(f'train {small} --out folder --reward mine:score', 'raised RuntimeError', capsys)[-1]
    assert list(Path('folder').iterdir()) == []


def test_reward_that_fails_later(here, capsys):
    "One call tries it, then one per iteration: the checkpoint of the second one is named, whole, and can be gone on from."
    reward('if len(calls) == 4: raise RuntimeError("no more")\n    return [float(i) for i in range(len(prompts))]')
    words = f'train {small} --out run --reward mine:score --iterations 3'
    line = fails(f'{words} --checkpoint-every 1', "raised RuntimeError", capsys)[-1]
    assert "the last checkpoint is 'run/checkpoint', of iteration 2: go on with --resume" in line
    reward('return [float(i) for i in range(len(prompts))]')
    line = fails(f'{words} --resume', 'resume: since the checkpoint the code of mine:score was', capsys)[-1]
    assert "(if you mean it, delete 'sources' from 'run/checkpoint/state.json')" in line
    forget_sources('run')
    assert main(shlex.split(f'{words} --resume')) == 0
    assert [json.loads(o)['iteration'] for o in Path('run/metrics.jsonl').read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize('call, said', [
    (2, ': no more'), (3, ": no more (the last checkpoint is 'run/checkpoint', of iteration 1: go on with --resume)")])
def test_reward_that_fails_between_checkpoints(here, capsys, call, said):
    "In the first iteration nothing is lost; later, what was trained before is saved and the message says how to go on."
    reward(f'if len(calls) == {call}: raise RuntimeError("no more")\n    return [float(i) for i in range(len(prompts))]')
    line = fails(f'train {small} --out run --reward mine:score --checkpoint-every 0', 'raised RuntimeError', capsys)[-1]
    assert line.endswith(said)


def test_a_slow_reward_is_seen(here):
    "Its seconds are among the rollout's."
    reward('__import__("time").sleep(.3 * (len(calls) == 2))\n    return [float(i) for i in range(len(prompts))]')
    assert main(shlex.split(f'train {small} --out run --reward mine:score --eval-rewards verifier --iterations 2')) == 0
    slow, fast = (json.loads(o) for o in Path('run/metrics.jsonl').read_text().splitlines())
    assert .3 <= slow['seconds_reward'] < slow['seconds_rollout'] and fast['seconds_reward'] < .3


# ---- folders and disks

def test_killed_while_a_checkpoint_or_a_line_is_written(here):
    "Half a line of metrics and a checkpoint that is still beside its place: the run goes on."
    words = f'train {small} --out run --iterations'
    assert main(shlex.split(f'{words} 2')) == 0
    with open('run/metrics.jsonl', 'a') as f: f.write('{"iteration": 2, "rew')
    Path('run/checkpoint').rename('run/checkpoint.old')
    assert main(shlex.split(f'{words} 3 --resume')) == 0
    assert [json.loads(o)['iteration'] for o in Path('run/metrics.jsonl').read_text().splitlines()] == [0, 1, 2]
    assert sorted(p.name for p in Path('run').glob('checkpoint*')) == ['checkpoint']


def test_killed_before_the_first_checkpoint(here, capsys):
    "With --resume the run starts anew in its folder, and ends as one that was not killed."
    words = f'train {small} --iterations 1'
    for out in ('run', 'straight'): assert main(shlex.split(f'{words} --out {out}')) == 0
    shutil.rmtree('run/checkpoint')
    fails(f'{words} --out run', "already holds a run: add --resume", capsys)
    assert main(shlex.split(f'{words} --out run --resume')) == 0
    said = capsys.readouterr()
    assert "the run in 'run' ended before its first checkpoint: it starts anew" in said.out + said.err
    assert metrics('run') == metrics('straight')
    assert Path('run/evaluations.csv').read_text() == Path('straight/evaluations.csv').read_text()


def test_a_lora_is_of_use_before_the_run_ends(here, monkeypatch, capsys):
    "Beside every checkpoint stands the model of the same iteration."
    def killed(self): raise RuntimeError('killed')
    monkeypatch.setattr(Loop, '_close', killed)
    words = f'train {small} --lora-rank 2 --ema-decay 0 --lr .01 --iterations 2 --out run'.split()
    with pytest.raises(RuntimeError, match='killed'): main(words)
    saved = load_file('run/checkpoint/weights.safetensors')
    held = dict(load_policy(device='cpu', lora_rank=0, lora_from='run/model').parameters())
    assert saved.keys() == held.keys() and all(torch.equal(saved[k], held[k]) for k in saved)


def test_the_last_checkpoint_outlives_one_that_cannot_be_written(tmp_path, monkeypatch):
    "Also where it is still beside its place."
    save_checkpoint(tmp_path/'checkpoint', {}, dict(iteration=1))
    (tmp_path/'checkpoint').rename(tmp_path/'checkpoint.old')
    def full(*args): raise OSError('no space left')
    monkeypatch.setattr(checkpoint_module, '_write', full)
    with pytest.raises(OSError, match='the last whole one is kept'): save_checkpoint(tmp_path/'checkpoint', {}, dict(iteration=2))
    assert load_checkpoint(tmp_path/'checkpoint')[1] == dict(iteration=1)


@pytest.mark.parametrize('call, iteration, budget', [(2, 2, None), (4, 5, None), (3, 3, 3)]) # evaluations at 0, 2, 4, 5; at 0, 2, 3
def test_evaluation_that_fails(tmp_path, call, iteration, budget):
    "All that was trained is in the checkpoint, and the evaluation that failed is made when the run goes on."
    calls, settings = [], dict(iterations=5, eval_every=2, eval_size=2, checkpoint_every=0, num_steps=4, tau=0, active_steps=2,
                               num_generations=2, device='cpu')
    if budget: settings['budget'] = training_nfe(TrainConfig(**settings), budget)
    class Trial(Trainer):
        "A trainer whose evaluations' rewards can fail."
        def evaluate(self):
            "Count, and fail once."
            calls.append(1)
            if len(calls) == call: self.eval_reward = get_reward(lambda images, prompts: 1 / 0)
            return super().evaluate()
    straight, broken = tmp_path/'straight', tmp_path/'broken'
    whole = Trainer(TrainConfig(**settings, out=str(straight))).fit()
    with pytest.raises(RewardError): Trial(TrainConfig(**settings, out=str(broken))).fit()
    assert load_checkpoint(broken/'checkpoint')[1]['iteration'] == iteration
    pd.testing.assert_frame_equal(Trainer(TrainConfig(**settings, out=str(broken), resume=True)).fit(), whole)
    (tensors, info), (others, other) = (load_checkpoint(o/'checkpoint') for o in (straight, broken))
    assert info['history'] == other['history'] and all(torch.equal(w, others['weights'][n]) for n, w in tensors['weights'].items())


def test_folder_that_holds_a_run(here, capsys):
    words = f'train {small} --iterations 1 --out run'
    assert main(shlex.split(words)) == 0
    before = tree(here)
    fails(words, "already holds a run: add --resume", capsys)
    fails(f'{words} --resume --tau 1.8', 'resume: the checkpoint is of another configuration (tau was 2.2, is 1.8)', capsys)
    fails(f'{words} --resume --lora-rank 2', 'lora_rank was 0, is 2', capsys)
    fails('demo --scale smoke --out run', 'holds something that is no demo of ours', capsys)
    assert tree(here) == before
    weights = Path('run/checkpoint/weights.safetensors')
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(f'{words} --resume', "checkpoint 'run/checkpoint' is damaged", capsys)


def test_disk_full_before(here, capsys, monkeypatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
    before = tree(here)
    fails(f'train {small} --out new/run', 'MiB free, the run needs about', capsys)
    fails('demo --scale smoke --out new/demo', 'MiB free, the run needs about', capsys)
    assert tree(here) == before


@contextmanager
def largest_file(size):
    "Inside: the system refuses to let a file grow beyond `size` bytes, as a full disk would."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_in_the_middle(here, capsys):
    words = f'train {small} --out run --checkpoint-every 1'
    assert main(shlex.split(f'{words} --iterations 1')) == 0
    whole = tree(here/'run/checkpoint')
    with largest_file(100_000):
        line = fails(f'{words} --iterations 2 --resume', "checkpoint 'run/checkpoint' could not be written", capsys)[-1]
    assert 'the last checkpoint is' in line and 'of iteration 1' in line
    assert tree(here/'run/checkpoint') == whole and not Path('run/checkpoint.new').exists()
    assert main(shlex.split(f'{words} --iterations 2 --resume')) == 0


# ---- interruptions

def test_interrupted_before_the_first_iteration(here, monkeypatch, capsys):
    def interrupted(self): raise KeyboardInterrupt
    monkeypatch.setattr(Trainer, 'evaluate', interrupted)
    assert main(shlex.split(f'train {small} --out new/run')) == 130
    assert capsys.readouterr().err.endswith('\negrpo train: interrupted\n') and not Path('new').exists()


@contextmanager
def started(words, env):
    "A command in a process of its own, ended at the latest when the block is left."
    process = subprocess.Popen([command, *shlex.split(words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try: yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close(), process.stderr.close()


def wait_for(path, process, seconds=90):
    "Wait until a running process has made a file."
    until = time.monotonic() + seconds
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < until, process.stderr.read() if process.poll() is not None else 'too slow'
        time.sleep(.02)


def wait_for_checkpoint(run, process, seconds=90):
    "Wait until a running process has saved an iteration; before the first it has saved once."
    until = time.monotonic() + seconds
    while True:
        with suppress(OSError, ValueError): # it may be replaced just now
            if read_state(Path(run, 'checkpoint'))['iteration']: return
        assert process.poll() is None and time.monotonic() < until
        time.sleep(.02)


def metrics(run):
    "What a run has logged, without its times."
    lines = [json.loads(o) for o in Path(run, 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in o.items() if not k.startswith('seconds')} for o in lines]


def test_killed_run_resumes_to_the_bit(here, measured):
    words = f'train {small} --checkpoint-every 1 --ema-decay 0.5 --eval-every 0'
    with one_thread() as env:
        with started(f'{words} --iterations 500 --out killed', env) as process:
            wait_for('killed/metrics.jsonl', process)
            wait_for_checkpoint('killed', process)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        saved = next(p for p in map(Path, ('killed/checkpoint', 'killed/checkpoint.old')) if p.exists())
        last = json.loads((saved/'state.json').read_text())['iteration'] + 1
        assert last < 500
        assert main(shlex.split(f'{words} --iterations {last} --out killed --resume')) == 0
        assert main(shlex.split(f'{words} --iterations {last} --out straight')) == 0
    largest = {}
    for part in ('weights', 'ema', 'optimizer'):
        a, b = (load_file(f'{run}/checkpoint/{part}.safetensors') for run in ('killed', 'straight'))
        largest[part] = max((a[k] - b[k]).abs().max() for k in a)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
    measured('1 process, killed, resumed, largest difference from a straight run', **largest)
    killed, straight = metrics('killed'), metrics('straight')
    assert killed == straight and len(killed) == last


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_request_to_stop_leaves_a_checkpoint(here, how):
    "Ctrl-C, or what a cluster sends before it takes the machine back."
    words = f'train {small} --iterations 500 --checkpoint-every 0 --eval-every 0 --out run'
    with started(words, {**os.environ, 'OMP_NUM_THREADS': '1'}) as process:
        wait_for('run/metrics.jsonl', process)
        process.send_signal(how)
        if how == signal.SIGTERM: process.send_signal(how) # a launcher passes on what a cluster sends to all
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err # what was to come next in the shell does not
    state = json.loads(Path('run/checkpoint/state.json').read_text())
    assert f'stopped after {state["iteration"]} of 500 iterations' in out and 'Traceback' not in err
    assert len(Path('run/metrics.jsonl').read_text().splitlines()) == state['iteration'] < 500
    assert Path('run/model/model_index.json').exists() and 'stopping after this iteration' in out + err


def test_a_fault_is_one_line_in_the_shell(tmp_path):
    words = [command, 'train', '--reward', 'math:sqrt', '--out', 'new']
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1 and done.stderr.startswith("egrpo train: error: reward 'math:sqrt' raised TypeError"), done.stderr
    assert not list(tmp_path.iterdir())
