"""Several processes are one run: the same rewards, advantages, metrics and, but for the order of sums, weights; one that is killed goes on.
That holds where each has the whole network, and where they share it."""
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessRaisedException

from egrpo.cli.commands import main
from egrpo.models.pipeline import assets_path
from egrpo.models.policy import load_policy
from egrpo.models.sharing import PASSES, whole_tensor
from egrpo.rewards.reward import RewardError
from egrpo.testing.pipelines import small_pipeline
from egrpo.train import processes as processes_module
from egrpo.train.trainer import TrainConfig, Trainer

SMALL = dict(num_steps=6, num_generations=4, active_steps=2, tau=0, prompts_per_iteration=4, eval_size=3, eval_every=0,
             device='cpu', lr=1e-4)
METHODS = {
    'egrpo, two updates': dict(updates_per_iteration=2, inner_epochs=2, ema_decay=.5),
    'aegpo, unequal groups by prompt': dict(method='aegpo', active_steps=None, tau=None, num_generations=6, top=2, weigh='prompt',
                                            prompts_per_iteration=5, update_each_step=True),
}
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
ACCELERATE = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_machines', '1', '--mixed_precision', 'no',
              '--dynamo_backend', 'no']
FSDP = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(assets_path('accelerate/8gpu_fsdp.yaml'))]

# `run`'s processes find them imported
multiprocessing.set_forkserver_preload(['egrpo.train.trainer', 'accelerate.commands.launch', 'pytest'])


def command(out, processes, shared=False, **settings):
    "The command line of a run by `accelerate launch`."
    launch = [*(FSDP if shared else ACCELERATE), f'--num_processes={processes}', '--main_process_port=0']
    return [*launch, '-m', 'egrpo', *train(out, settings)]


def train(out, settings):
    "The words of egrpo's command line."
    settings = {k: v for k, v in {**SMALL, 'iterations': 3, **settings}.items() if v is not None}
    return ['train', f'--out={out}', *(f'--{k.replace("_", "-")}' + ('' if v is True else f'={v}') for k, v in settings.items())]


def keep_samples():
    "From now on every iteration's latents, rewards and advantages are kept, by prompt."
    kept, sample, advantages = [], Trainer.sample, Trainer.advantages
    def sampled(self, *args):
        found = sample(self, *args)
        kept.append(dict.fromkeys(map(str, found[0])))
        return found
    def compared(self, out, rewards):
        found, (reward,) = advantages(self, out, rewards), rewards.values()
        for i, prompt in enumerate(kept[-1]):
            own = out.leaf_prompt == i
            kept[-1][prompt] = out.latents[own], reward[own], found[0][out.prompt[out.row] == i]
        return found
    Trainer.sample, Trainer.advantages = sampled, compared
    return kept


def process(rank, out, words, environment):
    "One process of a run, with the environment that a launcher gives it; what it sampled goes to a file."
    os.environ.update(environment)
    if environment: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    kept = keep_samples()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said: code = main(words)
    assert code == 0, said.getvalue()[-3000:]
    assert not dist.is_initialized() # else torch warns that a group was left behind
    torch.save(kept, f'{out}.{rank}')


def run(out, processes=1, shared=False, environment=(), **settings):
    "As launchers do, but without seconds of imports for each process: metrics, weights, and prompt → samples of each iteration."
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    group = dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    group = (group | dict(environment) | (dict(ACCELERATE_USE_FSDP='true') if shared else {})) if processes > 1 else {}
    words = out, train(out, settings), group
    jobs = torch.multiprocessing.start_processes(process, words, processes, join=False, daemon=True, start_method='forkserver')
    assert any(jobs.join(600) for _ in range(processes)), 'a process hangs'
    samples = [torch.load(f'{out}.{rank}') for rank in range(processes)]
    return result(out, [{k: v for own in together for k, v in own.items()} for together in zip(*samples)])


def result(out, samples=()):
    "A finished run's metrics and weights, with what it sampled."
    metrics = [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]
    return SimpleNamespace(metrics=metrics, weights=load_file(out/'checkpoint/weights.safetensors'), samples=samples)


