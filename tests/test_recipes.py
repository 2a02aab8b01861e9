"Recipes: what a name stands for, what overrides it, and that each can be planned."
import re
import shlex

import pytest

from egrpo.cli import training
from egrpo.cli.commands import main
from egrpo.testing.pipelines import small_pipeline
from egrpo.train.config import TrainConfig
from egrpo.train.recipes import describe_recipe, load_recipe, recipe_paths, to_yaml

FAMILIES = {'FLUX.1': 'flux-dev', 'stable-diffusion-3': 'sd3'}


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty current folder."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('EGRPO_SCALE', raising=False)
    return tmp_path


@pytest.mark.parametrize('name', recipe_paths())
def test_every_recipe_is_planned(name, here, capsys):
    "With a small pipeline of its family in place of the model."
    settings = load_recipe(name)
    family = next((small for words, small in FAMILIES.items() if words in settings['model']), None)
    small = ''
    if family:
        small_pipeline(family).save_pretrained('model')
        (here/'prompts.txt').write_text('a corgi\na red circle\n')
        small = '--model model --resolution 16 --prompts prompts.txt'
    assert main(shlex.split(f'train {name} {small} --device cpu --dry-run')) == 0, capsys.readouterr().err
    assert f"{settings['iterations']} iterations" in capsys.readouterr().out


@pytest.mark.parametrize('name, path', recipe_paths().items(), ids=recipe_paths())
def test_every_recipe_says_what_it_is(name, path):
    text = describe_recipe(path)
    assert re.search(r'arXiv \d{4}\.\d{5}', text) and 'Costs' in text
    assert load_recipe(name)['out'] == f'runs/{name}'


def configured(words, monkeypatch):
    "The configuration that `egrpo train` arrives at."
    seen = []
    def check(config):
        seen.append(config)
        raise ValueError('seen')
    monkeypatch.setattr(training, 'check_run', check)
    assert main(['train', *shlex.split(words)]) == 2
    return seen[0]


def test_options_override_a_recipe(here, monkeypatch):
    "A recipe counts more than the environment's scale and what was published, less than an option."
    monkeypatch.setenv('EGRPO_SCALE', 'smoke')
    (here/'mine.yaml').write_text('method: grpo_guard\nbeta: 0.5\nplan: {num_generations: 4}\nlr: 1e-5\n')
    config = configured('mine.yaml --lr 1e-6', monkeypatch)
    assert config == TrainConfig(method='grpo_guard', beta=.5, num_generations=4, lr=1e-6, advantage_std='group', clip_range=2e-6)
    assert configured('mine.yaml --scale smoke', monkeypatch).iterations == 2


def test_a_printed_configuration_reads_back(here, capsys, monkeypatch):
    for words in ('aegpo --prompts mine.txt --resolution 64', "--reward 'verifier + 0.5*clip' --tau 1.8 --eval-at 7"):
        (here/'mine.txt').write_text('a corgi\n')
        assert main(shlex.split(f'train {words} --print-config')) == 0
        (here/'mine.yaml').write_text(capsys.readouterr().out)
        with monkeypatch.context() as patch: assert configured(words, patch) == configured('mine.yaml', patch)
        config = TrainConfig(**load_recipe('mine.yaml'))
        assert to_yaml(config) == (here/'mine.yaml').read_text()


@pytest.mark.parametrize('text, says', [
    ('lr: fast', 'lr must be a number'), ('taw: 1', "recipe 'mine.yaml': config has no field taw: did you mean tau?"),
    ('- 1', 'holds no settings'), ('a: [', 'is not YAML'), ('', 'is empty'), ('window: 3', 'no setting of egrpo'),
    ('plan: {seed: 1, tau: 2}\nseed: 2', "sets 'seed' twice")])
def test_refusals_are_one_line(text, says, here, capsys):
    (here/'mine.yaml').write_text(text)
    assert main(['train', 'mine.yaml', '--dry-run']) == 2
    err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1
