"Is AEGPO's signal worth listening to: each measure against a case whose answer is known, and each seen to fail on a planted bug."
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from egrpo.core.rollout import rollout
from egrpo.core.sigmas import flow_sigmas
from egrpo.methods.aegpo import entropy_profiles
from egrpo.models.policy import load_policy
from egrpo.paper import attention_signal, peaks
from egrpo.paper.attention_signal import SIGNALS, LastScores, block_profiles, half_scores, policy_gradient, velocity_distance, watch
from egrpo.paper.exploration import all_steps, exploration_plan
from egrpo.paper.intervals import correlation_draws, draws_interval, rank_correlation
from egrpo.paper.peaks import chosen_minus_rest, mean_score, moved_along, step_groups, step_values
from egrpo.paper.records import get_scale, load_record
from egrpo.rewards.reward import get_reward
from egrpo.train.evaluate import ode_plan
from egrpo.train.trainer import TrainConfig

PROMPTS = ['a red circle', 'two blue squares', 'a green cross']
SMALL = TrainConfig(method='dance_grpo', num_steps=5, num_generations=3, prompts_per_iteration=3, eval_size=1, device='cpu', ema_decay=0,
                    reward='clip', lr=1e-3)


@pytest.fixture(scope='module')
def policy():
    "The miniature, on the CPU; whoever moves its weights moves them back."
    return load_policy(device='cpu')


def flat(policy): return torch.cat([p.detach().flatten() for p in policy.parameters().values()])


def brightness(images, prompts):
    "How bright an image is."
    return images.mean((1, 2, 3))


# ---- ranks

@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_rank_correlation_is_scipys(seed, n, levels):
    "Also with ties; a constant ranks nothing."
    x, y = np.random.default_rng(seed).integers(0, 3 * levels, size=(2, n))
    expected = scipy.stats.spearmanr(x, y)[0] if np.ptp(x) and np.ptp(y) else 0.
    assert rank_correlation(x, y) == pytest.approx(expected, abs=1e-12)


def slow_draws(a, b, n, seed):
    "Draw runs, and prompts within them, one at a time."
    rng, (S, C, P), out = np.random.default_rng(seed), a.shape, []
    for _ in range(n):
        each = [(s, rng.integers(P, size=P)) for s in rng.integers(S, size=S)]
        out.append(np.mean([scipy.stats.spearmanr(a[s, c, i], b[s, c, i])[0] for s, i in each for c in range(C)]))
    return np.array(out)


def test_draws_are_of_runs_and_prompts():
    "As slow resampling has it; with runs that differ, drawing prompts alone would be too sure."
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 2, 30))
    b = a * np.array([3, 1, 0, -1])[:, None, None] + rng.normal(size=a.shape)
    fast, slow = correlation_draws(a, b, 600)[1:], slow_draws(a, b, 300, 1)
    assert fast.std() == pytest.approx(slow.std(), rel=.2) and fast.mean() == pytest.approx(slow.mean(), abs=.05)
    alone = correlation_draws(a.reshape(1, 8, 30), b.reshape(1, 8, 30), 600)[1:]
    assert alone.std() < fast.std() / 3


def test_draws_are_shared():
    "Two signals are compared on the same draws: one that ranks alike has a lead of exactly 0."
    a, b = np.random.default_rng(0).normal(size=(2, 3, 2, 12))
    assert draws_interval(correlation_draws(a, b) - correlation_draws(np.exp(a), b)) == (0., 0., 0.)


def test_regression_to_the_mean_is_kept_out():
    "Where nothing is learnt, the score predicts the gain on its own noise, and not on the other half's."
    rng = np.random.default_rng(1)
    level = rng.normal(size=(8, 1, 40))
    a, b = (level + rng.normal(size=(8, 3, 40)) for _ in range(2))
    seen = {k: rng.normal(size=(8, 3, 40)) for k in SIGNALS} | dict(score=b)
    fooled, fair = (attention_signal._predictions(seen | dict(before=half))['correlation']['gain to the next']['before'] for half in (b, a))
    assert fooled[2] < -.2 and fair[1] < 0 < fair[2]


