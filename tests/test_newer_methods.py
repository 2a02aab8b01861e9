"""Newer methods: losses, masks, weights and credit against numbers of their public code, equalities between them, their cost."""
import json
import math
from dataclasses import replace

import method_oracles as oracle
import pytest
import torch
from torch.testing import assert_close

from egrpo.core.advantage import gains, preference_weights, turning_gains
from egrpo.core.loss import FORWARD_LOSSES, Compared, awm_loss, clip_loss, dgpo_loss, dppo_loss, nft_loss
from egrpo.core.plan import Branch, Forward, Plan, SDEStep, gradient_nfe, preference_nfe, rollout_nfe
from egrpo.core.rollout import FORWARD_STD, rollout, transition_log_prob, transition_mean
from egrpo.core.sde import gaussian_kl, log_prob, ode_step, sde_step, step_std
from egrpo.core.sigmas import flow_sigmas
from egrpo.methods.forward import _bounds, stratified_levels
from egrpo.methods.newer import _flash_weight, flash_grpo
from egrpo.methods.registry import METHODS, PUBLISHED, fitting, make_plan, make_plans
from egrpo.models.policy import load_policy
from egrpo.testing.pipelines import small_pipeline
from egrpo.train.objective import rows_loss, stride_values
from egrpo.train.trainer import TrainConfig, Trainer

FORWARD = ['awm', 'nft', 'v_grpo', 'dgpo']
NEWER = ['flash_grpo', 'flow_dppo', 'dynamic_tree_rpo', 'dense_grpo', 'stepwise_flow_grpo', 'turningpoint_grpo', *FORWARD]
DATA, NOISE, OLD = (torch.tensor(o) for o in (oracle.DATA, oracle.NOISE, oracle.VELOCITY_OLD))
SIGMA, ADVANTAGES = torch.tensor(oracle.SIGMA), torch.tensor(oracle.ADVANTAGES)
SIGMAS = torch.tensor(oracle.SIGMAS)
LEVELS = flow_sigmas(6, 3.)

@pytest.fixture(scope='module')
def policy(): return load_policy(device='cpu')

@pytest.fixture(scope='module')
def cond(policy): return policy.encode(['a red circle', 'two blue squares'])

def draws(velocity, sigma=SIGMA):
    "The oracle's two samples as forward draws under a velocity."
    target, std = NOISE - DATA, torch.full((2, 1), FORWARD_STD)
    new, old = (log_prob(target, o, std) for o in (velocity, OLD))
    return Compared(new, old, velocity, OLD, std, target, sigma)

def loss_and_gradient(loss, advantages, clip_range=1.):
    "Mean loss of the oracle's samples, and its gradient in the velocity."
    velocity = torch.tensor(oracle.VELOCITY, requires_grad=True)
    mean = loss(draws(velocity), advantages, clip_range)[0].mean()
    mean.backward()
    return mean.item(), velocity.grad

def test_log_prob_of_a_forward_draw_is_awms_uniform_one():
    step, same = draws(torch.tensor(oracle.VELOCITY)), draws(NOISE - DATA) # of the second the error is 0
    assert_close(step.log_prob - same.log_prob, torch.tensor(oracle.AWM_LOG_PROB['Uniform']), rtol=1e-5, atol=2e-7)

AWM = [(1., oracle.AWM_LOSS, oracle.AWM_GRAD), (.01, oracle.AWM_LOSS_NARROW, oracle.AWM_GRAD_NARROW)]

@pytest.mark.parametrize('clip_range,loss,gradient', AWM)
def test_awm_is_its_code(clip_range, loss, gradient):
    step = draws(torch.tensor(oracle.VELOCITY))
    assert_close(awm_loss(step, ADVANTAGES, 1.)[1].exp(), torch.tensor(oracle.AWM_RATIO), rtol=1e-5, atol=0)
    ours = loss_and_gradient(awm_loss, ADVANTAGES.clamp(-5, 5), clip_range)
    assert_close(ADVANTAGES.clamp(-5, 5) / 5, torch.tensor(oracle.AWM_ADVANTAGES))
    assert_close(ours, (loss, torch.tensor(gradient)), rtol=2e-5, atol=1e-7)

