"Prompts that ask for sizes of their own: files, order, training, evaluation and pictures go size by size."
import json
from collections import Counter

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from parity import differences, general_policy
from PIL import Image
from test_processes import LARGEST, apart
from test_processes import run as run_by

from egrpo.base.rows import Prompt, size_of
from egrpo.cli.commands import main
from egrpo.core.plan import gradient_nfe, rollout_nfe
from egrpo.methods.aegpo import AttentionPlanner
from egrpo.models.policy import load_policy
from egrpo.testing.pipelines import small_pipeline
from egrpo.train import trainer as trainer_module
from egrpo.train.evaluate import evaluate, sample_images, sample_latents
from egrpo.train.prompts import prompt_batch, read_prompts
from egrpo.train.run import run_sources
from egrpo.train.trainer import TrainConfig, Trainer

SMALL = dict(num_steps=4, active_steps=2, tau=0., num_generations=2, prompts_per_iteration=2, iterations=4, eval_size=5, eval_every=0,
             device='cpu', samples=5, checkpoint_every=0)
ROWS = [('a red circle', 32, 64), ('a blue square', 32, 64), ('a green cross', 64, 32), ('two red crosses', 64, 32),
        ('three blue circles', '', '')]
SIZES = {prompt: (int(height or 64), int(width or 64)) for prompt, height, width in ROWS}


@pytest.fixture
def file(tmp_path):
    "Prompts of three sizes, one of them the run's."
    path = tmp_path/'sizes.csv'
    path.write_text('prompt,height,width\n' + ''.join(f'{prompt},{height},{width}\n' for prompt, height, width in ROWS))
    return path


class Seen:
    "A reward that notes the sizes of the images of each prompt."
    def __init__(self): self.sizes = Counter()
    def __call__(self, images, prompts):
        self.sizes.update((prompt, tuple(images.shape[-2:])) for prompt in prompts)
        return images.mean((1, 2, 3))


def fit(file, out, model='miniature', policy=None, **changes):
    "A small run: the trainer, its metrics, what its reward saw."
    config = TrainConfig(**SMALL | dict(prompts=str(file), out=str(file.parent/out), model=model) | changes)
    reward = Seen()
    trainer = Trainer(config, policy, reward=reward)
    trainer.fit()
    lines = trainer.run.metrics.read_text().splitlines()
    return trainer, [json.loads(line) for line in lines], reward.sizes


def test_a_run_of_three_sizes(file):
    "Images have the sizes of their prompts, the first ratio is 1, and a run that was stopped resumes to the bit."
    straight, metrics, seen = fit(file, 'a')
    assert {prompt: size for prompt, size in seen} == SIZES and len(seen) == len(SIZES)
    assert max(m['ratio_error'] for m in metrics) < 1e-6
    trained = [{*map(size_of, straight._prompts_of(i))} for i in range(SMALL['iterations'])]
    assert all(len(sizes) == 1 for sizes in trained) and len(set.union(*trained)) > 1
    for place, prompt in enumerate(straight.eval_prompts):
        with Image.open(straight.run.samples/f'now/{place}.png') as image: assert image.size[::-1] == SIZES[prompt]
    with Image.open(straight.run.samples/'group/best.png') as image: assert image.size[::-1] == SIZES[straight._prompts_of(3)[0]]
    fit(file, 'b', iterations=2)
    resumed, again, _ = fit(file, 'b', resume=True)
    assert all(torch.equal(p, resumed.parameters[n]) for n, p in straight.parameters.items())
    assert [m['reward/Seen'] for m in metrics] == [m['reward/Seen'] for m in again]
    file.write_text(file.read_text().replace('a red circle,32,64', 'a red circle,64,32'))
    with pytest.raises(ValueError, match='sizes of the prompts was'): fit(file, 'b', resume=True, iterations=5)


def test_two_processes_are_one_run(file):
    "Of two processes each has some prompts of an iteration's size, and of every size in an evaluation; also where they share the network."
    settings = dict(prompts=str(file), reward='verifier', iterations=3, eval_size=5, prompts_per_iteration=3)
    one = run_by(file.parent/'one', 1, **settings)
    for shared in (False, True):
        two = run_by(file.parent/f'two{shared}', 2, shared, **settings)
        assert apart(one.weights, two.weights) < LARGEST['weights']
        assert [m['reward/verifier'] for m in two.metrics] == pytest.approx([m['reward/verifier'] for m in one.metrics], abs=1e-5)


