"""Several processes are one run: the same rewards, advantages, metrics and, but for the order of sums, weights; one that is killed goes on.
That holds where each has the whole network, and where they share it."""
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from egrpo import trainer as trainer_module
from egrpo.policy import PASSES, assets_path, load_policy, whole_tensor
from egrpo.small_pipelines import small_pipeline
from egrpo.trainer import TrainConfig, Trainer

SMALL = dict(num_steps=6, num_generations=4, active_steps=2, tau=0, prompts_per_iteration=4, eval_size=3, eval_every=0,
             device='cpu', lr=1e-4)
METHODS = {
    'egrpo, two updates': dict(updates_per_iteration=2, inner_epochs=2, ema_decay=.5),
    'aegpo, unequal groups by prompt': dict(method='aegpo', active_steps=None, tau=None, num_generations=6, top=2, weigh='prompt',
                                            prompts_per_iteration=5),
}
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
ACCELERATE = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_machines', '1', '--mixed_precision', 'no',
              '--dynamo_backend', 'no']
FSDP = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(assets_path('accelerate/8gpu_fsdp.yaml'))]


def command(out, processes=1, shared=False, **settings):
    "A training run's command line."
    settings = {k: v for k, v in {**SMALL, 'iterations': 3, **settings}.items() if v is not None}
    words = [f'--{k.replace("_", "-")}' + ('' if v is True else f'={v}') for k, v in settings.items()]
    launcher = [*(FSDP if shared else ACCELERATE), f'--num_processes={processes}', '--main_process_port=0']
    launch = launcher if processes > 1 else [sys.executable]
    return [*launch, '-m', 'egrpo', 'train', f'--out={out}', *words]


def run(out, processes=1, shared=False, **settings):
    "Run it to its end; its metrics and its weights."
    done = subprocess.run(command(out, processes, shared, **settings), capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()], load_file(out/'checkpoint/weights.safetensors')


def apart(a, b):
    "Mean difference of weights."
    return torch.cat([(a[n] - b[n].detach()).abs().flatten() for n in a]).mean()


def assert_same_run(one, several, lora_rank=0):
    "Metrics equal but for rounding, weights too, measured by how far training moved them."
    (metrics, weights), (others, other_weights) = one, several
    assert apart(weights, other_weights) < .01 * apart(weights, load_policy(device='cpu', lora_rank=lora_rank).parameters())
    for m, o in zip(metrics, others, strict=True):
        assert m.keys() == o.keys() and m['by_step'].keys() == o['by_step'].keys()
        for k in ('nfe_rollout', 'nfe_gradient', 'zero_variance_groups', 'samples', 'explored'): assert m.get(k) == o.get(k), k
        for k in ('reward/verifier', 'reward_std', 'grad_norm'): assert o[k] == pytest.approx(m[k], rel=.02, abs=2e-3), k
        assert o['kl'] == pytest.approx(m['kl'], rel=.02, abs=1e-9)
    assert others[0]['reward/verifier'] == pytest.approx(metrics[0]['reward/verifier'], abs=1e-5) # before any update


@pytest.mark.parametrize('settings', METHODS.values(), ids=METHODS)
def test_one_two_and_four_processes(tmp_path, settings):
    "`accelerate launch` with 2 processes, where groups are unequal also with 4 and with 2 that share the network, against one process."
    one, unequal = run(tmp_path/'one', **settings), 'weigh' in settings
    for n in (2, 4) if unequal else (2,): assert_same_run(one, run(tmp_path/str(n), n, **settings))
    if unequal: assert_same_run(one, run(tmp_path/'shared', 2, shared=True, **settings))


UNEVEN = dict(
    whole=(3, dict(iterations=5, num_steps=4, beta=.01, updates_per_iteration=2, ema_decay=.5, micro_batch=3, gradient_checkpointing=True,
                   eval_size=2)),
    lora=(4, dict(iterations=2, lora_rank=2, lr=1e-3, beta=.01, method='branch_grpo', active_steps=None, tau=None, num_generations=8,
                  num_steps=10, keep=.5, pruned_steps=1, micro_batch=5, prompts_per_iteration=5, eval_size=5)))