def test_uniform_awm_is_the_clipped_surrogate():
    ours = loss_and_gradient(clip_loss, ADVANTAGES.clamp(-5, 5))
    assert_close(ours, (oracle.AWM_LOSS_UNIFORM, torch.tensor(oracle.AWM_GRAD_UNIFORM)), rtol=2e-5, atol=1e-7)

def test_kl_of_a_forward_draw_is_the_squared_difference_of_velocities():
    std = torch.full((2, 1), FORWARD_STD)
    ours = gaussian_kl(torch.tensor(oracle.VELOCITY), torch.tensor(oracle.VELOCITY_REF), std).mean().item()
    assert_close(ours, oracle.AWM_KL_REF, rtol=1e-5, atol=0)

def test_nft_is_its_code():
    ours = loss_and_gradient(nft_loss, ADVANTAGES.clamp(-5, 5))
    assert_close(ours, (oracle.NFT_LOSS[0], torch.tensor(oracle.NFT_GRAD[0])), rtol=2e-5, atol=1e-6)
    one_sided = loss_and_gradient(nft_loss, torch.tensor([5., 5.]))[0]
    assert_close(one_sided, 5 * sum(oracle.NFT_POSITIVE[0]) / 2, rtol=2e-5, atol=0)

def test_dppo_is_its_code():
    logratio, A = torch.tensor(oracle.DPPO_LOG_RATIO, requires_grad=True), torch.tensor(oracle.DPPO_ADVANTAGES)
    mean = torch.tensor(oracle.DPPO_MEANS)[:, None]
    none = torch.zeros(8)
    step = Compared(logratio, none, mean, torch.zeros_like(mean), torch.full((8, 1), .5), mean, none)
    assert_close(gaussian_kl(mean, step.old_mean, step.std), torch.tensor(oracle.DPPO_KL), rtol=1e-5, atol=0)
    losses, _ = dppo_loss(step, A, 1e-5)
    assert_close(losses, torch.tensor(oracle.DPPO_LOSSES), rtol=1e-5, atol=0)
    losses.mean().backward()
    assert_close(logratio.grad, torch.tensor(oracle.DPPO_GRAD), rtol=1e-5, atol=1e-8)

def test_flash_is_its_code():
    for k, (std, weight) in enumerate(zip(oracle.FLASH_STD, oracle.FLASH_WEIGHT)):
        assert_close(float(step_std(SIGMAS[k], SIGMAS[k + 1], 1., 'flash', SIGMAS[1])), std, rtol=1e-5, atol=0)
        assert_close(_flash_weight(SIGMAS, k, 1.), weight, rtol=1e-5, atol=0)
    k = oracle.FLASH_STEPS
    mean, std = sde_step(torch.tensor(oracle.VELOCITY), DATA, SIGMAS[k], SIGMAS[[o + 1 for o in k]], 1., 'flash', SIGMAS[1])
    assert_close(mean, torch.tensor(oracle.FLASH_MEAN), rtol=1e-5, atol=1e-6)
    assert_close(log_prob(torch.tensor(oracle.FLASH_SAMPLE), mean, std), torch.tensor(oracle.FLASH_LOG_PROB), rtol=1e-5, atol=1e-6)

def test_flash_weights_of_its_table():
    starts = torch.tensor(oracle.FLASH_WAN_SIGMAS)
    for i, weight in enumerate(oracle.FLASH_WAN_WEIGHT): # its steps stand in pairs; sigmas[1] is that of the whole schedule
        around = torch.stack([starts[2 * i], starts[1], starts[2 * i + 1]])
        schedule = torch.tensor([around[0], around[2]])
        diffusion = float(starts[1] / around[2])
        assert_close(_flash_weight(schedule, 0, diffusion), weight, rtol=2e-5, atol=0)

def test_awms_strata():
    assert _bounds(1, int(14 * .9), 6) == oracle.AWM_STRATA and _bounds(0, int(14 * .9), 6) == oracle.AWM_STRATA_WITH_FIRST
    seen = {stratified_levels(flow_sigmas(14, 3.), oracle.AWM_STRATA, 0, i) for i in range(30)}
    assert len(seen) > 10 and all(sorted(o, reverse=True) == list(o) for o in seen)

