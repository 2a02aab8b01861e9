"""The objective (advantage and loss) against independent oracles, each oracle seen to fail on a planted bug.

`planted(module, old, new)` runs a copy of the module's source in which one place is changed; the library itself is never touched.
"""
import importlib
import inspect
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from egrpo.core import advantage, loss


def planted(module, old, new):
    "A copy of the module `egrpo.core.<module>` with the only occurrence of `old` replaced."
    source = inspect.getsource(importlib.import_module(f'egrpo.core.{module}'))
    if source.count(old) != 1: raise LookupError(f"{old!r} occurs {source.count(old)} times: the bug cannot be planted")
    scope = {'__name__': f'planted_{module}', '__package__': 'egrpo.core'}
    exec(compile(source.replace(old, new), f'planted {module}', 'exec'), scope)
    return SimpleNamespace(**scope)


# ---- advantage ----

def values_oracle(m):
    "Each value is a slice's mean, on random ranges and on a tree."
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(40, generator=g)
    start = torch.randint(0, 40, (100,), generator=g)
    count = (torch.rand(100, generator=g) * (40 - start)).long() + 1
    expected = torch.stack([rewards[s:s + c].mean() for s, c in zip(start.tolist(), count.tolist())])
    assert_close(m.transition_values(rewards, start, count), expected)


def zscore_oracle(m):
    "pandas groupby for unequal, interleaved groups; scipy.stats.zscore for a single one; numpy for the batch's std."
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat([12, -4, 7], [16, 8, 5]))
    rewards = rng.normal(3, 2, len(groups))
    frame = pd.Series(rewards).groupby(groups)
    centred = rewards - frame.transform('mean').to_numpy()
    r, o = torch.tensor(rewards), torch.tensor(groups)
    for correction in (0, 1):
        s = frame.transform(lambda v: v.std(ddof=correction)).to_numpy()
        expected = dict(group=centred / s, batch=centred / rewards.std(ddof=correction), none=centred)
        for std, e in expected.items(): assert_close(m.group_advantages(r, o, std=std, correction=correction).numpy(), e)
        assert_close(m.group_advantages(r, torch.zeros_like(o), correction=correction).numpy(), stats.zscore(rewards, ddof=correction))


def equal_oracle(m):
    "Rounding noise is not a difference; a real one counts at any scale."
    for scale in (1e-6, 1., 1e6):
        noisy = (torch.full((12,), .7) + torch.tensor([0., 6e-8]).repeat(6)) * scale
        for std in ('group', 'batch', 'none'): assert (m.group_advantages(noisy, torch.zeros(12, dtype=torch.long), std=std) == 0).all()
        assert_close(m.group_advantages(torch.tensor([1., 2., 3.]) * scale, torch.tensor([5, 5, 5])), torch.tensor([-1., 0., 1.]))
    assert m.zero_variance_groups([.1 + .2, .3, 0., 1., 5.], [0, 0, 1, 1, 2]) == 2


def weights_oracle(m):
    "A prompt's samples weigh 1 together, whatever their number."
    groups = torch.tensor([3] * 16 + [1] * 8 + [9] * 4)
    w = m.sample_weights(groups, per='prompt')
    for o in (3, 1, 9): assert_close(w[groups == o].sum(), torch.tensor(1.))
    assert_close(m.sample_weights(groups), torch.ones(28))


def combine_oracle(m):
    "After: a weighted sum of z-scores. Before: the z-score of the weighted sum. clip acts on the result."
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(24, generator=g), 10 * torch.randn(24, generator=g)
    groups = torch.arange(4).repeat_interleave(6)
    def z(v): return torch.cat([(o - o.mean()) / o.std() for o in v.split(6)])
    pair, weights = dict(a=a, b=b), dict(a=2., b=.5)
    assert_close(m.combine_advantages(pair, weights, groups), 2*z(a) + .5*z(b))
    assert_close(m.combine_advantages(pair, weights, groups, when='before'), z(2*a + .5*b))
    assert_close(m.combine_advantages(pair, weights, groups, clip=.7), (2*z(a) + .5*z(b)).clamp(-.7, .7))