@pytest.mark.parametrize('name', UNEVEN)
def test_processes_that_share_the_network_with_unequal_work(tmp_path, name):
    "Prompts, micro-batches, updates and evaluations that do not divide; the model that is saved is that of one process."
    (processes, settings), outs = UNEVEN[name], [tmp_path/'one', tmp_path/'shared']
    one, several = (run(out, n, n > 1, **settings) for out, n in zip(outs, (1, processes)))
    assert_same_run(one, several, settings.get('lora_rank', 0))
    model = 'pytorch_lora_weights' if name == 'lora' else 'transformer/diffusion_pytorch_model'
    scores, others = (pd.read_csv(out/'evaluations.csv') for out in outs)
    assert (scores.prompt == others.prompt).all() and (scores.verifier - others.verifier).abs().max() < .02
    saved, shared = (load_file(out/f'model/{model}.safetensors') for out in outs)
    assert saved.keys() == shared.keys() and apart(saved, shared) < 1e-6
    assert one[1].keys() == several[1].keys() and all(one[1][n].shape == several[1][n].shape for n in one[1])


def test_a_shared_run_is_resumed_by_one_process_and_the_other_way_round(tmp_path):
    "Checkpoints know nothing of processes: kill one of two that share the network, go on alone; stop alone, go on by three."
    settings, killed, stopped = dict(iterations=4, checkpoint_every=2, ema_decay=.5), tmp_path/'killed', tmp_path/'stopped'
    one = run(tmp_path/'straight', **settings)
    kill_after_checkpoint(killed, 2, shared=True, **settings)
    assert_same_run(one, run(killed, **settings, resume=True))
    run(stopped, **settings | dict(iterations=2))
    assert_same_run(one, run(stopped, 3, shared=True, **settings, resume=True))


