"""Every method on the shipped miniature: its cost as predicted, its first ratio 1, its numbers those of the authors' programs.

Constants stand with repository, file and commit. Most were printed by running that program's own functions. Four were not:
G²RPO's advantages (its loop, read and run again), TempFlow-GRPO's 1.73 and Flow-GRPO-Fast's window (read), and GRPO-Guard's
ratio (its formula, evaluated). None of their code is here."""
import ast
import inspect
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from egrpo.cli.commands import main
from egrpo.core import advantage, loss, plan
from egrpo.core import rollout as rollout_module
from egrpo.core.advantage import group_advantages, keep_extremes, transition_values
from egrpo.core.loss import guard_logratio
from egrpo.core.plan import Branch, Plan, SDEStep, count_leaves, describe, gradient_nfe, kept_count, preference_nfe, rollout_nfe
from egrpo.core.rollout import prune, rollout
from egrpo.core.sde import gaussian_kl, log_prob, ode_step, sde_sample, sde_step, step_std
from egrpo.core.sigmas import flow_sigmas
from egrpo.methods.baselines import branch_grpo, chain, dance_grpo, flow_grpo, flow_grpo_fast, g2rpo, grpo_guard, mix_grpo, tempflow_grpo
from egrpo.methods.registry import METHODS, PAPERS, PUBLISHED, describe_method, egrpo, make_plan
from egrpo.models.policy import load_policy
from egrpo.train import objective as objective_module
from egrpo.train import trainer as trainer_module
from egrpo.train.config import PLAN_FIELDS
from egrpo.train.prepare import training_nfe
from egrpo.train.trainer import TrainConfig, Trainer

PROMPTS = ['a red circle', 'two blue squares']
SMALL = dict(num_steps=7, num_generations=4, prompts_per_iteration=2, eval_size=1, device='cpu', lr=1e-9, ema_decay=0)
SETTINGS = {name: {} for name in METHODS} | dict(
    egrpo=dict(active_steps=3), g2rpo=dict(active_steps=3), mix_grpo=dict(window=2), flow_grpo_fast=dict(window=2))
VARIANTS = {name: dict(method=name, **settings) for name, settings in SETTINGS.items() if name != 'aegpo'} | { # see test_allocation
    'branch_grpo, pruned': dict(method='branch_grpo', keep=.5, pruned_steps=1, num_generations=8, num_steps=10),
    'egrpo, merged to 3': dict(method='egrpo', active_steps=3, merge_length=3, stride=2),
    'tempflow_grpo, with KL': dict(method='tempflow_grpo', beta=.004, seed_groups=True)}
every_method = pytest.mark.parametrize('name', METHODS)


@pytest.fixture(scope='module')
def policy():
    "The miniature, on the CPU."
    return load_policy(device='cpu')


def run(policy, **changes):
    "A trainer of a small run and the metrics of its iteration 0."
    trainer = Trainer(TrainConfig(**{**SMALL, **changes}), policy)
    return trainer, trainer.step(0)


def predicted(config):
    "Network evaluations of an iteration: rollout, and update with its reference."
    plan = make_plan(config.method, **config.flat())
    update = gradient_nfe(plan) * (2 if config.beta else 1) + preference_nfe(plan)
    return tuple(config.prompts_per_iteration * n for n in (rollout_nfe(plan), update))


# ---- cost, ratio

@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
def test_cost_is_predicted_and_first_ratio_is_one(policy, changes):
    "What the plan predicts is what the counter on the network finds, and the first update's policy is the one that sampled."
    trainer, metrics = run(policy, **changes)
    assert (metrics['nfe_rollout'], metrics['nfe_gradient']) == predicted(trainer.config)
    assert sum(predicted(trainer.config)) == training_nfe(trainer.config, 1)
    assert metrics['ratio_error'] < 1e-6


def test_cost_sees_pruning_forgotten(policy, monkeypatch):
    "Planted bug: the update trains what should be pruned."
    monkeypatch.setattr(objective_module, 'prune', lambda out, advantages: out)
    trainer, metrics = run(policy, **VARIANTS['branch_grpo, pruned'])
    assert metrics['nfe_gradient'] > predicted(trainer.config)[1]


def test_cost_sees_a_forward_per_child(policy, monkeypatch):
    "Planted bug: a velocity for every child instead of one for all."
    def wasteful(policy, *args):
        policy.nfe += 1
        return velocities(policy, *args)
    velocities = rollout_module._velocities
    monkeypatch.setattr(rollout_module, '_velocities', wasteful)
    trainer, metrics = run(policy, **VARIANTS['egrpo'])
    assert metrics['nfe_rollout'] > predicted(trainer.config)[0]


