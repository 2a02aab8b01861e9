"""Rewards: every way to fail is one line that names reward and remedy, and nothing loads before it is needed."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from egrpo.rewards.reward import BUILT_IN, RewardError, RewardSet, get_reward, score

IMAGES, PROMPTS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ['one', 'two', 'three']


def brightness(images, prompts): return images.mean((1, 2, 3))
def broken(images, prompts): raise KeyError('weights')
def in_place(images, prompts): return images.sub_(images.mean()).div_(images.std()).mean((1, 2, 3))
def multi_line(images, prompts): raise RuntimeError('first\nsecond')


def full(error):
    "A reward that meets this error."
    def reward(images, prompts): raise error
    return reward


@pytest.mark.parametrize('form', [lambda o: o, torch.Tensor.double, torch.Tensor.half, torch.Tensor.numpy, torch.Tensor.tolist,
                                  list, tuple, np.asarray])
def test_any_form_of_scores(form):
    out = score(lambda i, p: form(brightness(i, p)), IMAGES, PROMPTS)
    assert out.shape == (3,) and out.dtype == torch.float32 and out.device.type == 'cpu'
    torch.testing.assert_close(out, brightness(IMAGES, PROMPTS), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('reward, message', [
    (lambda i, p: [1., float('nan'), 2.], "'mine' gave nan for prompt 'two' \\(1 of 3"),
    (lambda i, p: [1., 2., float('inf')], "'mine' gave inf for prompt 'three'"),
    (lambda i, p: torch.tensor([1., 1e300, 1.], dtype=torch.float64), 'gave inf'),
    (lambda i, p: brightness(i, p)[:2], r'shape \(3,\), one score per image, got \(2,\)'),
    (lambda i, p: brightness(i, p)[:, None], r'got \(3, 1\)'),
    (lambda i, p: .5, r'got \(\)'),
    (lambda i, p: None, 'got NoneType'),
    (lambda i, p: ['a', 'b', 'c'], 'got list'),
    (broken, r"'mine' raised KeyError in test_reward.py:\d+ on 3 images, the first for prompt 'one': 'weights'$"),
    (torch.nn.Linear(2, 2), 'raised TypeError on 3'), # no line of the user's own
    (multi_line, 'first second'),
    (full(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')), "'mine' ran out of memory on 3 images: .*egrpo serve"),
    (full(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")), 'ran out of memory on 3 images: take a'),
    (full(RuntimeError('MPS backend out of memory')), 'ran out of memory'), (full(MemoryError()), 'ran out of memory'),
    (full(RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling')), 'ran out of memory'),
])
def test_bad_rewards(reward, message):
    with pytest.raises(RewardError, match=message) as e: score(reward, IMAGES, PROMPTS, name='mine')
    assert isinstance(e.value, ValueError) and '\n' not in str(e.value)


def test_cause_is_kept():
    with pytest.raises(RewardError) as e: score(broken, IMAGES, PROMPTS)
    assert isinstance(e.value.__cause__, KeyError) and 'broken' in str(e.value)


def test_interrupt_passes():
    def interrupted(images, prompts): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): score(interrupted, IMAGES, PROMPTS)


@pytest.mark.parametrize('images, prompts, message', [
    (IMAGES, PROMPTS[:2], 'list of 3 strings, one per image, got 2'),
    (IMAGES, 'one', 'got one string'),
    (IMAGES[0], PROMPTS, r'\(B,3,H,W\)'),
    (IMAGES.permute(0, 2, 3, 1), PROMPTS, r'\(B,3,H,W\)'),
    ((IMAGES * 255).byte(), PROMPTS, 'uint8'),
    (IMAGES.numpy(), PROMPTS, 'ndarray'),
])
def test_bad_batches(images, prompts, message):
    with pytest.raises(ValueError, match=message): score(brightness, images, prompts)


@pytest.mark.parametrize('name', ['verifier', 'preference', 'server(http://127.0.0.1:9)'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_images_that_are_not_finite_are_not_the_rewards_doing(name, value):
    "The verifier would find nothing in them, and give 0 without a word."
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    with pytest.raises(RewardError, match="images are not finite .1 of 3, the first for prompt 'a blue square'.*fp16.*bf16") as e:
        get_reward(name)(images, ['a red circle', 'a blue square', 'two red crosses'])
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('spec, good, bad, message', [
    ('verifier', 'a red circle', 'a cat', "^reward 'verifier' is the miniature's .*'a cat'"),
    ('preference + verifier_strict', 'a red circle', 'a cat', "^reward 'preference' is the miniature's"),
    ('ocr', 'a sign “GO”', 'a plain sign', "^reward 'ocr' looks for text in double quotes, and prompt 'a plain sign' has none"),
    ('clip_score + 2*ocr', 'a sign "GO"', 'an empty sign " "', "^reward 'ocr' looks for text"),
])
def test_prompts_are_checked_before_images_are_made(spec, good, bad, message):
    rewards = get_reward(spec)
    rewards.check([good, good])
    with pytest.raises(ValueError, match=message) as e: rewards.check([good, good, bad])
    assert '\n' not in str(e.value)


def test_a_reward_of_ones_own_may_check_prompts():
    class Short:
        def __call__(self, images, prompts): return brightness(images, prompts)
        def check(self, prompts):
            if max(map(len, prompts)) > 5: raise ValueError('reads five letters at most')
    get_reward(brightness).check(['anything at all'])
    rewards = get_reward(dict(short=Short(), other=brightness))
    rewards.check(PROMPTS)
    with pytest.raises(ValueError, match="^reward 'short' reads five letters"): rewards.check(['too long'])


@pytest.mark.parametrize('spec, weights', [
    ('verifier', dict(verifier=1.)),
    (' preference+0.5*clip ', dict(preference=1., clip=.5)),
    ('1e-3*clip + -2*verifier + verifier_strict', dict(clip=1e-3, verifier=-2., verifier_strict=1.)),
    ('1e+2*clip', dict(clip=100.)),
    ('hpsv2.1 + 0.5*clip_score', {'hpsv2.1': 1., 'clip_score': .5}),
    ('-.5 * hpsv2.0( xswu/HPSv2 )+pickscore(owner/na-me.v1)', {'hpsv2.0': -.5, 'pickscore': 1.}),
    ('server(http://a:1/x?y=1+2) + ocr', dict(server=1., ocr=1.)),
    ('server(http://a:1) + 2*server(http://b:1)', {'server(http://a:1)': 1., 'server(http://b:1)': 2.}),
    ('clip_score + 3*clip_score(a/b)', {'clip_score': 1., 'clip_score(a/b)': 3.}),
])
def test_weighted_sums(spec, weights):
    rewards = get_reward(spec)
    assert rewards.weights == weights and rewards.names == list(weights)
    assert get_reward(repr(rewards)).weights == weights


@pytest.mark.parametrize('spec, message', [
    ('verifer', 'unknown reward .* choose from verifier, verifier_strict, clip, preference'),
    ('my files/u.py:f', "a file's path of letters"), ('u.py', 'unknown reward'),
    ('/no/u.py:f', "'/no/u.py:f' cannot be imported, FileNotFound"),
    ('u.py:f(x)', 'has no place'), ('collections:Counter', r'is a class: .* scorer = Counter\(\) and collections:scorer$'),
    (torch.nn.Flatten, r'is a class: .* scorer = Flatten\(\) and scorer$'),
    ('clip +', 'not a weighted sum'), ('', 'not a weighted sum'), ('+', 'not a weighted sum'), ('clip clip', 'not a weighted sum'),
    ('clip*0.5', 'not a weighted sum'), ('2**clip', 'not a weighted sum'),
    ('clip + clip', 'twice'), ('0*clip', 'not 0'), ('1e999*clip', 'finite'),
    ('nowhere_to_be_found:reward', 'cannot be imported'), ('math:nothing', 'cannot be imported'), ('math:pi', 'is a float'),
    ('hpsv2.1(', 'not a weighted sum'), ('hpsv2.1()', 'not a weighted sum'), ('(hpsv2.1)', 'not a weighted sum'),
    ('hpsv2.1(a)(b)', 'not a weighted sum'), ('hpsv2', 'unknown reward'), ('clip(x)', "'clip' has no place"), ('ocr(x)', 'brings its own'),
    ('math:sqrt(x)', 'has no place'), ('hpsv2.1(/no/such.pt)', "'/no/such.pt' does not exist"), ('pickscore(nowhere)', 'does not exist'),
    ('server', 'needs an address'), ('server(a/b)', 'needs an address'), ('server(http://a) + server(http://a)', 'twice'),
    (None, 'must be a name'), (3, 'must be a name'), ({}, 'name the rewards'), (dict(a=brightness, b=3), "'b' is a int"),
])
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message) as e: get_reward(spec)
    assert '\n' not in str(e.value)


def test_own_rewards():
    assert get_reward(brightness).names == ['brightness']
    rewards = RewardSet(dict(a=brightness, b=lambda i, p: -brightness(i, p)), dict(a=2., b=1.))
    out = rewards(IMAGES, PROMPTS)
    torch.testing.assert_close(out['a'], -out['b'])
    assert get_reward(rewards) is rewards
    with pytest.raises(RewardError, match="'bad'"): get_reward(dict(good=brightness, bad=broken))(IMAGES, PROMPTS)


def test_a_reward_that_works_in_place_spoils_nothing():
    images = IMAGES.clone()
    out = get_reward(dict(first=in_place, second=brightness, third=in_place))(images, PROMPTS)
    assert torch.equal(images, IMAGES)
    torch.testing.assert_close(out['second'], brightness(IMAGES, PROMPTS))
    torch.testing.assert_close(out['first'], out['third'])


@pytest.mark.parametrize('code, message', [
    ('def f(images, prompts)\n  return 0', r"SyntaxError: expected ':' \(mine.py, line 1\)"),
    ('\nf = nothing', "NameError in mine.py:2: name 'nothing' is not defined"),
    ("import json\nf = json.loads('')", 'JSONDecodeError in mine.py:2: '), # nearest to the error, of one's own
    ("f = open('/nope/weights.pt')", "FileNotFoundError in mine.py:1: .*'/nope/weights.pt'"),
    ('import no_such_library', "ModuleNotFoundError in mine.py:1: No module named 'no_such_library'"),
    ('raise SystemExit(2)', 'SystemExit in mine.py:1: 2'),
    ('raise OSError("two\\nlines")', 'OSError in mine.py:1: two lines'),
    ('g = 3', "AttributeError: .* has no attribute 'f'"),
])
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, code, message):
    (tmp_path/'mine.py').write_text(code)
    monkeypatch.chdir(tmp_path)
    for name in ('mine:f', 'mine.py:f', './mine.py:f', f'{tmp_path}/mine.py:f'):
        with pytest.raises(ValueError, match=f"^reward '{name}' cannot be imported, {message}.* Check") as e: get_reward(name)
        assert '\n' not in str(e.value) and e.value.__cause__
        sys.modules.pop('mine', None)


def test_files_of_ones_own(tmp_path, monkeypatch):
    "In a sum, by any path, two of one name, each run once, with what lies beside it."
    for folder, value in dict(a=1, b=2).items():
        (tmp_path/folder).mkdir()
        (tmp_path/folder/f'beside_{folder}.py').write_text(f'value = {value}')
        (tmp_path/folder/'my-file.py').write_text(f'from beside_{folder} import value\nruns = []\n'
                                                  'def f(images, prompts): runs.append(1); return [value + len(runs) / 10] * len(prompts)\n'
                                                  'def g(images, prompts): return f(images, prompts)')
    monkeypatch.chdir(tmp_path)
    rewards = get_reward(f'-0.5*a/my-file.py:f + {tmp_path}/b/my-file.py:f+./a/../a/my-file.py:g + clip')
    assert list(rewards.weights.values()) == [-.5, 1, 1, 1] and get_reward(repr(rewards)).weights == rewards.weights
    values = [round(score(rewards.rewards[k], IMAGES, PROMPTS)[0].item(), 3) for k in rewards.names[:3]]
    assert values == [1.1, 2.1, 1.2]


def test_module_in_the_current_folder_is_found_and_nothing_else_loads(tmp_path):
    (tmp_path/'my_rewards.py').write_text('def flat(images, prompts): return [0.5] * len(prompts)\n')
    code = ("import sys; sys.path[:] = [o for o in sys.path if o not in ('', '.')]\n"
            "from egrpo.rewards.reward import get_reward; r = get_reward('my_rewards:flat + 2*preference')\n"
            "late = 'diffusers', 'transformers', 'egrpo.miniature.build', 'egrpo.miniature.world'\n"
            "print(r.names, [o for o in late if o in sys.modules])")
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.strip() == "['my_rewards:flat', 'preference'] []", out.stderr


def test_built_in_names(): assert list(BUILT_IN) == ['verifier', 'verifier_strict', 'clip', 'preference']


def test_every_name_is_described():
    from egrpo.rewards.published import REWARD_MODELS
    from egrpo.rewards.reward import describe_rewards
    rows = describe_rewards()
    assert {*BUILT_IN, *REWARD_MODELS} <= {row['reward'] for row in rows} and all(all(row.values()) for row in rows)


def test_a_path_may_hold_what_a_sum_may_not(tmp_path):
    place = tmp_path/'a + 2*b, c'
    place.mkdir()
    save_file(dict(weight=torch.zeros(1)), place/'model.safetensors')
    assert get_reward(f'0.5*pickscore({place}) + clip').weights == dict(pickscore=.5, clip=1.)


def test_the_total_is_the_weighted_sum():
    rewards = RewardSet(dict(a=brightness, b=lambda i, p: [1.] * len(p)), dict(a=2., b=-.5))
    torch.testing.assert_close(rewards.total(IMAGES, PROMPTS), 2 * brightness(IMAGES, PROMPTS) - .5)


def test_learned_rewards_load_once(monkeypatch):
    from egrpo.miniature import build as miniature
    from egrpo.rewards import reward
    loads = []

    class Scorer:
        model = torch.nn.Linear(3, 1)

    def load():
        loads.append(1)
        return Scorer()

    monkeypatch.setattr(miniature, 'load_small_clip', load)
    monkeypatch.setattr(miniature, 'clip_score', lambda scorer, images, prompts: scorer.model(images.mean((2, 3)))[:, 0])
    reward._load.cache_clear()
    try:
        rewards = get_reward('clip')
        assert not loads
        out = [rewards(IMAGES, PROMPTS)['clip'] for _ in range(3)]
        assert len(loads) == 1 and not out[0].requires_grad
    finally: reward._load.cache_clear()


@pytest.mark.parametrize('name', list(BUILT_IN))
def test_built_in_rewards_know_right_from_wrong(name):
    "On rendered scenes, with what the package ships."
    from egrpo.miniature.world import draw, sample_prompts, sample_scene
    prompts, rng = sample_prompts(32, seed=0, split='held_out'), np.random.default_rng(0)
    images = torch.stack([draw(sample_scene(o, rng)) for o in prompts])
    right, wrong = (get_reward(name)(images, o)[name] for o in (prompts, prompts[1:] + prompts[:1]))
    assert right.mean() > wrong.mean() and (right > wrong).float().mean() > .75
