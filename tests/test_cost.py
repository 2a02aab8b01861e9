"What runs cost, what they hold, and that faster ways do the same."
import gc
import inspect
import shlex
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore

from egrpo.cli.commands import main
from egrpo.core import rollout as rollout_module
from egrpo.core.plan import Branch, Plan, SDEStep, gradient_nfe, rollout_nfe
from egrpo.core.rollout import ab2_velocity, rollout
from egrpo.core.sigmas import flow_sigmas
from egrpo.models.policy import load_policy
from egrpo.models.reference import swapped
from egrpo.paper.suffix import group_agreement
from egrpo.testing.pipelines import small_flux, small_pipeline, small_sd3
from egrpo.train import cost, speed
from egrpo.train.trainer import TrainConfig, Trainer

SMALL = dict(num_steps=6, active_steps=2, num_generations=3, prompts_per_iteration=2, tau=0., device='cpu', eval_size=2, reward='clip')


def new_trainer(tmp_path, **changes):
    "A trainer before its first iteration."
    return Trainer(TrainConfig(**SMALL | changes, out=str(tmp_path/'run')))


# ---- the same iteration, sample by sample
@pytest.mark.parametrize('changes', [{}, dict(stride=2, lora_rank=2), dict(kernel='cps', noise_level=.8, merge_length=2)], ids=str)
@pytest.mark.parametrize('anchor', [False, True])
def test_one_by_one_is_the_same_iteration(tmp_path, changes, anchor):
    together, alone = (new_trainer(tmp_path, **changes) for _ in range(2))
    _, _, out, rewards = together.sample(0)
    sampled = together.policy.nfe
    speed.iteration_together(together)
    _, same, scores = speed.iteration_alone(alone, anchor=anchor)
    assert_close(same, out.latents, atol=1e-4, rtol=1e-4)
    assert_close(scores['clip'], rewards['clip'], atol=1e-3, rtol=1e-3)
    assert speed.gradient_error(together, alone) < 1e-3
    assert together.policy.nfe - sampled < alone.policy.nfe


def test_another_noise_is_another_iteration(tmp_path, monkeypatch):
    together, alone = (new_trainer(tmp_path) for _ in range(2))
    latents = together.sample(0)[2].latents
    speed.iteration_together(together)
    right = speed.addressed_noise
    monkeypatch.setattr(speed, 'addressed_noise', lambda shape, *address: right(shape, 'other', *address))
    _, other, _ = speed.iteration_alone(alone)
    assert (other - latents).abs().max() > .1 and speed.gradient_error(together, alone) > .1


# ---- a solver that looks back
class Field:
    "A policy with a velocity of our choice."
    latent_shape, device = (1, 2, 2), torch.device('cpu')
    def __init__(self, velocity): self._velocity = velocity
    def velocity(self, latents, sigma, cond): return self._velocity(latents, sigma.view(-1, 1, 1, 1))


def suffix_error(velocity, solution, num_steps, solver, stride, shift):
    "Largest error of the ODE after a stochastic step at 0."
    plan = Plan(flow_sigmas(num_steps, shift), (Branch((SDEStep(0, 1, 2),)),), strides=(stride,), solver=solver)
    out = rollout(Field(velocity), torch.zeros(1, 1), plan, 0, 0)
    return (out.latents - solution(out.children, plan.sigmas[1])).abs().max().item()


CURVED = (lambda x, s: torch.cos(3 * s).expand_as(x)), (lambda x, s: x - torch.sin(3 * s) / 3)


@given(st.integers(1, 2), st.sampled_from([1., 2., 3.]))
def test_ab2_is_of_second_order(stride, shift):
    fine, coarse = (suffix_error(*CURVED, n, 'ab2', stride, shift) for n in (192, 96))
    euler = suffix_error(*CURVED, 96, 'euler', stride, shift)
    assert coarse / fine > 2.8 and coarse < euler / 2