def apart(a, b):
    "Largest difference of tensors that have names."
    assert a.keys() == b.keys() and all(a[n].shape == b[n].shape for n in a)
    return max(float((a[n] - b[n].detach()).abs().max()) for n in a)


# What the order of sums may come to. A group whose rewards are almost equal is divided by its small std, hence the wide bound of
# advantages; AdamW moves a weight whose gradient is almost nothing by its sign, 1e-4 a step here: the bound of weights is half a step.
LARGEST = dict(latents=2e-4, rewards=2e-5, advantages=2e-3, weights=5e-5)


def assert_same_run(one, other, lora_rank=0):
    "But for the order of sums: metrics, of what was sampled latents, rewards and advantages, and weights, which training has moved."
    assert apart(one.weights, load_policy(device='cpu', lora_rank=lora_rank).parameters()) > 2e-4
    for m, o in zip(one.metrics, other.metrics, strict=True):
        assert m.keys() == o.keys() and m['by_step'].keys() == o['by_step'].keys()
        for k in ('nfe_rollout', 'nfe_gradient', 'zero_variance_groups', 'samples', 'explored'): assert m.get(k) == o.get(k), k
        for k in ('reward/verifier', 'reward_std'): assert o[k] == pytest.approx(m[k], abs=1e-5), k
        for k in ('grad_norm', 'kl'): assert o[k] == pytest.approx(m[k], rel=1e-4, abs=1e-9), k
    pairs = list(zip(one.samples[-len(other.samples):], other.samples, strict=True)) # a run that was resumed knows its last ones
    def kind(i): return max(apart(*({prompt: kinds[i] for prompt, kinds in o.items()} for o in pair)) for pair in pairs)
    found = dict(latents=kind(0), rewards=kind(1), advantages=kind(2), weights=apart(one.weights, other.weights))
    assert all(found[name] < LARGEST[name] for name in found), found
    return found


@pytest.mark.parametrize('settings', METHODS.values(), ids=METHODS)
def test_one_two_and_four_processes(tmp_path, measured, settings):
    "2 and 4 processes, where groups are unequal also 2 that share the network, against one, over five iterations."
    one, unequal = run(tmp_path/'one', iterations=5, **settings), 'weigh' in settings
    assert not unequal or min(one.metrics[-1]['samples']) < max(one.metrics[-1]['samples'])
    for n, shared in ((2, False), (4, False), (2, True))[:3 if unequal else 2]:
        other = run(tmp_path/f'{n}{shared}', n, shared, iterations=5, **settings)
        name = f'{settings.get("method", "egrpo")}, 5 iterations by {n} processes' + ' that share the network' * shared
        measured(f'{name}, largest differences from one', **assert_same_run(one, other))


UNEVEN = dict(
    whole=(3, dict(iterations=5, num_steps=4, beta=.01, updates_per_iteration=2, ema_decay=.5, micro_batch=3, gradient_checkpointing=True,
                   eval_size=2)),
    lora=(4, dict(iterations=2, lora_rank=2, lr=1e-3, beta=.01, method='branch_grpo', active_steps=None, tau=None, num_generations=8,
                  num_steps=10, keep=.5, pruned_steps=1, micro_batch=5, prompts_per_iteration=5, eval_size=5)),
    forward=(2, dict(iterations=2, method='nft', active_steps=None, tau=None, num_generations=4, num_steps=5, ema_decay=.5,
                     sample_with='average', beta=.01, micro_batch=5, prompts_per_iteration=3, eval_size=3)),
    preference=(2, dict(iterations=2, method='dgpo', active_steps=None, tau=None, num_generations=4, num_steps=5, lr=1e-3, beta=0.,
                        micro_batch=5, prompts_per_iteration=3, eval_size=3)),
    by_prompt=(2, dict(iterations=2, method='flash_grpo', active_steps=None, tau=None, num_generations=4, num_steps=6,
                       advantage_std='batch', micro_batch=3, prompts_per_iteration=3, eval_size=3)))


