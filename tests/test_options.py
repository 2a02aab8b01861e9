"What trainers of this kind offer: schedules, optimisers, kept checkpoints, patience; each survives a resume."
import json
import shutil
from importlib.util import find_spec

import pytest
import torch

from egrpo.rewards.reward import RewardError
from egrpo.train.checkpoint import load_checkpoint, save_checkpoint
from egrpo.train.config import TrainConfig, check_config
from egrpo.train.trainer import Trainer

SMALL = dict(num_steps=4, tau=0, active_steps=2, num_generations=2, prompts_per_iteration=1, eval_size=2, device='cpu', samples=0,
             eval_every=0, eval_rewards='verifier')


def run(out, **changes):
    "A small run and its metrics."
    trainer = Trainer(TrainConfig(out=str(out), **{**SMALL, **changes}))
    trainer.fit()
    return trainer, [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]


def assert_same_weights(a, b):
    for name, p in a.parameters.items(): assert torch.equal(p, b.parameters[name]), name


def stop_after(n):
    "A callback that ends a run."
    return lambda trainer: trainer.iteration == n


def test_a_schedule_goes_on_where_it_stopped(tmp_path):
    "Warm-up, then a cosine to the end of the run; each iteration says its rate."
    settings = dict(iterations=4, lr_schedule='cosine', lr_warmup=2, lr=1e-3)
    straight, metrics = run(tmp_path/'straight', **settings)
    rates = [m['lr'] for m in metrics]
    assert rates[:2] == [.5e-3, 1e-3] and 1e-3 > rates[2] > rates[3] > 0
    Trainer(TrainConfig(out=str(tmp_path/'stopped'), **SMALL | settings)).fit(stop_after(2))
    resumed, others = run(tmp_path/'stopped', **settings, resume=True)
    assert_same_weights(straight, resumed)
    assert [m['lr'] for m in others] == rates


def test_another_learning_rate_on_resume(tmp_path):
    "It counts from there on, and both are on record."
    run(tmp_path/'run', iterations=1)
    trainer, metrics = run(tmp_path/'run', iterations=2, lr=3e-5, resume=True)
    assert [m['lr'] for m in metrics] == [1e-4, 3e-5] and trainer.optimizer.param_groups[0]['lr'] == 3e-5
    assert json.loads((tmp_path/'run/config.json').read_text())['lr'] == 3e-5


@pytest.mark.parametrize('name, lr', [('prodigy', 1.), ('adamw8bit', 1e-4)])
def test_another_optimiser(tmp_path, name, lr):
    "Named where it is not installed; else resumed to the bit, with what it has found for all weights."
    package = dict(prodigy='prodigyopt', adamw8bit='bitsandbytes')[name]
    if find_spec(package) is None:
        with pytest.raises(ValueError, match=f"optimizer '{name}' needs the package {package}: pip install"):
            check_config(TrainConfig(optimizer=name))
        return
    settings = dict(optimizer=name, lr=lr)
    straight, _ = run(tmp_path/'straight', iterations=3, **settings)
    run(tmp_path/'stopped', iterations=2, **settings)
    resumed, _ = run(tmp_path/'stopped', iterations=3, resume=True, **settings)
    assert_same_weights(straight, resumed)


def by_evaluation(*scores):
    "A reward whose n-th call gives the n-th score."
    left = list(scores)
    def score(images, prompts): return [left.pop(0)] * len(prompts)
    return score


def test_patience_ends_a_run(tmp_path):
    "After two evaluations that are no better than the best; more patience goes on."
    def trainer(patience, *scores, **changes):
        made = Trainer(TrainConfig(out=str(tmp_path/'run'), **SMALL | dict(iterations=9, eval_every=1, patience=patience) | changes))
        made.eval_reward.rewards['verifier'] = by_evaluation(*scores)
        return made
    first = trainer(2, .1, .5, .4, .5, .9)
    history = first.fit()
    assert first.iteration == 3 and first.spent()
    assert history.groupby('iteration').verifier.first().tolist() == pytest.approx([.1, .5, .4, .5])
    more = trainer(3, .5, .2, .9, resume=True)
    more.fit()
    assert more.iteration == 4 and more.spent()


