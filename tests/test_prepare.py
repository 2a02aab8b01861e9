"A run is prepared once: one `egrpo train` reads, imports, makes and checks each thing once."
from collections import Counter
from pathlib import Path

import pytest

from egrpo.cli.commands import main
from egrpo.train import prepare as prepare_module
from egrpo.train import prompts as prompts_module
from egrpo.train.config import TrainConfig
from egrpo.train.prepare import describe_run, prepare, run_prompts, training_nfe
from egrpo.train.run import Run

SMALL = '--num-steps 4 --num-generations 2 --prompts-per-iteration 1 --iterations 1 --eval-size 2 --device cpu'
MINE = '''
from pathlib import Path
from egrpo.core.plan import Branch, Plan, SDEStep
from egrpo.core.sigmas import flow_sigmas

with open(Path(__file__).parent/'log', 'a') as log: log.write('x')

def plan(num_steps=4, num_generations=2): return Plan(flow_sigmas(num_steps), (Branch((SDEStep(0, 1, num_generations),)),))
def brightness(images, prompts): return images.mean((1, 2, 3))
'''


@pytest.fixture
def calls(tmp_path, monkeypatch):
    "In a folder with prompts, a method and a reward of one's own: how often each function is called."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('EGRPO_SCALE', raising=False)
    Path('prompts.txt').write_text('a red circle\na blue square\n')
    Path('own.py').write_text(MINE)
    counted = Counter()
    def count(module, name):
        function = getattr(module, name)
        def counting(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)
        monkeypatch.setattr(module, name, counting)
    count(prompts_module, 'read_prompts')
    for name in ('check_config', 'check_method', 'run_rewards'): count(prepare_module, name)
    return counted


@pytest.mark.parametrize('more', ['', '--dry-run'])
def test_everything_is_made_once(calls, more):
    words = f'train {SMALL} --method own.py:plan --reward own.py:brightness --prompts prompts.txt --out run {more}'
    assert main(words.split()) == 0
    assert calls == dict(read_prompts=1, check_config=1, check_method=1, run_rewards=1)
    assert Path('log').read_text() == 'x' # the file of one's own ran once
    assert Run('run').begun() == (not more)


def test_prompts_of_two_files_are_each_read(calls):
    Path('others.txt').write_text('a ring\n')
    assert run_prompts(TrainConfig(prompts='prompts.txt', eval_prompts='others.txt'))[1] == ['a ring']
    assert calls['read_prompts'] == 2


CHANGES = {}, dict(method='dance_grpo'), dict(method='aegpo', num_generations=4), dict(beta=.1, inner_epochs=2)


@pytest.mark.parametrize('changes', CHANGES, ids=str)
def test_a_prepared_run_costs_what_its_configuration_says(changes):
    config = TrainConfig(iterations=5, eval_size=2, **changes)
    assert describe_run(prepare(config)) == describe_run(config)
    assert training_nfe(prepare(config)) == training_nfe(config)