def test_turning_points_are_those_of_its_code():
    rewards = torch.tensor(oracle.TURNING_REWARDS)
    chains, steps = len(rewards), 4
    place = torch.arange(chains)
    before = torch.cat([place + chains * k for k in range(steps)])
    after = torch.cat([place + chains * (k + 1) for k in range(steps - 1)] + [torch.full((chains,), -1)])
    probes, leaves = rewards[:, :steps].T.flatten(), rewards[:, -1].repeat(steps)
    ours = turning_gains(leaves, probes, before, after, place.repeat(steps)).view(steps, chains).T
    assert_close(ours, torch.tensor(oracle.TURNING_VALUES))
    plain = gains(leaves, probes, before, after, place.repeat(steps)).view(steps, chains).T
    assert_close(plain, rewards.diff())
    assert_close(ours != plain, torch.tensor(oracle.TURNING_POINTS).bool())

def test_gdpo_is_its_code():
    from egrpo.core.advantage import combine_advantages
    values = dict(one=torch.tensor(oracle.REWARD_ONE), two=torch.tensor(oracle.REWARD_TWO))
    weights, groups = dict(one=1., two=.5), torch.tensor(oracle.REWARD_GROUPS)
    ours = combine_advantages(values, weights, groups, when='batch', correction=0)
    assert_close(ours, torch.tensor(oracle.GDPO_ADVANTAGES), rtol=1e-5, atol=1e-6)

# --- equalities -----------------------------------------------------------------------------------------------

def test_a_forward_draw_is_the_sde_step_that_ends_in_its_image():
    "From x to its image a step of std s·sigma has the log-prob of the draw at x with std s, less log sigma: the ratios are the same."
    sigma, velocity = torch.tensor(.4), torch.tensor(oracle.VELOCITY)
    noised = (1 - sigma) * DATA + sigma * NOISE
    arrived = log_prob(DATA, ode_step(velocity, noised, sigma, 0.), sigma * torch.full((2, 1), FORWARD_STD))
    drawn = log_prob(NOISE - DATA, velocity, torch.full((2, 1), FORWARD_STD))
    assert_close(arrived, drawn - sigma.log())

def test_dppo_without_a_threshold_is_the_surrogate_without_a_clip():
    step = draws(torch.tensor(oracle.VELOCITY))
    assert_close(dppo_loss(step, ADVANTAGES, math.inf), clip_loss(step, ADVANTAGES, math.inf))

def test_gain_without_probes_is_the_value_of_the_leaves(policy, cond):
    plan = Plan(LEVELS, (Branch((SDEStep(0), SDEStep(2)), noises=3),))
    rewards = dict(reward=torch.rand(6, generator=torch.Generator().manual_seed(0)))
    by_leaves, by_gain = (rollout(policy, cond, replace(plan, credit=credit), 0, 0) for credit in ('leaves', 'gain'))
    assert torch.equal(stride_values(by_leaves, rewards), stride_values(by_gain, rewards))

@pytest.mark.parametrize('kernel', ['flow', 'dance', 'cps', 'flash'])
def test_a_step_may_have_the_plans_noise_level(policy, cond, kernel):
    steps = SDEStep(0), SDEStep(2)
    plain = Plan(LEVELS, (Branch(steps, noises=3),), .5, kernel)
    own = Plan(LEVELS, (Branch(tuple(replace(s, noise_level=.5) for s in steps), noises=3),), .9, kernel)
    a, b = (rollout(policy, cond, plan, 0, 0) for plan in (plain, own))
    assert a.level is None and b.level.tolist() == [.5] * 12
    assert_close(a.children, b.children, rtol=1e-5, atol=1e-5)
    assert_close(a.log_prob, b.log_prob, rtol=1e-5, atol=1e-5)

