"The identity of a run: names of cells never change, and a flat configuration is read as it was written."
import json
from dataclasses import asdict
from pathlib import Path

import pytest

import egrpo
from egrpo.train.run import cell_key

CELLS = sorted((Path(__file__).parent.parent/'figures/cells').glob('*.json'))


def test_every_cell_keeps_its_name():
    assert len(CELLS) >= 242
    configs = {p.stem: json.loads(p.read_text(encoding='utf-8'))['config'] for p in CELLS}
    changed = [name for name, config in configs.items() if cell_key(egrpo.TrainConfig.from_dict(config)) != name]
    assert not changed, f'{len(changed)} of {len(configs)} cells are not found any more: {changed[:3]}'


def test_a_setting_that_counts_changes_the_name():
    config = json.loads(CELLS[0].read_text(encoding='utf-8'))['config']
    other = config | dict(seed=config.get('seed', 0) + 1)
    assert cell_key(egrpo.TrainConfig.from_dict(other)) != CELLS[0].stem
    elsewhere = config | dict(out='other', micro_batch=3)
    assert cell_key(egrpo.TrainConfig.from_dict(elsewhere)) == CELLS[0].stem


def test_a_flat_configuration_is_read_back():
    config = egrpo.TrainConfig(tau=1.8, lr=1e-4, seed=3)
    assert egrpo.TrainConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match='config has no field taw'): egrpo.TrainConfig.from_dict(dict(taw=1.8))