def test_ratio_sees_other_means(policy, monkeypatch):
    "Planted bug: GRPO-Guard's old means are not those of the policy that sampled."
    take = trainer_module.rollout
    def spoiled(*args, **kwargs):
        out = take(*args, **kwargs)
        out.means = out.means + .01
        return out
    monkeypatch.setattr(trainer_module, 'rollout', spoiled)
    assert run(policy, **VARIANTS['grpo_guard'])[1]['ratio_error'] > 1e-5
    assert run(policy, **VARIANTS['flow_grpo'])[1]['ratio_error'] < 1e-6 # the plain ratio needs no means


def test_kept_siblings_share_a_forward(policy):
    "Where a splitting step is pruned, the prediction is a bound, and the forwards are the parents of what was kept."
    p = Plan(flow_sigmas(6), (Branch((SDEStep(0, 1, 2), SDEStep(1, 1, 3, keep=.5))),))
    trainer = Trainer(TrainConfig(**SMALL), policy, method=lambda: p)
    _, cond, out, rewards = trainer.sample(0)
    advantages, _ = trainer.advantages(out, rewards)
    kept, before = prune(out, advantages), policy.nfe
    trainer.update(cond, out, advantages)
    assert policy.nfe - before == len(torch.unique(kept.row[kept.weight > 0])) <= 2 * gradient_nfe(p)
    assert int((kept.weight > 0).sum()) == 2 * (2 + 3)


def test_cost_of_a_plan_that_moves_is_summed(policy):
    "DanceGRPO's random steps cost differently from iteration to iteration; the prediction follows them."
    trainer = Trainer(TrainConfig(**SMALL, method='dance_grpo'), policy)
    metrics = [trainer.step(i) for i in range(3)]
    assert sum(m['nfe_rollout'] + m['nfe_gradient'] for m in metrics) == training_nfe(trainer.config, 3)
    costs = {gradient_nfe(dance_grpo(iteration=i)) for i in range(20)}
    assert costs == {9 * 12, 8 * 12 + 1}


@given(n=st.integers(2, 60), keep=st.floats(.01, 1), seed=st.integers(0, 99))
def test_as_many_are_kept_as_counted(n, keep, seed):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(seed)).round()
    mask = keep_extremes(scores, torch.full((n,), 7), torch.full((n,), keep))
    assert mask.sum() == kept_count(n, keep)
    if not mask.all(): assert scores[~mask].max() <= scores[mask].max() and scores[~mask].min() >= scores[mask].min()


def test_weights_are_the_surrogates(policy, monkeypatch):
    "A step's weight multiplies its surrogate and leaves the KL alone, as in the code of TempFlow-GRPO and GRPO-Guard."
    monkeypatch.setattr(objective_module, '_reference_kl', lambda policy, sigma, c, out, rows, *_: torch.ones(len(rows)))
    p = Plan(flow_sigmas(5), (Branch((SDEStep(1, 1, 4, weight=3.),)),))
    trainer = Trainer(TrainConfig(**SMALL, beta=.5), policy, method=lambda: p)
    _, cond, out, _ = trainer.sample(0)
    for advantage_of_all, expected in ((0., .5), (2., 3 * -2. + .5)):
        advantages = torch.full((len(out.row),), advantage_of_all)
        total, *_ = objective_module.rows_loss(policy, cond, out, torch.arange(len(out.parents)), advantages, trainer.config)
        assert_close(total.item() / len(out.row), expected, rtol=1e-5, atol=1e-6)


# ---- equivalent configurations

def update_of(policy, p, rewards_of):
    "Rollout, advantages and loss (with its gradient) of a plan."
    trainer = Trainer(TrainConfig(**SMALL), policy, method=lambda: p)
    cond = policy.encode(PROMPTS)
    out = rollout(policy, cond, p, 0, 3)
    advantages, _ = trainer.advantages(out, dict(verifier=rewards_of(out)))
    total, _, _, _ = objective_module.rows_loss(policy, cond, out, torch.arange(len(out.parents)), advantages, trainer.config)
    gradient = torch.autograd.grad(total, list(trainer.parameters.values()))
    return out, advantages, total.detach(), gradient


def brightness(out):
    "A reward that only depends on the clean latents."
    return out.latents.flatten(1).mean(1)