@given(st.integers(0, 10**6), st.integers(2, 9))
@settings(deadline=None, max_examples=40)
def test_chosen_minus_rest(seed, B):
    "Whatever is chosen, and opposite for the complement."
    rng = np.random.default_rng(seed)
    values, n = rng.normal(size=(3, B)), int(rng.integers(1, B))
    chosen = [rng.choice(B, n, replace=False).tolist() for _ in range(3)]
    rest = [[k for k in range(B) if k not in c] for c in chosen]
    expected = [values[p, c].mean() - values[p, r].mean() for p, (c, r) in enumerate(zip(chosen, rest))]
    np.testing.assert_allclose(chosen_minus_rest(values, chosen), expected)
    np.testing.assert_allclose(chosen_minus_rest(values, rest), -np.array(expected))


# ---- signals

def test_profiles_by_block(policy):
    "Their mean is the profile that allocation uses; a prompt's does not depend on the others."
    profiles, blocks = block_profiles(policy, PROMPTS, 5)
    assert profiles.shape == (3, 5, len(blocks))
    assert_close(profiles.mean(-1), entropy_profiles(policy, PROMPTS, 5), atol=1e-5, rtol=0)
    assert_close(block_profiles(policy, PROMPTS[1:2], 5)[0][0], profiles[1], atol=1e-5, rtol=0)


def test_distance_is_on_the_probes_latents(policy, monkeypatch):
    "The walk ends where the probe's rollout ends, and the distance before training is 0."
    seen, true = [], attention_signal.ode_step
    monkeypatch.setattr(attention_signal, 'ode_step', lambda *o: seen.append(true(*o)) or seen[-1])
    policy.freeze_reference()
    assert velocity_distance(policy, PROMPTS, 5).tolist() == [0.] * 3
    probe = rollout(policy, policy.encode(PROMPTS), ode_plan(5), 'probe', prompt_ids=PROMPTS)
    assert_close(seen[-1], probe.latents, atol=1e-4, rtol=1e-4)


def test_gradient_goes_up(policy):
    "A short way against it, and the transitions with a positive advantage are more likely: finite differences."
    plan = exploration_plan([(1, 1)], 4, 5)
    cond, out, scores, _ = step_groups(policy, PROMPTS[0], 0, plan, get_reward(brightness))
    out, advantages = replace(out, weight=torch.ones(4)), torch.tensor([1., -1., .5, -.5])

    def surrogate():
        "The loss, as its definition says, at the weights of the moment; the clip is out of reach."
        from egrpo.core.rollout import transition_log_prob
        sigma = flow_sigmas(5)[out.start]
        with torch.no_grad(): v = policy.velocity(out.parents, sigma, cond[out.prompt])
        new, *_ = transition_log_prob(v, out.parents, out.children, out.row, out.start, out.end, out.plan)
        return -((new.double() - out.log_prob.double()).exp() * advantages).mean().item()

    g, eps = policy_gradient(policy, cond, out, advantages, TrainConfig(clip_range=.2)), 3e-2
    with moved_along(policy.parameters(), g, eps): up = surrogate()
    with moved_along(policy.parameters(), -g, eps): down = surrogate()
    assert (up - down) / (2 * eps) == pytest.approx(g.norm().item(), rel=.1)
    assert not any(p.grad is not None and p.grad.any() for p in policy.parameters().values())


def test_micro_batches_of_a_gradient(policy):
    "One row at a time or all at once: the same gradient, weights untouched."
    plan, start = exploration_plan(all_steps(5), 3, 5), flat(policy)
    cond, out, scores, _ = step_groups(policy, PROMPTS[0], 0, plan, get_reward(brightness))
    out, advantages = replace(out, weight=torch.ones(len(out.row))), torch.linspace(-1, 1, len(out.row))
    whole = policy_gradient(policy, cond, out, advantages, SMALL)
    micro, policy.micro_batch = policy.micro_batch, 1
    assert_close(policy_gradient(policy, cond, out, advantages, SMALL), whole, atol=1e-6, rtol=1e-3)
    policy.micro_batch = micro
    assert torch.equal(start, flat(policy))


def test_halves_are_different_noise(policy):
    "Half A and half B are scored apart, on fixed noise; together they are all samples."
    reward = get_reward(brightness)
    halves, again = (half_scores(policy, reward, PROMPTS, 4) for _ in range(2))
    assert_close(halves, again)
    assert (halves[:, 0] != halves[:, 1]).all()
    with pytest.raises(ValueError, match='samples must be even'): half_scores(policy, reward, PROMPTS, 5)