@pytest.mark.parametrize('by', [dict(), dict(base='flow_grpo', allocation='reward_std', explore='all')])
def test_attention_entropy_allocates_within_a_size(file, by, monkeypatch):
    "Profiles before training are of a size; what a run counted is what its plans predict, also resumed."
    settings = dict(method='aegpo', active_steps=None, tau=None, num_generations=6, top=2, eval_size=1, iterations=3) | by
    plan, planned = Trainer.plan, []
    def noted(self, iteration):
        "The plans of an iteration, kept."
        found = plan(self, iteration)
        planned.append(found[0])
        return found
    monkeypatch.setattr(Trainer, 'plan', noted)
    trainer, metrics, _ = fit(file, 'a', **settings)
    assert all(sum(m['samples']) == 12 for m in metrics)
    for plans, m in zip(planned, metrics):
        assert m['nfe_rollout'] == sum(map(rollout_nfe, plans)) + m['nfe_probe']
        assert m['nfe_gradient'] == sum(map(gradient_nfe, plans))
    fit(file, 'b', **settings | dict(iterations=1))
    resumed, again, _ = fit(file, 'b', **settings, resume=True)
    assert [m['samples'] for m in metrics] == [m['samples'] for m in again] and trainer.nfe == resumed.nfe
    if by: return
    sizes = {size_of(p) for i in range(3) for p in trainer._prompts_of(i)}
    assert trainer.planner.known.keys() == {size or 64 for size in sizes}


def test_profiles_before_training_are_of_one_size():
    "The same text in two sizes has two."
    policy = load_policy(device='cpu', lora_rank=2)
    settings = TrainConfig(method='aegpo', num_steps=4, num_generations=4).flat() | dict(shift=3.)
    planner, pair = AttentionPlanner('aegpo', policy, Accelerator(cpu=True), settings), {}
    for size in ('64x64', '32x64'):
        height, width = size.split('x')
        policy.resize(size)
        _, metrics = planner([Prompt('a red circle', dict(height=height, width=width))] * 2, 0)
        pair[size] = planner.known[size].known['a red circle']
        assert metrics['nfe_probe'] == 4 * 3 # two now, one before training
    assert (pair['64x64'] - pair['32x64']).abs().max() > 1e-3


def test_the_order_shows_every_prompt_as_often():
    "In as many iterations as there are prompts every size has its share; without sizes the order is what it was."
    prompts = [Prompt(str(i), dict(height=16, width=32)) for i in range(12)] + [str(i) for i in range(12, 20)]
    for first in (0, 20, 40): # passes
        batches = [prompt_batch(prompts, 4, first + i, seed=3) for i in range(20)]
        assert all(len({*map(size_of, batch)}) == 1 for batch in batches)
        assert {*Counter(sum(batches, [])).values()} == {4}
    assert prompt_batch(prompts, 4, 7, seed=3) != prompt_batch(prompts, 4, 7, seed=4)
    texts, same = [*map(str, prompts)], [Prompt(p, dict(height=16, width=32)) for p in prompts]
    assert [prompt_batch(texts, 3, i) for i in range(9)] == [prompt_batch(same, 3, i) for i in range(9)]


def test_sampling_and_scoring(file, tmp_path, capsys):
    "From Python and the command line; a prompt has the image that a policy of that size draws."
    policy, prompts = load_policy(device='cpu', lora_rank=None), read_prompts(file)
    images = sample_images(policy, prompts, num_steps=2)
    assert [tuple(image.shape[1:]) for image in images] == [*SIZES.values()] and policy.resolution == 64
    wide = load_policy(device='cpu', lora_rank=None, resolution='64x32')
    assert torch.equal(sample_images(wide, [*map(str, prompts[2:4])], num_steps=2, ids=[2, 3]), torch.stack(images[2:4]))
    frame = evaluate(policy, prompts, {'seen': Seen()}, num_steps=2)
    assert frame.seen.tolist() == pytest.approx([float(image.mean()) for image in images], abs=1e-5) and frame.prompt.tolist() == prompts
    out = tmp_path/'grid.png'
    assert main(f'sample --prompts {file} --num-steps 2 --device cpu --each --out {out}'.split()) == 0, capsys.readouterr().err
    for place, (path, (prompt, size)) in enumerate(zip(sorted((tmp_path/'grid').iterdir()), SIZES.items())):
        with Image.open(path) as image:
            assert image.size[::-1] == size and image.text['prompt'] == prompt and image.text['place'] == str(place)