def same_bits(a, b):
    "Are two updates the same to the last bit?"
    (x, adv_x, loss_x, grad_x), (y, adv_y, loss_y, grad_y) = a, b
    tensors = ('parents', 'children', 'log_prob', 'latents', 'weight', 'row', 'group')
    return (all(torch.equal(getattr(x, n), getattr(y, n)) for n in tensors) and torch.equal(adv_x, adv_y) and torch.equal(loss_x, loss_y)
            and all(torch.equal(g, h) for g, h in zip(grad_x, grad_y)))


def test_egrpo_unmerged_is_g2rpo_with_one_stride(policy):
    "Same latents, advantages, loss and gradient, to the last bit; and neither merging nor a second stride goes unnoticed."
    few = dict(num_steps=8, active_steps=3, num_generations=4)
    ours = update_of(policy, egrpo(**few, merge_length=1), brightness)
    assert same_bits(ours, update_of(policy, egrpo(**few, tau=0), brightness))
    assert same_bits(ours, update_of(policy, g2rpo(**few, strides=(1,)), brightness))
    merged, strides = (update_of(policy, p, brightness) for p in (egrpo(**few, merge_length=2), g2rpo(**few)))
    assert torch.equal(merged[0].parents, ours[0].parents) and not torch.equal(merged[0].children, ours[0].children)
    children = strides[0].children, ours[0].children # the second stride's walkers share batches, which are rounded otherwise
    assert torch.allclose(*children, rtol=0, atol=1e-5) and not torch.equal(strides[1], ours[1])


def dance_by_hand(policy, cond, T, G, level):
    "DanceGRPO's sampler as a plain loop over one prompt: latents, log-probs, then an ODE step to the image."
    sigmas, x = flow_sigmas(T), rollout_module.addressed_noise(policy.latent_shape, 0, 3, 0, 'root', 0)[None]
    children, scores = [], []
    for k in range(T):
        v = policy.velocity(x, sigmas[k].expand(len(x)), cond.repeat_interleave(len(x), 0) if torch.is_tensor(cond) else cond[[0] * len(x)])
        if k == T - 1: return torch.stack(children), torch.stack(scores), ode_step(v, x, sigmas[k].item(), sigmas[k+1].item())
        mean, std = sde_step(v, x, sigmas[k].expand(len(x)), sigmas[k+1].expand(len(x)), level, 'dance', float(sigmas[1]))
        noise = torch.stack([rollout_module.addressed_noise(policy.latent_shape, 0, 3, 0, 0, k, i) for i in range(G)])
        x = sde_sample(mean.expand(G, *mean.shape[1:]), std.expand(G, *std.shape[1:]), noise)
        children.append(x)
        scores.append(log_prob(x, mean, std))


def test_a_chain_is_dance_grpo(policy):
    "The executor on a chain with one child per step does what DanceGRPO's loop does, to the last bit."
    T, G = 6, 4
    cond = policy.encode(PROMPTS[:1])
    with torch.no_grad(): children, scores, images = dance_by_hand(policy, cond, T, G, .3)
    p = dance_grpo(num_steps=T, num_generations=G, train_share=1.)
    out = rollout(policy, cond, p, 0, 3)
    assert torch.equal(out.children, children.flatten(0, 1)) and torch.equal(out.latents, images)
    assert torch.equal(out.log_prob, scores.flatten())
    by_hand = Plan(flow_sigmas(T), (Branch((SDEStep(0, 1, G), *[SDEStep(k) for k in range(1, T - 1)])),), .3, 'dance')
    assert torch.equal(rollout(policy, cond, by_hand, 0, 3).latents, images) and describe(p) == describe(by_hand)
    rewards = brightness(out)
    z = (rewards - rewards.mean()) / rewards.std()
    ours = group_advantages(transition_values(rewards, out.leaf_start, out.leaf_count), out.group)
    assert_close(ours, z.repeat(T - 1), rtol=1e-5, atol=1e-5) # one advantage per chain, at all its steps
    own_noise = Plan(p.sigmas, (Branch(chain(range(T - 1)), noises=G),), .3, 'dance')
    assert not torch.equal(rollout(policy, cond, own_noise, 0, 3).latents, images) # planted: noise that is not shared


# ---- the authors' numbers