# ---- a watched run

def test_watch(monkeypatch):
    "What training sees is not what is measured: the last group's std is training's, and measuring changes nothing of the run."
    asked, true = [], LastScores.std
    def std(self, prompts):
        "Note what is remembered when it is asked for."
        asked.append({p: s.clone() for p, s in self.last.items()})
        return true(self, prompts)
    monkeypatch.setattr(LastScores, 'std', std)
    seen, once = watch(SMALL, PROMPTS, (1, 2), 2), watch(SMALL, PROMPTS, (2,), 2)
    for k in ('delta_entropy', 'distance', 'last_std', 'score'): assert_close(seen[k][1], once[k][0], atol=1e-5, rtol=1e-3)
    assert seen['reward'] == pytest.approx(once['reward'], rel=1e-4)
    assert_close(asked[1], asked[2], atol=1e-5, rtol=1e-4)
    assert all(len(v) == SMALL.plan["num_generations"] for v in asked[0].values())
    assert seen['nfe'] > once['nfe']


def test_nothing_learnt_nothing_moved():
    "At a learning rate of nearly nothing no prompt moves, and no signal says that one has."
    seen = watch(replace(SMALL, lr=1e-12), PROMPTS, (1,), 2)
    assert seen['delta_entropy'].tolist() == [[0.] * 3] and seen['distance'].max() < 1e-4


# ---- one step alone

def test_step_values_of_a_linear_world(policy):
    "An update from a step's own group makes images brighter if brightness is the reward, and darker if darkness is."
    plan = exploration_plan([(0, 1), (1, 1)], 8, 5)
    start = flat(policy)
    bright, dark = (step_values(policy, PROMPTS[:2], plan, {'r': f}, 4) for f in (brightness, lambda i, p: -brightness(i, p)))
    assert (bright.gain > 0).float().mean() >= .5 and bright.gain.mean() > 0
    assert_close(bright.variance, dark.variance, atol=1e-8, rtol=1e-3)
    assert_close(bright.repeat, dark.repeat, atol=1e-3, rtol=1e-2)
    assert torch.equal(start, flat(policy))


def test_gain_is_measured_on_other_noise(policy):
    "The samples that measure the gain share no noise with the groups."
    plan = exploration_plan([(0, 1)], 4, 5)
    seen, true = [], peaks.rollout
    peaks.rollout = lambda *a, **k: seen.append((a[3:], tuple(k.get('prompt_ids') or ()))) or true(*a, **k)
    try: step_values(policy, PROMPTS[:1], plan, brightness, 2)
    finally: peaks.rollout = true
    assert seen[0] == (('steps', 0), (0,)) and {o for o in seen[1:]} == {(('other noise',), ('0, 0', '0, 1'))}


def test_mean_score_follows_the_weights(policy):
    "It moves with them, and comes back with them."
    reward = get_reward(brightness)
    def score(): return mean_score(policy, reward, PROMPTS[0], 0, 3, flow_sigmas(5))
    before = score()
    with moved_along(policy.parameters(), torch.ones_like(flat(policy)), .3): assert score() != before
    assert score() == before


# ---- records

@pytest.mark.parametrize('name', ['attention_profile', 'learning_value', 'peaks'])
def test_record(name):
    "Measured, at a scale that measures something."
    record = load_record(name)
    assert record['scale'] in ('mini', 'gpu') and record['nfe'] > 0 and record['command'].startswith(f'egrpo reproduce {name}')


def test_record_of_learning_value_adds_up():
    "Its correlations and ceilings are those of its signals."
    data = load_record('learning_value')['data']
    seen = {k: np.array(v) for k, v in data['signals'].items()}
    again = attention_signal._predictions(seen)
    for value, found in again['correlation'].items():
        for p, o in found.items(): np.testing.assert_allclose(o, data['correlation'][value][p], atol=.05)
    assert set(data['over_rivals']) == set(again['over_rivals'])


def test_unknown_scale_is_refused():
    with pytest.raises(ValueError, match='scale must be one of smoke, mini, gpu'): peaks.peaks_data(get_scale('flux'))
