"Signal and noise of the gradient: what was planted is found, a wrong estimator is noticed, and nothing that is trained moves."
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

from egrpo.cli.commands import main
from egrpo.core.plan import gradient_nfe, preference_nfe, rollout_nfe
from egrpo.methods.registry import fitting
from egrpo.paper import signal_settings as signal_settings_module
from egrpo.paper.experiments import EXPERIMENTS
from egrpo.paper.records import SCALES
from egrpo.paper.signal_settings import _signal_points, _signal_tables, signal_correlation, signal_of_setting, signal_settings
from egrpo.testing.pipelines import small_pipeline
from egrpo.train import signal as gs
from egrpo.train.run import result_settings
from egrpo.train.trainer import TrainConfig, Trainer

small = dict(num_steps=6, num_generations=2, prompts_per_iteration=2, reward='preference', eval_size=2, device='cpu')


def trainer(tmp_path, **kwargs): return Trainer(TrainConfig(**small | dict(out=str(tmp_path/'run')) | kwargs))


class Planted:
    "A trainer whose gradients are a known mean and noise: n steps of one parameter."
    def __init__(self, signal, noise, size=400):
        self.mean, self.noise = torch.full((size,), (signal / size)**.5), (noise / size)**.5
        self.parameter = torch.nn.Parameter(torch.zeros(size))

    def gradient(self, seed):
        "Of one batch."
        xi = torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(seed))
        return self.mean + self.noise * xi


def planted_estimate(signal, noise, seed, n=64):
    "Estimate from sketches of planted gradients."
    world = Planted(signal, noise)
    sketch, found = gs.CountSketch([world.parameter], 4096), []
    for b in range(n):
        world.parameter.grad = world.gradient(10_000 * seed + b)
        found.append(sketch())
    products = gs.weighted_products(gs.gram_matrix(torch.stack(found)[:, None]), [1.])
    return gs.signal_estimate(products, 100, 4)


@pytest.mark.parametrize('signal, noise', [(1., 20.), (.2, 20.), (0., 20.)])
def test_planted_signal_and_noise_are_recovered(signal, noise, measured):
    estimates = [planted_estimate(signal, noise, seed) for seed in range(60)]
    for name, truth in dict(signal=signal, noise=noise, ratio=signal / noise).items():
        value, low, high = np.array([getattr(e, name) for e in estimates]).T
        covered = ((low <= truth) & (truth <= high)).mean()
        assert covered >= .88, f'{name}: {covered}'
        assert abs(value.mean() - truth) < 4 * value.std() / 60**.5 + .02 * truth, name
        measured(f'planted {name} {truth:g}', mean=value.mean(), covered=covered)


def biased(products):
    "The signal with a batch's product with itself among the pairs."
    return products.mean()


def test_pairs_of_a_batch_with_itself_are_noticed():
    rng, right, wrong = np.random.default_rng(0), [], []
    for _ in range(60):
        g = .05 + rng.normal(size=(64, 400)) * .2 # signal 1, noise 16
        products = g @ g.T
        right.append(gs.signal_estimate(products, 1).signal[0])
        wrong.append(biased(products))
    def off(values): return abs(np.mean(values) - 1) / (np.std(values) / 60**.5)
    assert off(right) < 4 < off(wrong)


def test_sketch_keeps_inner_products(tmp_path, measured):
    t = trainer(tmp_path, active_steps=2, tau=0.)
    sketch, places = gs.CountSketch(t.parameters.values()), list(t.parameters.values())
    def whole(): return torch.cat([p.grad.flatten().double() for p in places])
    both = [dict(zip(('sketch', 'whole'), (gs.step_sketches(t, i, f)[0] for f in (sketch, whole)))) for i in range(4)]
    sketches, exact = (torch.stack([torch.stack([*b[k].values()]) for b in both]).flatten(0, 1).double() for k in ('sketch', 'whole'))
    size = exact.norm(dim=1)
    error = (sketches @ sketches.T - exact @ exact.T) / (size * size[:, None])
    assert error.abs().max() < 5 * (2 / gs.SKETCH_SIZE)**.5
    measured('error of sketched products over the norms', largest=error.abs().max(), rms=error.square().mean().sqrt())
    signs = sketch.places[0] >= gs.SKETCH_SIZE # a sketch without signs keeps no inner product
    assert .45 < signs.float().mean() < .55


