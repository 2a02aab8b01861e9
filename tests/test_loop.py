"The loop on the shipped miniature: what must hold for every plan, and that each check fails on a planted bug."
import json

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from PIL import Image
from torch.testing import assert_close

from egrpo.core import rollout as rollout_module
from egrpo.core.plan import Branch, Plan, SDEStep, count_leaves, count_transitions, gradient_nfe, rollout_nfe
from egrpo.core.rollout import rollout, transition_log_prob
from egrpo.core.sde import ode_step
from egrpo.core.sigmas import flow_sigmas
from egrpo.methods.registry import egrpo
from egrpo.models.policy import load_policy
from egrpo.train.evaluate import evaluate
from egrpo.train.gains import evaluation_metrics
from egrpo.train.prepare import describe_run, training_nfe
from egrpo.train.prompts import load_prompts
from egrpo.train.trainer import TrainConfig, Trainer

PROMPTS = ['a red circle', 'two blue squares', 'a green cross left of a yellow triangle']
SIGMAS = flow_sigmas(10)
PLANS = {
    'merged': egrpo(num_steps=16, num_generations=3),
    'unmerged': egrpo(num_steps=10, tau=0, active_steps=4, num_generations=3),
    'dance chain': Plan(SIGMAS, (Branch((SDEStep(0, 1, 4),) + tuple(SDEStep(k) for k in range(1, 9))),), .3, 'dance'),
    'cps window': Plan(SIGMAS, (Branch(tuple(SDEStep(k) for k in range(2, 5)), noises=4),), .8, 'cps'),
    'tree': Plan(SIGMAS, (Branch((SDEStep(0, 1, 2), SDEStep(3, 2, 2), SDEStep(6, 1, 2))),), .3, 'dance'),
    'noises by children': Plan(SIGMAS, tuple(Branch((SDEStep(k, 1, 3, weight=1 + k),), noises=2) for k in range(3))),
    'two strides': Plan(SIGMAS, tuple(Branch((SDEStep(k, 2, 3),)) for k in range(3)), strides=(1, 3)),
}


@pytest.fixture(scope='module')
def policy():
    "The miniature, on the CPU."
    return load_policy(device='cpu')


@pytest.fixture(params=PLANS, scope='module')
def walked(request, policy):
    "A plan and its rollout, with the network evaluations it took."
    plan, before = PLANS[request.param], policy.nfe
    out = rollout(policy, policy.encode(PROMPTS), plan, 0, 0)
    return plan, out, policy.nfe - before


def fresh_ratio(policy, out, micro_batch):
    "The ratio that the update's own forward finds, in its own micro-batches."
    keep, policy.micro_batch = policy.micro_batch, micro_batch
    with torch.no_grad(): v = policy.velocity(out.parents, out.plan.sigmas[out.start], policy.encode(PROMPTS)[out.prompt])
    policy.micro_batch = keep
    logp, *_ = transition_log_prob(v, out.parents, out.children, out.row, out.start, out.end, out.plan)
    return (logp - out.log_prob).double().exp()


def continues_where_it_should(policy, out, transition):
    "Does the ODE from a transition's child, at the index where its step ends, arrive at its leaf?"
    row = out.row[transition]
    x, cond = out.children[transition][None], policy.encode(PROMPTS)[out.prompt[row]][None]
    sigmas = out.plan.sigmas
    with torch.no_grad():
        for k in range(int(out.end[row]), out.plan.num_steps):
            x = ode_step(policy.velocity(x, sigmas[k][None], cond), x, sigmas[k].item(), sigmas[k+1].item())
    return torch.allclose(x[0], out.latents[out.leaf_start[transition]], atol=1e-3, rtol=1e-3)


def test_counts(walked):
    "Leaves, transitions, rows and network evaluations are those the plan predicts."
    plan, out, nfe = walked
    predicted = tuple(len(PROMPTS) * f(plan) for f in (count_leaves, count_transitions, gradient_nfe, rollout_nfe))
    assert (len(out.latents), len(out.children), len(out.parents), nfe) == predicted


@pytest.mark.parametrize('micro_batch', [1, 7, 64])
def test_first_ratio_is_one(policy, walked, micro_batch):
    "The update's own forward finds the rollout's log-probs, whatever the micro-batch."
    _, out, _ = walked
    assert (fresh_ratio(policy, out, micro_batch) - 1).abs().max() < 1e-6


