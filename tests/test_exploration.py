"Measurements of single steps against closed forms: a linear policy, whose rollouts are Gaussian, knows every answer exactly."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from egrpo.core.entropy import landing_noise, merge_lengths, step_entropy
from egrpo.core.plan import rollout_nfe
from egrpo.core.rollout import rollout
from egrpo.core.sde import sde_step
from egrpo.core.sigmas import flow_sigmas
from egrpo.paper import credit, exploration, intervals, measurement
from egrpo.paper.credit import chain_plan, credit_shares, redraw_advantages, redraw_chains, redraw_scores, reliability, sign_flips
from egrpo.paper.exploration import add_noise, all_steps, exploration_plan, explore, spread
from egrpo.paper.intervals import Estimate
from egrpo.paper.merging_noise import gaussian_std, guard_tau, landing_shares
from egrpo.paper.records import get_scale, load_record
from egrpo.rewards.reward import RewardSet
from egrpo.train.prompts import load_prompts


class Conditions:
    "Nothing, once per prompt."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, index): return Conditions(len(index))


class LinearPolicy:
    "The exact velocity of Gaussian data; an image is three latents, its latent shape (1,8,8) elsewhere ignored."
    device, latent_shape = torch.device('cpu'), (1, 8, 8)
    def __init__(self, data_std=.5): self.c2, self.nfe = data_std**2, 0
    def encode(self, prompts): return Conditions(len(prompts))
    def decode(self, latents): return latents.repeat(1, 3, 1, 1)
    def velocity(self, latents, sigma, cond):
        self.nfe += len(latents)
        s = sigma.view(-1, 1, 1, 1)
        return (s - (1 - s)*self.c2) / ((1 - s)**2*self.c2 + s**2) * latents


policy = LinearPolicy()
linear = RewardSet(dict(sum=lambda images, prompts: images[:, 0].sum((1, 2))))


@pytest.mark.parametrize('step', [(0, 1), (0, 4), (2, 4), (6, 3), (8, 4)])
def test_gaussian_std_is_what_the_executor_samples(step):
    out = rollout(policy, Conditions(64), exploration_plan([step], 64), 'gauss', step[0])
    samples = out.latents.unflatten(0, (64, -1))[:, :-1].flatten(0, 1) # 64 prompts, each with its own initial noise
    assert abs(samples.std().item() / gaussian_std([step]) - 1) < .02
    assert abs(samples.std().item() / gaussian_std([(step[0], step[1] + 1)]) - 1) > .02 or step == (6, 3)


def test_chain_std_is_what_the_executor_samples():
    for n in (1, 4, 8):
        latents = redraw_chains(policy, Conditions(32), chain_plan(n, num_generations=8), 'chain', n)
        assert abs(latents.std().item() / gaussian_std(all_steps()[:n]) - 1) < .04


def test_explore_counts_and_compares():
    plan = exploration_plan([(2, 1), (6, 4)], 5)
    before = policy.nfe
    found = explore(policy, ['a', 'b', 'c'], plan, linear, batch=2)
    assert found.nfe == policy.nfe - before == 3 * rollout_nfe(plan)
    assert found.scores['sum'].shape == (3, 2, 5) and found.ode['sum'].shape == (3,)
    assert_close(explore(policy, ['a', 'b', 'c'], plan, linear, batch=1).scores, found.scores)
    assert not torch.equal(explore(policy, ['a', 'b', 'c'], plan, linear, seed=1).scores['sum'], found.scores['sum'])
    assert_close(policy.decode(found.latents)[:, 0].sum((1, 2)), found.ode['sum'])


def coefficients(plan, data_std=.5):
    "How much the noise of each stochastic step counts in the end: its std there times the slopes of all steps after it."
    steps, sigmas, out = {s.start: s.end for s in plan.branches[0].steps}, plan.sigmas, {}
    one, k = torch.ones(1, 1), 0
    while k < plan.num_steps:
        end, s = steps.get(k, k + 1), sigmas[k].item()
        v = torch.full((1, 1), (s - (1 - s)*data_std**2) / ((1 - s)**2*data_std**2 + s**2))
        mean, std = sde_step(v, one, s, sigmas[end].item(), plan.noise_level, plan.kernel, plan.sigma_max)
        slope = mean if k in steps else one - v*(s - sigmas[end].item())
        out = {j: c * slope.item() for j, c in out.items()} | ({k: std.item()} if k in steps else {})
        k = end
    return out