LANDED = [ # log-prob of landing at [.4, -1.1] from [.5, -1.2] with velocity [.3, .8], 16 steps, shift 3, at steps 0, 4 and 14
    # Tencent-Hunyuan/MixGRPO e5cdd6a, fastvideo/utils/sampling_utils.py flow_grpo_step
    ('flow', 0.7, (-0.5786068, 0.0596786, 0.5833007)),
    # Fredreic1849/BranchGRPO 19fbb9f, fastvideo/train_branchgrpo_flux.py flux_step_with_split
    ('dance', 0.3, (-0.6313688, -0.0364437, 0.4657786)),
]


@pytest.mark.parametrize('kernel, level, scores', LANDED)
def test_kernels_are_the_released(kernel, level, scores):
    sigmas, x, v, landed = flow_sigmas(), *torch.tensor([[[.5, -1.2]], [[.3, .8]], [[.4, -1.1]]])
    for k, score in zip((0, 4, 14), scores):
        mean, std = sde_step(v, x, sigmas[k], sigmas[k+1], level, kernel, sigmas[1])
        assert_close(log_prob(landed, mean, std).item(), score, rtol=0, atol=3e-6)


# 1 / Δ and the ratio of moving the velocity to [.31, .78]; zhtmike/flow_grpo 2e2f712 (a copy of yifan123/flow_grpo),
# scripts/train_sd3_GRPO_Guard.py; beside it the plain ratio of the same step
GUARD = [(0, 46.00001, 0.99994063, 0.99991506), (4, 31.666716, 1.00006676, 1.00017750), (14, 7.5, 1.00188899, 1.01121747)]


def test_guard_ratio_and_weight_are_the_released():
    sigmas, x, old_v, v, landed = flow_sigmas(), *torch.tensor([[[.5, -1.2]], [[.3, .8]], [[.31, .78]], [[.4, -1.1]]])
    weights = [s.weight for s in grpo_guard(num_steps=16).branches[0].steps]
    for k, weight, ratio, plain in GUARD:
        (old_mean, std), (mean, _) = (sde_step(u, x, sigmas[k], sigmas[k+1], .7, 'flow', sigmas[1]) for u in (old_v, v))
        new, old = (log_prob(landed, m, std) for m in (mean, old_mean))
        assert_close(guard_logratio(new, old, mean, old_mean, std).exp().item(), ratio, rtol=0, atol=4e-7)
        assert_close((new - old).exp().item(), plain, rtol=0, atol=4e-7)
        assert_close(weights[k], weight, rtol=1e-6, atol=0)


def tree_of(policy, p):
    "A tree's rollout for one prompt."
    return rollout(policy, policy.encode(PROMPTS[:1]), p, 0, 0)


def test_branch_advantages_are_the_released(policy):
    "Fredreic1849/BranchGRPO 19fbb9f, compute_hierarchical_advantages_by_depth: splits at 0 and 2, leaf rewards .2 .6 .5 .9."
    p = branch_grpo(num_steps=5, num_generations=4, split_every=2)
    out, rewards = tree_of(policy, p), torch.tensor([.2, .6, .5, .9])
    values = transition_values(rewards, out.leaf_start, out.leaf_count)
    released = {0: [-.7071068, .7071066], 1: [-.7071068, .7071066], **{k: [-1.2124355, .1732053, -.1732049, 1.2124357] for k in (2, 3)}}
    for k, expected in released.items():
        assert_close(group_advantages(values, out.group)[out.start[out.row] == k], torch.tensor(expected), rtol=0, atol=1e-5)
    leaves_as_groups = group_advantages(values, out.start[out.row] * 0) # planted: all depths in one group
    assert (leaves_as_groups[out.start[out.row] == 0] - torch.tensor(released[0])).abs().max() > .01


def test_branch_width_pruning_is_the_released(policy):
    "The same program's --width_pruning_mode 2, eight leaves, splits at 0, 1, 2 of 6 steps: it keeps leaves 0, 3, 4, 6 of steps 3 to 5."
    p = branch_grpo(num_steps=7, num_generations=8, split_every=1, keep=.5)
    out, rewards = tree_of(policy, p), torch.tensor([.2, .6, .5, .9, .1, .3, .8, .4])
    kept = prune(out, group_advantages(transition_values(rewards, out.leaf_start, out.leaf_count), out.group))
    steps = out.start[out.row]
    for k in (3, 4, 5): assert out.leaf_start[(steps == k) & (kept.weight > 0)].tolist() == [0, 3, 4, 6]
    assert int((kept.weight > 0).sum()) == 26 # as many as the program trains