def test_more_processes_than_prompts(tmp_path):
    "One line says what to change."
    done = subprocess.run(command(tmp_path/'run', 2, prompts_per_iteration=1), capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode and 'prompts_per_iteration (1) must not be below the 2 processes' in done.stderr


def test_killed_worker_stops_the_run_and_resume_goes_on(tmp_path):
    "SIGKILL for one of two processes: the launcher ends, the last checkpoint is whole, resuming arrives where a straight run does."
    settings = dict(iterations=6, checkpoint_every=2)
    straight, killed = tmp_path/'straight', tmp_path/'killed'
    one = run(straight, 2, **settings)
    kill_after_checkpoint(killed, 2, **settings)
    again = run(killed, 2, **settings, resume=True)
    assert [m['iteration'] for m in again[0]] == list(range(6))
    assert all(torch.equal(one[1][n], again[1][n]) for n in one[1])


def kill_after_checkpoint(out, processes, iterations, **settings):
    "Start a run, and kill one of its processes once there is a checkpoint; the launcher ends the others."
    words = command(out, processes, iterations=iterations, **settings)
    job = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while job.poll() is None and not (out/'checkpoint').exists(): time.sleep(.05)
    workers = [int(p) for p in os.listdir('/proc') if p.isdigit() and is_worker(p, out)]
    assert len(workers) == processes
    os.kill(max(workers), signal.SIGKILL)
    assert job.wait(timeout=120) != 0
    assert 2 <= len((out/'metrics.jsonl').read_text().splitlines()) < iterations


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
            one_of_two = SimpleNamespace(process_index=p, num_processes=2, device=torch.device('cpu'), reduce=lambda x, how: x)
            monkeypatch.setattr(trainer, 'accelerator', one_of_two)
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


# ---- a network that is shared, by one process alone

@pytest.fixture
def mesh():
    "A mesh of this process alone."
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh('cpu', (1,))
    dist.destroy_process_group()


def gradients(policy, prompt='a red circle'):
    "The policy's velocity at three latents, and the gradient of its square."
    latents = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with policy.together():
        velocity = policy.velocity(latents, torch.tensor([.2, .5, .9]), policy.encode([prompt] * 3))
        velocity.square().sum().backward()
    return velocity.detach(), {n: whole_tensor(p.grad) for n, p in policy.parameters().items() if p.grad is not None}


@pytest.mark.parametrize('lora_rank', [0, 2])
@pytest.mark.parametrize('dtype', ['fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize('family', ['flux-dev', 'sd3.5', 'sdxl'])
def test_every_family_computes_the_same_when_shared(tmp_path, mesh, family, dtype, lora_rank):
    "Velocity and gradient but for rounding; parameters are parts, a LoRA's excepted; a whole network in fp16 is refused."
    small_pipeline(family).save_pretrained(tmp_path)
    def load(**more): return load_policy(str(tmp_path), 'cpu', dtype, lora_rank, **more)
    if dtype == 'fp16' and not lora_rank:
        with pytest.raises(ValueError, match='dtype fp16 cannot train a whole network that is shared'): load(mesh=mesh)
        return
    plain, shared = load(), load(mesh=mesh)
    frozen = [p for p in shared.transformer.parameters() if not p.requires_grad]
    assert all(isinstance(p, DTensor) for p in (frozen if lora_rank else shared.parameters().values()))
    (v, grads), (other, others) = gradients(plain), gradients(shared)
    error = {'fp32': 1e-5, 'bf16': .1, 'fp16': .02}[dtype] # less than a dtype's distance from fp32
    assert grads.keys() == others.keys() and len(grads) > 10 and plain.nfe == shared.nfe
    for a, b in ((v, other), *((g, others[n]) for n, g in grads.items())): assert (a - b).norm() <= error * a.norm() + 1e-8


def test_a_shared_network_runs_in_company_only(mesh):
    "Outside `together` a pass would wait for the others for ever: refused."
    policy = load_policy(device='cpu', mesh=mesh)
    with torch.no_grad(), pytest.raises(ValueError, match='run it in all of them, inside `with policy.together'):
        policy.velocity(torch.zeros(1, *policy.latent_shape), torch.ones(1), policy.encode(['a red circle']))


def test_one_pass_with_gradient_at_a_time(mesh):
    "Two graphs at once would be gathered in another order than a process that accompanies them does."
    policy = load_policy(device='cpu', mesh=mesh, micro_batch=1)
    batch = torch.zeros(2, *policy.latent_shape), torch.ones(2), policy.encode(['a red circle'] * 2)
    with pytest.raises(ValueError, match='makes one pass with gradient, its backward pass, then the next'), policy.together():
        policy.velocity(*batch)
    with policy.together():
        for _ in range(2): policy.velocity(*(x[:1] for x in batch[:2]), batch[2][:1]).sum().backward()


def test_different_passes_at_once_are_an_error(mesh, monkeypatch):
    "Two processes that would wait for each other see it, and stop."
    policy, other = load_policy(device='cpu', mesh=mesh), PASSES.index('backward')
    policy._joined = True
    monkeypatch.setattr(dist, 'all_reduce', lambda wanted, group: wanted.__setitem__(other, 1.))
    assert policy._announce() == policy._announce('backward') == 'backward'
    with pytest.raises(RuntimeError, match='processes make different passes at once \\(forward, backward\\)'): policy._announce('forward')


@pytest.fixture
def zero3():
    "What accelerate's launcher puts into the environment for the DeepSpeed configuration that comes with the package."
    words = ['--config_file', str(assets_path('accelerate/8gpu_zero3.yaml')), '-m', 'egrpo']
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config, args.main_process_port = ','.join(defaults.deepspeed_config), 0
    assert args.use_deepspeed and args.num_processes == 8
    environment = prepare_deepspeed_cmd_env(args)[1]
    return {k: v for k, v in environment.items() if k.startswith('ACCELERATE')}


def test_a_deepspeed_configuration_shares_the_network(tmp_path, zero3, monkeypatch):
    "Its ZeRO stage 3 is what FSDP does: the same run, to the last bit."
    settings = dict(iterations=1, eval_size=2)
    metrics, weights = run(tmp_path/'fsdp', 2, shared=True, **settings)
    for k, v in zero3.items(): monkeypatch.setitem(ENVIRONMENT, k, v)
    again, others = run(tmp_path/'zero3', 2, **settings)
    assert metrics[0]['reward/verifier'] == again[0]['reward/verifier'] and all(weights[n].equal(others[n]) for n in weights)


@pytest.mark.parametrize('name, value', dict(fsdp_offload_params='true', deepspeed_config_file='ds.json', offload_param_device='cpu',
                                            offload_optimizer_device='nvme').items())
def test_a_launcher_that_asks_for_what_is_not_there(zero3, monkeypatch, name, value):
    "Names it; what is off is not asked for."
    for k, v in zero3.items(): monkeypatch.setenv(k, v)
    assert trainer_module.sharing_asked()
    monkeypatch.setenv('ACCELERATE_DEEPSPEED_ZERO_STAGE', '0')
    assert not trainer_module.sharing_asked()
    monkeypatch.setenv(trainer_module.UNSHAREABLE[name], value)
    with pytest.raises(ValueError, match=f'{name} is not supported'): trainer_module.sharing_asked()


def test_a_reward_that_fails_elsewhere_fails_here(tmp_path, monkeypatch):
    "All processes raise, so all can write the checkpoint."
    trainer = Trainer(TrainConfig(**SMALL, out=str(tmp_path/'run')))
    monkeypatch.setattr(trainer, '_total', lambda count: float(count) + 1)
    with pytest.raises(trainer_module.RewardError, match='the reward failed in another process'):
        trainer._score(torch.zeros(1, 3, 64, 64), ['a red circle'])