def test_first_ratio_sees_bf16_latents(policy):
    "Planted bug: sampled latents stored in bf16 move the ratio."
    out = rollout(policy, policy.encode(PROMPTS), PLANS['merged'], 0, 0)
    out.children = out.children.bfloat16().float()
    assert (fresh_ratio(policy, out, 64) - 1).abs().max() > 1e-4


def test_first_ratio_sees_truncated_timesteps(policy, monkeypatch):
    "Planted bug: the update feeds int(1000 sigma), the rollout sigma."
    out = rollout(policy, policy.encode(PROMPTS), PLANS['merged'], 0, 0)
    velocity = policy.velocity
    monkeypatch.setattr(policy, 'velocity', lambda x, s, c: velocity(x, (1000 * s).int() / 1000, c))
    assert (fresh_ratio(policy, out, 64) - 1).abs().max() > 1e-6


def test_ode_continues_after_the_merged_step(policy):
    "Every merged sample's image is the ODE's from k + l."
    out = rollout(policy, policy.encode(PROMPTS), PLANS['merged'], 0, 0)
    merged = ((out.end - out.start)[out.row] > 1).nonzero()[::5, 0]
    assert len(merged) > 5 and all(continues_where_it_should(policy, out, t) for t in merged)


def test_ode_continuing_at_the_next_step_is_seen(policy, monkeypatch):
    "Planted bug, that of the released code: after a merged step the ODE goes on at k + 1."
    split = rollout_module._split
    def early(walker, velocity, plan, b, *rest):
        (children,) = split(walker, velocity, plan, b, *rest)
        children.k = plan.branches[b].steps[walker.stage].start + 1
        return [children]
    monkeypatch.setattr(rollout_module, '_split', early)
    plan = Plan(flow_sigmas(16), (Branch((SDEStep(4, 2, 3),)),))
    out = rollout(policy, policy.encode(PROMPTS), plan, 0, 0)
    assert not any(continues_where_it_should(policy, out, t) for t in range(len(out.children)))


def test_noise_is_shared_and_distinct(walked):
    "Groups of one prompt start from shared noise; no two children are alike."
    _, out, _ = walked
    flat = out.children.flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat)
    first = (out.start == 0) & (out.prompt == 1)
    assert first.sum() == 0 or len(torch.unique(out.parents[first].flatten(1), dim=0)) <= max(b.noises for b in out.plan.branches)


def test_strides_are_compared_each_among_its_own(policy):
    "A leaf's images by stride 1 and by stride 3 are normalised apart, then added: a stride whose images all score low changes nothing."
    from egrpo.core.advantage import group_advantages
    plan = PLANS['two strides']
    trainer = Trainer(TrainConfig(**SMALL), policy, method=lambda: plan)
    out = rollout(policy, policy.encode(PROMPTS), plan, 0, 0)
    rewards = torch.rand(len(out.latents), generator=torch.Generator().manual_seed(0))
    advantages, _ = trainer.advantages(out, {'verifier': rewards})
    assert_close(advantages, sum(group_advantages(r[out.leaf_start], out.group) for r in rewards.chunk(2)))
    shifted, _ = trainer.advantages(out, {'verifier': torch.cat([rewards.chunk(2)[0], rewards.chunk(2)[1] - 5])})
    assert_close(shifted, advantages, atol=1e-4, rtol=1e-4)


def test_duplicate_prompts_are_different_groups(policy):
    "Two equal prompts in a batch have their own noise and their own groups."
    out = rollout(policy, policy.encode(['a red circle'] * 2), PLANS['unmerged'], 0, 0)
    assert not torch.equal(out.latents[out.leaf_prompt == 0], out.latents[out.leaf_prompt == 1])
    assert len(out.group.unique()) == 2 * len(PLANS['unmerged'].branches)


def test_a_share_of_the_batch_is_the_same(policy):
    "A process that has prompts 1 and 2 of the batch computes what one with all of them does."
    cond = policy.encode(PROMPTS)
    whole, part = (rollout(policy, cond[ids], PLANS['merged'], 3, 5, prompt_ids=ids) for ids in ([0, 1, 2], [1, 2]))
    assert_close(part.latents, whole.latents[whole.leaf_prompt > 0], atol=1e-4, rtol=1e-4)