# iteration -> steps it does not train, with --depth_pruning 15,16,17,18, sliding every 30, stop depth 9
DEPTH = {0: [14, 15, 16, 17], 29: [14, 15, 16, 17], 30: [13, 14, 15, 16], 90: [11, 12, 13, 14], 180: [8, 9, 10, 11], 10000: [8, 9, 10, 11]}


@pytest.mark.parametrize('iteration, steps', DEPTH.items())
def test_branch_depth_pruning_is_the_released(iteration, steps):
    p = branch_grpo(pruned_steps=4, iteration=iteration)
    assert [s.start for s in p.branches[0].steps if not s.weight] == steps


@pytest.mark.parametrize('iteration, start', {0: 0, 24: 0, 25: 1, 299: 11, 475: 19, 499: 19}.items())
def test_mix_window_is_the_released(iteration, start):
    "Tencent-Hunyuan/MixGRPO e5cdd6a, fastvideo/utils/grpo_states.py; from iteration 500 on its window shrinks, ours does not."
    assert [s.start for s in mix_grpo(iteration=iteration).branches[0].steps] == list(range(start, start + 4))


def test_fast_window_is_the_released():
    "yifan123/flow_grpo: random.randint(0, 5 - 3), both ends included."
    assert {flow_grpo_fast(iteration=i).branches[0].steps[0].start for i in range(60)} == {0, 1, 2}


@pytest.mark.parametrize('samples, noises', [(8, 1), (12, 2), (16, 2), (24, 4), (31, 1), (32, 4)])
def test_tempflow_has_noises_for_every_size_of_group(samples, noises):
    "AEGPO changes the size of a group from prompt to prompt."
    plan = make_plan('aegpo', base='tempflow_grpo', num_generations=samples, steps=(1, 2), num_steps=10)
    assert {b.noises for b in plan.branches} == {noises} and count_leaves(plan) == 2 * samples


def test_seed_groups_compare_samples_of_one_initial_noise(policy):
    "As scripts/train_flux_pr.py of Shredded-Pork/TempFlow-GRPO does; the group of a step is else all its samples."
    def groups(seed_groups):
        plan = tempflow_grpo(num_steps=4, num_generations=6, noises=2, seed_groups=seed_groups)
        return rollout(policy, policy.encode(PROMPTS), plan, 0)
    apart, together = groups(True), groups(False)
    assert torch.equal(apart.children, together.children) and torch.equal(apart.row, together.row)
    assert apart.group.tolist() == apart.row.tolist() # a node has a group of its own
    sizes = apart.group.unique(return_counts=True)[1]
    assert set(sizes.tolist()) == {3} and together.group.unique(return_counts=True)[1].tolist() == [6] * 6
    with pytest.raises(ValueError, match='is trained but has a group of 1'): tempflow_grpo(num_generations=4, noises=4, seed_groups=True)
    with pytest.raises(ValueError, match='keep must be 1'):
        Plan(flow_sigmas(4), (Branch((SDEStep(0, 1, 4, keep=.5, siblings=True),)),))


def test_flow_grpo_has_the_kl_of_its_code():
    "yifan123/flow_grpo ac4c86e, scripts/train_sd3.py: the squared distance of the means over 2 s², where the step's variance is s²Δ."
    plan = flow_grpo(num_steps=6, kl_weights='delta')
    generator = torch.Generator().manual_seed(0)
    for step in plan.steps:
        x, v, reference = torch.randn(3, 1, 4, 2, 2, generator=generator, dtype=torch.float64)
        sigma, sigma_next = plan.sigmas[step.start].double(), plan.sigmas[step.end].double()
        (mean, std), (other, _) = [sde_step(o, x, sigma, sigma_next, plan.noise_level, 'flow', plan.sigma_max) for o in (v, reference)]
        s = (sigma / (1 - min(sigma, plan.sigmas[1]))).sqrt() * plan.noise_level
        assert_close(step.kl_weight * gaussian_kl(mean, other, std), (mean - other).square().mean((1, 2, 3)) / (2 * s**2),
                     check_dtype=False, rtol=1e-5, atol=0)


def test_tempflow_weights_are_the_released():
    "Shredded-Pork/TempFlow-GRPO 28a9b9b, scripts/train_flux_pr.py: 1.73 std, mean 1 within 1 % at its noise level for FLUX."
    p, sigmas = tempflow_grpo(noise_level=.9), flow_sigmas(10)
    for k, b in enumerate(p.branches):
        std = step_std(sigmas[k], sigmas[k+1], .9, 'flow', sigmas[1]).item()
        assert_close(b.steps[0].weight, 1.73 * std, rtol=.01, atol=0)


