"Where a trainer runs, and what that asks of a device. None of it needs an accelerator."
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from egrpo.core.advantage import keep_extremes
from egrpo.core.noise import addressed_noise
from egrpo.models.policy import load_policy
from egrpo.train import trainer as trainer_module
from egrpo.train.config import check_config
from egrpo.train.evaluate import sample_images
from egrpo.train.prompts import prompt_batch
from egrpo.train.trainer import TrainConfig, Trainer

SMALL = dict(num_steps=6, num_generations=4, prompts_per_iteration=2, iterations=1, eval_size=2)
BRANCH = dict(method='branch_grpo', num_steps=10, num_generations=8, keep=.5, pruned_steps=1)


class Float32Only(TorchDispatchMode):
    "Inside, every tensor is on a device without float64, as Apple's GPUs are."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        wide = [o for o in tree_leaves(found) if isinstance(o, torch.Tensor) and o.dtype == torch.float64]
        assert not wide, f'{func} makes float64'
        return found


@pytest.fixture(scope='module')
def policy():
    "The miniature, on the CPU; its network may use float64 there, which diffusers leaves alone on Apple's GPUs."
    policy = load_policy(device='cpu')
    forward = policy.transformer.forward
    def unwatched(*args, **kwargs):
        with _disable_current_modes(): return forward(*args, **kwargs)
    policy.transformer.forward = unwatched
    return policy


@pytest.mark.parametrize('settings', [dict(active_steps=2), dict(active_steps=2, beta=.1), BRANCH, dict(method='grpo_guard')])
def test_rollout_and_update_need_no_float64(tmp_path, policy, monkeypatch, settings):
    "What runs on the policy's device; rewards and metrics are gathered on the CPU."
    trainer = Trainer(TrainConfig(**SMALL | settings, device='cpu', out=str(tmp_path/'run')), policy)
    monkeypatch.setattr(trainer, 'score', lambda latents, prompts: {})
    plans, _ = trainer.plan(0) # schedules are made on the CPU
    with Float32Only(): _, cond, out, _ = trainer.sample(0, plans)
    images = policy.decode(out.latents)
    advantages, _ = trainer.advantages(out, dict(verifier=images.mean((1, 2, 3))))
    monkeypatch.setattr(trainer.objective, 'metrics', lambda *args: {})
    with Float32Only(): trainer.update(cond, out, advantages)


def test_float64_is_seen():
    "Planted: shares in float64."
    with pytest.raises(AssertionError, match='makes float64'), Float32Only():
        keep_extremes(torch.randn(4), torch.zeros(4, dtype=torch.long), torch.full((4,), .5).double())


def placed(out, monkeypatch, **settings):
    "Where a trainer wants its policy."
    found = []
    with monkeypatch.context() as m:
        m.setattr(trainer_module, 'load_policy', lambda model, device, *args, **kwargs: found.append(device) or load_policy(device='cpu'))
        Trainer(TrainConfig(**SMALL, active_steps=2, **settings, out=str(out)))
    return str(found[0])


def test_trainers_of_one_process_are_each_where_they_say(tmp_path, monkeypatch):
    "accelerate keeps the first one's device; CPU, then GPU, then CPU again as if the first had been on a GPU."
    assert [placed(tmp_path, monkeypatch, device=device) for device in ('cpu', 'cuda', 'cuda:1', 'mps')] == ['cpu', 'cuda', 'cuda:1', 'mps']
    for state in (PartialState, AcceleratorState): monkeypatch.setitem(state._shared_state, 'device', torch.device('cuda'))
    assert placed(tmp_path, monkeypatch, device='cpu') == 'cpu'


def test_a_run_leaves_the_process_group_to_those_who_go_on(tmp_path, policy):
    "With a tracker too: after `fit` there may be something that all processes do together."
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        Trainer(TrainConfig(**SMALL, active_steps=2, device='cpu', tracker='tensorboard', out=str(tmp_path/'run')), policy).fit()
        assert dist.is_initialized()
    finally:
        if dist.is_initialized(): dist.destroy_process_group()


# ---- in a notebook that has changed torch or accelerate for itself

def one_step(out, policy, **settings):
    "Reward and gradient of an iteration; the policy stays as it is."
    trainer = Trainer(TrainConfig(**SMALL | settings, active_steps=2, device='cpu', lr=1e-30, out=str(out)), policy)
    metrics = trainer.step(0)
    return metrics['reward_std'], metrics['grad_norm']


def test_an_accelerator_of_the_users_changes_nothing(tmp_path, policy):
    "Its mixed precision is another one, and accelerate has one state for all."
    expected, state = one_step(tmp_path, policy), AcceleratorState._shared_state
    before = dict(state)
    try:
        state.clear()
        Accelerator(mixed_precision='bf16', cpu=True)
        found = one_step(tmp_path, policy)
    finally:
        state.clear()
        state.update(before)
    assert found == expected and found[1] > 0


def test_gradients_are_taken_where_they_were_switched_off(tmp_path, policy):
    expected = one_step(tmp_path, policy)
    with torch.no_grad(): found = one_step(tmp_path, policy)
    assert found == expected and found[1] > 0


@pytest.mark.parametrize('set_default, value, back', [
    (torch.set_default_dtype, torch.float64, torch.float32), (torch.set_default_dtype, torch.bfloat16, torch.float32),
    (torch.set_default_device, 'meta', None)], ids=['float64', 'bfloat16', 'meta'])
def test_other_defaults_of_torch_are_refused(tmp_path, policy, set_default, value, back):
    "Before anything is loaded, and where they are set between loading and training."
    config = TrainConfig(**SMALL, active_steps=2, device='cpu', out=str(tmp_path/'run'))
    trainer = Trainer(config, policy)
    set_default(value)
    try:
        for run in (lambda: load_policy('nowhere'), lambda: Trainer(config), trainer.fit):
            with pytest.raises(ValueError, match=f"torch's default d.* is {value}"): run()
    finally: set_default(back)
    assert not (tmp_path/'run').exists()


def test_inference_mode_is_refused(tmp_path, policy):
    "In it nothing can be trained; samples can be drawn."
    config = TrainConfig(**SMALL, active_steps=2, device='cpu', out=str(tmp_path/'run'))
    with torch.inference_mode(), pytest.raises(ValueError, match='inference_mode is on'): Trainer(config, policy)
    with torch.inference_mode(): assert len(sample_images(policy, ['a red circle'], 2)) == 1


# ---- seeds

@pytest.mark.parametrize('seed', [2**64 - 1, 2**63, 2**32])
def test_every_seed_of_64_bits_is_another_one(seed):
    "torch takes so many for a generator; the order of the prompts has them multiplied."
    prompts = [str(i) for i in range(9)]
    assert not torch.equal(addressed_noise((4,), seed), addressed_noise((4,), seed - 1))
    assert sorted(prompt_batch(prompts, 9, 3, seed)) == prompts
    assert prompt_batch(prompts, 9, 3, seed) != prompt_batch(prompts, 9, 3, seed - 1)


@pytest.mark.parametrize('seed', [-1, 2**64, 1.5, None], ids=str)
def test_other_seeds_are_refused(seed):
    with pytest.raises(ValueError, match='seed must be a whole number'): check_config(TrainConfig(seed=seed))
    with pytest.raises(ValueError, match=r'address must be .* from 0 to 2\*\*64 - 1, got'): addressed_noise((4,), seed, 'root')