SMALL = dict(num_steps=6, active_steps=2, num_generations=4, prompts_per_iteration=2, eval_size=4, device='cpu')


def trained(tmp_path, name, **changes):
    "A small run and its metrics."
    trainer = Trainer(TrainConfig(out=str(tmp_path/name), **{**SMALL, **changes}))
    trainer.fit()
    return trainer, [json.loads(line) for line in (tmp_path/name/'metrics.jsonl').read_text().splitlines()]


def test_batch_8x1_equals_1x8(tmp_path):
    "Micro-batches of 1 and of 64 give the same weights within fp32 rounding, and the same rewards."
    (a, ma), (b, mb) = (trained(tmp_path, f'm{n}', micro_batch=n, iterations=2) for n in (1, 64))
    for n, p in a.parameters.items(): assert_close(p, b.parameters[n], atol=2e-5, rtol=0)
    assert abs(ma[0]['reward/verifier'] - mb[0]['reward/verifier']) < 1e-3


VARIANTS = {'full': dict(), 'lora and ema': dict(lora_rank=2, ema_decay=.9), 'kl': dict(beta=.01, inner_epochs=2)}


@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
def test_resume_equals_straight(tmp_path, changes):
    "Stopped and resumed, a run ends in the same bits."
    straight, _ = trained(tmp_path, 'straight', iterations=3, **changes)
    trained(tmp_path, 'stopped', iterations=1, **changes)
    resumed, _ = trained(tmp_path, 'stopped', iterations=3, resume=True, **changes)
    for n, p in straight.parameters.items(): assert torch.equal(p, resumed.parameters[n]), n


def test_gains_and_pictures_survive_a_resume(tmp_path):
    "A resumed run finds the first visits of prompts in its metrics, and the pictures before training in its folder."
    (tmp_path/'prompts.txt').write_text('\n'.join(PROMPTS))
    settings = dict(prompts=str(tmp_path/'prompts.txt'), eval_every=1, reward='verifier', lr=1e-3)
    straight, metrics = trained(tmp_path, 'straight', iterations=3, **settings)
    trained(tmp_path, 'stopped', iterations=1, **settings)
    resumed, others = trained(tmp_path, 'stopped', iterations=3, resume=True, **settings)
    gains = [m.get('reward_gain') for m in metrics]
    assert gains == [m.get('reward_gain') for m in others] and gains[0] is None is not gains[2]
    seen = {}
    for i in (0, 1): seen = dict(zip(straight._prompts_of(i), metrics[i]['reward_by_prompt'])) | seen
    now = dict(zip(straight._prompts_of(2), metrics[2]['reward_by_prompt']))
    assert len(seen) == 3 and gains[2] == pytest.approx(sum(now[p] - seen[p] for p in now) / 2)
    assert evaluation_metrics(resumed.history) == evaluation_metrics(straight.history)
    assert abs(evaluation_metrics(straight.history)['eval_gain/verifier']) > 0
    assert resumed.run.report.read_text(encoding='utf-8').count("<figure") == 3 * 2 + 3
    sheets = [(run.run.samples/'3.png').read_bytes() for run in (straight, resumed)]
    assert sheets[0] == sheets[1]
    assert {p.name for p in straight.run.samples.iterdir()} == {*'before now group 0.png 1.png 2.png 3.png'.split()}


def test_training_cost_is_predicted(tmp_path):
    "What a run evaluates is what `training_nfe` says, inner epochs included."
    trainer, metrics = trained(tmp_path, 'cost', iterations=2, inner_epochs=3, updates_per_iteration=2)
    assert sum(m['nfe_rollout'] + m['nfe_gradient'] for m in metrics) == training_nfe(trainer.config)