def test_order_is_lost_with_the_wrong_sign(monkeypatch):
    right = [suffix_error(*CURVED, n, 'ab2', 1, 1.) for n in (48, 96)]
    monkeypatch.setattr(rollout_module, 'ab2_velocity', lambda v, h, before, h_before: v - h / h_before / 2 * (v - before))
    wrong = [suffix_error(*CURVED, n, 'ab2', 1, 1.) for n in (48, 96)]
    assert right[0] / right[1] > 3 > 2.5 > wrong[0] / wrong[1]


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(.01, .5), st.floats(.01, .5))
def test_ab2_is_exact_for_a_constant_rate(a, b, h, before):
    def v(s): return torch.tensor(a + b * s, dtype=torch.float64)
    mean = ab2_velocity(v(.5), h, v(.5 + before), before)
    assert_close(mean, v(.5 - h / 2))


@pytest.mark.parametrize('strides', [(1,), (2,), (1, 3)])
def test_solver_leaves_what_is_trained(strides):
    policy, cond = load_policy(device='cpu'), None
    cond = policy.encode(['a red circle'])
    tree = Branch((SDEStep(0, 1, 2), SDEStep(3, 1, 2)))
    euler, ab2 = (Plan(flow_sigmas(8), (tree, Branch((SDEStep(2, 2, 3),)), Branch()), strides=strides, solver=s) for s in ('euler', 'ab2'))
    a, before = rollout(policy, cond, euler, 0), policy.nfe
    b = rollout(policy, cond, ab2, 0)
    assert policy.nfe - before == rollout_nfe(ab2) == rollout_nfe(euler) and gradient_nfe(ab2) == gradient_nfe(euler)
    for name in ('parents', 'children', 'log_prob', 'row', 'leaf_start'): assert torch.equal(getattr(a, name), getattr(b, name))
    n = len(a.latents) // len(strides)
    assert torch.equal(a.latents[n - 1], b.latents[n - 1]) # the plain ODE has no suffix
    assert not torch.allclose(a.latents[:n - 1], b.latents[:n - 1], atol=1e-5)


def test_agreement_of_noise_is_none():
    x, y = torch.randn(2, 200, 4, 12, generator=torch.Generator().manual_seed(0))
    assert abs(group_agreement(x, y).mean()) < .03 and group_agreement(x, 3 * x + 1).min() > 1 - 1e-6


# ---- memory
@pytest.mark.parametrize('rank', [0, 4])
def test_memory_is_what_a_trainer_holds(tmp_path, rank):
    trainer = new_trainer(tmp_path, lora_rank=rank, dtype='fp32')
    trainer.step(0)
    parts = cost.run_memory(trainer.config)
    def held(tensors): return sum(t.numel() * t.element_size() for t in tensors)
    p = trainer.parameters.values()
    assert parts['trained weights'] == held(p) and parts['gradients'] == held(o.grad for o in p)
    assert parts["Adam's moments"] == held(o[k] for o in trainer.optimizer.state.values() for k in ('exp_avg', 'exp_avg_sq'))
    assert parts['average of the weights'] == held(trainer.ema.values())
    pipeline = trainer.policy.pipeline
    assert parts['decoder'] == held(pipeline.vae.parameters())
    assert parts['text encoders'] == held(o for m in (pipeline.text_encoder, pipeline.text_encoder_2) for o in m.parameters())
    assert parts.get('frozen weights', 0) == held(o for o in pipeline.transformer.parameters() if not o.requires_grad)


def test_memory_of_a_lora_that_goes_on(tmp_path):
    load_policy(device='cpu', lora_rank=4).save(tmp_path/'lora')
    policy, config = (f(lora_from=str(tmp_path/'lora'), device='cpu') for f in (load_policy, TrainConfig))
    parts = cost.run_memory(config)
    assert parts['reference'] == sum(t.nbytes for t in policy._reference.start.values()) == parts['trained weights']


def rise(trainer, run):
    "Most bytes that a call allocates, all tensors counted by torch."
    tracker = MemTracker()
    tracker.track_external(trainer.policy.transformer, trainer.optimizer)
    with tracker: run()
    peak, now = (tracker.get_tracker_snapshot(t)[torch.device('cpu')]['Total'] for t in ('peak', 'current'))
    return peak - now


