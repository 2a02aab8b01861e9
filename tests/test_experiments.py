"""Cells are run once, kept whole, found again and compared seed by seed; workers die with their parent."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from egrpo.base.files import digest
from egrpo.methods.registry import METHODS, check_plan, fitting
from egrpo.paper import cells as cells_module
from egrpo.paper import experiments, grids, pool
from egrpo.paper.cells import FALL, _costs, _pack, _unpack, cell_path, load_cell, run_cell
from egrpo.paper.claims import best
from egrpo.paper.comparisons import Comparison, contrast, evaluation_texts, grid_data, summarize
from egrpo.paper.experiments import EXPERIMENTS, cells_of, registered, reproduce
from egrpo.paper.grids import learning_rate
from egrpo.paper.hacking import contrast_hacking, hacking, real_share
from egrpo.paper.pool import run_cells
from egrpo.paper.records import get_scale, load_record, save_record, verdict
from egrpo.paper.registered import DESIGN
from egrpo.paper.training_reward import base_reward, training_rewards, training_rise
from egrpo.testing.pipelines import small_pipeline
from egrpo.train import run as run_module
from egrpo.train.config import TrainConfig, check_config, evaluation_is_due
from egrpo.train.prepare import check_method, iteration_nfe
from egrpo.train.prompts import load_prompts, prompt_batch
from egrpo.train.run import cell_key, result_settings

FIGURES = Path(__file__).parent.parent/'figures'
CELLS = sorted((FIGURES/'cells').glob('*.json'))
TINY = dict(num_steps=4, active_steps=2, num_generations=2, prompts_per_iteration=1, iterations=1, eval_size=12, device='cpu', tau=0.,
            reward='preference', eval_rewards='preference + verifier')


def cell(scores, seed=0, reward=(0., 1.)):
    "A finished cell by hand: scores before and after."
    before, after = (np.array(o, dtype=float) for o in scores)
    return dict(config=dict(seed=seed), scores={'preference': {0: before, 5: after}}, reward=list(reward), nfe=10, train_seconds=1.,
                seconds=1., ratio_error=0., key=f'k{seed}', device='cpu (one, 1 thread)')


# ---- the committed store
@pytest.mark.parametrize('path', CELLS, ids=lambda p: p.stem)
def test_committed_cell(path):
    found = load_cell(path)
    config = TrainConfig(**dict(dtype='fp32') | found['config'])
    assert cell_key(config) == path.stem, 'not what its name says: a field of TrainConfig has changed'
    assert path.stat().st_size < 100_000
    assert found['ratio_error'] < 1e-6 or config.sample_with == 'average' # there another policy samples
    if 'shown' in found:
        assert path.with_suffix('.png').stat().st_size <= 60_000
        assert len(found['images']) == len(found['shown']['prompts']) == len(found['shown']['saw'])


def test_no_two_committed_cells_are_one_run():
    "Another seed or setting that changes nothing has not reached the run."
    rewards = {}
    for path in CELLS: rewards.setdefault(tuple(load_cell(path)['reward']), []).append(path.stem)
    assert [keys for keys in rewards.values() if len(keys) > 1] == []


@pytest.mark.parametrize('name', ['tau', 'kernels', 'methods', 'explored'])
def test_committed_cells_are_found_by_their_grid(name):
    "A default that changes must not change what a grid asks for: each of its runs is in the store."
    wanted = {cell_key(c) for cells in EXPERIMENTS[name].cells(get_scale('mini')).values() for c in cells}
    assert len(wanted) >= 20 and wanted <= {p.stem for p in CELLS}


def test_a_schedule_has_one_name(tmp_path):
    "Without a shift the miniature's run is that of its shift; a model of other levels, or not at hand, is another."
    def key(**fields): return cell_key(TrainConfig(device='cpu', **fields))
    assert key() == key(shift=3.) != key(shift=2.)
    small_pipeline('sd3').save_pretrained(tmp_path)
    assert key(model=str(tmp_path)) != key(model=str(tmp_path), shift=3.)
    assert 'shift' not in result_settings(TrainConfig(model=str(tmp_path)))
    nowhere = str(tmp_path/'vae') # no pipeline's folder
    assert key(model=nowhere) != key(model=nowhere, shift=3.)


@pytest.mark.parametrize('method', list(METHODS))
def test_every_method_keeps_what_belongs_to_the_run(method):
    config = TrainConfig(method=method, seed=7, shift=2., tau=1., stride=2, window=3, num_generations=4)
    kept = replace(config, plan=fitting(method, config.plan))
    check_plan(method, kept.plan)
    assert kept.seed == 7 and kept.shift == 2. and kept.plan['num_generations'] == 4
    for name in config.plan.keys() - kept.plan.keys():
        with pytest.raises(ValueError, match='is no setting of'): check_plan(method, {name: config.plan[name]})


def test_seeds_differ(tmp_path):
    one, two = (run_cell(TrainConfig(**TINY, seed=s)) for s in (0, 1))
    assert one['reward'] != two['reward']


@pytest.mark.parametrize('name', [n for n in EXPERIMENTS if (FIGURES/f'{n}.json').exists()])
def test_cells_of_a_record_are_kept(name):
    def keys(o): return [k for v in o.values() for k in keys(v)] if isinstance(o, dict) else [o]
    record = load_record(FIGURES/f'{name}.json')
    assert set(keys(record['data'].get('cells', {}))) <= {p.stem for p in CELLS}


# ---- running
def test_workers_and_failures(tmp_path):
    good, bad = TrainConfig(**TINY, seed=1), TrainConfig(**TINY, prompts='nothing.txt')
    with pytest.raises(ValueError, match="1 cells failed, the last with .*'nothing.txt' could not be read"):
        run_cells([bad, good], 1, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f'{cell_key(good)}.json'] # seed 1: no images
    apart, here = load_cell(cell_path(good, tmp_path)), run_cell(good)
    assert apart['reward'] == here['reward'] and apart['nfe'] == here['nfe']
    for name, scores in here['scores'].items():
        for i, values in scores.items(): np.testing.assert_array_equal(np.array(values) / 1000, apart['scores'][name][int(i)])


def test_continues_where_it_stopped(tmp_path, monkeypatch):
    ran = []
    def stub(config, out):
        ran.append(config.seed)
        if len(ran) == 2: raise KeyboardInterrupt
        return dict(config=config.flat(), scores={}, key='')
    monkeypatch.setattr(pool, 'run_cell', stub)
    configs = [TrainConfig(**TINY, seed=s) for s in (2, 0, 1)]
    with pytest.raises(KeyboardInterrupt): run_cells(configs, 0, tmp_path)
    assert ran == [0, 1] and len(list(tmp_path.iterdir())) == 1 # first seeds first; the interrupted one is not kept
    assert len(run_cells(configs + configs, 0, tmp_path)) == 6 and ran == [0, 1, 1, 2]


LONG = """
from egrpo.paper.pool import run_cells
from egrpo.train.trainer import TrainConfig
if __name__ == '__main__': run_cells([TrainConfig(**{settings!r}, seed=s) for s in (1, 2)], 2, {store!r})
"""


def children(pid):
    "Processes whose parent it is, and theirs."
    own = [int(o) for task in Path(f'/proc/{pid}/task').glob('*/children') for o in task.read_text().split()]
    return own + [o for p in own for o in children(p)]


@pytest.mark.skipif(not Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').exists(), reason='needs Linux')
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_no_orphans(tmp_path, how):
    script = tmp_path/'long.py'
    script.write_text(LONG.format(settings=TINY | dict(iterations=100_000), store=str(tmp_path/'store')))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def wait_for(condition):
        end = time.monotonic() + 120
        while not condition() and time.monotonic() < end: time.sleep(.2)
        return condition()
    try:
        assert wait_for(lambda: len(children(parent.pid)) >= 2)
        time.sleep(3)
        below = children(parent.pid)
        parent.send_signal(how)
        parent.wait(60)
        assert wait_for(lambda: not any(alive(p) for p in below))
    finally:
        for p in [parent.pid, *children(parent.pid)]:
            if alive(p): os.kill(p, signal.SIGKILL)
    assert not list((tmp_path/'store').glob('*.json'))


def alive(pid):
    "Is the process there, and more than a zombie?"
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError: return False


def test_a_damaged_cell_is_named(tmp_path):
    path = cell_path(TrainConfig(**TINY), tmp_path)
    path.write_text('{"config": {')
    with pytest.raises(ValueError, match=f'{path.name} is no finished cell'): run_cells([TrainConfig(**TINY)], 0, tmp_path)


# ---- statistics
def test_rises_are_compared_without_pairing_seeds():
    "Welch's interval, whichever seeds the runs have."
    a = [cell(([0, 0], [1, 1]), s, (0., s)) for s in (0, 1, 2)]
    b = [cell(([0, 0], [1, 1]), s, (0., 2 * s)) for s in (2, 0, 1, 7)]
    e, rises = Comparison(a, b).rise(), [(0., 1., 2.), (4., 0., 2., 14.)]
    welch = stats.ttest_ind(*rises, equal_var=False)
    assert e.mean == -4 and e.mean / e.se == pytest.approx(welch.statistic) and e.df == pytest.approx(max(welch.df, 1))
    assert e.p_below() * 2 == pytest.approx(welch.pvalue)


@pytest.fixture
def base_scores(tmp_path, monkeypatch):
    "A record of base scores with a spread of .1 over prompts; text -> score."
    monkeypatch.setenv('EGRPO_FIGURES', str(tmp_path))
    texts = list(dict.fromkeys(load_prompts('shapes')))
    scores = (.5 + .1 * np.random.default_rng(0).normal(size=len(texts))).tolist()
    def save(texts):
        data = dict(prompts=4096, digest=digest(json.dumps(texts).encode()), scores=dict(preference=scores))
        save_record('base_scores', data, scale='mini', seeds=[], wall_time=1, nfe=1, command='egrpo reproduce base_scores')
    save(texts)
    return dict(zip(texts, scores)), save


def trained(seed, known, gain, noise=.01, iterations=60, **config):
    "A run whose reward is the prompts' base score, what is learnt, and noise of its own."
    rng, prompts = np.random.default_rng((seed, round(gain * 1e4))), load_prompts('shapes')
    base = [np.mean([known[text] for text in prompt_batch(prompts, 4, i, seed)]) for i in range(iterations)]
    reward = base + gain * np.linspace(0, 1, iterations) + noise * rng.normal(size=iterations)
    settings = dict(model='miniature', prompts='shapes', eval_size=2, reward='preference', prompts_per_iteration=4, seed=seed)
    return cell(([0, 0], [1, 1]), seed, reward.tolist()) | dict(config=settings | config)


def test_base_scores_take_the_prompts_out_of_the_training_reward(base_scores, monkeypatch, tmp_path):
    "Less spread over seeds, the same expectation; a lead that the raw reward cannot show is found."
    known, _ = base_scores
    runs = {gain: [trained(s, known, gain) for s in range(24)] for gain in (0., .02)}
    fair = {gain: training_rise(rs) for gain, rs in runs.items()}
    lead = Comparison(runs[.02][:5], runs[0.][12:17]).rise()
    data = grid_data({str(k): rs for k, rs in runs.items()}, '0.02')
    monkeypatch.setenv('EGRPO_FIGURES', str(tmp_path/'none'))
    raw = {gain: training_rise(rs) for gain, rs in runs.items()}
    rise = .02 * 45 / 59 # between the middles of the first and the last quarter
    for gain, planted in ((0., 0.), (.02, rise)):
        assert fair[gain].std() < raw[gain].std() / 3
        for found in (fair, raw): assert abs(found[gain].mean() - planted) < 4 * found[gain].std() / 24**.5
    assert lead.p_above() < .01 and lead.interval()[1] < rise < lead.interval()[2]
    assert data['minus_base'] and data['training_rise']['0.02'][0] == pytest.approx(fair[.02].mean())
    assert not grid_data({str(k): rs for k, rs in runs.items()}, '0.02')['minus_base']


def test_prompts_of_another_seed_would_be_noticed(base_scores):
    "With the wrong order of prompts the spread grows instead."
    known, _ = base_scores
    runs = [trained(s, known, 0.) for s in range(12)]
    wrong = [r | dict(config=r['config'] | dict(seed=s + 1)) for s, r in enumerate(runs)]
    assert training_rise(wrong).std() > 3 * training_rise(runs).std()


@pytest.mark.parametrize('config', [dict(prompts='hpd'), dict(model='a/b'), dict(reward='verifier'), dict(reward='preference + verifier')])
def test_runs_without_base_scores_are_left_alone(base_scores, config):
    "One such run is enough: a setting is treated as one."
    known, _ = base_scores
    runs = [trained(0, known, 0.), trained(1, known, 0., **config)]
    assert base_reward(runs[0]) is not None and base_reward(runs[1]) is None
    for kept, r in zip(training_rewards(runs), runs): assert kept.tolist() == r['reward']


def test_base_scores_of_other_prompts_are_refused(base_scores):
    known, save = base_scores
    save(['another'])
    with pytest.raises(ValueError, match='is of other prompts: make it again with `egrpo reproduce base_scores`'):
        training_rise([trained(0, known, 0.)])


def test_scores_are_compared_without_pairing_seeds():
    "Of other seeds, and other numbers of them; the order of the runs does not matter."
    a = [cell(([0, 0], [s, s + 1]), s) for s in (0, 1, 2)]
    b = [cell(([0, 0], [s + .5, s + 1.5]), s) for s in (12, 10, 11, 13)]
    e = contrast(b, a, 'preference')
    assert e.mean == 11 and e.seeds == 3 and e == contrast(b[::-1], a, 'preference')
    assert e.se == pytest.approx((np.var(range(4), ddof=1) / 4 + np.var(range(3), ddof=1) / 3)**.5)


def test_the_distinct_texts_are_counted():
    held_out = load_prompts('shapes', 'held_out', 256)
    rng = np.random.default_rng(0)
    own = {text: rng.normal() for text in held_out}
    config = dict(prompts='shapes', eval_size=256)
    def run(seed):
        after = [own[text] + .01 * rng.normal() for text in held_out]
        return cell((np.zeros(256), after)) | dict(config=config | dict(seed=seed))
    runs = [run(s) for s in range(5)]
    by_text = summarize(runs)['preference']['gain']
    by_image = summarize([r | dict(config=dict(seed=r['config']['seed'])) for r in runs])['preference']['gain']
    assert evaluation_texts(runs) == tuple(held_out) and by_text[0] == pytest.approx(by_image[0])
    assert 1.2 < np.ptp(by_text) / np.ptp(by_image) < 2


def test_a_partial_grid_compares_other_seeds():
    data = grid_data(dict(a=[cell(([0, 0], [1, 1]))], b=[cell(([0, 0], [1, 1]), seed=3)]), 'a')
    assert set(data['rise_against_best']) == set(data['against_best']) == {'b'} and set(data['settings']) == {'a', 'b'}
    assert not data['minus_base'] # runs that name no prompts


def test_verdict_follows_the_intervals():
    assert verdict((1, .1, 2), (1, 0., 2)) == 'open' # touching 0 is not above it
    assert verdict() == 'open'
    assert verdict((1, .5, 2), seeds=4).startswith('open (4 of 5')


def test_hacking_is_found():
    scores = {'preference': {0: np.full(5, .5), 9: np.array([.6, .6, .4, .6, .4])},
              'verifier': {0: np.array([.9, .9, .9, .9, .7]), 9: np.array([.7, .9, .7, .81, .9])}}
    found = hacking([dict(scores=scores)])
    assert [round(found[k][0], 9) for k in ('hacked', 'fell', 'rose', 'beyond_chance')] == [.2, .4, .2, -.04]


def test_what_a_second_reward_changes_in_hacking():
    "Alone half of the gain comes with the truth; jointly all of it. Seeds that only one of them has do not count."
    rng = np.random.default_rng(0)
    truth = rng.normal(.05, .2, (5, 400))
    def trained(learned, seeds):
        zero, both = np.zeros(400), ('preference', 'verifier')
        return [dict(config=dict(seed=s), scores={k: {0: zero, 9: o[s]} for k, o in zip(both, (learned, truth))}) for s in seeds]
    alone, joint = .2 * truth + .01, .4 * truth
    found = contrast_hacking(trained(alone, range(5)), trained(joint, range(4)))
    expected = real_share(joint[:4], truth[:4])[0] - real_share(alone[:4], truth[:4])[0]
    assert found['real_share'][0] == pytest.approx(expected) and found['real_share'][1] > .2
    fell = truth[:4] <= -FALL
    assert found['hacked'][0] == pytest.approx((fell & (joint[:4] > 0)).mean() - (fell & (alone[:4] > 0)).mean())
    assert found['verifier'] == (0, 0, 0)
    assert contrast_hacking(trained(-alone, range(5)), trained(joint, range(5)))['real_share'] is None


def test_a_lift_of_the_reward_alone_is_no_hacking():
    rng = np.random.default_rng(0)
    before, truth = rng.uniform(.4, .6, 2000), rng.normal(0, .2, 2000)
    def found(after):
        end = {'preference': {0: before, 9: after}, 'verifier': {0: np.full(2000, .5), 9: .5 + truth}}
        return hacking([dict(scores=end)])
    _, low, high = found(before + .05 + rng.normal(0, .05, 2000))['beyond_chance']
    assert low < 0 < high
    assert found(before + .05 + .2 * truth)['beyond_chance'][2] < 0 < found(before - .2 * truth)['beyond_chance'][1]


def test_processes_with_different_cells_are_refused(monkeypatch):
    monkeypatch.setattr(cells_module, 'gather_object', lambda keys: [*keys, 'another'])
    with pytest.raises(ValueError, match='about to run different cells'): run_cell(TrainConfig(iterations=1, eval_size=1))


def test_an_edited_method_or_reward_is_another_cell(tmp_path, monkeypatch):
    def first(num_steps=16, shift=3.): return None
    def second(num_steps=16, shift=2.): return None
    def key(**fields): return cell_key(TrainConfig(**fields))
    builtin = key()
    keys = []
    for method in (first, second, first):
        monkeypatch.setitem(METHODS, 'mine', method)
        keys.append(key(method='mine'))
    assert keys[0] == keys[2] != keys[1] and key() == builtin
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for text in ('red = 1', 'red = 22'):
        (tmp_path/'my_reward_of_cells.py').write_text(f'{text}\ndef red(images, prompts): return [0.] * len(images)\n')
        keys += [key(reward='verifier + .5*my_reward_of_cells:red'), key(eval_rewards=f'{tmp_path}/my_reward_of_cells.py:red')]
    assert len(set(keys)) == 4
    assert key(reward='server(http://127.0.0.1:8000)') == key(reward='server(http://127.0.0.1:8000)')


def test_another_dtype_is_another_cell(monkeypatch):
    "Of its own a GPU computes in bf16, the scale mini in fp32 on every machine."
    def keys(): return [cell_key(TrainConfig(**o)) for o in (dict(), dict(dtype='fp32'), get_scale('mini').settings, dict(dtype='bf16'))]
    on_cpu = keys()
    monkeypatch.setattr(run_module, 'best_device', lambda device: torch.device('cuda'))
    on_gpu = keys()
    assert on_cpu[0] == on_cpu[1] == on_gpu[1] and on_gpu[0] == on_gpu[3] == on_cpu[3] != on_cpu[0] and on_cpu[2] == on_gpu[2]


def test_the_training_reward_is_the_weighted_sum():
    metrics = dict(seconds_rollout=1., seconds_update=1., nfe_rollout=1, nfe_gradient=1, ratio_error=0.) | {'reward/a': 1., 'reward/b': 2.}
    assert _costs([metrics], 1., 1., dict(a=1., b=-.5))['reward'] == [0.]


def test_a_record_names_the_devices_of_its_runs(tmp_path, monkeypatch):
    def run_cells(configs, workers, store):
        return [cell(([0, 0], [1, 1]), c.seed) | dict(key=cell_key(c), device=f'{"a" if c.seed else "b"} GPU') for c in configs]
    monkeypatch.setattr(experiments, 'run_cells', run_cells)
    assert load_record(reproduce('tau', 'mini', path=tmp_path/'tau.json'))['device'] == 'a GPU and b GPU'


def test_small_scores_are_kept():
    frame = pd.DataFrame(dict(iteration=[0, 0, 1, 1], prompt=list('abab'), small=[1.23456e-4, 2e-4, 3e-4, 4e-4], large=[.1234, .5, .9, .2]))
    found = _unpack(dict(scores=json.loads(json.dumps(_pack(frame)))))['scores']
    np.testing.assert_allclose(found['small'][0], [1.23456e-4, 2e-4], rtol=1e-5)
    assert found['large'][0].tolist() == [.123, .5]


def test_scores_of_other_prompts_are_not_compared(tmp_path):
    other = tmp_path/'other.txt'
    other.write_text('a circle\na square')
    a, b = cell(([0, 0], [1, 1])), cell(([0, 0], [2, 2]))
    b['config'] |= dict(eval_prompts=str(other), eval_size=2)
    with pytest.raises(ValueError, match='evaluated on other prompts'): contrast([a], [b], 'preference')
    a['config'] |= dict(eval_prompts=str(other), eval_size=2)
    assert contrast([b], [a], 'preference').mean == 1
    b['sources'] = dict(eval_prompts='edited')
    with pytest.raises(ValueError, match='evaluated on other prompts'): contrast([a], [b], 'preference')


def test_settings_left_out_leave_a_claim_open(tmp_path, monkeypatch):
    "A record of `--only` some settings cannot decide over those it lacks; what is finished of the others is in it."
    made = []
    def results(configs, workers, store):
        made.append(len(configs))
        return [cell(([0, 0], [1 + c.seed / 10, 1]), c.seed) | dict(key=cell_key(c)) for c in configs]
    monkeypatch.setattr(experiments, 'run_cells', results)
    data = load_record(reproduce('tau', 'mini', 0, tmp_path/'cells', tmp_path/'tau.json', only=['2.2', '0']))['data']
    assert made == [10] and {k: len(v) for k, v in data['seeds_finished'].items()} == {'0': 5, '1.8': 0, '2': 0, '2.2': 5, '2.6': 0}
    assert best(data, 0, None, 'tau').verdict == 'open (0 of 5 seeds)'
    path = cell_path(EXPERIMENTS['tau'].cells(get_scale('mini'))['2.6'][1], tmp_path/'cells')
    path.parent.mkdir()
    path.touch()
    data = load_record(reproduce('tau', 'mini', 0, tmp_path/'cells', tmp_path/'tau.json', only=['2.2', '0']))['data']
    assert made == [10, 11] and data['seeds_finished']['2.6'] == [1]


# ---- the grids
@pytest.fixture
def rates(monkeypatch): monkeypatch.setattr(grids, 'learning_rate', lambda name, scale: 1e-4)


@pytest.mark.parametrize('name', ['tau', 'merge_length', 'active_steps', 'kernels', 'methods'])
def test_budgets_are_equal(name, rates):
    scale, base = get_scale('mini'), TrainConfig(**get_scale('mini').settings)
    budget = base.iterations * iteration_nfe(base)
    for setting, cells in EXPERIMENTS[name].cells(scale).items():
        assert [c.seed for c in cells] == list(scale.seeds)
        for c in cells[:1]:
            spent = sum(iteration_nfe(c, i) for i in range(c.iterations))
            assert abs(spent - budget) <= iteration_nfe(c, c.iterations), (setting, spent, budget)


@pytest.mark.parametrize('scale', ['smoke', 'mini', 'confirm', 'gpu'])
def test_every_cell_is_a_run_that_starts(scale, rates, monkeypatch):
    "All settings that a scale gives its cells are accepted, those that a method has no use for are left out."
    class Started(Exception): pass

    def start(config):
        check_config(config)
        check_method(config.method, config)
        raise Started

    monkeypatch.setattr(cells_module, 'Trainer', start)
    grids = registered(scale) if get_scale(scale).registered else {k: cells_of(k, get_scale(scale)) for k in EXPERIMENTS}
    for grid in grids.values():
        for cells in grid.values():
            with pytest.raises(Started): run_cell(cells[0])


@pytest.mark.parametrize('scale', ['confirm', 'gpu'])
def test_registered_runs_share_an_evaluation_with_their_rivals(scale):
    "Fresh seeds, no run twice; a pair that no evaluation joins could not be compared at equal iterations."
    def evaluated(run):
        "Iterations of its evaluations, as far as they are known."
        return {*map(int, (run.eval_at or '').split()), *([] if run.budget else [run.iterations])}
    grids = registered(scale)
    for g in DESIGN:
        if g.timed: continue # compared at equal times
        runs = grids[g.experiment]
        for rival in g.rivals:
            assert set.intersection(*map(evaluated, runs[g.best] + runs[rival])), (g, rival)
    configs = {cell_key(c): c for grid in grids.values() for cells in grid.values() for c in cells}
    assert len(configs) == 296 and min(c.seed for c in configs.values()) == 100
    with pytest.raises(ValueError, match='experiment must be a registered one at scale'): cells_of('kernels', get_scale(scale))


def test_an_evaluation_is_named_by_its_iteration():
    config = TrainConfig(iterations=9, eval_every=4, eval_at='3 7')
    assert [i for i in range(10) if evaluation_is_due(config, i)] == [0, 3, 4, 7, 8, 9]
    with pytest.raises(ValueError, match="eval_at must be numbers of iterations such as '59 100', got '3,7'"):
        check_config(TrainConfig(eval_at='3,7'))


def test_default_is_one_cell_everywhere(rates):
    scale = get_scale('mini')
    same = dict(tau='2.2', merge_length='adaptive', active_steps='first 8', kernels='flow')
    keys = {cell_key(EXPERIMENTS[n].cells(scale)[s][0]) for n, s in same.items()}
    assert len(keys) == 1 # Table 1 names the published advantage besides, which is the default: the same run
    assert {cell_key(EXPERIMENTS['methods'].cells(scale)['egrpo'][0])} == keys


def test_learning_rates_come_from_their_record(tmp_path, monkeypatch):
    monkeypatch.setenv('EGRPO_FIGURES', str(tmp_path))
    with pytest.raises(ValueError, match='run `egrpo reproduce lr --scale mini` first'): learning_rate('egrpo', get_scale('mini'))
    (tmp_path/'lr.json').write_text(json.dumps(dict(
        name='lr', data=dict(chosen=dict(egrpo=2e-4)), scale='mini', seeds=[100], wall_time=1., nfe=1, command='egrpo reproduce lr',
        device='cpu', versions=dict(python='', torch='', egrpo=''))))
    assert learning_rate('egrpo', get_scale('mini')) == 2e-4
    with pytest.raises(ValueError, match='no lr is chosen for egrpo at scale flux'): learning_rate('egrpo', get_scale('flux'))


def test_partial_reproduction_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, 'run_cell', lambda config: pytest.fail('ran a cell'))
    with pytest.raises(ValueError, match='no cell of the experiment is finished'): reproduce('tau', 'smoke', 0, tmp_path, partial=True)
