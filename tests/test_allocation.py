"AEGPO in the loop: its cost, its equalities with the base, unequal groups, several processes, and that each check sees a planted bug."
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from egrpo.core.plan import count_leaves, gradient_nfe, rollout_nfe
from egrpo.core.rollout import rollout
from egrpo.methods.aegpo import ALLOCATIONS, AttentionPlanner, allocate, entropy_profiles, share_work
from egrpo.methods.registry import METHODS, explored, make_plan, stochastic_steps
from egrpo.models.policy import load_policy
from egrpo.train import objective as objective_module
from egrpo.train.objective import rows_loss
from egrpo.train.prepare import iteration_nfe
from egrpo.train.trainer import TrainConfig, Trainer

SMALL = dict(method='aegpo', top=2, num_steps=7, num_generations=6, prompts_per_iteration=2, eval_size=1, device='cpu', lr=1e-4,
             ema_decay=0)
NO_CHOICE = ('aegpo', 'flash_grpo', 'awm', 'nft', 'v_grpo', 'dgpo') # they have one stochastic step, or none
BASES = {name: {} for name in METHODS if name not in NO_CHOICE} | dict(
    egrpo=dict(active_steps=3), g2rpo=dict(active_steps=4), mix_grpo=dict(window=3), branch_grpo=dict(num_steps=9),
    dynamic_tree_rpo=dict(num_generations=8))


@pytest.fixture
def policy():
    "The miniature, on the CPU, untrained."
    return load_policy(device='cpu')


def trainer_of(policy, tmp_path, **changes):
    "A trainer of a small run."
    return Trainer(TrainConfig(**{**SMALL, 'out': str(tmp_path/'run'), **changes}), policy)


# ---- division of the budget

@cache
def plan_of(n):
    "A plan of n samples."
    return make_plan('egrpo', num_generations=n, active_steps=2)


def cost_of(n):
    "Its network evaluations."
    return rollout_nfe(plan_of(n)) + gradient_nfe(plan_of(n))


@given(st.lists(st.floats(0, 1) | st.just(0.), min_size=1, max_size=40), st.integers(2, 24), st.sampled_from(ALLOCATIONS),
       st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None, max_examples=200)
def test_budget_holds(delta, G, rule, processes, seed):
    "Every rule spends the same, no group is too small to compare, and processes share all prompts evenly."
    counts = allocate(torch.tensor(delta), G, rule, seed)
    assert sum(counts) == len(delta) * G and min(counts) >= 2
    shares = share_work([plan_of(n) for n in counts], processes)
    load = [sum(cost_of(counts[i]) for i in s) for s in shares]
    assert sorted(i for s in shares for i in s) == list(range(len(delta)))
    assert max(load) - min(load) <= max(map(cost_of, counts))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40, unique=True))
@settings(deadline=None)
def test_upper_half_gets_sixteen(delta):
    "16 for the prompts above the median, 8 below, 12 for one at it."
    d = torch.tensor(delta, dtype=torch.float64)
    expected = [16 if x > d.quantile(.5) else 8 if x < d.quantile(.5) else 12 for x in d]
    assert allocate(d, 12) == expected
    assert allocate(d, 12, 'inverted') == [24 - n for n in expected]


def test_nothing_known_is_uniform():
    "Without any difference nobody is preferred, except by lot."
    for rule in ALLOCATIONS:
        if rule != 'random': assert allocate(torch.zeros(7), 12, rule) == [12] * 7


# ---- with every base

@pytest.mark.parametrize('base', BASES)
def test_cost_and_first_ratio(policy, tmp_path, base):
    "What the plans predict is what the network's counter finds, with the probes; the prediction without them is a bound; ratio 1."
    trainer = trainer_of(policy, tmp_path, base=base, **BASES[base])
    plans, choice = trainer.plan(0)
    assert all(len(stochastic_steps(p)) == 2 for p in plans)
    again, metrics = trainer.plan(0)[0], trainer.step(0)
    assert [p.branches for p in plans] == [p.branches for p in again]
    T, P = trainer.config.num_steps, trainer.config.prompts_per_iteration
    assert (choice['nfe_probe'], metrics['nfe_probe']) == (2 * T * P, T * P) # the policy before training is asked once
    assert metrics['nfe_rollout'] - metrics['nfe_probe'] == sum(map(rollout_nfe, plans))
    assert metrics['nfe_gradient'] == sum(map(gradient_nfe, plans))
    assert choice['nfe_probe'] + metrics['nfe_rollout'] - metrics['nfe_probe'] + metrics['nfe_gradient'] <= iteration_nfe(trainer.config)
    assert metrics['ratio_error'] < 1e-6
    assert metrics['samples'] == [trainer.config.plan['num_generations']] * P and metrics['delta_entropy'] == 0 # it has not learnt yet


@pytest.mark.parametrize('base', ['awm', 'nft', 'v_grpo', 'dgpo'])
def test_forward_draws_leave_nothing_to_choose(policy, tmp_path, base):
    with pytest.raises(ValueError, match='take a method with stochastic steps'): trainer_of(policy, tmp_path, base=base)