@pytest.mark.parametrize('name', UNEVEN)
def test_processes_that_share_the_network_with_unequal_work(tmp_path, name):
    "Prompts, micro-batches, updates and evaluations that do not divide; the model that is saved is that of one process."
    (processes, settings), outs = UNEVEN[name], [tmp_path/'one', tmp_path/'shared']
    one, several = (run(out, n, n > 1, **settings) for out, n in zip(outs, (1, processes)))
    assert_same_run(one, several, settings.get('lora_rank', 0))
    model = 'pytorch_lora_weights' if name == 'lora' else 'transformer/diffusion_pytorch_model'
    scores, others = (pd.read_csv(out/'evaluations.csv') for out in outs)
    assert (scores.prompt == others.prompt).all() and (scores.verifier - others.verifier).abs().max() < 1e-4
    pictures, shown = ({p.relative_to(out).as_posix() for p in (out/'samples').rglob('*.png')} for out in outs)
    assert pictures == shown and {'samples/0.png', f'samples/now/{len(scores.prompt.unique()) - 1}.png', 'samples/group/best.png'} <= shown
    saved, shared = (load_file(out/f'model/{model}.safetensors') for out in outs)
    assert apart(saved, shared) < LARGEST['weights']


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
    with pytest.raises(ProcessRaisedException, match=r'error: prompts_per_iteration \(1\) must not be below the 2 processes'):
        run(tmp_path/'run', 2, prompts_per_iteration=1)


