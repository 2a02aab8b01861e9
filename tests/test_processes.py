"Several processes are one run: the same rewards, advantages, metrics and, but for the order of sums, weights; one that is killed goes on."
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from egrpo import trainer as trainer_module
from egrpo.policy import load_policy
from egrpo.trainer import TrainConfig, Trainer

SMALL = dict(num_steps=6, num_generations=4, active_steps=2, tau=0, prompts_per_iteration=4, eval_size=3, eval_every=0,
             device='cpu', lr=1e-4)
METHODS = {
    'egrpo, two updates': dict(updates_per_iteration=2, inner_epochs=2, ema_decay=.5),
    'flow_grpo, std of the batch': dict(method='flow_grpo', active_steps=None, advantage_std='batch', tau=0),
    'aegpo, unequal groups by prompt': dict(method='aegpo', active_steps=None, num_generations=6, top=2, weigh='prompt',
                                            prompts_per_iteration=5),
}
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
ACCELERATE = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_machines', '1', '--mixed_precision', 'no',
              '--dynamo_backend', 'no']


def command(out, processes=1, **settings):
    "A training run's command line."
    settings = {k: v for k, v in {**SMALL, 'iterations': 3, **settings}.items() if v is not None}
    words = [f'--{k.replace("_", "-")}' + ('' if v is True else f'={v}') for k, v in settings.items()]
    launch = [*ACCELERATE, f'--num_processes={processes}', '--main_process_port=0'] if processes > 1 else [sys.executable]
    return [*launch, '-m', 'egrpo', 'train', f'--out={out}', *words]


def run(out, processes=1, **settings):
    "Run it to its end; its metrics and its weights."
    done = subprocess.run(command(out, processes, **settings), capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()], load_file(out/'checkpoint/weights.safetensors')


def apart(a, b):
    "Mean difference of weights."
    return torch.cat([(a[n] - b[n].detach()).abs().flatten() for n in a]).mean()


def assert_same_run(one, several):
    "Metrics equal but for rounding, weights too, measured by how far training moved them."
    (metrics, weights), (others, other_weights) = one, several
    assert apart(weights, other_weights) < .01 * apart(weights, load_policy(device='cpu').parameters())
    for m, o in zip(metrics, others, strict=True):
        assert m.keys() == o.keys() and m['by_step'].keys() == o['by_step'].keys()
        for k in ('nfe_rollout', 'nfe_gradient', 'zero_variance_groups', 'samples', 'explored'): assert m.get(k) == o.get(k), k
        for k in ('reward/verifier', 'reward_std', 'grad_norm'): assert o[k] == pytest.approx(m[k], rel=.02, abs=2e-3), k
    assert others[0]['reward/verifier'] == pytest.approx(metrics[0]['reward/verifier'], abs=1e-5) # before any update


@pytest.mark.parametrize('settings', METHODS.values(), ids=METHODS)
def test_one_two_and_four_processes(tmp_path, settings):
    "`accelerate launch` with 2 processes, and with 4 for one method, against one process."
    one = run(tmp_path/'one', **settings)
    for n in (2, 4) if 'weigh' in settings else (2,): assert_same_run(one, run(tmp_path/str(n), n, **settings))


def test_more_processes_than_prompts(tmp_path):
    "One line says what to change."
    done = subprocess.run(command(tmp_path/'run', 2, prompts_per_iteration=1), capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode and 'prompts_per_iteration (1) must not be below the 2 processes' in done.stderr


def test_killed_worker_stops_the_run_and_resume_goes_on(tmp_path):
    "SIGKILL for one of two processes: the launcher ends, the last checkpoint is whole, resuming arrives where a straight run does."
    settings = dict(iterations=6, checkpoint_every=2)
    straight, killed = tmp_path/'straight', tmp_path/'killed'
    one = run(straight, 2, **settings)
    job = subprocess.Popen(command(killed, 2, **settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while job.poll() is None and not (killed/'checkpoint').exists(): time.sleep(.05)
    workers = [int(p) for p in os.listdir('/proc') if p.isdigit() and is_worker(p, killed)]
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGKILL)
    assert job.wait(timeout=120) != 0
    done = len((killed/'metrics.jsonl').read_text().splitlines())
    assert 2 <= done < 6
    again = run(killed, 2, **settings, resume=True)
    assert [m['iteration'] for m in again[0]] == list(range(6))
    assert all(torch.equal(one[1][n], again[1][n]) for n in one[1])


def is_worker(pid, out):
    "Is it a training process of this run, and not its launcher?"
    try: words = open(f'/proc/{pid}/cmdline', 'rb').read().split(b'\0')
    except OSError: return False
    return f'--out={out}'.encode() in words and not any(b'accelerate' in w or b'torch.distributed' in w for w in words)


# ---- one process that believes it is one of two

def advantages_of_two(trainer, monkeypatch, gather):
    "Advantages of an iteration whose four prompts two processes share, by prompt; `gather` joins what both give to `gather_object`."
    local, given = [], []
    for ids in ([0, 2], [1, 3]):
        monkeypatch.setattr(trainer, '_mine', lambda plans, ids=ids: ids)
        _, _, out, _, rewards = trainer.sample(0)
        local.append((ids, out, rewards))
    for run in ('collect', 'join'):
        found = {}
        for p, (ids, out, rewards) in enumerate(local):
            monkeypatch.setattr(trainer, 'accelerator', SimpleNamespace(process_index=p, num_processes=2))
            joined = gather if run == 'join' else lambda both, own, p: given.append(own[0]) or [own[0]] * 2
            monkeypatch.setattr(trainer_module, 'gather_object', lambda own, p=p, joined=joined: joined(given, own, p))
            advantages, _ = trainer.advantages(out, rewards)
            found |= {i: advantages[out.prompt[out.row] == place] for place, i in enumerate(ids)}
    return torch.cat([found[i] for i in range(4)])


def test_std_of_the_batch_is_that_of_all_processes(tmp_path, monkeypatch):
    "Two processes find the advantages of one; a planted process that sees itself alone does not."
    settings = {**SMALL, 'method': 'flow_grpo', 'active_steps': None, 'advantage_std': 'batch', 'out': str(tmp_path/'run')}
    trainer = Trainer(TrainConfig(**settings))
    _, _, out, _, rewards = trainer.sample(0)
    whole, _ = trainer.advantages(out, rewards)
    one = torch.cat([whole[out.prompt[out.row] == i] for i in range(4)])
    torch.testing.assert_close(advantages_of_two(trainer, monkeypatch, lambda both, own, p: both), one, rtol=1e-3, atol=1e-3)
    alone = advantages_of_two(trainer, monkeypatch, lambda both, own, p: [own[0] if i == p else [t[:0] for t in own[0]] for i in range(2)])
    assert (alone - one).abs().max() > .01