def test_kept_checkpoints_are_gone_on_from(tmp_path):
    "The last two stay; a run from an earlier one, by its iteration, is the run that did not go further."
    settings = dict(checkpoint_every=1, keep_checkpoints=2)
    straight, metrics = run(tmp_path/'straight', iterations=3, **settings)
    kept = tmp_path/'straight/checkpoints'
    assert sorted(p.name for p in kept.iterdir()) == ['2', '3']
    again, others = run(tmp_path/'straight', iterations=3, resume=True, resume_from=2, **settings)
    assert_same_weights(straight, again)
    assert [m['grad_norm'] for m in others] == [m['grad_norm'] for m in metrics]
    further, changed = run(tmp_path/'straight', iterations=4, resume=True, resume_from=2, lr=1e-3, **settings)
    assert [m['lr'] for m in changed] == [1e-4, 1e-4, 1e-4, 1e-3], 'what came from 2 is not run again'
    assert sorted(p.name for p in kept.iterdir()) == ['3', '4']
    other, changed = run(tmp_path/'straight', iterations=5, resume=True, resume_from=3, lr=1e-3, **settings)
    assert [m['lr'] for m in changed] == [1e-4] * 3 + [1e-3] * 2 and sorted(p.name for p in kept.iterdir()) == ['4', '5']
    resumed, _ = run(tmp_path/'straight', iterations=5, lr=1e-3, resume=True, **settings) # from the newest again
    assert_same_weights(other, resumed)
    assert resumed.resumed_from == 3
    with pytest.raises(ValueError, match='no checkpoint of iteration 7 in .*: there are 4, 5'):
        run(tmp_path/'straight', iterations=9, resume=True, resume_from=7)


def test_a_kept_checkpoint_that_does_not_fit_replaces_nothing(tmp_path):
    "It is checked first: damaged weights, metrics that are not its own. A lost newest one asks for a kept one."
    settings = dict(iterations=2, checkpoint_every=1, keep_checkpoints=2)
    run(tmp_path/'run', **settings)
    newest, kept = tmp_path/'run/checkpoint', tmp_path/'run/checkpoints/1'
    before = (newest/'state.json').read_bytes()
    def refused(why, **changes):
        with pytest.raises(ValueError, match=why): run(tmp_path/'run', resume=True, **settings | changes)
    metrics = tmp_path/'run/metrics.jsonl'
    text = metrics.read_text()
    metrics.write_text(text.replace('"iteration":', '"iteration" :', 1))
    refused('is not what the checkpoint knows', resume_from=1)
    metrics.write_text(text)
    weights = kept/'weights.safetensors'
    data = weights.read_bytes()
    weights.unlink() # it may be a hard link
    weights.write_bytes(data[:-1])
    refused('damaged', resume_from=1)
    assert (newest/'state.json').read_bytes() == before
    weights.write_bytes(data)
    shutil.rmtree(newest)
    refused('set resume_from to one of 1, 2')
    _, lines = run(tmp_path/'run', resume=True, resume_from=1, **settings)
    assert len(lines) == 2


def test_the_best_is_kept_where_its_evaluation_comes_after_a_resume(tmp_path):
    "A run that ended between a checkpoint and its evaluation."
    settings = dict(iterations=2, eval_every=1, keep_best=True)
    def trainer(*scores, **changes):
        made = Trainer(TrainConfig(out=str(tmp_path/'run'), **SMALL | settings | changes))
        made.eval_reward.rewards['verifier'] = by_evaluation(*scores)
        return made
    with pytest.raises(RewardError): trainer(.1, .5).fit() # the third evaluation has no score
    assert sorted(p.name for p in (tmp_path/'run/checkpoints').iterdir()) == ['1']
    trainer(.9, resume=True).fit()
    assert sorted(p.name for p in (tmp_path/'run/checkpoints').iterdir()) == ['1', '2']


def test_a_run_from_before_a_setting_is_resumed(tmp_path):
    "What its checkpoint lacks was the default."
    run(tmp_path/'run', iterations=1)
    checkpoint = tmp_path/'run/checkpoint'
    tensors, info = load_checkpoint(checkpoint)
    for name in ('optimizer', 'lr_schedule', 'ema_decay'): del info['config'][name]
    save_checkpoint(checkpoint, tensors, info)
    with pytest.raises(ValueError, match='ema_decay was .*, is 0.5'):
        run(tmp_path/'run', iterations=2, resume=True, ema_decay=.5)
    _, lines = run(tmp_path/'run', iterations=2, resume=True)
    assert len(lines) == 2


def test_options_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match='lr_warmup needs a schedule that warms up'): check_config(TrainConfig(lr_warmup=3))
    with pytest.raises(ValueError, match='resume_from goes with resume'): check_config(TrainConfig(resume_from=3))