def test_killed_worker_stops_the_run_and_resume_goes_on(tmp_path, measured):
    """SIGKILL for one of two processes of `accelerate launch`: the launcher ends, the last checkpoint is whole,
    and resuming arrives where a straight run of the launcher does, to the last bit."""
    settings, straight, killed = dict(iterations=6, checkpoint_every=2), tmp_path/'straight', tmp_path/'killed'
    done = subprocess.run(command(straight, 2, **settings), capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    kill_after_checkpoint(killed, 2, **settings)
    one, again = result(straight), run(killed, 2, **settings, resume=True)
    measured('2 processes, one killed, resumed, largest difference from a straight run', weights=apart(one.weights, again.weights))
    assert [m['iteration'] for m in again.metrics] == list(range(6))
    assert all(torch.equal(w, again.weights[n]) for n, w in one.weights.items())


def kill_after_checkpoint(out, processes, iterations, **settings):
    "Start a run, and kill one of its processes once there is a checkpoint; the launcher ends the others."
    words = command(out, processes, iterations=iterations, **settings)
    job = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        while job.poll() is None and not saved(out): time.sleep(.05)
        workers = workers_of(out)
        assert len(workers) == processes
        os.kill(max(workers), signal.SIGKILL)
        assert job.wait(timeout=120) != 0
    finally:
        job.kill()
        for worker in workers_of(out):
            with suppress(ProcessLookupError): os.kill(worker, signal.SIGKILL)
    assert 2 <= len((out/'metrics.jsonl').read_text().splitlines()) < iterations


def saved(out):
    "Iterations in a run's checkpoint; 0 while there is none."
    try: return json.loads((out/'checkpoint/state.json').read_text())['iteration']
    except OSError: return 0


def workers_of(out):
    "The training processes of a run."
    return [int(p) for p in os.listdir('/proc') if p.isdigit() and is_worker(p, out)]


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
        monkeypatch.setattr(trainer.processes, 'share', lambda plans, ids=ids: ids)
        _, _, out, rewards = trainer.sample(0)
        local.append((ids, out, rewards))
    for run in ('collect', 'join'):
        found = {}
        for p, (ids, out, rewards) in enumerate(local):
            one_of_two = SimpleNamespace(process_index=p, num_processes=2, device=torch.device('cpu'), reduce=lambda x, how: x)
            monkeypatch.setattr(trainer.objective, 'processes', processes_module.Processes(one_of_two))
            joined = gather if run == 'join' else lambda both, own, p: given.append(own[0]) or [own[0]] * 2
            monkeypatch.setattr(processes_module, 'gather_object', lambda own, p=p, joined=joined: joined(given, own, p))
            advantages, _ = trainer.advantages(out, rewards)
            found |= {i: advantages[out.prompt[out.row] == place] for place, i in enumerate(ids)}
    return torch.cat([found[i] for i in range(4)])


def test_std_of_the_batch_is_that_of_all_processes(tmp_path, monkeypatch):
    "Two processes find the advantages of one; a planted process that sees itself alone does not."
    settings = {**SMALL, 'method': 'flow_grpo', 'active_steps': None, 'tau': None, 'advantage_std': 'batch', 'out': str(tmp_path/'run')}
    trainer = Trainer(TrainConfig(**settings))
    _, _, out, rewards = trainer.sample(0)
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
    passes, other = load_policy(device='cpu', mesh=mesh)._passes, PASSES.index('backward')
    passes.joined = True
    monkeypatch.setattr(dist, 'all_reduce', lambda wanted, group: wanted.__setitem__(other, 1.))
    assert passes.announce() == passes.announce('backward') == 'backward'
    with pytest.raises(RuntimeError, match='processes make different passes at once \\(forward, backward\\)'): passes.announce('forward')


@pytest.fixture
def zero3():
    "What accelerate's launcher puts into the environment for the DeepSpeed configuration that comes with the package."
    words = ['--config_file', str(assets_path('accelerate/8gpu_zero3.yaml')), '-m', 'egrpo']
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config, args.main_process_port = ','.join(defaults.deepspeed_config), 0
    assert args.use_deepspeed and args.num_processes == 8
    environment = prepare_deepspeed_cmd_env(args)[1]
    return {k: v for k, v in environment.items() if k.startswith('ACCELERATE')}


def test_a_deepspeed_configuration_shares_the_network(tmp_path, zero3):
    "Its ZeRO stage 3 is what FSDP does: the same run, to the last bit."
    settings = dict(iterations=1, eval_size=2)
    one, again = run(tmp_path/'fsdp', 2, shared=True, **settings), run(tmp_path/'zero3', 2, environment=zero3, **settings)
    assert one.metrics[0]['reward/verifier'] == again.metrics[0]['reward/verifier'] and apart(one.weights, again.weights) == 0


def test_mixed_precision_of_the_launcher_is_not_taken(tmp_path, monkeypatch):
    "And that is said."
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    with pytest.warns(UserWarning, match='mixed_precision bf16'): trainer = Trainer(TrainConfig(**SMALL, out=str(tmp_path/'run')))
    assert trainer.accelerator.mixed_precision == 'no'


@pytest.mark.parametrize('name, value', dict(fsdp_offload_params='true', deepspeed_config_file='ds.json', offload_param_device='cpu',
                                            offload_optimizer_device='nvme').items())
def test_a_launcher_that_asks_for_what_is_not_there(zero3, monkeypatch, name, value):
    "Names it; what is off is not asked for."
    for k, v in zero3.items(): monkeypatch.setenv(k, v)
    assert processes_module.sharing_asked()
    monkeypatch.setenv('ACCELERATE_DEEPSPEED_ZERO_STAGE', '0')
    assert not processes_module.sharing_asked()
    monkeypatch.setenv(processes_module.UNSHAREABLE[name], value)
    with pytest.raises(ValueError, match=f'{name} is not supported'): processes_module.sharing_asked()


def test_a_reward_that_fails_elsewhere_fails_here(tmp_path, monkeypatch):
    "All processes raise, so all can write the checkpoint."
    trainer = Trainer(TrainConfig(**SMALL, out=str(tmp_path/'run')))
    monkeypatch.setattr(trainer.processes, 'total', lambda count: float(count) + 1)
    with pytest.raises(RewardError, match='the reward failed in another process'):
        trainer.score(torch.zeros(1, *trainer.policy.latent_shape), ['a red circle'])