ADVANTAGE_BUGS = [
    (values_oracle, "(count.cumsum(0) - count)[row]", "count.cumsum(0)[row] + 1"),
    (values_oracle, "(total / count).to", "total.to"),
    (zscore_oracle, "(count - correction).clamp(min=1)", "count"),
    (zscore_oracle, "values.std(correction=correction)", "centred.std(correction=correction)"),
    (zscore_oracle, "mean = _sum_by(values, index, num) / count", "mean = values.mean().expand(num)"),
    (equal_oracle, "torch.where(equal, 0., centred / torch.where(equal, 1., scale))", "centred / (scale + 1e-8)"),
    (equal_oracle, "high - low <= EQUAL * torch.maximum(low.abs(), high.abs())", "high - low <= EQUAL"),
    (weights_oracle, "return 1 / _sum_by(weights, index, num)[index]", "return weights / num"),
    (combine_oracle, "if when == 'before'", "if when == 'after'"),
    (combine_oracle, "sum(weights[name] * score for", "sum(score for"),
    (combine_oracle, "return _clamp(total, clip)", "return total"),
]


@pytest.mark.parametrize('oracle', [values_oracle, zscore_oracle, equal_oracle, weights_oracle, combine_oracle])
def test_advantage(oracle): oracle(advantage)


@pytest.mark.parametrize('oracle,old,new', ADVANTAGE_BUGS)
def test_advantage_oracles_can_fail(oracle, old, new):
    module = planted('advantage', old, new)
    with pytest.raises((AssertionError, IndexError, RuntimeError)): oracle(module)


@st.composite
def reward_groups(draw):
    "Graded scores in groups of any size."
    n = draw(st.integers(1, 60))
    rewards = draw(st.lists(st.integers(-1000, 1000), min_size=n, max_size=n))
    groups = draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))
    return torch.tensor(rewards, dtype=torch.float64) / 100, torch.tensor(groups)


@settings(max_examples=150)
@given(reward_groups(), st.sampled_from(['group', 'batch', 'none']), st.integers(0, 2**31))
def test_advantage_properties(rg, std, seed):
    "Zero mean, unit std, order kept, blind to shifts, to the order of the batch, and to the ids' names."
    rewards, groups = rg
    A = advantage.group_advantages(rewards, groups, std=std)
    for o in groups.unique():
        a, r = A[groups == o], rewards[groups == o]
        assert abs(a.sum()) < 1e-8
        assert (a == 0).all() == (r == r[0]).all()
        if std == 'group' and (a != 0).any(): assert abs(a.std() - 1) < 1e-8
        assert (a[r.argsort()].diff() >= -1e-12).all()
    assert_close(advantage.group_advantages(rewards + 7, groups, std=std), A, atol=1e-9, rtol=1e-9)
    assert_close(advantage.group_advantages(rewards, 1000 - 17*groups, std=std), A)
    order = torch.randperm(len(A), generator=torch.Generator().manual_seed(seed))
    assert_close(advantage.group_advantages(rewards[order], groups[order], std=std), A[order])
    clipped = advantage.group_advantages(rewards, groups, std=std, clip=.5)
    assert_close(clipped, A.clamp(-.5, .5))


@settings(max_examples=50)
@given(reward_groups(), st.floats(1e-3, 1e3))
def test_scale_does_not_matter(rg, scale):
    "Except without a std, where advantages scale with the rewards."
    rewards, groups = rg
    for std in ('group', 'batch'):
        ours, scaled = (advantage.group_advantages(r, groups, std=std) for r in (rewards, rewards * scale))
        assert_close(scaled, ours, atol=1e-9, rtol=1e-9)
    ours, scaled = (advantage.group_advantages(r, groups, std='none') for r in (rewards, rewards * scale))
    assert_close(scaled, scale * ours)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    assert advantage.group_advantages(torch.tensor([1, 2, 3], dtype=dtype), [0, 0, 0]).dtype == dtype


