"Columns of a file of prompts, from the file to a reward that asks for them."
import json
import threading

import pytest
import torch

from egrpo.base.rows import Prompt
from egrpo.cli.commands import main
from egrpo.models.conditions import Embeddings
from egrpo.models.policy import load_policy
from egrpo.rewards.reward import RewardError, get_reward, score
from egrpo.rewards.server import RewardClient, make_server
from egrpo.train.prompts import read_prompts
from egrpo.train.trainer import TrainConfig, Trainer

GENEVAL = [dict(tag='single_object', include=[{'class': 'circle', 'count': 1}], prompt='a red circle'),
           dict(tag='counting', include=[{'class': 'square', 'count': 3}], prompt='three blue squares')]
SMALL = dict(num_steps=4, active_steps=2, tau=0., num_generations=2, prompts_per_iteration=2, eval_size=2, eval_every=0, device='cpu')
IMAGES = torch.full((2, 3, 8, 8), .5)


def asked_for(images, prompts, rows):
    "A reward of DDPO's form: brightness by the number of objects that its prompt asks for."
    assert [row['prompt'] for row in rows] == prompts
    return torch.stack([x.mean() * row['include'][0]['count'] for x, row in zip(images, rows)]), dict(tags=[row['tag'] for row in rows])


@pytest.fixture(scope='module')
def policy():
    "The miniature, on the CPU."
    return load_policy(device='cpu')


@pytest.fixture
def file(tmp_path):
    "Prompts in GenEval's form."
    path = tmp_path/'geneval.jsonl'
    path.write_text('\n'.join(map(json.dumps, GENEVAL)))
    return path


def run(file, policy, **changes):
    "A small run on a file, by a reward that asks for rows."
    settings = SMALL | dict(iterations=2, prompts=str(file), lr=1e-9) | changes
    config = TrainConfig(out=str(file.parent/'run'), eval_rewards='verifier', **settings)
    return Trainer(config, policy, reward={'asked_for': asked_for, 'brightness': lambda images, prompts: images.mean((1, 2, 3))})


def test_a_run_gives_rows_to_its_reward(file, policy):
    "In a sum with one that takes none; resumed, with rows that are the same alone."
    run(file, policy, iterations=1).fit()
    run(file, policy, resume=True).fit()
    metrics = [json.loads(line) for line in (file.parent/'run/metrics.jsonl').read_text().splitlines()]
    assert all(m['reward/asked_for'] > 1.2 * m['reward/brightness'] for m in metrics) and len(metrics) == 2
    file.write_text(file.read_text().replace('"count": 3', '"count": 4'))
    with pytest.raises(ValueError, match='columns of the prompts was'): run(file, policy, resume=True, iterations=3).fit()


def test_an_evaluation_gives_rows(file, policy):
    "To the reward that measures."
    config = TrainConfig(out=str(file.parent/'run'), **SMALL | dict(prompts=str(file), reward='verifier'))
    trainer = Trainer(config, policy)
    trainer.eval_reward = get_reward(asked_for)
    one, three = trainer.evaluate().asked_for
    assert three > 2 * one


def test_embeddings_are_found_by_the_text(tmp_path):
    "Whatever the row."
    kept = Embeddings(tmp_path)
    assert kept.path(Prompt('a cat', dict(tag='x'))) == kept.path('a cat')


def test_a_missing_column_is_named(file, capsys):
    "With its prompt, in one line, before a model is loaded."
    code = file.parent/'mine.py'
    code.write_text('def mine(images, prompts, rows): return [len(row["source"]) for row in rows]\n')
    spec = f'{code}:mine'
    with pytest.raises(RewardError) as error: score(get_reward(spec).rewards[spec], IMAGES, read_prompts(file))
    assert "prompt 'a red circle' has no column 'source', but 'tag, include, prompt'" in str(error.value)
    assert main(['train', '--prompts', str(file), '--reward', spec, '--out', str(file.parent/'new'), '--dry-run']) == 2
    said = capsys.readouterr().err
    assert "has no column 'source'" in said and said.count('\n') == 1


@pytest.mark.parametrize('reward, expected', [(asked_for, [.5, 1.5]), (lambda images, prompts: images.mean((1, 2, 3)), [.5, .5])])
def test_a_server_gets_rows(file, reward, expected):
    "Over the wire, where its reward asks for them; through a sum as `egrpo serve` has it, too."
    for served in (reward, get_reward(reward).total):
        with make_server(served, '127.0.0.1', 0) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try: found = RewardClient(f'http://127.0.0.1:{server.server_port}', retries=0)(IMAGES, read_prompts(file))
            finally:
                server.shutdown()
                thread.join()
        torch.testing.assert_close(found, torch.tensor(expected), atol=.01, rtol=0)
