"Recipes: what a name stands for, what overrides it, and that each can be planned."
import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity import brightness

from egrpo.cli.commands import main
from egrpo.cli.demo import demo_config
from egrpo.models.policy import load_policy
from egrpo.testing.pipelines import small_pipeline
from egrpo.train import cost
from egrpo.train.config import TrainConfig
from egrpo.train.prepare import iteration_nfe, training_nfe
from egrpo.train.recipes import describe_recipe, load_recipe, recipe_paths, to_yaml
from egrpo.train.trainer import Trainer

APART = Path(sys.prefix)/'apart' # where `make` puts torchao, for which diffusers warns on every import
FAMILIES = {'FLUX.1-dev': 'flux-dev', 'FLUX.1-schnell': 'flux-schnell', 'FLUX.2-klein': 'flux2-klein', 'Z-Image': 'z-image',
            'stable-diffusion-3': 'sd3.5'}
FEW_STEPS = {'flux_schnell': 4, 'flux2_klein': 4, 'z_image_turbo': 8}


def small_of(settings):
    "A small pipeline of a recipe's family; None = the recipe trains the miniature."
    family = next((small for words, small in FAMILIES.items() if words in settings['model']), None)
    if family is None: return None
    pipeline = small_pipeline(family)
    if family == 'flux2-klein': pipeline.register_to_config(is_distilled=True)
    return pipeline


def with_torchao(words, settings, monkeypatch, capsys):
    "Int8 without torchao is refused in one line; from here on it is found where `make` puts it."
    if not settings.get('quantize'): return
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, 'torchao', None)
        assert main(words) == 2 and "quantize 'int8' needs the package torchao: pip install torchao" in capsys.readouterr().err
    if find_spec('torchao'): return
    if not (APART/'torchao').exists(): pytest.skip('torchao is not there: make installs it apart')
    monkeypatch.syspath_prepend(str(APART))


@pytest.mark.parametrize('name', recipe_paths())
def test_every_recipe_is_planned(name, here, capsys, monkeypatch):
    "With a small pipeline of its family in place of the model."
    settings = load_recipe(name)
    pipeline, small = small_of(settings), ''
    if pipeline:
        pipeline.save_pretrained('model')
        (here/'prompts.txt').write_text('a corgi\na red circle\n')
        small = '--model model --resolution 16 --prompts prompts.txt'
    words = shlex.split(f'train {name} {small} --device cpu --dry-run')
    with_torchao(words, settings, monkeypatch, capsys)
    assert main(words) == 0, capsys.readouterr().err
    assert f"{settings['iterations']} iterations" in capsys.readouterr().out


@pytest.mark.parametrize('name', recipe_paths())
def test_every_recipe_has_a_plan(name, here, capsys, monkeypatch):
    "Without its model; memory and time are told, activations aside, which test_cost counts."
    monkeypatch.setattr(cost, 'activation_bytes', lambda *args: (2**30, 2**28))
    words = ['plan', name, '--seconds-forward', '.1', '--seconds-backward', '.3']
    assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert 'memory is not counted' not in said and 'one device holds' in said
    assert 'an iteration takes' in said and 'network evaluations' in said


@pytest.mark.parametrize('name, path', recipe_paths().items(), ids=recipe_paths())
def test_every_recipe_says_what_it_is(name, path):
    text = describe_recipe(path)
    assert re.search(r'arXiv \d{4}\.\d{5}', text) and 'Costs' in text
    assert load_recipe(name)['out'] == f'runs/{name}'