@pytest.mark.parametrize('rank', [0, 4])
def test_memory_of_evaluation_and_step_is_what_they_allocate(tmp_path, rank):
    trainer = new_trainer(tmp_path, lora_rank=rank, dtype='fp32', micro_batch=1)
    trainer.step(0)
    def evaluation():
        with swapped(trainer.parameters, trainer.ema): pass
    trainer.optimizer.param_groups[0]['foreach'] = True # what torch takes on a GPU
    held = cost.run_memory(trainer.config)['trained weights']
    assert rise(trainer, evaluation) == held == pytest.approx(rise(trainer, trainer.optimizer.step), rel=1e-3)
    for changes in (dict(), dict(device=None, ema_decay=0.)): # an evaluation on a CPU, a step on a GPU
        parts = cost.run_memory(TrainConfig(**vars(trainer.config) | changes))
        assert parts['activations'] + parts.get('evaluation or optimiser step', 0) == max(parts['activations'], held)
    assert 'evaluation or optimiser step' not in cost.run_memory(TrainConfig(**vars(trainer.config) | dict(ema_decay=0.)))


@pytest.mark.parametrize('rank', [0, 4])
def test_memory_of_a_shared_network_is_what_a_process_holds(rank):
    "The first of four processes, the others imagined: torch's fake process group."
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=4)
    try:
        policy = load_policy(device='cpu', lora_rank=rank, mesh=init_device_mesh('cpu', (4,)))
        def held(trained): return sum(own(p).numel() * 4 for p in policy.transformer.parameters() if p.requires_grad == trained)
        def own(p): return p.to_local() if isinstance(p, DTensor) else p
        parts = cost.run_memory(TrainConfig(lora_rank=rank, dtype='fp32'), share=4)
        assert parts['trained weights'] == pytest.approx(held(True), rel=.01)
        assert parts.get('frozen weights', 0) == pytest.approx(held(False), rel=.01)
        groups = [sum(p._orig_size.numel() for g in m._get_fsdp_state()._fsdp_param_groups for p in g.fsdp_params)
                  for m in policy.transformer.modules() if isinstance(m, FSDPModule)]
        assert cost.block_parameters('miniature') == (max(groups[1:]), groups[0]) # the root comes first
    finally: dist.destroy_process_group()


def allocated():
    "Bytes of all tensors that are alive."
    gc.collect()
    return sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor)


def test_tune_leaves_room_for_what_a_run_holds(monkeypatch):
    "Gradients and every latent take as much as the weights; moments and average three times that."
    policy, seen = load_policy(device='cpu'), []
    weights = sum(p.nbytes for p in policy.parameters().values())
    monkeypatch.setattr(cost, 'probe', lambda policy, n, clock: (seen.append((n, allocated())), n)[1])
    monkeypatch.setattr(cost, 'highest_rise', lambda run, device: (n := run(), (n + 1) * weights))
    before = allocated()
    assert [n for n, *_ in cost.tune(policy, 8 * weights)] == [1, 2, 4] == [n for n, _ in seen]
    assert all(now - before == 3 * weights for _, now in seen) and allocated() == before
    assert [n for n, *_ in cost.tune(policy, 8 * weights - 4)] == [1, 2]


def test_a_probe_holds_gradients_as_a_run_does(monkeypatch):
    policy, held = load_policy(device='cpu', lora_rank=2), []
    right = policy.velocity
    monkeypatch.setattr(policy, 'velocity', lambda *args: (held.append(all(p.grad is not None for p in policy.parameters().values())),
                                                           right(*args))[1])
    cost.probe(policy, 2)
    assert held == [False] * 4 + [True] * 2 and all(p.grad is None for p in policy.parameters().values())


def test_traffic_of_a_shared_network():
    dev, billion = TrainConfig(model='flux.1-dev', dtype='bf16'), 1e9
    whole, lora = (cost.shared_traffic(TrainConfig(**vars(dev) | dict(lora_rank=r)), 2) for r in (0, 32))
    half = cost.count_parameters('flux.1-dev')['network'] / 2
    assert whole == pytest.approx((4 * half, 8 * half)) and lora == pytest.approx((2 * half, 2 * half)) and half > 5 * billion


