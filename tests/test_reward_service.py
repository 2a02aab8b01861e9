"""The reward server of one file, which needs nothing of egrpo: any function, and the package hpsv2 itself in an environment of its own.

`make hpsv2-service` makes that environment, .venv-hpsv2; where it is not there, the last test is skipped."""
import ast
import json
import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from egrpo.base.rows import Prompt
from egrpo.rewards.published import ClipReward, RewardError, clean_prompt, fit_in, load_clip, load_tokenizer
from egrpo.rewards.reward import get_reward
from egrpo.rewards.server import RewardClient

ROOT = Path(__file__).parents[1]
SERVICE = ROOT/'egrpo/rewards/service.py'
OF_HPSV2 = ROOT/'.venv-hpsv2/bin/python'
REWARDS = '''
def brightness(images, prompts): return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]
def breaks(images, prompts): raise KeyError('no such\\nword')
def short(images, prompts): return [1.]
def infinite(images, prompts): return [float('inf')] * len(images)
number = 3
def longest(images, prompts, rows): return [len(row['source']) for row in rows]
def slow(images, prompts):
    import pathlib, time
    with pathlib.Path('calls').open('a') as f: f.write(prompts[0] + ' ')
    time.sleep(1)
    return [0.] * len(images)
def scaled(images, prompts, factor=2.): return [factor] * len(images)
'''
SMALL = ''' # the package's own code on a small model: its weights and words are written, then it is served
import json, sys
sys.path.insert(0, sys.argv[1])
import service
service.torchvision_for_cpu()
import torch
from hpsv2.src.open_clip import factory, tokenizer
vision = dict(image_size=28, layers=2, width=64, head_width=4, patch_size=14)
text = dict(context_length=77, vocab_size=49408, width=32, heads=16, layers=2)
factory._MODEL_CONFIGS['ViT-H-14'] = dict(embed_dim=24, vision_cfg=vision, text_cfg=text)
torch.manual_seed(0)
model = factory.create_model('ViT-H-14', output_dict=True)
for p in model.parameters(): p.data += .1 * torch.randn_like(p)
torch.save(dict(state_dict=model.state_dict()), 'HPS_v2.1_compressed.pt')
words = tokenizer._tokenizer
merges = sorted(words.bpe_ranks, key=words.bpe_ranks.get)
json.dump(dict(encoder=words.encoder, merges=merges), open('words.json', 'w'))
service.main(['hpsv2', '--weights', 'HPS_v2.1_compressed.pt', '--port', '0'])
'''


@contextmanager
def served(python, words, folder):
    "A service in a process of its own; yields its address."
    env = {**os.environ, 'PYTHONWARNINGS': 'ignore'}
    process = subprocess.Popen([python, *words], cwd=folder, stdout=subprocess.PIPE, text=True, env=env)
    try:
        line = process.stdout.readline()
        assert 'until Ctrl-C' in line, line
        yield line.split(' at ')[1].split(',')[0]
    finally:
        process.kill()
        process.wait()


def test_the_file_needs_pillow_alone():
    "Nothing of egrpo, and torch only where a package is served."
    tree = ast.parse(SERVICE.read_text(encoding='utf-8'))
    imported = [o for o in tree.body if isinstance(o, (ast.Import, ast.ImportFrom))]
    modules = {o.module if isinstance(o, ast.ImportFrom) else o.names[0].name for o in imported}
    assert {m.split('.')[0] for m in modules} - sys.stdlib_module_names == {'PIL'}
    assert 'egrpo' not in {getattr(o, 'module', None) for o in ast.walk(tree)}


def test_a_function_of_another_environment_is_a_reward(tmp_path):
    (tmp_path/'mine.py').write_text(REWARDS)
    images = torch.stack([torch.full((3, 8, 8), v) for v in (0., .6, 1.)])
    with served(sys.executable, [SERVICE, 'mine:brightness', '--port', '0'], tmp_path) as url:
        client = RewardClient(url, retries=0)
        assert_close(client(images, ['a'] * 3), torch.tensor([0., .6, 1.]))
        assert_close(client(images.repeat(20, 1, 1, 1), ['a'] * 60), torch.tensor([0., .6, 1.] * 20)) # more than a request holds
        assert json.load(urllib.request.urlopen(url)) == dict(reward='mine:brightness')
        for body in (b'{}', b'no json', b'{"prompts": ["a"], "images": ["AAAA"]}', b'{"prompts": ["a"], "images": []}',
                     b'{"prompts": "ab", "images": ["", ""]}'):
            with pytest.raises(urllib.error.HTTPError) as refused: urllib.request.urlopen(url, body)
            assert refused.value.code == 400 and 'cannot be read' in json.load(refused.value)['error']