def test_each_step_scatters_by_its_own_noise_level(policy, cond):
    plan = Plan(LEVELS, (Branch((SDEStep(0, noise_level=.2), SDEStep(2)), noises=3),), .7, 'dance')
    out = rollout(policy, cond, plan, 0, 0)
    _, std = transition_mean(out.means, out.parents, out.start, out.end, plan, out.level)
    wanted = [plan.std(plan.steps[0 if k == 0 else 1]) for k in out.start.tolist()]
    assert_close(std.flatten(), torch.tensor(wanted))
    first = step_std(LEVELS[0], LEVELS[1], .2, 'dance', LEVELS[1])
    assert_close(plan.std(plan.steps[0]), float(first))

def test_probes_are_the_predicted_image_or_the_odes(policy, cond):
    branch = Branch((SDEStep(1), SDEStep(3)), noises=2, probes=(1, 3))
    for probe in ('predicted', 'ode'):
        plan = Plan(LEVELS, (branch,), credit='gain', probe=probe)
        before = policy.nfe
        out = rollout(policy, cond, plan, 0, 0)
        assert policy.nfe - before == 2 * rollout_nfe(plan) and out.probes == 8 and out.num_leaves == 4
        for t in range(len(out.row)):
            parent, prompt = out.parents[out.row[t]][None], out.prompt[out.row[t]]
            k, latents = int(out.start[out.row[t]]), parent
            ends = [k + 1] if probe == 'predicted' else range(k + 1, 7)
            with torch.no_grad():
                for j in ends:
                    velocity = policy.velocity(latents, LEVELS[[j - 1]], cond[[int(prompt)]])
                    latents = ode_step(velocity, latents, LEVELS[j - 1], 0. if probe == 'predicted' else LEVELS[j])
            assert_close(out.latents[out.num_leaves + out.before[t]], latents[0], rtol=1e-4, atol=1e-4)
            assert out.leaf_prompt[out.num_leaves + out.before[t]] == prompt
        first = out.start[out.row] == 1
        assert (out.after[~first] == -1).all()
        followed = {int(a): int(leaf) for a, leaf in zip(out.after[first], out.leaf_start[first])}
        led = {int(b): int(leaf) for b, leaf in zip(out.before[~first], out.leaf_start[~first])}
        assert followed == led # the probe a step leads to is that of the next step on the same chain

@pytest.mark.parametrize('shared', [True, False])
def test_forward_draws_are_the_leaves_noised_again(policy, cond, shared):
    plan = Plan(LEVELS, (Branch(noises=3),), forward=Forward((.8, .3), 2, shared))
    before = policy.nfe
    out = rollout(policy, cond, plan, 0, 0)
    assert policy.nfe - before == 2 * rollout_nfe(plan) and len(out.row) == 2 * gradient_nfe(plan) == 24
    sigma = torch.tensor([.8, .3])[out.start].view(-1, 1, 1, 1)
    leaves = out.latents[out.leaf_start]
    eps = out.children + leaves
    assert_close(out.parents, (1 - sigma) * leaves + sigma * eps, rtol=1e-4, atol=1e-4)
    of_group = torch.stack([eps[out.group == g] for g in out.group.unique()])
    assert ((of_group - of_group[:, :1]).abs().max() < 1e-5) == shared
    with torch.no_grad(): velocity = policy.velocity(out.parents, sigma.flatten(), cond[out.prompt])
    new, *_ = transition_log_prob(velocity, out.parents, out.children, out.row, out.start, out.end, plan)
    assert_close(new, out.log_prob, rtol=0, atol=1e-6)
    assert_close(out.log_prob + (velocity - out.children).square().flatten(1).mean(1), torch.full((24,), -math.log(math.pi) / 2))

def test_what_forward_cannot_be_is_refused():
    leaves = (Branch(noises=3),)
    for sigmas, draws, words in (((), 1, 'nothing is trained'), ((.5,), 0, 'nothing is trained'), ((0.,), 1, 'must be in')):
        with pytest.raises(ValueError, match=words): Forward(sigmas, draws)
    forward = Forward((.5,))
    for branches, more, words in (((Branch((SDEStep(0),), 3),), {}, 'leave the steps out'), ((Branch(),), {}, 'at least 2'),
                                  (leaves, dict(strides=(1, 2)), 'strides'), (leaves, dict(loss='dppo'), 'loss must be one of')):
        with pytest.raises(ValueError, match=words): Plan(LEVELS, branches, forward=forward, **more)
    with pytest.raises(ValueError, match='loss must be one of'): Plan(LEVELS, (Branch((SDEStep(0),), 3),), loss='nft')
    with pytest.raises(ValueError, match='needs chains'): Plan(LEVELS, (Branch((SDEStep(0), SDEStep(1)), 3, (0,)),), credit='turning')
    with pytest.raises(ValueError, match='probes must be'): Branch((SDEStep(0),), 3, (1,))