@pytest.mark.parametrize('settings', [
    dict(active_steps=2, tau=0.), dict(active_steps=2, tau=0., micro_batch=1), dict(method='flow_grpo', beta=.04, weigh='prompt'),
    dict(method='branch_grpo', num_generations=4), dict(method='tempflow_grpo', num_generations=4), dict(method='grpo_guard'),
    dict(method='aegpo', top=2),
    dict(method='dgpo', num_generations=4, draws=2)])
def test_steps_add_up_to_the_whole_gradient_and_nothing_moves(tmp_path, settings):
    t = trainer(tmp_path, **settings)
    sketch = gs.CountSketch(t.parameters.values())
    state = [{n: p.detach().clone() for n, p in of.items()} for of in (t.parameters, t.ema)]
    found, plans, nfe = gs.step_sketches(t, 0, sketch)
    for before, of in zip(state, (t.parameters, t.ema)): assert all(torch.equal(before[n], p) for n, p in of.items())
    assert not t.optimizer.state and t.iteration == t.nfe == t.weights.steps == 0
    assert all(p.grad is None for p in t.parameters.values())

    _, cond, out, rewards = t.sample(0, plans)
    advantages, _ = t.advantages(out, rewards)
    out = t.objective.weighed(cond, out, advantages)
    t.objective.gradient(cond, out, torch.unique(out.row[out.weight > 0]), advantages)
    torch.testing.assert_close(sum(found.values()), sketch(), rtol=1e-3, atol=1e-5 * float(sketch().norm()))
    if 'beta' not in settings and settings.get('method') not in ('aegpo', 'branch_grpo'): # probes; shares of siblings
        assert nfe == sum(rollout_nfe(p) + preference_nfe(p) + gradient_nfe(p) for p in plans)


def test_window_that_moves(tmp_path):
    t = trainer(tmp_path, method='flow_grpo_fast', window=1)
    gradients = gs.batch_gradients(t, 8)
    assert len(gradients.steps) > 1 and not gradients.trained.all() and gradients.trained.any(1).all()
    assert (gradients.sketches.norm(dim=2).numpy()[~gradients.trained] == 0).all()
    report = gs.signal_report(gradients, 2)
    few = [e is None for _, e in report.steps]
    assert few == (gradients.trained.sum(0) < 3).tolist()
    assert len(gs.signal_rows(report)) == 1 + len(gradients.steps)


def test_reward_without_differences_has_no_signal(tmp_path):
    def flat(images, prompts): return torch.ones(len(images))
    t = Trainer(TrainConfig(**small | dict(active_steps=2, tau=0., out=str(tmp_path))), reward=flat)
    report = gs.signal_of(t, 6)
    assert report.weightings['plain'][1].ratio == (0, 0, 0)
    assert gs.signal_answer(report)[0].startswith('batch: 6 batches show no signal yet')


def test_batch_answer_names_the_batch():
    e = planted_estimate(2., 20., 1)
    line = gs._batch_answer(e, 64)
    assert line.startswith('batch: signal equals noise at ') and '4 prompts, 100 evaluations' in line
    value, low, high = e.critical
    assert low < 1 / .1 < high and low < value < high


def test_lead_is_paired():
    "Noise that two methods share does not blur their difference."
    rng = np.random.default_rng(0)
    g = .05 + rng.normal(size=(64, 400)) * .2
    h = g + .02 + .001 * rng.normal(size=(64, 400))
    one, other = (gs.signal_estimate(x @ x.T, 1000) for x in (h, g))
    paired = gs.signal_lead(one, other)
    short = gs.signal_lead(one, gs.signal_estimate((g @ g.T)[:40, :40], 1000))
    assert 0 < paired[1] < paired[0] and paired[2] - paired[1] < .5 * (short[2] - short[1])


def test_sd3_with_a_lora(tmp_path, capsys):
    small_pipeline('sd3').save_pretrained(tmp_path/'sd3')
    prompts = tmp_path/'prompts.txt'
    prompts.write_text('a cat\na dog\na house\n')
    (tmp_path/'light.py').write_text('def brightness(images, prompts): return images.mean((1, 2, 3))')
    words = ['signal', '--model', str(tmp_path/'sd3'), '--lora-rank', '2', '--prompts', str(prompts),
             '--reward', f'{tmp_path}/light.py:brightness',
             '--batches', '6', '--out', str(tmp_path/'signal.json'), '--micro-batch', '2', '--guidance', '1',
             *shlex.split('--num-steps 6 --active-steps 2 --tau 0 --num-generations 2 --prompts-per-iteration 1 --device cpu')]
    assert main(words) == 0
    found = json.loads((tmp_path/'signal.json').read_text())
    assert [(s['start'], s['end']) for s in found['steps']] == [(0, 1), (1, 2)]
    assert found['nfe'] > 0 and found['steps'][0]['noise'][0] > 0
    assert not (tmp_path/'runs').exists()


