"""Every record in figures/ satisfies the schema, every picture has its record, and the frame itself is sound."""
import json
import os
from pathlib import Path

import numpy as np
import pytest

from egrpo.base.bootstrap import bootstrap_interval, paired_interval
from egrpo.paper.records import figures_dir, get_scale, load_record, save_record

FIGURES = Path(__file__).parent.parent/'figures'
RECORDS, PICTURES = sorted(FIGURES.glob('*.json')), sorted(FIGURES.glob('*.png'))
FINE = dict(data=dict(x=[1., 2.]), scale='smoke', seeds=[0], wall_time=1., nfe=8, command='egrpo reproduce x')


def test_there_are_records(): assert RECORDS, f"no records in {FIGURES.name}/"


@pytest.mark.parametrize('path', RECORDS, ids=lambda o: o.stem)
def test_record(path):
    record = load_record(path)
    assert record['name'] == path.stem and record['data']
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize('path', PICTURES, ids=lambda o: o.stem)
def test_picture_has_its_record(path):
    stems = {o.stem for o in RECORDS}
    assert any(f'{path.stem}_'.startswith(f'{o}_') for o in stems), f"{path.name} has no record: draw it from one of its own name"


def test_round_trip(tmp_path):
    file = save_record(tmp_path/'sub'/'x.json', **FINE, paper=dict(x=np.float32(.5)))
    record = load_record(file)
    assert record['data'] == FINE['data'] and record['paper'] == {'x': .5} and record['versions']['egrpo']
    before = file.read_bytes()
    with pytest.raises(ValueError): save_record(file, **FINE | dict(data=dict(x=float('inf'))))
    assert file.read_bytes() == before and os.listdir(file.parent) == ['x.json']


@pytest.mark.parametrize('field', ['name', 'data', 'scale', 'seeds', 'wall_time', 'nfe', 'command', 'device', 'versions'])
def test_missing_field_is_named(field, tmp_path):
    file = save_record(tmp_path/'x.json', **FINE)
    record = json.loads(file.read_text())
    del record[field]
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"x.json has no '{field}'"): load_record(file)


@pytest.mark.parametrize('change', [dict(scale='big'), dict(seeds=['a']), dict(wall_time=-1.), dict(nfe=1.5), dict(nfe=True),
                                    dict(command=''), dict(data=dict(folder=str(Path('out').absolute()))), dict(data=dict(x=object()))])
def test_bad_record_is_not_written(change, tmp_path):
    with pytest.raises(ValueError): save_record(tmp_path/'x.json', **FINE | change)
    assert not os.listdir(tmp_path)


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('EGRPO_FIGURES', str(tmp_path))
    assert figures_dir() == tmp_path and save_record('x', **FINE) == tmp_path/'x.json'
    monkeypatch.setenv('EGRPO_SCALE', 'mini')
    assert get_scale().name == 'mini'
    monkeypatch.setenv('EGRPO_SCALE', 'mega')
    with pytest.raises(ValueError, match='smoke, mini, confirm, gpu, flux'): get_scale()


def test_interval_over_prompts_is_wider_than_over_their_images():
    rng = np.random.default_rng(0)
    values, prompts = (rng.normal(size=(40, 1)) + .1*rng.normal(size=(40, 6))).ravel(), np.repeat(np.arange(40), 6)
    (_, a, b), (_, c, d) = bootstrap_interval(values, prompts), bootstrap_interval(values)
    assert 1.8 < (b - a) / (d - c) < 3 # sqrt(6) = 2.45


def test_interval_over_seeds_is_wider_when_they_differ():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 200)) + np.arange(5)[:, None]
    (_, a, b), (_, c, d) = bootstrap_interval(values), bootstrap_interval(values.mean(0))
    assert b - a > 4 * (d - c)


def test_pairs_cancel_what_they_share():
    rng = np.random.default_rng(0)
    before = rng.normal(size=100)
    mean, low, high = paired_interval(before, before + .01)
    assert abs(mean - .01) < 1e-12 and high - low < 1e-12
    assert bootstrap_interval(before) == bootstrap_interval(before) # the same seed, the same interval