@pytest.mark.parametrize('make', [small_flux, small_sd3, lambda: small_sd3((0,))], ids=['flux', 'sd3', 'sd3.5'])
def test_parameters_and_activations_of_a_folder(tmp_path, make):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), device='cpu', guidance=1.)
    found, network = cost.count_parameters(str(tmp_path)), policy.transformer
    assert found['network'] == sum(p.numel() for p in network.parameters())
    a = cost.architecture(str(tmp_path))
    assert a.text_tokens == policy.encode(['a red circle']).embeds.shape[1]
    real, _ = cost.kept_bytes(network, cost.network_inputs(a, network, policy.latent_shape))
    counted, checkpointed = cost.activation_bytes(str(tmp_path), policy.latent_shape[1], 'fp32')
    assert .6 < counted / real < 1.6 and 0 < checkpointed


def network_calls(policy, prompt):
    "What a policy's network is called with for one latent, by the name of its argument."
    seen = []
    names = [*inspect.signature(policy.transformer.forward).parameters]
    def note(module, args, kwargs): seen.append(dict(zip(names, args)) | kwargs)
    hook = policy.transformer.register_forward_pre_hook(note, with_kwargs=True)
    latents, cond = torch.zeros(1, *policy.latent_shape), policy.encode([prompt])
    with torch.no_grad(): policy.velocity(latents, torch.tensor([.5]), cond)
    hook.remove()
    (call,) = seen
    return {k: v for k, v in call.items() if k != 'return_dict'}, cond.embeds.shape[1]


def shapes(call):
    "Shapes of tensors, also in lists; other values as they are."
    def shape(o): return [shape(x) for x in o] if isinstance(o, list) else tuple(o.shape) if torch.is_tensor(o) else o
    return {k: shape(v) for k, v in call.items() if v is not None}


@pytest.mark.parametrize('name', ['flux2-dev', 'flux2-klein', 'qwen-image', 'z-image'])
def test_memory_of_newer_families(tmp_path, name, measured):
    "Counted without numbers, from a folder, against a real pass of the policy: its arguments, what it keeps, parameters, evaluations."
    pipeline = small_pipeline(name)
    pipeline.save_pretrained(tmp_path)
    config = TrainConfig(model=str(tmp_path), device='cpu', dtype='fp32', resolution='32x64', lora_rank=2, guidance=1., micro_batch=1)
    policy = load_policy(str(tmp_path), 'cpu', 'fp32', 0, guidance=0. if name == 'z-image' else 1., resolution='32x64')
    call, tokens = network_calls(policy, 'a red circle')
    a = replace(cost.architecture(str(tmp_path)), text_tokens=tokens)
    assert (cost.latent_channels(a), *cost._sides(config, a)) == policy.latent_shape
    assert shapes(cost.network_inputs(a, policy.transformer, policy.latent_shape)) == shapes(call)
    real, _ = cost.kept_bytes(policy.transformer, call)
    network = cost.build_part(*a.network)
    counted, checkpointed = cost.kept_bytes(network, cost.network_inputs(a, network, policy.latent_shape))
    measured(f'{name}, bytes kept by a pass, counted to measured', ratio=counted / real)
    assert .6 < counted / real < 1.6 and 0 < checkpointed < counted
    def count(*modules): return sum(p.numel() for m in modules for p in m.parameters())
    found = cost.count_parameters(str(tmp_path), 2)
    assert (found['network'], found['vae']) == (count(policy.transformer), count(policy.pipeline.vae))
    assert found['text'] == count(pipeline.text_encoder)
    assert found['lora'] == sum(p.numel() for p in load_policy(str(tmp_path), 'cpu', lora_rank=2).parameters().values())
    parts = cost.run_memory(config)
    assert parts['decoder'] == 4 * found['vae'] and parts['activations'] > 0
    for guidance in (0., 1., 3.5):
        twice = load_policy(str(tmp_path), 'cpu', lora_rank=None, guidance=guidance).nfe_per_velocity
        assert cost.evaluations_per_velocity(replace(config, guidance=guidance)) == twice