@pytest.mark.parametrize('kernel, noise', [('flow', .7), ('dance', .3)])
def test_redraws_find_each_step_s_share(kernel, noise):
    "A linear reward of a linear policy is a sum of independent parts, so reliabilities and flips are known."
    plan = chain_plan(3, num_generations=12, num_steps=8, noise_level=noise, kernel=kernel)
    c = np.array(list(coefficients(plan).values()))
    shares = c**2 / (c**2).sum()
    a = redraw_advantages(redraw_scores(policy, ['a'] * 600, plan, linear, batch=200)['sum'])
    rho, flips = (m(a[:, :1], a[:, 1:]).mean(0).numpy() for m in (reliability, sign_flips))
    np.testing.assert_allclose(rho, shares, atol=.04)
    np.testing.assert_allclose(flips, np.arccos(shares) / math.pi, atol=.03)
    assert abs(rho.sum() - 1) < .06 and shares.max() - shares.min() > .1
    past = redraw_advantages(redraw_scores(policy, ['a'] * 600, plan, linear, keep='past', batch=200)['sum'])
    np.testing.assert_allclose(credit_shares(past).mean(0), shares, atol=.04)


def test_redraws_notice_a_planted_bug(monkeypatch):
    "Were the kept noise redrawn too, the advantages before and after would have nothing in common."
    whole = credit._redraw_noise
    def redraw_all(shape, where, p, k, at, keep, G): return whole(shape, where, p, k, None if at is None else 99, keep, G)
    monkeypatch.setattr(credit, '_redraw_noise', redraw_all)
    a = redraw_advantages(redraw_scores(policy, ['a'] * 200, chain_plan(1, num_generations=8), linear, batch=200)['sum'])
    assert abs(reliability(a[:, :1], a[:, 1:]).mean()) < .1


def test_chains_are_the_rollout_s():
    for n, first, kernel in ((4, 0, 'flow'), (2, 5, 'flow'), (15, 0, 'dance')):
        plan = chain_plan(n, first, 3, kernel=kernel)
        ours = redraw_chains(policy, Conditions(2), plan, 'x', 3, ids=[4, 7])[:, 0].flatten(0, 1)
        assert_close(ours, rollout(policy, Conditions(2), plan, 'x', 3, prompt_ids=[4, 7]).latents)


