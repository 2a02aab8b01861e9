"""Every claim of the paper has a judge, and verdicts follow the records."""
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from egrpo.cli.commands import main
from egrpo.paper import claims
from egrpo.paper.comparisons import grid_data
from egrpo.paper.experiments import EXPERIMENTS
from egrpo.paper.records import load_record, save_record

ROOT = Path(__file__).parent.parent
PLACES = 'Fig. 1a, Fig. 1b, Fig. 1c, Fig. 3, Fig. 4, Fig. 8, Table 1, Table 2, Table 3, Table 4'.split(', ')
PLACES += [*(f'AEGPO {i}' for i in range(1, 8)), 'AEGPO', 'Ours']


def test_no_figure_or_table_is_missing():
    assert list(dict.fromkeys(c.place for c in claims.CLAIMS)) == PLACES
    assert len({(c.place, c.text) for c in claims.CLAIMS}) == len(claims.CLAIMS)


@pytest.mark.parametrize('claim', claims.CLAIMS, ids=lambda c: f'{c.place}: {c.text}'[:50])
def test_claim_has_its_experiment_and_notebook(claim):
    assert (ROOT/EXPERIMENTS[claim.record].notebook).exists()


@pytest.fixture(scope='module')
def table(): return claims.claims_table()


def test_verdicts_on_the_committed_records(table):
    for claim, row in zip(claims.CLAIMS, table.itertuples()):
        measured = bool(claims.records_of(claim))
        assert row.verdict.startswith('not measured') == (not measured)
        assert bool(row.ours) <= measured
        assert row.word in claims.MARKS and row.verdict.startswith(row.word)
        if row.found.margin is not None: assert row.found.margin in claims.margins_of(claim.record).values()


def test_a_verdict_is_not_written_by_hand(tmp_path, monkeypatch):
    "Swap the signs of a record's differences, and what holds no longer does."
    monkeypatch.setenv('EGRPO_FIGURES', str(tmp_path))
    frame = json.loads((ROOT/'figures/entropy_by_step.json').read_text())
    entropy = frame['data']['entropy']
    (tmp_path/'entropy_by_step.json').write_text(json.dumps(frame))
    def verdicts(): return [claims.judged(c)['verdict'] for c in claims.CLAIMS if c.record == 'entropy_by_step']
    assert verdicts() == ['holds', 'holds']
    frame['data']['entropy'] = {k: v[::-1] for k, v in entropy.items()}
    (tmp_path/'entropy_by_step.json').write_text(json.dumps(frame))
    assert verdicts()[0] == 'does not hold'


def test_registered_runs_decide_once_they_are_there(tmp_path, monkeypatch):
    "An incomplete registered record says nothing; a complete one goes before the exploratory one, which stands beside it."
    monkeypatch.setenv('EGRPO_FIGURES', str(tmp_path))
    claim = next(c for c in claims.CLAIMS if c.registered and c.record == 'tau')
    def write(name, scale, lead, first, **progress):
        "A record in which the best setting leads by so much."
        e = dict(mean=lead, se=.001, df=20., seeds=6, per_seed=1e-5, rest=1e-8)
        known = dict(end={'0': dict(preference=e)}, equal={}, gain={})
        gained = {k: dict(preference=dict(before=[.55, .55, .55], after=[.58, .58, .58], gain=[.03, .03, .03])) for k in ('2.2', '0')}
        seeds = dict.fromkeys(gained, list(range(first, first + 6)))
        data = dict(best='2.2', settings=gained, comparisons=known, seeds_finished=seeds, seeds_planned=6, **progress)
        made = dict(wall_time=1., nfe=1, command='made up', device='a made-up device')
        save_record(tmp_path/f'{name}.json', data, scale=scale, seeds=seeds['0'], **made)
    write('tau', 'mini', -.01, 0)
    assert claims.judged(claim)['word'] == 'does not hold' and claims.judged(claim)['exploratory']
    write('confirm/tau', 'confirm', .01, 100, complete=False)
    assert claims.judged(claim)['word'] == 'does not hold'
    write('gpu/tau', 'gpu', .01, 100, complete=True)
    row = claims.judged(claim)
    assert (row['word'], row['scale'], row['exploratory'], row['beside']) == ('holds', 'gpu', False, dict(mini='does not hold'))
    write('confirm/tau', 'confirm', 0., 100, complete=True)
    row = claims.judged(claim)
    assert row['scale'] == 'confirm' and row['word'] != 'holds' and list(row['beside']) == ['gpu', 'mini']