def test_flow_advantages_are_the_released():
    "yifan123/flow_grpo ac4c86e, flow_grpo/stat_tracking.py, with and without global_std; it adds 1e-4 to the std."
    rewards, groups = torch.tensor([.90, .70, .80, .65, .30, .10, .20, .05]), torch.tensor([0] * 4 + [1] * 4)
    for std, released in (('batch', [.4363831, -.198356, .1190136, -.3570408]), ('group', [1.430588, -.6502673, .3901604, -1.1704811])):
        ours = group_advantages(rewards, groups, std=std, correction=0)
        assert_close(ours, torch.tensor(released * 2), rtol=2e-3, atol=0)


def test_g2rpo_advantages_are_the_released(policy):
    "bcmi/Granular-GRPO 04ee954, fastvideo/train_g2rpo_hps.py: z-scores of two granularities, added."
    trainer = Trainer(TrainConfig(**SMALL), policy, method=lambda: g2rpo(num_steps=4, active_steps=1, num_generations=4))
    out = tree_of(policy, g2rpo(num_steps=4, active_steps=1, num_generations=4))
    rewards = torch.tensor([.90, .70, .80, .65, .10, .90, .60, .40]) # exact, then at stride 2
    ours, _ = trainer.advantages(out, dict(verifier=rewards))
    assert_close(ours, torch.tensor([.0520391, .6244431, .6352857, -1.3117659]), rtol=0, atol=1e-5)


# ---- the table and the command line

@every_method
def test_published_settings(name):
    "Every method has a paper, published settings that are fields of the configuration, a row, and a plan by defaults alone."
    assert PAPERS[name] in METHODS[name].__doc__ and set(PUBLISHED[name]) <= {f.name for f in fields(TrainConfig)} | set(PLAN_FIELDS)
    row = describe_method(name)
    assert int(row['nfe rollout']) == rollout_nfe(METHODS[name]()) and row['arXiv'] == PAPERS[name]
    assert len(inspect.getsource(METHODS[name]).split('"""')[0].splitlines()) <= 31 # signature and docments included


def test_no_part_of_the_loop_asks_for_a_method():
    "Nothing that executes plans compares with a method's name."
    for module in (plan, advantage, loss, rollout_module, objective_module, trainer_module):
        compared = [c for c in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(c, ast.Compare)]
        words = {o.value for c in compared for o in ast.walk(c) if isinstance(o, ast.Constant)}
        assert not words & set(METHODS), module.__name__


def test_methods_command(capsys):
    assert main(['methods']) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and PAPERS[name] in printed for name in METHODS)


def test_train_starts_from_what_was_published(monkeypatch, configured):
    "A method brings its clip range, KL weight and scale of advantages; what is given explicitly wins; the rest stays."
    monkeypatch.delenv('EGRPO_SCALE', raising=False)
    plain, guard = TrainConfig(), configured('--method grpo_guard')
    assert (guard.clip_range, guard.beta, guard.lr, guard.lora_rank) == (2e-6, 0, plain.lr, plain.lora_rank)
    flow = configured('--method flow_grpo --beta 0 --scale mini')
    assert (flow.advantage_std, flow.beta, flow.clip_range) == ('batch', 0, 1e-4)
    assert vars(configured('')) == vars(plain)


def test_group_size_is_the_methods_own():
    "A configuration that names no group size leaves it as published; one that does has its way."
    sizes = {name: make_plan(name, **TrainConfig().flat()).branches[0].leaves for name in METHODS}
    assert sizes == dict(flow_grpo=24, dance_grpo=12, mix_grpo=12, tempflow_grpo=24, branch_grpo=16, g2rpo=12, grpo_guard=24,
                         flow_grpo_fast=24, egrpo=12, aegpo=12, flash_grpo=4, flow_dppo=16, dynamic_tree_rpo=16, dense_grpo=24,
                         stepwise_flow_grpo=24, turningpoint_grpo=24, awm=24, nft=24, v_grpo=24, dgpo=24)
    assert {make_plan(name, **TrainConfig(num_generations=8).flat()).branches[0].leaves for name in METHODS} == {8}


@every_method
def test_plan_command(name, capsys):
    assert main(['plan', '--method', name, '--iteration', '40']) == 0
    assert 'with gradient' in capsys.readouterr().out