def test_command_prints_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('EGRPO_SCALE', 'smoke')
    assert main(['signal', '--batches', '6', '--device', 'cpu', '--active-steps', '2', '--reward', 'preference']) == 0
    out = capsys.readouterr().out
    for words in ('ratio per batch', 'per 1,000 evaluations', '0→1', 'std/Δ', 'best, cross-validated', 'batch: ', 'steps: ', 'weights: '):
        assert words in out, words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('words, says', [
    ('--batches 2', 'batches must be >= 3, got 2'), ('--method nope', 'method must be one of'), ('--out " "', '--out is blank'),
    ('--window 3', 'window is no setting of egrpo')])
def test_refusals(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(['signal', *shlex.split(words)]) == 2
    assert says in capsys.readouterr().err


# ---- the experiment

def test_every_setting_has_a_run_of_its_table():
    "A setting's fields are those of the runs that its signal is compared with."
    settings, lr = signal_settings('mini'), ('lr', 'iterations', 'budget', 'eval_every', 'eval_size', 'eval_rewards', 'seed')
    def fields(config): return {k: v for k, v in result_settings(config).items() if k not in lr}
    tables = _signal_tables()
    for record in (*tables['egrpo'], *tables['aegpo']):
        for name, runs in EXPERIMENTS[record].cells(SCALES['mini']).items():
            run = replace(runs[0], plan=fitting(runs[0].method, runs[0].plan))
            assert fields(settings[f'{record}: {name}']) == fields(run), (record, name)


def test_settings_share_prompts_and_noise(tmp_path):
    def of(name): return Trainer(replace(signal_settings('smoke')[name], out=str(tmp_path)))
    one, other = of('methods: egrpo'), of('tau: 0')
    assert one._prompts_of(2) == other._prompts_of(2) and one.config.seed == other.config.seed


def test_a_setting_is_measured_once(tmp_path, monkeypatch):
    first = signal_of_setting('methods: mix_grpo', 'smoke', tmp_path)
    monkeypatch.setattr(signal_settings_module, '_measure_signal', lambda *args: pytest.fail('measured again'))
    assert signal_of_setting('methods: mix_grpo', 'smoke', tmp_path) == first
    assert first['batches'] == 4 and len(first['common']['ratios']) == 1 + 3
    assert not list((tmp_path/'signal').glob('*.lock'))


def test_policy_after_training_is_another(tmp_path):
    before = signal_of_setting('methods: egrpo', 'smoke', tmp_path)
    after = signal_of_setting('after 2: egrpo', 'smoke', tmp_path)
    assert before['key'] != after['key']
    assert not np.allclose(before['common']['ratios'], after['ratios'], rtol=1e-3)


def test_points_are_distinct_configurations():
    def found(key, value): return dict(key=key, weightings=dict(plain=dict(per_thousand=(value, 0, 1))))
    signals = {'tau: 2.2': found('a', 1.), 'kernels: flow': found('a', 1.), 'tau: 0': found('b', .5)}
    gains = {'tau: 2.2': (.02, 0, 1), 'kernels: flow': (.04, 0, 1), 'tau: 0': (.01, 0, 1), 'tau: 9': (9., 0, 1)}
    points = _signal_points(signals, gains)
    assert [p['settings'] for p in points] == [['kernels: flow', 'tau: 2.2'], ['tau: 0']]
    assert points[0]['gain'] == pytest.approx(.03)


def test_correlation_finds_what_was_planted(measured):
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    for noise, low, high in ((.3, .7, 1), (3., -.3, .8)):
        value, a, b = signal_correlation(x, x + noise * rng.normal(size=30))
        assert low < value < high and a < value < b
        measured(f'rank correlation, noise {noise}', value=value, low=a, high=b)
    assert signal_correlation([1, 2, 3], [1, 2, 3]) is None