def test_a_function_in_a_file_gets_rows(tmp_path):
    (tmp_path/'own').mkdir()
    (tmp_path/'own'/'mine.py').write_text(REWARDS)
    prompts = [Prompt('a', dict(source='web')), Prompt('b', dict(source='book'))]
    with served(sys.executable, [SERVICE, 'own/mine.py:longest', '--port', '0'], tmp_path) as url:
        reward = get_reward(f'server({url})')
        assert reward.total(torch.rand(2, 3, 8, 8), prompts).tolist() == [3, 4]
    with served(sys.executable, [SERVICE, 'own/mine.py:scaled', '--port', '0'], tmp_path) as url:
        assert RewardClient(url, retries=0)(torch.rand(2, 3, 8, 8), prompts).tolist() == [2, 2] # a default is no place for rows


def test_who_has_left_is_not_scored(tmp_path):
    "Its turn comes after it gave up."
    (tmp_path/'mine.py').write_text(REWARDS)
    with served(sys.executable, [SERVICE, 'mine:slow', '--port', '0'], tmp_path) as url, ThreadPoolExecutor() as pool:
        stays = RewardClient(url, retries=0)
        first = pool.submit(stays, torch.rand(1, 3, 8, 8), ['first'])
        while not (tmp_path/'calls').exists(): time.sleep(.01)
        with pytest.raises(RewardError): RewardClient(url, timeout=.2, retries=0)(torch.rand(1, 3, 8, 8), ['gone'])
        first.result()
        stays(torch.rand(1, 3, 8, 8), ['last'])
    assert (tmp_path/'calls').read_text() == 'first last '


@pytest.mark.parametrize('name, said', [('breaks', 'no such'), ('short', '1 numbers for 3 images'), ('infinite', 'not finite')])
def test_a_reward_that_fails_stops_the_training(tmp_path, name, said):
    (tmp_path/'mine.py').write_text(REWARDS)
    with served(sys.executable, [SERVICE, f'mine:{name}', '--port', '0'], tmp_path) as url:
        client = RewardClient(url, retries=0)
        with pytest.raises(RewardError, match=f'mine:{name} failed.*{said}'): client(torch.rand(3, 3, 8, 8), ['a'] * 3)


@pytest.mark.parametrize('words, said', [
    ('hpsv4', 'must be hpsv2, hpsv3, module:function or file.py:function, got hpsv4'), ('mine:nothing', "mine:nothing cannot be loaded"),
    ('nowhere:score', 'nowhere:score cannot be loaded'), ('hpsv2 --weights none.pt', '--weights none.pt is no file'),
    ('mine:brightness --weights none.pt', '--weights is for hpsv2 and hpsv3'), ('mine:number', 'number is a int, not a function'),
    (':f', ':f cannot be loaded'), ('mine:brightness --port 70000', '--port must be 0 to 65535')])
def test_what_cannot_be_served_is_said_in_a_line(tmp_path, words, said):
    (tmp_path/'mine.py').write_text(REWARDS)
    done = subprocess.run([sys.executable, SERVICE, *'--port 0'.split(), *words.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not OF_HPSV2.exists(), reason='make hpsv2-service makes the environment')
def test_the_package_hpsv2_scores_as_our_loader(tmp_path, measured):
    "On small random weights in the package's own file, pictures of several shapes."
    from transformers import CLIPTokenizer
    (tmp_path/'small.py').write_text(SMALL)
    rng = np.random.default_rng(0)
    prompts = ['a cat', "it's 1990 & the \u201cbest\u201d caf\u00e9\u2026", 'many words ' * 60]
    largest = 0.
    with served(OF_HPSV2, ['small.py', SERVICE.parent], tmp_path) as url:
        words = json.loads((tmp_path/'words.json').read_text())
        names = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
        vocabulary = {names.get(k, k): i for k, i in words['encoder'].items()}
        CLIPTokenizer(vocabulary, [tuple(o) for o in words['merges']], model_max_length=77).save_pretrained(tmp_path)
        model = load_clip(tmp_path/'HPS_v2.1_compressed.pt')
        ours = ClipReward(model, load_tokenizer(tmp_path, CLIPTokenizer, ''), fit_in, clean_prompt)
        theirs = RewardClient(url)
        for size in ((64, 64), (90, 120), (300, 200)):
            image = torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8)) / 255
            images = image.expand(len(prompts), -1, -1, -1)
            expected, found = theirs(images, prompts), ours(images, prompts)
            assert_close(found, expected, rtol=0, atol=1e-5)
            largest = max(largest, float((found - expected).abs().max()))
            assert float(expected.std()) > 1e-3
    measured('score of the package hpsv2 in its own environment against our loader', largest=largest)