def test_one_step_has_nobody_to_share_with():
    for first in (0, 3, 7):
        scores = redraw_scores(policy, ['a', 'b'], chain_plan(1, first, 6), linear)['sum']
        assert_close(scores[:, 0], scores[:, 1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(4, 40), st.floats(.5, 6), st.floats(.3, 1.2), st.data())
def test_guard_means_what_it_says(T, shift, noise, data):
    n, kernel = data.draw(st.integers(1, T - 1)), data.draw(st.sampled_from(['flow', 'dance', 'cps']))
    sigmas, noise = flow_sigmas(T, shift), min(noise, 1.) if kernel == 'cps' else noise
    safe, step = guard_tau(sigmas, n, noise_level=noise, kernel=kernel)
    assert (safe == 0) == bool((landing_noise(sigmas, [1]*(T - 1) + [0], noise, kernel)[:n] > 1).any())
    if safe == 0: return
    lengths = merge_lengths(sigmas, safe * (1 - 1e-5), noise, kernel)
    assert landing_noise(sigmas, lengths, noise, kernel)[:n].max() <= 1
    above = merge_lengths(sigmas, safe * (1 + 1e-5), noise, kernel)[step]
    assert above == 0 or landing_shares(sigmas, noise, kernel)[step, above - 1] > 1


def test_guard_of_a_kernel_whose_entropy_falls_with_length():
    sigmas = flow_sigmas()
    safe, _ = guard_tau(sigmas, noise_level=.8, kernel='cps')
    assert safe == min(step_entropy(sigmas, 1, .8, kernel='cps')[:8]) > 1.3
    assert merge_lengths(sigmas, safe, .8, 'cps')[:8].tolist() == [1] * 8


def test_noise_on_a_result_is_that_share():
    clean = torch.rand(3, 2, 16, 16)
    noisy = add_noise(clean, .25, 200, 'x')
    assert_close(noisy.mean(1), .75 * clean, atol=.1, rtol=0)
    assert abs(noisy.std(1).mean().item() - .25) < .005
    assert_close(add_noise(clean, 0., 2), clean[:, None].expand(-1, 2, -1, -1, -1))


def test_spread_is_unbiased_for_any_group():
    scores = torch.randn(30_000, 12, generator=torch.Generator().manual_seed(1))
    assert all(abs(spread(scores[:, :g]).mean().item() - 1) < .03 for g in (2, 6, 12))


def test_sizes_name_the_scales():
    with pytest.raises(ValueError, match='smoke, mini, gpu for one_step'): measurement.measurement_size('one_step', get_scale('flux'))
    for name, sizes in measurement.SIZES.items():
        what = dict(speed='rounds', base_scores='noises').get(name, 'prompts')
        smoke, mini, gpu = (sizes[o][what] for o in ('smoke', 'mini', 'gpu'))
        assert smoke < mini < gpu, name


@pytest.mark.parametrize('name', measurement.SIZES)
def test_record_is_of_a_size_that_says_something(name):
    record = load_record(name)
    assert record['scale'] != 'smoke' and record['nfe'] > 0
    has, wanted = record['data']['prompts'], measurement.SIZES[name][record['scale']]['prompts']
    assert has <= wanted and (has < wanted) == bool(measurement.size_note(record))


def test_one_step_record_agrees_with_itself():
    data = load_record('one_step')['data']
    where = {tuple(o): i for i, o in enumerate(data['steps'])}
    texts = load_prompts('shapes', 'held_out', data['prompts'])
    for reward, v in data['variance'].items():
        early, late = (v[where[o]] for o in (exploration.EARLY, exploration.LATE))
        again = intervals.log_ratio(early, late, texts)
        found = Estimate(**data['contrasts'][reward]['step 2 over step 6']['log_ratio'])
        assert found.interval() == pytest.approx(again.interval(), abs=1e-3)


# ---- variances as logarithms

def skewed(rng, prompts=200): return rng.lognormal(sigma=2, size=prompts)


def test_a_planted_log_ratio_is_found():
    "In 95 of 100 worlds, about; the ratio of the means is anything."
    rng = np.random.default_rng(0)
    found, means = [], []
    for _ in range(100):
        u = skewed(rng)
        v = 1.4 * u * rng.lognormal(sigma=1, size=200)
        found.append(intervals.as_ratio(intervals.log_ratio(v, u)))
        means.append(v.mean() / u.mean())
    assert 88 <= sum(low < 1.4 < high for _, low, high in found) <= 99
    assert np.std(np.log(means)) > 2 * np.std(np.log([o[0] for o in found]))


def test_a_text_that_repeats_counts_once():
    rng = np.random.default_rng(1)
    u, v = skewed(rng, 40), skewed(rng, 40)
    one = intervals.log_ratio(v, u)
    copied = intervals.log_ratio(np.tile(v, 5), np.tile(u, 5), list(range(40)) * 5)
    fooled = intervals.log_ratio(np.tile(v, 5), np.tile(u, 5))
    assert copied.se == pytest.approx(one.se) and fooled.se < .6 * one.se


def test_floor_of_a_variance():
    "A hundredth of the median positive variance, one for both sides; what is above it is left alone."
    rng = np.random.default_rng(2)
    u = skewed(rng)
    u[:30] = 0
    floor = .01 * np.median(u[30:])
    np.testing.assert_allclose(intervals.log_variance(u), np.log(np.maximum(u, floor)))
    assert intervals.log_ratio(u, u).interval() == pytest.approx((0, 0, 0), abs=1e-9)
    half = intervals.log_ratio(u / 2, u)
    both = np.median(np.concatenate([u[u > 0] / 2, u[u > 0]])) * .01
    assert half.mean == pytest.approx(np.mean(np.log(np.maximum(u / 2, both)) - np.log(np.maximum(u, both))))
    silent = intervals.log_ratio([0, 0, 0, 1.], [1, 1, 1, 1.])
    assert silent.mean == pytest.approx(3 * np.log(.01) / 4) # no infinity
    assert not intervals.log_variance(np.zeros(5)).any()


def test_credit_record_agrees_with_itself():
    data = load_record('credit')['data']
    for chain, a in data['advantages'].items():
        a = torch.tensor(a).transpose(0, 1)
        np.testing.assert_allclose(sign_flips(a[:, :1], a[:, 1:]).mean(), data['credit']['preference'][chain]['flips']['all'][0], atol=5e-3)


def test_a_tampered_credit_record_would_be_noticed():
    data = load_record('credit')['data']
    a = torch.tensor(data['advantages']['8 steps']).transpose(0, 1)
    a[:, 1:3] = a[:, :1] # as if two of the eight steps had the reward to themselves
    assert abs(sign_flips(a[:, :1], a[:, 1:]).mean() - data['credit']['preference']['8 steps']['flips']['all'][0]) > .05
