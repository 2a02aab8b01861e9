"""Oracles for sigmas, sde and entropy. Each one is a function of the implementation under test: it must accept ours, and reject a copy with
one bug planted, so that we know it can fail."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from egrpo.core import entropy, sde, sigmas

steps = st.integers(2, 40)
shifts = st.floats(0.2, 12, allow_nan=False)
taus = st.floats(0, 9, allow_nan=False)
kernels = st.sampled_from(list(sde.KERNELS))
levels = st.floats(0.05, 1, allow_nan=False)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def planted(oracle, buggy):
    "The oracle must notice the bug."
    with pytest.raises(AssertionError): oracle(buggy)


def latents_like(shape, batch=3, seed=0, dtype=torch.float32):
    return torch.randn(3, batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)  # latents, velocity, noise


# --- sigmas ---------------------------------------------------------------------------------------------------------------------------

def schedule_oracle(flow_sigmas):
    for num_steps, shift in ((1, 3.), (5, 1.), (16, 3.), (40, 0.3)):
        from diffusers import FlowMatchEulerDiscreteScheduler
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).numpy())
        assert_close(flow_sigmas(num_steps, shift), scheduler.sigmas, rtol=0, atol=1.2e-7)


def test_schedule_is_diffusers(): schedule_oracle(sigmas.flow_sigmas)


def test_schedule_oracle_can_fail():
    planted(schedule_oracle, lambda num_steps, shift: torch.linspace(1, 0, num_steps + 1))  # the shift forgotten
    planted(schedule_oracle, lambda num_steps, shift: sigmas.flow_sigmas(num_steps + 1, shift)[:-1])  # one step short of the image


@given(num_steps=st.integers(1, 200), shift=shifts)
def test_schedule_falls_from_one_to_zero(num_steps, shift):
    schedule = sigmas.flow_sigmas(num_steps, shift)
    assert schedule.shape == (num_steps + 1,) and schedule.dtype == torch.float32
    assert schedule[0] == 1 and schedule[-1] == 0 and (schedule.diff() < 0).all()


@given(num_steps=steps, shift=shifts, more=st.floats(1.1, 3))
def test_a_larger_shift_stays_noisier(num_steps, shift, more):
    assert (sigmas.flow_sigmas(num_steps, shift * more)[1:-1] > sigmas.flow_sigmas(num_steps, shift)[1:-1]).all()


@pytest.mark.parametrize('args', [(0,), (-1,), (True,), (2.5,), ('16',), (16, 0), (16, -1), (16, math.inf), (16, '3')])
def test_schedule_refuses(args):
    with pytest.raises(ValueError, match='must be a'): sigmas.flow_sigmas(*args)


# --- sde: shapes ------------------------------------------------------------------------------------------------------------------------

def per_sample_oracle(step):
    starts, ends = torch.tensor([1., 0.8, 0.3]), torch.tensor([0.9, 0.2, 0.1])
    for shape in ((3,), (3, 3), (2, 3, 3), (3, 2, 3, 3)):
        x, v, _ = latents_like(shape)
        for kernel in sde.KERNELS:
            mean, std = step(v, x, starts, ends, 0.7, kernel, 0.95)
            for i in range(3):
                row_mean, row_std = sde.sde_step(v[i:i + 1], x[i:i + 1], starts[i].item(), ends[i].item(), 0.7, kernel, 0.95)
                assert_close(mean[i:i + 1], row_mean)
                assert_close(std[i:i + 1], row_std)


def broadcast_from_the_right(v, x, sigma, sigma_next, *args):
    "A sigma per sample that meets the last dimension instead of the batch."
    mean, std = sde.sde_step(v.movedim(-1, 0), x.movedim(-1, 0), sigma, sigma_next, *args)
    return mean.movedim(0, -1), std.movedim(0, -1)


def test_sigma_per_sample_is_one_by_one(): per_sample_oracle(sde.sde_step)


def test_per_sample_oracle_can_fail():
    planted(per_sample_oracle, broadcast_from_the_right)
    planted(per_sample_oracle, lambda v, x, s, n, *args: sde.sde_step(v, x, s[0], n[0], *args))  # the first sample's sigma for all


@given(shape=shapes, kernel=kernels, level=levels, start=st.floats(0.2, 1), part=st.floats(0, 0.9))
def test_shapes_and_dtypes(shape, kernel, level, start, part):
    x, v, noise = latents_like(shape)
    mean, std = sde.sde_step(v.bfloat16(), x.bfloat16(), start, start * part, level, kernel)
    assert mean.shape == x.shape and std.shape == (1,) * x.ndim and mean.dtype == std.dtype == torch.float32
    assert mean.isfinite().all() and std.isfinite().all()
    _, per_sample = sde.sde_step(v, x, torch.full((3,), start), start * part, level, kernel)
    assert per_sample.shape == (3,) + (1,) * (x.ndim - 1)
    assert sde.step_std(torch.full((5,), start), start * part, level, kernel).shape == (5,)
    assert sde.sde_sample(mean, std, noise).shape == x.shape


@given(shape=shapes, kernel=kernels, start=st.floats(0.2, 1), part=st.floats(0, 0.9))
def test_noise_level_zero_is_the_ode(shape, kernel, start, part):
    x, v, _ = latents_like(shape)
    mean, std = sde.sde_step(v, x, start, start * part, 0, kernel)
    assert mean.equal(sde.ode_step(v, x, start, start * part)) and (std == 0).all()


def test_float64_stays_float64():
    x, v, _ = latents_like((2,), dtype=torch.float64)
    assert sde.sde_step(v, x, 0.5, 0.4)[0].dtype == torch.float64
    assert sde.log_prob(x, *sde.sde_step(v, x, 0.5, 0.4)).dtype == torch.float64


# --- sde: the step ----------------------------------------------------------------------------------------------------------------------

# What the authors' released programs return for latents [0.5, -1.2] and velocity [0.3, 0.8] on 16 steps with shift 3, at steps 0, 4
# and 14, and (flow, dance) the log-prob of landing at [0.4, -1.1].
RELEASED = [
    # yifan123/flow_grpo ac4c86e, flow_grpo/diffusers_patch/sd3_sde_with_logprob.py
    ('flow', 0.7, 0, [0.3709783, -0.9233914], -0.5786068),
    ('flow', 0.7, 4, [0.4495211, -1.1386106], 0.0596786),
    ('flow', 0.7, 14, [0.4268667, -1.2768000], 0.5833007),
    # XueZeyue/DanceGRPO 15cc71d, fastvideo/train_grpo_flux.py
    ('dance', 0.3, 0, [0.4929892, -1.2162175], -0.6313690),
    ('dance', 0.3, 4, [0.4896895, -1.2234949], -0.0364439),
    ('dance', 0.3, 14, [0.4458000, -1.2938668], 0.4657786),
    # IamCreateAI/FlowCPS b402c7a, flow_grpo/diffusers_patch/sd3_sde_with_logprob.py (its log-prob drops all constants)
    ('cps', 0.8, 0, [0.1554974, -0.4062372], None),
    ('cps', 0.8, 4, [0.1724922, -0.5531911], None),
    ('cps', 0.8, 14, [0.3782337, -1.2329619], None),
]


def released_oracle(step, log_prob=sde.log_prob):
    schedule, x, v, landed = sigmas.flow_sigmas(), *torch.tensor([[[0.5, -1.2]], [[0.3, 0.8]], [[0.4, -1.1]]])
    for kernel, level, k, mean, score in RELEASED:
        ours, std = step(v, x, schedule[k], schedule[k + 1], level, kernel, schedule[1])
        assert_close(ours, torch.tensor([mean]), rtol=0, atol=3e-6)
        if score is not None: assert_close(log_prob(landed, ours, std).item(), score, rtol=0, atol=2e-5)


def without_drift(v, x, sigma, sigma_next, *args):
    return sde.ode_step(v, x, sigma, sigma_next), sde.sde_step(v, x, sigma, sigma_next, *args)[1]


def test_released_programs_agree(): released_oracle(sde.sde_step)


def test_released_oracle_can_fail():
    planted(released_oracle, without_drift)
    planted(released_oracle, lambda v, x, s, n, a, kernel, top: sde.sde_step(v, x, s, n, a, 'flow', top))  # every kernel is flow
    planted(lambda lp: released_oracle(sde.sde_step, lp), lambda sample, mean, std: -((sample - mean)**2).flatten(1).mean(1))


def gaussian_velocity(x, sigma, mu, c):
    "E[noise - data | x] for data N(mu, c²)."
    return (sigma - (1 - sigma) * c**2) / ((1 - sigma)**2 * c**2 + sigma**2) * (x - (1 - sigma) * mu) - mu


def final_moments(step, schedule, lengths, mu=1., c=0.5, **kwargs):
    "Exact mean and std after the last step: every step is affine in x, so its values at 0 and 1 say all."
    schedule, probe = schedule.double(), torch.tensor([[0.], [1.]], dtype=torch.float64)
    k, mean, var = 0, 0., 1.
    while k < len(schedule) - 1:
        end = k + lengths.get(k, 1)
        velocity = gaussian_velocity(probe, schedule[k], mu, c)
        if k in lengths: out, std = step(velocity, probe, schedule[k], schedule[end], sigma_max=schedule[1], **kwargs)
        else: out, std = sde.ode_step(velocity, probe, schedule[k], schedule[end]), torch.zeros(1)
        offset, slope = out[0].item(), (out[1] - out[0]).item()
        mean, var, k = slope * mean + offset, slope**2 * var + std.flatten()[0].item()**2, end
    return mean, var**0.5


EVERY = {k: 1 for k in range(16)}  # the last step to sigma = 0 included
TABLE = [({}, .416), (EVERY, .449), ({0: 2}, .479), ({0: 4}, .698), ({2: 4}, .560), ({8: 4}, .506), ({8: 8}, 1.229)]


def gaussian_oracle(step):
    for lengths, std in TABLE: assert_close(final_moments(step, sigmas.flow_sigmas(), lengths)[1], std, rtol=0, atol=0.01)
    assert_close(final_moments(step, sigmas.flow_sigmas(), EVERY)[0], 1., rtol=0, atol=0.05)


def test_gaussian_flow(): gaussian_oracle(sde.sde_step)


def test_gaussian_oracle_can_fail():
    planted(gaussian_oracle, lambda v, x, s, n, sigma_max=None: without_drift(v, x, s, n, 0.7, 'flow', sigma_max))
    planted(gaussian_oracle, lambda v, x, s, n, sigma_max=None: sde.sde_step(v, x, s, n))  # a merged first step without sigmas[1]


def limit_oracle(step):
    "With small steps the samples have the data's mean and std, whatever the kernel."
    for kernel, level in (('flow', 0.7), ('dance', 0.7), ('cps', 600**-0.5)):
        for mu, c in ((1., 0.5), (-2., 0.8)):
            mean, std = final_moments(step, sigmas.flow_sigmas(600), {k: 1 for k in range(599)}, mu, c, kernel=kernel, noise_level=level)
            assert_close(mean, mu, rtol=0, atol=0.01)
            assert_close(std, c, rtol=0, atol=0.01)


def test_small_steps_keep_the_distribution(): limit_oracle(sde.sde_step)


def test_limit_oracle_can_fail():
    def half_noise(*args, **kwargs):
        mean, std = sde.sde_step(*args, **kwargs)
        return mean, std / 2
    planted(limit_oracle, half_noise)


@given(kernel=st.sampled_from(['flow', 'dance']), sigma=st.floats(0.1, 0.9), c=st.floats(0.2, 2), level=st.floats(0.1, 0.7))
def test_one_small_step_keeps_the_variance_to_first_order(kernel, sigma, c, level):
    def excess(delta):
        probe = torch.tensor([[0.], [1.]], dtype=torch.float64)
        out, std = sde.sde_step(gaussian_velocity(probe, sigma, 0., c), probe, sigma, sigma - delta, level, kernel)
        true = lambda s: (1 - s)**2 * c**2 + s**2
        return ((out[1] - out[0])**2 * true(sigma) + std[0]**2 - true(sigma - delta)).item()
    assert abs(excess(1e-4)) < 1e-4 * 0.05  # nothing of the first order is left


def test_first_step_is_finite_and_capped():
    schedule = sigmas.flow_sigmas()
    assert_close(sde.step_std(1., schedule[1]).item(), 0.7)  # Δ / (1 - sigmas[1]) = 1
    assert sde.step_std(1., schedule[4], sigma_max=schedule[1]) > sde.step_std(1., schedule[4])
    assert sde.step_std(0.8, 0.5, sigma_max=0.9) == sde.step_std(0.8, 0.5)  # below 1 the cap is not used


@given(kernel=kernels, level=levels)
def test_cps_ends_without_noise(kernel, level):
    assert (sde.step_std(0.3, 0., level, kernel, sigma_max=.9) == 0).item() == (kernel == 'cps')


# --- sde: log-prob and KL ---------------------------------------------------------------------------------------------------------------

def normal_oracle(log_prob):
    for shape in ((5,), (4, 3), (4, 2, 3), (2, 3, 2, 2)):
        x, v, noise = latents_like(shape)
        for kernel in sde.KERNELS:
            mean, std = sde.sde_step(v, x, torch.tensor([1., 0.7, 0.2]), torch.tensor([0.9, 0.4, 0.1]), 0.5, kernel, 0.95)
            sample = sde.sde_sample(mean, std, noise)
            assert_close(log_prob(sample, mean, std), Normal(mean, std.expand_as(mean)).log_prob(sample).flatten(1).mean(1))


def test_log_prob_is_the_normal_density(): normal_oracle(sde.log_prob)


def test_normal_oracle_can_fail():
    def line_break(sample, mean, std):
        density = -(sample - mean)**2 / (2 * std**2)
        - std.log() - math.log(2 * math.pi) / 2
        return density.flatten(1).mean(1)
    planted(normal_oracle, line_break)  # constants lost by a line break
    planted(normal_oracle, lambda sample, mean, std: sde.log_prob(sample, mean, std) * sample[0].numel())  # sum for mean
    planted(normal_oracle, lambda sample, mean, std: sde.log_prob(mean + 4 * (sample - mean), mean, std))  # noise and score scaled apart


def gradient_oracle(log_prob):
    "Finite differences in float64, through the step to the velocity."
    x, v, sample = latents_like((2, 3), batch=2, seed=1, dtype=torch.float64)
    def score(v): return log_prob(sample, *sde.sde_step(v, x, torch.tensor([1., 0.6]), torch.tensor([0.7, 0.3])))
    assert torch.autograd.gradcheck(score, v.clone().requires_grad_(), raise_exception=False)
    mean, std = sde.sde_step(v, x, 0.8, 0.6)
    mean.requires_grad_()
    log_prob(sample, mean, std).sum().backward()
    assert_close(mean.grad, (sample - mean).detach() / std**2 / 6)


def test_gradient_is_the_closed_form(): gradient_oracle(sde.log_prob)


def test_gradient_oracle_can_fail():
    class WrongSign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, grad): return -grad
    planted(gradient_oracle, lambda sample, mean, std: sde.log_prob(sample, WrongSign.apply(mean), std))
    planted(gradient_oracle, lambda sample, mean, std: sde.log_prob(sample, mean.detach() + 0 * mean, std))


def kl_oracle(kl):
    x, v, other = latents_like((3, 4))
    mean, std = sde.sde_step(v, x, torch.tensor([0.9, 0.5, 0.2]), 0.1)
    mean_ref, _ = sde.sde_step(other, x, torch.tensor([0.9, 0.5, 0.2]), 0.1)
    spread = std.expand_as(mean)
    assert_close(kl(mean, mean_ref, std), kl_divergence(Normal(mean, spread), Normal(mean_ref, spread)).flatten(1).mean(1))


def test_kl_is_the_normal_kl(): kl_oracle(sde.gaussian_kl)


def test_kl_oracle_can_fail(): planted(kl_oracle, lambda mean, ref, std: ((mean - ref) / std).pow(2).flatten(1).mean(1))  # the half lost


def test_group_shares_one_mean():
    x, v, _ = latents_like((4,), batch=1)
    mean, std = sde.sde_step(v, x, 0.9, 0.5)
    children = sde.sde_sample(mean, std, torch.randn(6, 4))
    assert_close(sde.log_prob(children, mean, std), sde.log_prob(children, mean.expand(6, 4), std))


@pytest.mark.parametrize('bad, words', [
    (dict(kernel='heun'), 'flow, dance, cps'), (dict(noise_level=-0.1), 'noise_level must be'),
    (dict(noise_level=math.nan), 'noise_level must be'),
    (dict(noise_level='0.7'), 'noise_level must be'), (dict(kernel='cps', noise_level=1.1), '<= 1 for the cps kernel')])
def test_step_refuses(bad, words):
    good = dict(velocity=torch.zeros(3, 4), latents=torch.zeros(3, 4), sigma=0.5, sigma_next=0.4)
    with pytest.raises(ValueError, match=words): sde.sde_step(**good | bad)


# --- entropy ----------------------------------------------------------------------------------------------------------------------------

def entropy_oracle(step_entropy):
    for num_steps, shift, level in ((16, 3., 0.7), (10, 1., 0.3), (25, 3., 1.)):
        schedule = sigmas.flow_sigmas(num_steps, shift)
        for kernel in sde.KERNELS:
            for length in (1, 2, 5):
                std = sde.step_std(schedule[:-length], schedule[length:], level, kernel, schedule[1])
                ours = step_entropy(schedule, length, level, 'nats', kernel)
                some = std > 0
                assert_close(ours[some], Normal(0., std[some]).entropy())
                assert ours.shape == (num_steps - length + 1,) and (ours[~some] == -math.inf).all()


def test_entropy_is_the_normal_entropy(): entropy_oracle(entropy.step_entropy)


def test_entropy_oracle_can_fail():
    planted(entropy_oracle, lambda s, length, a, scale, kernel: entropy.step_entropy(s, length, a, 'bits', kernel))
    planted(entropy_oracle, lambda s, length, a, scale, kernel: 2 * entropy.step_entropy(s, length, a, scale, kernel))  # of the variance
    single = lambda s, length, *args: entropy.step_entropy(s, 1, *args)[:len(s) - length]
    planted(entropy_oracle, single)  # the merge forgotten


@given(num_steps=steps, shift=shifts, level=levels, length=st.integers(1, 6), kernel=kernels)
def test_scales_are_one_number(num_steps, shift, level, length, kernel):
    length = min(length, num_steps)
    schedule = sigmas.flow_sigmas(num_steps, shift)
    exp, nats, bits = (entropy.step_entropy(schedule, length, level, scale, kernel) for scale in entropy.ENTROPY_SCALES)
    assert_close(exp, nats.exp(), rtol=1e-5, atol=1e-7)
    assert_close(bits * math.log(2), nats, rtol=1e-5, atol=1e-6)


@given(num_steps=steps, shift=shifts, level=levels, kernel=st.sampled_from(['flow', 'dance']))
def test_longer_steps_explore_more(num_steps, shift, level, kernel):
    schedule = sigmas.flow_sigmas(num_steps, shift)
    for length in range(1, num_steps):
        shorter, longer = (entropy.step_entropy(schedule, n, level, kernel=kernel) for n in (length, length + 1))
        assert (longer > shorter[:-1]).all()


def merging_oracle(merge_lengths, num_steps=16, shift=3., tau=2.2, level=0.7, kernel='flow'):
    "The definition: reach tau, with one step less do not, never take the last step; 0 only if no length would do."
    schedule = sigmas.flow_sigmas(num_steps, shift)
    table = {n: entropy.step_entropy(schedule, n, level, kernel=kernel) for n in range(1, num_steps)}
    lengths = merge_lengths(schedule, tau, level, kernel)
    assert lengths.shape == (num_steps,) and lengths.dtype == torch.long and lengths[-1] == 0
    for k, length in enumerate(lengths.tolist()):
        enough = [n for n in range(1, num_steps - k) if table[n][k] >= tau]
        assert length == (enough[0] if enough else 0)


@given(num_steps=steps, shift=shifts, tau=taus, level=levels, kernel=kernels)
def test_merging_is_minimal(num_steps, shift, tau, level, kernel):
    merging_oracle(entropy.merge_lengths, num_steps, shift, tau, level, kernel)


def test_merging_oracle_can_fail():
    ours = entropy.merge_lengths
    planted(merging_oracle, lambda s, tau, a, kernel: ours(s, tau, a, kernel) + (ours(s, tau, a, kernel) > 1))  # one too long
    planted(merging_oracle, lambda s, tau, a, kernel: torch.where(ours(s, tau, a, kernel) == 0, 1, ours(s, tau, a, kernel)))  # 0 hidden
    longer = lambda s: torch.cat([s[:-1], torch.tensor([1e-6, 0.])])
    planted(merging_oracle, lambda s, tau, a, kernel: ours(longer(s), tau, a, kernel)[:-1])  # takes the last step too


@given(num_steps=steps, shift=shifts, tau=taus, more=st.floats(0, 3), level=levels)
def test_a_higher_tau_never_shortens(num_steps, shift, tau, more, level):
    schedule = sigmas.flow_sigmas(num_steps, shift)
    low, high = (entropy.merge_lengths(schedule, t, level) for t in (tau, tau + more))
    assert ((high >= low) | (high == 0)).all() and (high[low == 0] == 0).all()


def test_papers_merge_lengths():
    rows = {0: '11111111', 1.8: '11122223', 2.0: '11122233', 2.2: '11222333', 2.6: '11233444'}
    for tau, row in rows.items(): assert entropy.merge_lengths(sigmas.flow_sigmas(), tau)[:8].tolist() == [int(n) for n in row]


@given(num_steps=steps, shift=shifts, tau=taus, level=levels, kernel=kernels)
def test_unreachable_means_unreachable(num_steps, shift, tau, level, kernel):
    schedule = sigmas.flow_sigmas(num_steps, shift)
    highest, dead = entropy.highest_tau(schedule, level, kernel), entropy.unreachable_steps(schedule, tau, level, kernel)
    assert dead == [k for k in range(num_steps) if highest[k] < tau or k == num_steps - 1]
    assert entropy.describe_merging(schedule, tau, level, kernel).startswith('tau ')


@given(num_steps=st.integers(1, 40), length=st.integers(1, 40))
def test_fixed_lengths_stop_before_the_last_step(num_steps, length):
    if length > num_steps: pytest.raises(ValueError, entropy.fixed_lengths, num_steps, length)
    else:
        expected = [length if k + length <= num_steps - 1 else 0 for k in range(num_steps)]
        assert entropy.fixed_lengths(num_steps, length).tolist() == expected


@pytest.mark.parametrize('c', [0.25, 0.5, 1.])
def test_a_step_within_its_landing_noise_adds_no_spread(c):
    schedule = sigmas.flow_sigmas()
    for length in range(1, 16):
        shares = entropy.landing_noise(schedule, entropy.fixed_lengths(16, length))
        for k in range(16 - length):
            if 0 < shares[k] <= 1: assert final_moments(sde.sde_step, schedule, {k: length}, c=c)[1] < c


@pytest.mark.parametrize('tau', [-0.1, math.nan, math.inf, '2.2', None, True, torch.tensor([1.])])
def test_merging_refuses_tau(tau):
    with pytest.raises(ValueError, match='tau must be'): entropy.merge_lengths(sigmas.flow_sigmas(), tau)


@pytest.mark.parametrize('schedule', [[1.], [0., 1.], [1., 1., 0.], [[1., 0.]], [1.2, 0.], [1., -0.1], [1., math.nan, 0.]])
def test_entropy_refuses_schedules(schedule):
    with pytest.raises(ValueError, match='sigmas must be'): entropy.step_entropy(torch.tensor(schedule))


def test_imports_are_light():
    import subprocess
    import sys
    code = "import sys, egrpo.core.entropy; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)