@pytest.mark.parametrize('tested, survives', [(1, True), (20, False)])
def test_claims_that_found_nothing_count_in_the_correction(monkeypatch, tested, survives):
    def judged(i):
        found = claims.Finding('', 'open') if i else claims.Finding('', 'holds', .04)
        return dict(found=found, word=found.word)
    monkeypatch.setattr(claims, 'CLAIMS', range(tested))
    monkeypatch.setattr(claims, 'judged', judged)
    assert claims.claims_table().survives.any() == survives


def test_partial_record_is_open():
    data = dict(best='egrpo', comparisons=dict(end={}), seeds_finished=dict(egrpo=[0], mix_grpo=[]))
    for found in (claims.best(data), claims.training_best(data, ('mix_grpo',))): assert found.verdict == 'open (0 of 5 seeds)'


# ---- simulated records

def grid(lead, seeds, world, settings=('both', 'one'), first=0):
    "Data of a grid whose first setting leads by so much, with the noise of the quiet grids."
    rng = np.random.default_rng(world)
    texts = rng.integers(0, 215, 256)
    difficulty = .09 * rng.normal(size=215)[texts]
    def run(setting, seed, own):
        after = difficulty + own + .58 + lead * (setting == settings[0]) + .0015 * rng.normal() + .046 * rng.normal(size=256)
        return dict(config=dict(seed=seed), scores=dict(preference={0: difficulty + .55, 40: after}), reward=[0.] * 40, nfe=1,
                    train_seconds=1., ratio_error=0., key='k')
    effects = {s: .007 * rng.normal(size=215)[texts] for s in settings}
    results = {s: [run(s, first + i, effects[s] - effects[s].mean()) for i in range(seeds)] for s in settings}
    return grid_data(results, settings[0]) | dict(seeds_finished={s: list(range(first, first + seeds)) for s in settings})


def words(lead, seeds, worlds=8): return [claims.best(grid(lead, seeds, world), 0, ('one',)).word for world in range(worlds)]


def test_a_planted_lead_of_twice_the_margin_is_found():
    found = words(2 * claims.MARGINS['preference'], 8)
    assert found.count('holds') >= 7 and not {'does not hold', 'equivalent', 'not better'} & set(found)
    assert words(-2 * claims.MARGINS['preference'], 8).count('does not hold') >= 7


def test_a_planted_null_is_found():
    found = words(0., 16)
    assert found.count('equivalent') + found.count('not better') >= 7 and found.count('holds') + found.count('does not hold') <= 1


def test_runs_with_seeds_from_100_confirm(tmp_path, monkeypatch):
    monkeypatch.setenv('EGRPO_FIGURES', str(tmp_path))
    claim = next(c for c in claims.CLAIMS if c.record == 'aegpo' and c.place == 'AEGPO 5')
    def row(first):
        data = grid(.02, 5, 0, ('both', 'DanceGRPO', 'local only'), first)
        save_record('aegpo', data, scale='mini', seeds=list(range(first, first + 5)), wall_time=1, nfe=1, command='egrpo reproduce aegpo')
        return claims.judged(claim)
    assert [(row(first)['exploratory'], row(first)['word']) for first in (0, 100)] == [(True, 'holds'), (False, 'holds')]


def test_a_verdict_follows_the_estimates():
    "Turn the leads of a record around, and the verdict is the opposite."
    data = load_record('active_steps')['data']
    def word(): return claims.best(data, 0, ('second 8',), 'active_steps').word
    assert word() == 'does not hold'
    for lead in data['comparisons']['end'].values(): lead['preference']['mean'] *= -1
    assert word() == 'holds'


def test_the_papers_numbers_are_scaled_to_our_gain():
    data = load_record('merge_length')['data']
    gain = data['settings']['adaptive']['preference']['gain'][0]
    assert claims.scaled(data, 'merge_length')['6'] == pytest.approx((.391 - .337) / (.391 - .311) * gain)
    for name, table in claims.PAPER.items(): assert next(iter(table)) == load_record(name)['data']['best']