def test_forward_draws_need_a_flow_model(policy, cond, monkeypatch):
    monkeypatch.setattr(policy, 'is_flow', False, raising=False)
    with pytest.raises(ValueError, match='need a flow model'): rollout(policy, cond, make_plan('awm', num_steps=6), 0, 0)

def test_aegpo_has_nothing_to_choose_where_a_method_chooses_itself():
    with pytest.raises(ValueError, match='draws the one step of a prompt itself'): make_plan('aegpo', base='flash_grpo')

def test_the_race_is_compared_where_all_have_taken_as_long():
    "One iteration for all seeds of a method, before any of them ends; the fastest method's is its end."
    from egrpo.paper.grids import RACE, forward_passes, race_cells
    from egrpo.paper.records import get_scale
    cells = race_cells(get_scale('confirm'))
    spent = {}
    for method in RACE:
        (at,) = {run.eval_at for run in cells[method]}
        times = forward_passes(cells[method][0])
        spent[method] = sum(times[:int(at)] if at else times)
        assert not at or int(at) < min(run.iterations for run in cells[method])
    assert sum(cells[method][0].eval_at is None for method in RACE) >= 1
    assert max(spent.values()) / min(spent.values()) < 1.06 # an iteration of DenseGRPO is that long

def test_the_kl_of_a_step_has_its_weight(policy, cond):
    config = TrainConfig(beta=.5, device='cpu')
    policy.freeze_reference()
    plain = Plan(LEVELS, (Branch((SDEStep(0), SDEStep(2)), noises=3),))
    heavy = Plan(LEVELS, (Branch((SDEStep(0, kl_weight=3.), SDEStep(2, kl_weight=0.)), noises=3),))
    totals = []
    with torch.no_grad():
        for p in policy.parameters().values(): p.mul_(1.02)
        for plan in (plain, heavy):
            out = rollout(policy, cond, plan, 0, 0)
            total, _, index, kl = rows_loss(policy, cond, out, torch.arange(len(out.parents)), torch.zeros(len(out.row)), config)
            totals.append((total, kl, out.start[out.row[index]]))
        for p in policy.parameters().values(): p.div_(1.02)
    _, kl, start = totals[0]
    assert (kl > 0).all()
    assert_close(totals[0][0], .5 * kl.sum())
    assert_close(totals[1][0], .5 * 3 * kl[start == 0].sum())

def test_flash_draws_a_step_for_each_prompt():
    plans = make_plans('flash_grpo', 3, range(32), seed=0, num_generations=4)
    starts = {p.steps[0].start for p in plans}
    assert len(starts) > 5 and max(starts) < 10
    assert_close(sum(flash_grpo(prompt=i).steps[0].weight for i in range(4000)) / 4000, 1., rtol=0, atol=.03)

# --- DGPO ------------------------------------------------------------------------------------------------------

def dgpo_draws(velocity):
    "The oracle's four draws, in two groups."
    old, reference, target = (torch.tensor(o) for o in (oracle.DGPO_VELOCITY_OLD, oracle.DGPO_VELOCITY_REF, oracle.DGPO_TARGET))
    std = torch.full((4, 1), FORWARD_STD)
    new, before, start = (log_prob(target, o, std) for o in (velocity, old, reference))
    return Compared(new, before, velocity, old, std, target, torch.full((4,), .5)), new.detach() - start