def test_after_an_update_groups_are_unequal(policy, tmp_path):
    "ΔEntropy is no longer zero, so the halves differ, by what was asked for, and the ratio is still 1."
    trainer = trainer_of(policy, tmp_path)
    trainer.step(0)
    metrics = trainer.step(1)
    assert sorted(metrics['samples']) == [4, 8] and metrics['delta_entropy'] > 0 and metrics['ratio_error'] < 1e-6
    assert sum(metrics['explored'].values()) == 4


def test_reference_is_the_policy_before_training(policy, tmp_path, monkeypatch):
    "Planted bug: the reference is the policy itself. Then nothing would ever move."
    trainer = trainer_of(policy, tmp_path)
    trainer.step(0)
    moved = entropy_profiles(policy, ['a red circle'], 7)
    with policy.reference(): before = entropy_profiles(policy, ['a red circle'], 7)
    assert (moved - before).abs().max() > 1e-5
    monkeypatch.setattr(type(policy), 'reference', lambda self: torch.no_grad())
    assert trainer.step(1)['delta_entropy'] == 0


@pytest.mark.parametrize('base', ['dance_grpo', 'flow_grpo', 'egrpo', 'tempflow_grpo'])
def test_without_choices_it_is_the_base(tmp_path, base):
    "Uniform groups and all steps: same latents, rewards, weights as the base, to the last bit."
    runs = []
    for method in ('aegpo', base):
        policy = load_policy(device='cpu')
        own = dict(base=base, allocation='uniform', explore='all', top=None) if method == 'aegpo' else dict(method=base, top=None)
        whole = dict(train_share=1.) if base == 'dance_grpo' else {}
        trainer = trainer_of(policy, tmp_path/method, num_generations=4, **own, **whole, **BASES[base])
        runs.append((trainer.step(0), trainer.sample(1)[2].latents, trainer.parameters))
    (a, x, v), (b, y, w) = runs
    assert torch.equal(x, y) and all(torch.equal(v[n], w[n]) for n in v)
    assert {k: o for k, o in a.items() if k in b and 'seconds' not in k} == {k: o for k, o in b.items() if 'seconds' not in k}


# ---- unequal groups in the loss

def gradient_of(policy, trainer, cond, out, advantages):
    "Gradient of the mean loss, flat."
    policy.transformer.zero_grad()
    total = objective_module.loss_weights(out, trainer.config).sum()
    loss = rows_loss(policy, cond, out, torch.arange(len(out.parents)), advantages, trainer.config)[0] / total
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trainer.parameters.values()))])


@pytest.mark.parametrize('weigh', ['sample', 'prompt'])
def test_weights_of_unequal_groups(policy, tmp_path, weigh):
    "The gradient is the mean over prompts of each one's own, equal ones or by their samples."
    trainer = trainer_of(policy, tmp_path, weigh=weigh, prompts_per_iteration=2)
    plans = [explored(make_plan('dance_grpo', num_steps=7, num_generations=n), [1, 3]) for n in (8, 4)]
    _, cond, out, rewards = trainer.sample(0, plans)
    advantages, _ = trainer.advantages(out, rewards)
    advantages = advantages + .1 # so that no prompt's gradient is zero
    whole = gradient_of(policy, trainer, cond, out, advantages)
    mine = out.prompt[out.row]
    alone = [gradient_of(policy, trainer, cond, replace(out, weight=out.weight * (mine == p)), advantages) for p in range(2)]
    shares = (.5, .5) if weigh == 'prompt' else (8/12, 4/12)
    assert_close(whole, sum(s * g for s, g in zip(shares, alone)), rtol=1e-4, atol=1e-6)
    other = (8/12, 4/12) if weigh == 'prompt' else (.5, .5)
    assert (whole - sum(s * g for s, g in zip(other, alone))).norm() > .02 * whole.norm()


# ---- runs

def test_resume_equals_a_straight_run(tmp_path):
    "The cache of profiles is on disk, so a run that was stopped goes on with the same choices."
    def fit(out, iterations, **changes):
        trainer = trainer_of(load_policy(device='cpu'), tmp_path/out, iterations=iterations, checkpoint_every=0, **changes)
        trainer.fit()
        return trainer
    straight = fit('a', 2)
    fit('b', 1)
    resumed = fit('b', 2, resume=True)
    assert all(torch.equal(p, resumed.parameters[n]) for n, p in straight.parameters.items())
    logs = [[json.loads(line) for line in (tmp_path/o/'run/metrics.jsonl').read_text().splitlines()] for o in 'ab']
    assert [m['samples'] for m in logs[0]] == [m['samples'] for m in logs[1]] and sorted(logs[0][1]['samples']) == [4, 8]
    assert straight.nfe == resumed.nfe == sum(m['nfe_rollout'] + m['nfe_gradient'] for m in logs[0])