def test_recipes_are_listed_in_a_line_each_and_printed_whole(capsys):
    assert main(['recipes']) == 0
    listed = capsys.readouterr().out.splitlines()[:len(recipe_paths())]
    assert [line.split()[0] for line in listed] == list(recipe_paths()) and max(map(len, listed)) < 160
    for name, path in recipe_paths().items():
        assert main(['recipes', name]) == 0
        assert capsys.readouterr().out == path.read_text(encoding='utf-8')
    assert main(['recipes', 'nope']) == 2
    assert 'recipe must be one of aegpo, ' in capsys.readouterr().err


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', recipe_paths())
def test_every_recipe_trains(name, here):
    "Three iterations of a small pipeline of its family; few-step models as they are sampled."
    settings = load_recipe(name)
    (here/'prompts.txt').write_text('a corgi\na red circle and a blue square\n')
    how = {k: v for k, v in TrainConfig(**settings).policy_settings().items() if v is not None}
    how |= dict(resolution=16, micro_batch=None, quantize=None) # torchao lies apart (test_quantize)
    policy = load_policy(small_of(settings) or 'miniature', 'cpu', 'fp32', settings.get('lora_rank', 0), **how)
    few = dict(iterations=3, prompts_per_iteration=2, num_generations=4, prompts='prompts.txt', eval_size=2, eval_every=0,
               eval_rewards=None, checkpoint_every=0, resolution=16, micro_batch=None, quantize=None, dtype='fp32', device='cpu', lr=1e-3)
    trainer = Trainer(TrainConfig(**settings | few), policy, brightness)
    before = {n: p.detach().clone() for n, p in policy.parameters().items()}
    trainer.fit()
    first = json.loads(Path(settings['out'], 'metrics.jsonl').read_text().splitlines()[0])
    assert first['ratio_error'] < 1e-6 and any(not torch.equal(p, before[n]) for n, p in policy.parameters().items())
    if name not in FEW_STEPS: return
    assert settings['num_steps'] == FEW_STEPS[name] and policy.nfe_per_velocity == 1
    plan = trainer.plan(0)[0][0]
    assert torch.equal(plan.sigmas, policy.sigmas(FEW_STEPS[name])) and (plan.kernel, plan.noise_level) == ('cps', 1)


@pytest.mark.parametrize('name', sorted(recipe_paths().keys() - {'miniature'}))
def test_a_recipe_costs_what_it_says(name, configured):
    "As `egrpo train` makes it of the recipe and what its method was published with."
    text = Path(recipe_paths()[name]).read_text(encoding='utf-8')
    each, millions = re.search(r'([\d,]+) network evaluations an iteration, ([\d.]+) million in all', text).groups()
    config = configured(name)
    assert iteration_nfe(config) == int(each.replace(',', ''))
    assert f'{training_nfe(config) / 1e6:.2g}' == f'{float(millions):.2g}'


def test_the_demonstration_is_its_recipe():
    asked = SimpleNamespace(scale='mini', minutes=8., out='runs/demo')
    assert demo_config(asked) == TrainConfig(**load_recipe('demo'))
    asked.scale, asked.seed = 'gpu', 3
    assert demo_config(asked) == TrainConfig(**load_recipe('demo') | dict(num_generations=16, eval_size=2048, seed=3))


def test_options_override_a_recipe(here, monkeypatch, configured):
    "A recipe counts more than the environment's scale and what was published, less than an option."
    monkeypatch.setenv('EGRPO_SCALE', 'smoke')
    (here/'mine.yaml').write_text('method: grpo_guard\nbeta: 0.5\nplan: {num_generations: 4}\nlr: 1e-5\n')
    config = configured('mine.yaml --lr 1e-6')
    assert config == TrainConfig(method='grpo_guard', beta=.5, num_generations=4, lr=1e-6, advantage_std='group', clip_range=2e-6)
    assert configured('mine.yaml --scale smoke').iterations == 2


def test_a_printed_configuration_reads_back(here, capsys, configured):
    for words in ('aegpo --prompts mine.txt --resolution 64', "--reward 'verifier + 0.5*clip' --tau 1.8 --eval-at 7"):
        (here/'mine.txt').write_text('a corgi\n')
        assert main(shlex.split(f'train {words} --print-config')) == 0
        (here/'mine.yaml').write_text(capsys.readouterr().out)
        assert configured(words) == configured('mine.yaml')
        config = TrainConfig(**load_recipe('mine.yaml'))
        assert to_yaml(config) == (here/'mine.yaml').read_text()


@pytest.mark.parametrize('text, says', [
    ('lr: fast', 'lr must be a number'), ('taw: 1', "recipe 'mine.yaml': config has no field taw: did you mean tau?"),
    ('- 1', 'holds no settings'), ('a: [', 'is not YAML'), ('', 'is empty'), ('window: 3', 'no setting of egrpo'),
    ('plan: {seed: 1, tau: 2}\nseed: 2', "sets 'seed' twice"), ('lr: 1e-5\nseed: 1\nlr: 1e-4', "'lr' is there twice"),
    ('plan: {tau: 1, tau: 2}', "'tau' is there twice")])
def test_refusals_are_one_line(text, says, here, capsys):
    (here/'mine.yaml').write_text(text)
    assert main(['train', 'mine.yaml', '--dry-run']) == 2
    err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1