@pytest.mark.parametrize('name', ['flux2-dev', 'cogview4', 'ltx-video', 'lumina2'])
def test_the_general_policy_at_another_size(name):
    "It is as its pipeline at both sizes, whose schedules and times may differ, and as a policy of that size."
    policy = general_policy(name, resolution=64)
    square, was = policy.sigmas(5), policy.latent_shape
    policy.resize('96x128')
    wide = general_policy(name, resolution='96x128')
    assert torch.equal(policy.sigmas(5), wide.sigmas(5)) and policy.latent_shape == wide.latent_shape != was
    assert torch.equal(policy.sigmas(5), square) == (name in ('ltx-video', 'lumina2')) # the others shift by the size
    assert max(filter(None, differences(policy, policy.pipeline)), default=0.) < 1e-6
    policy.resize()
    assert torch.equal(policy.sigmas(5), square) and policy.latent_shape == was
    assert max(filter(None, differences(policy, policy.pipeline)), default=0.) < 1e-6


def test_a_schedule_by_size(file, monkeypatch):
    "A run of a pipeline whose schedule depends on the size has other noise levels for each, in training and evaluation."
    policy = general_policy('flux2-dev', resolution=64, lora_rank=2)
    trainer, metrics, seen = fit(file, 'a', policy=policy, samples=2, eval_size=3, lora_rank=2, iterations=2)
    assert {prompt: size for prompt, size in seen if prompt in trainer.eval_prompts} == dict([*SIZES.items()][:3])
    assert max(m['ratio_error'] for m in metrics) < 1e-6
    plans = {size_of(trainer._prompts_of(i)[0]): trainer.plan(i)[0][0] for i in range(5)}
    assert len(plans) > 1
    evaluated = {}
    def watched(policy, prompts, num_steps, shift, **kwargs):
        "Note the schedule that prompts are sampled with."
        evaluated[size_of(prompts[0])] = policy.sigmas(num_steps, shift)
        return sample_latents(policy, prompts, num_steps, shift, **kwargs)
    monkeypatch.setattr(trainer_module, 'sample_latents', watched)
    trainer.evaluate()
    assert len(evaluated) > 1
    for size, sigmas in {**{size: plan.sigmas for size, plan in plans.items()}, **evaluated}.items():
        alone = general_policy('flux2-dev', resolution=size or 64)
        assert torch.equal(sigmas, alone.sigmas(4))
    for size in plans.keys() & evaluated.keys(): assert torch.equal(plans[size].sigmas, evaluated[size])
    assert len({plan.sigmas[1].item() for plan in plans.values()}) == len({32 * 64 if size else 64 * 64 for size in plans})


def test_a_size_that_was_left_behind_changes_nothing(file, tmp_path):
    "A policy that another run left at its size makes the plans of its own; a rollout has the size of its iteration."
    policy = general_policy('flux2-dev', resolution=64, lora_rank=2)
    own = policy.sigmas(4)
    trainer, _, _ = fit(file, 'a', policy=policy, eval_size=1, lora_rank=2, iterations=1)
    assert policy.resolution == 64 # after a run it is at its own
    policy.resize('32x64')
    plain = TrainConfig(**SMALL | dict(lora_rank=2, out=str(tmp_path/'plain')))
    later = Trainer(plain, policy=policy, reward=Seen())
    assert torch.equal(later.plan(0)[0][0].sigmas, own)
    i = next(i for i in range(9) if size_of(trainer._prompts_of(i)[0]) == '32x64')
    plans, _ = trainer.plan(i)
    trainer.evaluate()
    *_, out, _ = trainer.sample(i, plans)
    policy.resize('32x64')
    assert out.latents.shape[1:] == policy.latent_shape
    with pytest.raises(ValueError, match='cannot be entered|must be'): policy.resize('16x16000000')
    assert policy.resolution == '32x64'