@pytest.mark.parametrize('model', ['flux.1-dev', 'stable-diffusion-3.5-large', 'Tongyi-MAI/Z-Image-Turbo'])
def test_less_memory_with_less(model):
    usual = dict(model=model, resolution=512, micro_batch=2, lora_rank=8)
    def total(**o): return sum(cost.run_memory(TrainConfig(**usual | o)).values())
    assert total(gradient_checkpointing=True) < total() < total(micro_batch=3) < total(lora_rank=0, micro_batch=3)
    assert max(total(text_encoders='offload'), total(ema_decay=0.), total(resolution=256)) < total()


# ---- the command line
COST = ('plan --model flux.1-dev --scale flux --lora-rank 32 --gradient-checkpointing --text-encoders offload --micro-batch 2 '
        '--processes 8 --seconds-forward 0.25 --seconds-backward 1')


def test_plan_of_devices_that_share(capsys):
    "A LoRA of FLUX.1-dev does not fit into 24 GB (22 GiB); two such devices hold it."
    for words, fits in (('', 'does not fit in 22 GiB'), ('--share', 'gathered blocks'), ('--share', '\nfits in 22 GiB')):
        assert main(shlex.split(f"plan --model flux.1-dev --scale flux --lora-rank 32 --gradient-checkpointing --text-encoders offload "
                                f"--micro-batch 1 --processes 2 --device-memory 22 {words}")) == 0
        assert fits in capsys.readouterr().out


def test_plan_says_what_a_run_costs(capsys):
    assert main(shlex.split(f'{COST} --device-memory 80')) == 0
    out = capsys.readouterr().out
    assert 'fits in 80 GiB' in out and 'takes 8,096 network evaluations' in out
    plan = 1004 * .25 + 8 * 1.
    assert f'an iteration takes {plan:.3g} s' in out and f'300 iterations {300 * plan / 3600:.3g} h' in out
    assert main(shlex.split(f'{COST} --device-memory 20')) == 0
    assert 'does not fit in 20 GiB: try' in capsys.readouterr().out


@pytest.mark.parametrize('words, error', [('--model flux.9', "model 'flux.9' is not known here"), ('--seconds-forward 1', 'go together'),
                                          ('--scale flux --processes 0', 'processes must be >= 1'), ('--scale giant', 'unknown scale')])
def test_plan_refuses(words, error, capsys):
    assert main(shlex.split(f'plan {words}')) == 2
    assert error in capsys.readouterr().err


def test_plan_of_a_unet_says_what_is_not_counted(tmp_path, capsys):
    small_pipeline('sdxl').save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(['plan', '--model', str(tmp_path)]) == 0
    assert 'memory is not counted for this family' in capsys.readouterr().out.splitlines()
    (tmp_path/'unet'/'config.json').unlink() # a folder that is no pipeline is an error
    assert main(['plan', '--model', str(tmp_path)]) == 2
    assert 'or a folder with transformer and vae' in capsys.readouterr().err


def test_tune_prints_what_to_use(capsys):
    assert main('tune --device cpu --most 4 --lora-rank 2'.split()) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ['1', '2', '4'] and '--micro-batch' in out


@pytest.mark.parametrize('device, dtype', [('cpu', 'fp32'), ('mps', 'fp32'), ('mps:0', 'fp32'), ('cuda', 'bf16'), ('cuda:1', 'bf16')])
def test_a_planned_run_has_the_dtype_of_its_device(device, dtype):
    assert cost.network_dtype(TrainConfig(device=device)) == dtype
    assert cost.network_dtype(TrainConfig(device=device, dtype='fp16')) == 'fp16'


@pytest.mark.parametrize('device', ['cpu', 'mps', 'cpu:0', 'mps:0'])
def test_optimisers_that_go_one_by_one_take_no_more(device):
    "AdamW's step through all parameters at once is CUDA's."
    one, all_at_once = (cost.run_memory(TrainConfig(device=d, ema_decay=0., dtype='fp32', micro_batch=1)) for d in (device, 'cuda'))
    assert 'evaluation or optimiser step' not in one and 'evaluation or optimiser step' in all_at_once
