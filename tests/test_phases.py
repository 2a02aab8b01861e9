"`egrpo speed`: every operation in its phase, nothing left behind."
import json
import shlex

import pytest
import torch
from parity import PROMPTS, brightness
from torch.utils.flop_counter import FlopCounterMode

from egrpo.cli.commands import main
from egrpo.core.plan import gradient_nfe, rollout_nfe
from egrpo.testing.pipelines import small_pipeline
from egrpo.train.config import TrainConfig
from egrpo.train.phases import measure_phases
from egrpo.train.trainer import Trainer


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with prompts."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'prompts.txt').write_text('\n'.join(PROMPTS))
    return tmp_path


@pytest.mark.filterwarnings('ignore')
def test_operations_of_flux2(here):
    "As many as the evaluations of each phase have; the update's with a backward pass; memory is predicted."
    small_pipeline('flux2-klein').save_pretrained('model')
    settings = dict(num_steps=6, active_steps=2, num_generations=3, prompts_per_iteration=2, lora_rank=2, resolution=32, guidance=3.)
    config = TrainConfig(model='model', prompts='prompts.txt', eval_size=2, iterations=2, device='cpu', out='run', **settings)
    trainer = Trainer(config, reward=brightness)
    report, policy = measure_phases(trainer, 1), trainer.policy
    phases = {o.name: o for o in report.phases}
    cond, noise = policy.encode(PROMPTS[:1]), torch.randn(1, *policy.latent_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad(): policy.velocity(noise, torch.tensor([.5]), cond)
    velocity = counter.get_total_flops()
    plan = trainer.plan(0)[0][0]
    rolled, trained = 2 * rollout_nfe(plan), 2 * gradient_nfe(plan)
    assert report.nfe == 2 * (rolled + trained) # guidance takes two evaluations
    assert phases['rollout'].flops == pytest.approx(rolled * velocity, rel=.01)
    assert 1.8 < phases['update'].flops / (trained * velocity) < 3.2
    assert phases['embed'].flops > 0 and phases['decode'].flops > 0
    assert report.predicted_bytes > 0 and phases['rollout'].predicted > 0 and phases['reward'].predicted is None
    assert not (here/'run').exists()


def test_the_command(here, capsys):
    options = shlex.split('--device cpu --rounds 1 --num-steps 6 --active-steps 2 --num-generations 3 --prompts-per-iteration 2')
    assert main(['speed', *options, '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert [o['name'] for o in found['phases']] == ['embed', 'rollout', 'decode', 'reward', 'update']
    assert all(o['seconds'] > 0 and o['bytes'] > 0 for o in found['phases']) and found['predicted_bytes'] > 0 and found['peak'] > 1e6
    assert main(['speed', *options]) == 0
    out = capsys.readouterr().out
    assert 'predicted' in out and 'rollout' in out and 'by the cost model' in out
    assert [p.name for p in here.iterdir()] == ['prompts.txt']
    assert main(['speed', '--rounds', '0']) == 2 and 'rounds must be >= 1' in capsys.readouterr().err