@pytest.mark.parametrize('method', [dict(), dict(method='awm', active_steps=None, tau=None, draws=2)])
def test_an_optimiser_step_for_each_step_of_the_sampler(tmp_path, method):
    "By hand: the mean loss of each step's samples alone, first the noisiest, at the weights that the one before left."
    settings = {**SMALL, 'active_steps': 3, 'tau': 0, 'lr': 1e-3, **method}
    whole, each = (Trainer(TrainConfig(**settings, update_each_step=by_step, out=str(tmp_path/str(by_step))), reward=darkness)
                   for by_step in (False, True))
    plans, _ = whole.plan(0)
    _, cond, out, rewards = whole.sample(0, plans)
    advantages, _ = whole.advantages(out, rewards)
    starts = out.start.unique().tolist()
    places = len(starts)
    assert places == (2 if method else 3) and f'{places} optimiser step(s)' in describe_run(each.config)
    metrics = each.update(cond, out, advantages)
    assert metrics['ratio_error'] < 1e-5 < metrics['approx_kl']
    for k in starts:
        whole.optimizer.zero_grad()
        whole.objective.gradient(cond, out, (out.start == k).nonzero()[:, 0], advantages)
        whole.weights.step(whole.processes, 0)
    for ours, by_hand in zip(each.parameters.values(), whole.parameters.values()): assert torch.equal(ours, by_hand)


@pytest.mark.parametrize('steps', [None, 9])
def test_an_evaluation_may_take_more_steps(tmp_path, steps):
    "Its scores are those of the same images drawn with that many."
    trainer = Trainer(TrainConfig(**SMALL, eval_steps=steps, out=str(tmp_path/'run')), reward=darkness)
    expected = evaluate(trainer.policy, trainer.eval_prompts, trainer.eval_reward, num_steps=steps or 6)
    assert trainer.evaluate().iloc[:, 1].tolist() == pytest.approx(expected.iloc[:, 1].tolist(), abs=1e-5)


def darkness(images, prompts):
    "A reward: minus the mean brightness."
    return -images.mean((1, 2, 3))


def test_training_moves_towards_the_reward(tmp_path):
    "A reward for dark images makes images darker: the sign of the whole chain."
    settings = {**SMALL, 'num_generations': 8, 'lr': 2e-4, 'iterations': 12, 'eval_size': 32}
    trainer = Trainer(TrainConfig(out=str(tmp_path/'dark'), **settings), reward=darkness)
    prompts = load_prompts('shapes', 'held_out', 16)
    def measured(): return evaluate(trainer.policy, prompts, darkness, num_steps=6).iloc[:, 1].mean()
    before = measured()
    trainer.fit()
    assert measured() > before + .005


class Stand(GeneralTracker):
    "A tracker that stands in for one that is not installed: it keeps what it gets, also pictures."
    requires_logging_directory = False
    tracker = None
    kept = {}
    def __init__(self, run_name):
        super().__init__()
        self.numbers = Stand.kept.setdefault(self.name, {})
    def store_init_configuration(self, values): self.numbers['lr'] = values['lr']
    def log(self, values, step=None): self.numbers.update(values)
    def log_images(self, values, step=None): self.numbers.update(values)


def test_three_trackers_get_what_the_log_has(tmp_path, monkeypatch):
    "Through accelerate, under the names of metrics.jsonl: numbers, gains and pictures."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for name in ('first', 'second'): monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, type(name, (Stand,), dict(name=name)))
    _, metrics = trained(tmp_path, 'tracked', iterations=2, tracker=['tensorboard', 'first', 'second'])
    (events,) = {p.parent for p in tmp_path.rglob('events.out.tfevents.*') if EventAccumulator(str(p.parent)).Reload().Tags()['scalars']}
    log = EventAccumulator(str(events)).Reload()
    assert [e.value for e in log.Scalars('reward/verifier')] == pytest.approx([m['reward/verifier'] for m in metrics])
    names = {'ratio_error', 'grad_norm', 'eval/verifier_strict', 'eval_gain/verifier', 'eval_gain_low/verifier'}
    assert names <= set(log.Tags()['scalars']) and [image.step for image in log.Images('samples')] == [0, 2]
    for name in ('first', 'second'):
        kept = Stand.kept.pop(name)
        assert names < kept.keys() and kept['lr'] == TrainConfig.lr and kept['grad_norm'] == metrics[1]['grad_norm']
        assert kept['samples'][0].tobytes() == Image.open(tmp_path/'tracked/samples/2.png').tobytes()


def test_a_tracker_that_is_not_installed_is_named():
    if 'wandb' in map(str, get_available_trackers()): pytest.skip('it is')
    with pytest.raises(ValueError, match="tracker 'wandb' is not installed: pip install wandb"):
        Trainer(TrainConfig(tracker='tensorboard, wandb'))