@pytest.mark.parametrize('place', [0, 1])
def test_dgpo_is_its_code(place):
    velocity = torch.tensor(oracle.DGPO_VELOCITY, requires_grad=True)
    advantages, groups = torch.tensor(oracle.DGPO_ADVANTAGES), torch.tensor(oracle.DGPO_GROUPS)
    step, gained = dgpo_draws(velocity)
    weights = preference_weights(gained, advantages, groups, 10.)
    assert_close(weights, torch.tensor(oracle.DGPO_WEIGHTS), rtol=1e-5, atol=0)
    loss, logratio = dgpo_loss(step, advantages, oracle.DGPO_CLIP_RANGE[place])
    assert_close(logratio.exp(), torch.tensor(oracle.DGPO_RATIO), rtol=1e-5, atol=0)
    mean = (weights * loss).mean()
    mean.backward()
    assert_close(mean.item(), oracle.DGPO_LOSS, rtol=1e-5, atol=0)
    assert_close(velocity.grad, torch.tensor(oracle.DGPO_GRAD[place]), rtol=1e-5, atol=1e-8)
    still = (velocity.grad == 0).all(1).tolist()
    assert still == oracle.DGPO_CLIPPED[place]

def test_a_group_that_has_learnt_everything_is_still_trained():
    advantages = torch.tensor([1., -1.])
    assert (preference_weights(advantages, advantages, torch.zeros(2).long(), 2000.) > 0).all()

def test_a_group_weighs_a_half_before_training_and_by_what_is_learnt_after_it(tmp_path):
    trainer = Trainer(run_config('dgpo', tmp_path, num_steps=4, beta=0.))
    _, cond, out, _ = trainer.sample(0)
    advantages = torch.linspace(-1, 1, len(out.row))
    def weights(out): return trainer.objective.weighed(cond, out, advantages).weight
    assert_close(weights(out), torch.full((len(out.row),), .5), rtol=0, atol=1e-4)
    with torch.no_grad():
        for p in trainer.parameters.values(): p.mul_(1.02)
    _, cond, moved, _ = trainer.sample(0)
    velocity = load_policy(device='cpu').velocity # of weights that nothing has moved
    with torch.no_grad(): before = velocity(moved.parents, moved.plan.start_sigmas[moved.start], cond[moved.prompt])
    error, error_before = ((v - moved.children).square().flatten(1).mean(1) for v in (moved.means, before))
    for group in moved.group.unique():
        own = moved.group == group
        learnt = (advantages * (error - error_before))[own].sum() / own.sum()
        assert_close(weights(moved)[own], torch.sigmoid(10 * learnt).expand(own.sum()), rtol=1e-3, atol=1e-4)

