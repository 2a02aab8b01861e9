"""Every claim of the paper has a judge, and verdicts follow the records."""
import json
import re
from pathlib import Path

import pytest

from egrpo import claims
from egrpo.cli import main
from egrpo.experiments import EXPERIMENTS

ROOT = Path(__file__).parent.parent
PLACES = 'Fig. 1a, Fig. 1b, Fig. 1c, Fig. 3, Fig. 4, Fig. 8, Table 1, Table 2, Table 3, Table 4'.split(', ')
PLACES += [*(f'AEGPO {i}' for i in range(1, 8)), 'AEGPO']


def test_no_figure_or_table_is_missing():
    assert list(dict.fromkeys(c.place for c in claims.CLAIMS)) == PLACES
    assert len({(c.place, c.text) for c in claims.CLAIMS}) == len(claims.CLAIMS)


@pytest.mark.parametrize('claim', claims.CLAIMS, ids=lambda c: f'{c.place}: {c.text}'[:50])
def test_claim_has_its_experiment_and_notebook(claim):
    assert (ROOT/EXPERIMENTS[claim.record].notebook).exists()


def test_verdicts_on_the_committed_records():
    table = claims.claims_table()
    measured = {p.stem for p in (ROOT/'figures').glob('*.json')}
    for claim, row in zip(claims.CLAIMS, table.itertuples()):
        assert row.verdict.startswith('not measured') == (claim.record not in measured)
        assert bool(row.ours) <= (claim.record in measured)
        assert re.match(r'holds$|does not hold$|undecided( \(\d of 5 seeds\))?$|not measured yet: egrpo reproduce \w+$', row.verdict)


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


def test_partial_record_is_undecided():
    data = dict(best='egrpo', against_best={}, rise_against_best={}, seeds_finished=dict(egrpo=[0], mix_grpo=[]))
    for judge in (claims.best(), claims.training_best(('mix_grpo',))): assert judge(data)[1].startswith('undecided')


def test_command_prints_every_claim(capsys):
    assert main(['claims']) == 0
    out = capsys.readouterr().out
    assert all(c.text in out for c in claims.CLAIMS)


def test_markdown_has_a_row_per_claim():
    lines = claims.claims_markdown().split('\n')
    assert len(lines) == len(claims.CLAIMS) + 2 and len({len(re.findall(r'(?<!\\)\|', line)) for line in lines}) == 1