def test_images_of_two_sizes_are_scored_as_they_are():
    policy, prompts = load_policy(device='cpu', lora_rank=None), [Prompt('a red circle', dict(height='32', width='64')), 'a blue square']
    images = sample_images(policy, prompts, num_steps=2)
    table = evaluate(policy, prompts, 'verifier', images)
    pd.testing.assert_frame_equal(table, evaluate(policy, prompts, 'verifier', num_steps=2, ids=torch.tensor([0, 1])), check_exact=False)
    for call in (sample_images, evaluate):
        with pytest.raises(ValueError, match='prompts is empty'): call(policy, [])


@pytest.mark.parametrize('text, says', [
    ('a fox,64,\n', "line 3 of {file!r} has no size in height and width, but '64x'"), ('a fox,,64\n', "but 'x64': give both or neither"),
    ('a fox,64.0,64\n', "but '64.0x64'"), ('a fox,-64,64\n', 'rename the columns'), ('a fox,64,70000\n', "but '64x70000'"),
    ('a fox,64,44\n', 'prompts: line 3 of {file!r}: resolution must be a multiple of 16, got 64x44')], ids='abcdef')
def test_sizes_that_cannot_be(tmp_path, text, says):
    "All but the last are refused before a model is asked for."
    file = tmp_path/'sizes.csv'
    file.write_text('prompt,height,width\na cat,64,64\n' + text)
    config = TrainConfig(**SMALL, prompts=str(file), out=str(tmp_path/'run'))
    if 'multiple' not in says: config = TrainConfig(**config.flat() | dict(model='no/model', plan={}))
    with pytest.raises(ValueError) as error: Trainer(config, reward=Seen())
    assert says.format(file=str(file)) in str(error.value) and not (tmp_path/'run').exists()


def test_positions_that_a_model_lacks(tmp_path):
    "A size that only the model can refuse is refused with its line, once it is there."
    file = tmp_path/'sizes.jsonl'
    file.write_text('"a cat"\n' + json.dumps(dict(prompt='a fox', height=64, width=4096)))
    config = TrainConfig(**SMALL, prompts=str(file), out=str(tmp_path/'run'))
    policy = load_policy(small_pipeline('sd3'), 'cpu', lora_rank=2, resolution=32)
    with pytest.raises(ValueError, match='prompts: line 2 of .*: resolution must be at most'): Trainer(config, policy, reward=Seen())


@pytest.mark.parametrize('name, size, says', [('sd3', '64,4096', 'resolution must be at most'), ('sana', '61,64', 'a multiple of')])
def test_a_dry_run_refuses_sizes_that_its_model_cannot_draw(tmp_path, capsys, name, size, says):
    "From the configuration files, with the line that asks for it."
    small_pipeline(name).save_pretrained(tmp_path/name)
    file = tmp_path/'sizes.csv'
    file.write_text(f'prompt,height,width\na red circle,64,64\na red circle,{size}\n')
    words = ['train', '--scale', 'smoke', '--dry-run', '--model', str(tmp_path/name), '--prompts', str(file)]
    assert main(words) == 2
    assert f'line 3 of {str(file)!r}: resolution' in (said := capsys.readouterr().err) and says in said
    assert main([*words[:-2], '--resolution', '61']) == 2
    assert 'error: resolution must be a multiple of' in capsys.readouterr().err


def test_a_file_without_sizes_is_what_it_was(tmp_path):
    "Other columns give a run no new source."
    file = tmp_path/'tags.csv'
    file.write_text('prompt,tag\na cat,x\na fox,y\n')
    trainer = Trainer(TrainConfig(**SMALL, prompts=str(file), out=str(tmp_path/'run')), reward=Seen())
    assert 'sizes of the prompts' not in run_sources(trainer.prepared) and trainer.sizes.keys() == {None}