def test_samples_go_where_rewards_are_uncertain(tmp_path):
    "By the spread of rewards at earlier visits, without a probe; a resumed run knows them."
    prompts = tmp_path/'prompts.txt'
    prompts.write_text('a red circle\ntwo blue squares\n')
    by_reward = dict(prompts=str(prompts), base='flow_grpo', allocation='reward_std', explore='all', reward='verifier', checkpoint_every=0)
    def fit(out, iterations, **changes):
        trainer = trainer_of(load_policy(device='cpu'), tmp_path/out, iterations=iterations, **by_reward, **changes)
        trainer.fit()
        return trainer, [json.loads(line) for line in trainer.run.metrics.read_text().splitlines()]
    straight, log = fit('a', 3)
    fit('b', 1)
    resumed, log_resumed = fit('b', 3, resume=True)
    assert all(torch.equal(p, resumed.parameters[n]) for n, p in straight.parameters.items())
    assert straight.planner.spread == resumed.planner.spread
    assert [m['samples'] for m in log] == [m['samples'] for m in log_resumed] and log[0]['samples'] == [6, 6]
    first = dict(zip(straight._prompts_of(0), log[0]['reward_std_by_prompt']))
    second = dict(zip(straight._prompts_of(1), log[1]['samples']))
    assert sorted(second.values()) == [4, 8] and second[max(first, key=first.get)] == 8
    assert all(m['nfe_probe'] == 0 for m in log)


def test_a_model_trained_in_place_has_new_profiles(tmp_path):
    "Runs of a model share its profiles; told something else, or trained on under the same name, it is measured again."
    model, shared = tmp_path/'model', tmp_path/'profiles'
    def fit(out, **call):
        policy = load_policy(str(model), device='cpu', call=call)
        trainer = trainer_of(policy, tmp_path/out, model=str(model), profile_cache=str(shared), iterations=1, num_generations=3)
        trainer.fit()
        return trainer.policy, len(list(shared.iterdir()))
    load_policy(device='cpu').save(model)
    (trained, first), (_, again) = fit('a'), fit('b')
    trained.save(model)
    assert first == again == SMALL['prompts_per_iteration'] and fit('c')[1] == 2 * first
    assert [fit(f'd{n}', max_sequence_length=n)[1] for n in (12, 8)] == [3 * first, 4 * first]


def test_probes_look_at_the_weights_that_sample(tmp_path, monkeypatch):
    "With `sample_with: average` both see the average, which differs from the weights once there was an update."
    trainer = trainer_of(load_policy(device='cpu'), tmp_path, sample_with='average', ema_decay=.5, iterations=2, num_generations=3, lr=1e-3)
    seen = []
    def note(function):
        "Note the first weights at a call."
        def noted(*args, **kwargs):
            seen.append(next(iter(trainer.parameters.values())).detach().clone())
            return function(*args, **kwargs)
        return noted
    trainer.step(0)
    trained = next(iter(trainer.parameters.values())).detach().clone()
    monkeypatch.setattr(AttentionPlanner, '__call__', note(AttentionPlanner.__call__))
    monkeypatch.setattr('egrpo.train.trainer.rollout', note(rollout))
    trainer.step(1)
    probed, sampled = seen
    assert torch.equal(probed, sampled) and not torch.equal(probed, trained)


def test_budget_ends_a_run(policy, tmp_path):
    "The run ends with the iteration that uses up its network evaluations."
    trainer = trainer_of(policy, tmp_path, method='egrpo', top=None, active_steps=2, budget=500, iterations=50)
    trainer.fit()
    each = iteration_nfe(trainer.config)
    assert 500 <= trainer.nfe < 500 + each and trainer.iteration == -(-500 // each) < 50


# ---- what is refused

@pytest.mark.parametrize('changes, message', [
    (dict(method='egrpo', top=None, base='dance_grpo'), 'base is no setting of egrpo'),
    (dict(method='egrpo', top=None, allocation='median'), 'is no setting of egrpo: leave it out, or take aegpo'),
    (dict(allocation='fair'), 'allocation must be one of'),
    (dict(explore='late'), 'explore must be one of'),
    (dict(explore_per='step'), 'explore_per must be'),
    (dict(top=0), 'top must be >= 1'),
    (dict(base='ppo'), 'method must be one of'),
    (dict(base='branch_grpo', num_steps=4), 'do not fit 4 steps'),
    (dict(weigh='group'), 'weigh must be one of'),
    (dict(budget=0), 'budget must be >= 1'),
])
def test_refused(policy, tmp_path, changes, message):
    "One clear line before anything is written."
    with pytest.raises(ValueError, match=message): trainer_of(policy, tmp_path, **changes)
    assert not (tmp_path/'run').exists()


def test_prompts_of_a_batch_share_a_rollout(policy):
    "Plans that differ by prompt are walked together, each prompt as if alone."
    plans = [explored(make_plan('dance_grpo', num_steps=7, num_generations=n), steps) for n, steps in ((4, [1, 3]), (2, [0, 5]))]
    cond = policy.encode(['a red circle', 'two blue squares'])
    both = rollout(policy, cond, plans, 0)
    for p in range(2):
        alone = rollout(policy, cond[[p]], plans[p:p + 1], 0, prompt_ids=[p])
        assert_close(both.latents[both.leaf_prompt == p], alone.latents, rtol=0, atol=1e-4)
    assert (both.leaf_prompt == 0).sum() == count_leaves(plans[0]) == 4