def test_a_run_that_looks_back_resumes_to_the_bit(tmp_path):
    "Also where nothing but the preference needs the policy before training."
    def weights(out, **more):
        trainer = Trainer(run_config('dgpo', out, num_steps=4, beta=0., lr=1e-3, checkpoint_every=1, **more))
        trainer.fit()
        return trainer.parameters
    whole = weights(tmp_path/'whole')
    weights(tmp_path/'parts', iterations=1)
    parts = weights(tmp_path/'parts', resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

# --- every method trains, at the cost that is predicted ---------------------------------------------------------

def small(method):
    "Small settings of a method."
    settings = dict(num_steps=8, num_generations=4)
    if method in FORWARD: settings['draws'] = 2
    return settings

def run_config(method, out, **more):
    "Three iterations of a method, as published but small."
    config = dict(method=method, iterations=3, prompts_per_iteration=2, eval_size=2, eval_every=0, samples=0, device='cpu', shift=3.)
    return TrainConfig(**{**config, **PUBLISHED[method], **small(method), 'out': str(out), **more})

@pytest.mark.parametrize('method', NEWER)
def test_newer_methods_train_on_the_miniature_at_the_predicted_cost(tmp_path, method):
    trainer = Trainer(run_config(method, tmp_path, num_steps=6))
    rows = [trainer.step(i) for i in range(3)]
    for i, row in enumerate(rows):
        plans = make_plans(method, i, range(2), **trainer.settings)
        assert row['nfe_rollout'] == sum(map(rollout_nfe, plans))
        gradient = sum(map(gradient_nfe, plans))
        reference = (gradient if trainer.config.beta else 0) + sum(map(preference_nfe, plans))
        assert row['nfe_gradient'] == gradient + reference
        assert math.isfinite(row['grad_norm']) and row['grad_norm'] > 0
    if trainer.config.sample_with == 'weights': assert all(row['ratio_error'] < 1e-6 for row in rows)

@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains_another_family(tmp_path, method):
    small_pipeline('sd3').save_pretrained(tmp_path/'model')
    config = run_config(method, tmp_path/'run', model=str(tmp_path/'model'), num_steps=4, resolution=32, guidance=1., lora_rank=2)
    of_four = dict(window=2, active_steps=2, top=2, split_every=2) # steps
    config.plan |= {k: v for k, v in fitting(method, of_four).items() if k not in config.plan}
    trainer = Trainer(config, reward=lambda images, prompts: images.mean((1, 2, 3)))
    rows = [trainer.step(i) for i in range(3)]
    assert all(math.isfinite(row['grad_norm']) for row in rows)

@pytest.mark.parametrize('method, clips', [('flow_grpo', True), ('flow_dppo', False), ('nft', False)])
def test_only_a_clipped_ratio_is_called_clipped(tmp_path, method, clips, recwarn, monkeypatch):
    "Flow-DPPO's threshold is a KL, DiffusionNFT has none: no share of clipped ratios, no warning of them."
    trainer = Trainer(run_config(method, tmp_path, num_steps=8, iterations=1, clip_range=1e-9))
    sample = trainer.sample
    def inexact(*args):
        "A rollout whose log-probs are 1e-6 off."
        *before, out, rewards = sample(*args)
        return *before, replace(out, log_prob=out.log_prob + 1e-6), rewards
    monkeypatch.setattr(trainer, 'sample', inexact)
    trainer.fit()
    metrics = json.loads(trainer.run.metrics.read_text())
    by_step = next(iter(metrics['by_step'].values()))
    warned = any('before anything has moved' in str(w.message) for w in recwarn)
    assert metrics['ratio_error'] > 1e-7
    assert ('clip_frac' in metrics) == ('clip_frac' in by_step) == warned == clips

def test_nft_samples_with_the_average(tmp_path):
    trainer = Trainer(run_config('nft', tmp_path, num_steps=4, lr=1e-2))
    trainer.step(0)
    _, cond, out, _ = trainer.sample(1)
    with trainer.weights.averaged(), torch.no_grad():
        averaged = trainer.policy.velocity(out.parents, out.plan.start_sigmas[out.start], cond[out.prompt])
    with torch.no_grad(): current = trainer.policy.velocity(out.parents, out.plan.start_sigmas[out.start], cond[out.prompt])
    assert_close(out.means, averaged, rtol=1e-4, atol=1e-5)
    assert (current - averaged).abs().max() > 1e-3
    with pytest.raises(ValueError, match='set ema_decay above 0'): Trainer(run_config('nft', tmp_path/'none', ema_decay=0.))

def test_a_run_with_forward_draws_resumes_to_the_bit(tmp_path):
    def weights(out, **more):
        trainer = Trainer(run_config('nft', out, num_steps=4, checkpoint_every=1, **more))
        trainer.fit()
        return trainer.parameters, trainer.ema
    whole = weights(tmp_path/'whole')
    weights(tmp_path/'parts', iterations=1)
    parts = weights(tmp_path/'parts', resume=True)
    for a, b in zip(whole, parts):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize('method, settings, says', [
    ('flash_grpo', dict(noise_level=0), 'noise_level must be > 0 for stochastic steps'),
    ('tempflow_grpo', dict(noise_level=0), 'noise_level must be > 0 for stochastic steps'),
    ('tempflow_grpo', dict(noises=0), 'noises must be >= 1')])
def test_settings_by_which_weights_cannot_be_computed(method, settings, says):
    with pytest.raises(ValueError, match=says): make_plan(method, **settings)


def test_a_loss_of_another_signature_is_refused_by_its_plan(monkeypatch):
    monkeypatch.setitem(FORWARD_LOSSES, 'mine', lambda step, advantages: advantages)
    plan = make_plan('nft')
    with pytest.raises(ValueError, match="loss 'mine' must take .step, advantages, clip_range.: too many"): replace(plan, loss='mine')
