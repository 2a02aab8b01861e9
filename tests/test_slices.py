"Images are decoded and scored in slices: few are alive at a time, and the scores are those of all at once."
import itertools
import weakref

import pytest
import torch
from torch.testing import assert_close

from egrpo.core.plan import count_leaves
from egrpo.models.policy import load_policy
from egrpo.rewards.reward import BUILT_IN, RewardError, get_reward
from egrpo.train import evaluate as evaluate_module
from egrpo.train.evaluate import evaluate, images_per_slice, sample_latents, score_latents
from egrpo.train.prepare import first_plan
from egrpo.train.timing import Laps
from egrpo.train.trainer import TrainConfig, Trainer

PROMPTS = ['a red circle', 'two blue squares', 'a green cross left of a yellow triangle']
SMALL = dict(num_steps=6, active_steps=2, num_generations=4, prompts_per_iteration=2, eval_size=4, device='cpu')


def brightness(images, prompts):
    "A reward of each image by itself."
    return [float(image.mean()) for image in images]


@pytest.fixture(scope='module')
def policy():
    "The miniature, on the CPU."
    return load_policy(device='cpu')


@pytest.fixture
def alive(monkeypatch, policy):
    "Slices of two images; numbers of images that were alive after each decoding."
    seen, numbers, decode = [], [], policy.decode
    def watched(latents):
        "Decode, and count the images that are not gone."
        images = decode(latents)
        seen.append((weakref.ref(images), len(images)))
        numbers.append(sum(n for image, n in seen if image() is not None))
        return images
    monkeypatch.setattr(policy, 'decode', watched)
    monkeypatch.setattr(evaluate_module, 'SLICE_BYTES', 2 * 4 * 3 * policy.resolution**2)
    return numbers


def test_few_images_are_alive(tmp_path, policy, alive):
    "Those of a slice: in training, in its evaluation, and in one outside of it. The phases' times add up."
    trainer = Trainer(TrainConfig(**SMALL, out=str(tmp_path/'run')), policy, reward=brightness)
    ticks = itertools.count()
    metrics = trainer.step(0, Laps(lambda: next(ticks)))
    slices = len(alive)
    assert slices == count_leaves(first_plan(trainer.prepared)) # two prompts, two images in a slice
    assert metrics['seconds_reward'] == slices
    assert metrics['seconds_rollout'] + metrics['seconds_update'] == next(ticks) - 1
    trainer.evaluate()
    evaluate(policy, PROMPTS, num_steps=2)
    assert len(alive) == slices + 2 + 2
    assert max(alive) == 2


def test_what_is_kept_is_seen(policy, alive):
    "Planted: a reward that keeps its images, as a loop that waits for all of them would."
    kept = []
    latents = sample_latents(policy, PROMPTS, num_steps=2)
    score_latents(policy, latents, PROMPTS, lambda images, prompts: kept.append(images) or dict(kept=torch.zeros(len(images))))
    assert max(alive) == 3


def test_slices_score_as_all_at_once(monkeypatch, policy, alive):
    "To the bit where an image is decoded and scored by itself, closely where a network sees a batch."
    monkeypatch.setattr(policy, 'micro_batch', 1)
    reward = get_reward(dict(brightness=brightness) | BUILT_IN)
    latents = sample_latents(policy, PROMPTS, num_steps=2)
    apart = score_latents(policy, latents, PROMPTS, reward)
    together = reward(policy.decode(latents), PROMPTS)
    assert list(apart) == list(together) == reward.names
    for name in ('brightness', 'verifier'): assert torch.equal(apart[name], together[name])
    for name in ('clip', 'preference'): assert_close(apart[name], together[name], atol=1e-5, rtol=0)


def test_a_late_slice_may_fail(tmp_path, policy, alive):
    "As the first one: nothing is trained on the others."
    def late(images, prompts):
        "Raises at the second call."
        if len(alive) == 2: raise ConnectionError('away')
        return brightness(images, prompts)
    trainer = Trainer(TrainConfig(**SMALL, out=str(tmp_path/'run')), policy, reward=late)
    before = {name: p.clone() for name, p in trainer.parameters.items()}
    with pytest.raises(RewardError, match='raised ConnectionError .* on 2 images'): trainer.step(0)
    for name, p in trainer.parameters.items(): assert torch.equal(p, before[name])


@pytest.mark.parametrize('frames, resolution, images', [(1, 64, 2730), (1, 720, 21), (1, '720x1440', 10), (81, 720, 1)])
def test_slices_are_of_128_mib(frames, resolution, images):
    "And of one image or video at least."
    class Sizes: pass
    Sizes.frames, Sizes.resolution = frames, resolution
    assert images_per_slice(Sizes) == images