def test_only_rivals_that_leave_a_claim_open_ask_for_seeds():
    "A rival that is beaten already, however little is known of it, asks for none."
    leads = {name: claims.Estimate(**e['preference']) for name, e in load_record('methods_clip')['data']['comparisons']['end'].items()}
    chosen = {name: leads[name] for name in claims.RIVALS}
    v = claims.judge(chosen, claims.TABLE_1_MARGINS['preference'])
    alone = claims.judge(dict(mix_grpo=leads['mix_grpo']), claims.TABLE_1_MARGINS['preference'])
    assert (v.word, v.seeds_needed, v.times_prompts) == ('open', alone.seeds_needed, 1)


def test_peaks_are_judged_by_aegpos_kernel():
    data = load_record('peaks')['data']
    found = claims.pays(data, 'variance')
    data['kernels']['flow']['statistics']['variance']['lead']['mean'] *= -1
    same = claims.pays(data, 'variance')
    assert found.rival == 'dance' and (same.word, same.p) == (found.word, found.p) and same.seen != found.seen


def test_a_gain_without_the_verifier_has_no_p_value(table):
    row = table[table.claim.str.startswith('trained on HPS alone')].iloc[0]
    assert row.found.p is None and not row.survives and 'a low estimate' in row.ours


# ---- as text


def test_front_page_names_the_margin_and_the_other_verdict():
    equal = claims.Finding('', 'open')
    def line(mean, same):
        found = claims.Finding('a; a minus b', 'holds', interval=(mean, 0, 1), margin=.005, equal=same)
        return claims._headline(SimpleNamespace(word='holds', place='Table 0', claim='a is best', ours=found.seen, found=found))
    assert line(.004, equal) == '✓ holds (Table 0): a is best. Ours: a minus b, below the margin of .005. At equal iterations: open.'
    assert line(.006, replace(equal, word='holds')) == '✓ holds (Table 0): a is best. Ours: a minus b.'


def test_command_prints_every_claim(capsys, table):
    assert main(['claims']) == 0
    out = ' '.join(capsys.readouterr().out.split())
    assert all(c.text in out for c in claims.CLAIMS)
    assert out.startswith(f'{len(claims.CLAIMS)} claims: {claims.counts_text(table.word)}')


def test_json_has_every_claim(capsys, table):
    assert main(['claims', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(o['place'], o['claim']) for o in found] == [(c.place, c.text) for c in claims.CLAIMS]
    for o, row in zip(found, table.itertuples()):
        assert o['verdict'] == row.word and o['survives_holm'] == row.survives and o['exploratory'] == row.exploratory
        assert (o['equal_iterations'] is None) == (row.verdict_iterations == '')
        assert o['numbers']['logarithm'] == ('geometric mean' in o['ours'])
        if o['margin'] is not None: assert o['numbers']['low'] <= o['numbers']['mean'] <= o['numbers']['high'] and o['seeds'] >= 5


def test_counts_of_the_page_and_of_its_table(table):
    page = (ROOT/'PAPERS.md').read_text(encoding='utf-8')
    rows = [line for line in page.splitlines() if re.match(r'\| [^ a-z-]+ [a-z]', line)]
    assert len(rows) == len(table) == len(claims.CLAIMS)
    assert claims.counts_text(table.word) in page
    for word, mark in claims.MARKS.items(): assert sum(row.startswith(f'| {mark} {word}') for row in rows) == sum(table.word == word)
    assert claims.claims_summary().replace('../', '') in (ROOT/'README.md').read_text(encoding='utf-8')


def test_markdown_has_a_row_per_claim():
    lines = claims.claims_markdown().split('\n')
    assert len(lines) == len(claims.CLAIMS) + 2 and len({len(re.findall(r'(?<!\\)\|', line)) for line in lines}) == 1


@pytest.mark.parametrize('seeds, needed, times, says', [(5, 9, 1, 'open (about 9 seeds would tell)'),
                                                        (10, 9, 2, 'open (about 9 seeds and 2 times the prompts would tell)'),
                                                        (10, 9, 1, 'open (10 seeds would have shown a lead of .0075)')])
def test_an_open_claim_asks_for_no_seeds_that_were_there(seeds, needed, times, says):
    found = claims.Finding('', 'open', margin=.0075, seeds=seeds, seeds_needed=needed, times_prompts=times)
    assert found.verdict == says