@pytest.mark.parametrize('call,message', [
    (lambda: advantage.transition_values([.1, float('nan'), .3], [0], [1]), r'1 of 3 are not \(1: nan\)'),
    (lambda: advantage.transition_values([.1, float('-inf')], [0], [1]), '1: -inf'),
    (lambda: advantage.group_advantages([.1, .2], [0, 0], std='prompt'), "std must be"),
    (lambda: advantage.combine_advantages(dict(a=[.1, .2]), dict(b=1.), [0, 0]), 'one weight per reward'),
    (lambda: advantage.combine_advantages(dict(a=[.1, .2]), dict(a=1.), [0, 0], when='never'), 'when must be'),
    (lambda: advantage.sample_weights([0, 1], per='group'), 'per must be'),
])
def test_advantage_errors(call, message):
    with pytest.raises(ValueError, match=message) as e: call()
    assert '\n' not in str(e.value)


# ---- loss ----

g = torch.Generator().manual_seed(0)
STATE, ADV = torch.randn(32, 8, generator=g, dtype=torch.float64), torch.randn(32, generator=g, dtype=torch.float64)
THETA = torch.randn(8, 8, generator=g, dtype=torch.float64) / 3
CHILD = STATE @ THETA + .3*torch.randn(32, 8, generator=g, dtype=torch.float64)
MOVE = torch.randn(8, 8, generator=g, dtype=torch.float64)


def step_log_prob(theta):
    "A linear Gaussian policy's log-prob of the sampled children, nats per element."
    return Normal(STATE @ theta, .3).log_prob(CHILD).mean(1)


def grad(f, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(f(theta), theta)[0]


def reinforce_oracle(m):
    "At the old policy the surrogate's gradient is REINFORCE's."
    ours = grad(lambda o: m.policy_loss(step_log_prob(o), step_log_prob(o), ADV).mean(), THETA)
    assert_close(ours, grad(lambda o: -(ADV * step_log_prob(o)).mean(), THETA))


def differences_oracle(m):
    "Away from it, on both sides of the clip, the gradient is the slope of the surrogate as written in the PPO paper."
    old, theta, eps = step_log_prob(THETA), THETA + .03*MOVE, 1e-6
    def paper(o):
        r = (step_log_prob(o) - old).exp()
        return -torch.minimum(r*ADV, r.clamp(.95, 1.05)*ADV).mean()
    slope = (paper(theta + eps*MOVE) - paper(theta - eps*MOVE)) / (2*eps)
    ours = grad(lambda o: m.policy_loss(step_log_prob(o), old, ADV, .05).mean(), theta)
    ratio = (step_log_prob(theta) - old).exp()
    assert .2 < ((ratio - 1).abs() > .05).double().mean() < .95 # some clip, some do not
    assert_close((ours * MOVE).sum(), slope, rtol=1e-6, atol=1e-9)
    assert_close(m.policy_loss(step_log_prob(theta), old, ADV, .05).mean(), paper(theta))


def guard_oracle(m):
    "GRPO-Guard's logratio is the mean over elements of noise times the change of mean, for any shape of std."
    g = torch.Generator().manual_seed(1)
    for shape in ((6, 5), (6, 4, 3), (6, 2, 3, 3), (6, 2, 2, 3, 3)):
        old, noise = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
        new = old + torch.rand(shape, generator=g, dtype=torch.float64) * torch.arange(1., 7).double().view(-1, *[1]*(len(shape) - 1))
        std = torch.linspace(.1, .6, 6, dtype=torch.float64)
        wide = std.view(-1, *[1]*(len(shape) - 1))
        def lp(mean): return Normal(mean, wide).log_prob(old + wide*noise).flatten(1).mean(1)
        for s in (std, wide): assert_close(m.guard_logratio(lp(new), lp(old), new, old, s), (noise*(new - old)).flatten(1).mean(1))


def metrics_oracle(m):
    "k3 estimates the exact KL of two Gaussians, and survives tiny ratios; the rest by numpy."
    p, q = Normal(torch.tensor(0., dtype=torch.float64), .3), Normal(torch.tensor(.03, dtype=torch.float64), .3)
    torch.manual_seed(0)
    z = p.sample((100_000,))
    assert abs(m.loss_metrics(q.log_prob(z), p.log_prob(z))['approx_kl'] / kl_divergence(p, q).item() - 1) < .05
    change = torch.tensor([1e-6, 3e-6, -4e-6, 0.], dtype=torch.float64)
    out = m.loss_metrics(change, torch.zeros(4, dtype=torch.float64), clip_range=2.5e-6)
    assert out['clip_frac'] == .5
    np.testing.assert_allclose(out['approx_kl'], (change**2 / 2 + change**3 / 6).mean(), rtol=1e-4)
    r = np.exp(change.numpy())
    np.testing.assert_allclose([out[k] for k in ('ratio_mean', 'ratio_min', 'ratio_max')], [r.mean(), r.min(), r.max()], rtol=1e-12)
    np.testing.assert_allclose(out['ratio_error'], 4e-6, rtol=1e-4)


LOSS_BUGS = [
    (reinforce_oracle, "torch.maximum(-advantages * ratio, -advantages", "torch.maximum(advantages * ratio, advantages"),
    (reinforce_oracle, "ratio = (log_prob - old_log_prob.detach()).exp()", "ratio = (log_prob - old_log_prob).exp()"),
    (differences_oracle, "torch.maximum", "torch.minimum"),
    (differences_oracle, "ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(max=1 + clip_range)"),
    (differences_oracle, "ratio = (log_prob - old_log_prob.detach()).exp()", "ratio = 1 + log_prob - log_prob.detach()"),
    (guard_oracle, ".flatten(1).square().mean(1)", ".square().mean()"),
    (guard_oracle, "(2 * std**2)", "std**2"),
    (guard_oracle, "+ drift) * std", "+ drift)"),
    (metrics_oracle, "(change - logratio).mean()", "(-logratio).mean()"),
    (metrics_oracle, "log_prob.double() - old_log_prob.double()", "log_prob.float() - old_log_prob.float() + 1"),
    (metrics_oracle, "(change.abs() > clip_range)", "(change > clip_range)"),
]


@pytest.mark.parametrize('oracle', [reinforce_oracle, differences_oracle, guard_oracle, metrics_oracle])
def test_loss(oracle): oracle(loss)


@pytest.mark.parametrize('oracle,old,new', LOSS_BUGS)
def test_loss_oracles_can_fail(oracle, old, new):
    with pytest.raises(AssertionError): oracle(planted('loss', old, new))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(-.5, .5), st.floats(-5, 5)), min_size=1, max_size=20), st.floats(1e-5, .3))
def test_surrogate_is_pessimistic(pairs, clip_range):
    "Never below the unclipped surrogate, equal to it within the range, constant where PPO says so."
    logratio, A = torch.tensor(pairs, dtype=torch.float64).T
    logratio = logratio.contiguous().requires_grad_()
    out = loss.policy_loss(logratio, torch.zeros_like(logratio), A, clip_range)
    plain = -A * logratio.exp()
    assert (out >= plain - 1e-12).all()
    change = logratio.detach().expm1()
    flat = (A > 0) & (change > clip_range) | (A < 0) & (change < -clip_range)
    slope, = torch.autograd.grad(out.sum(), logratio)
    sure = (change.abs() - clip_range).abs() > 1e-9
    assert (slope[flat & sure] == 0).all()
    assert_close(slope[~flat & sure], plain.detach()[~flat & sure])


@pytest.mark.parametrize('size', [1, 3, 7, 32])
def test_micro_batches_change_nothing(size):
    theta, old, weight = THETA + .01*MOVE, step_log_prob(THETA), torch.linspace(.5, 2, 32, dtype=torch.float64)
    whole = grad(lambda o: (weight * loss.policy_loss(step_log_prob(o), old, ADV, .05)).sum() / weight.sum(), theta)
    def part(o, s): return (weight[s] * loss.policy_loss(step_log_prob(o)[s], old[s], ADV[s], .05)).sum() / weight.sum()
    assert_close(sum(grad(lambda o: part(o, s), theta) for s in torch.arange(32).split(size)), whole)
