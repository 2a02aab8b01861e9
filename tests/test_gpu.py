"""On a real CUDA GPU, where there is one: training there is that of the CPU, and what only a GPU can show.

`python tests/fake_device.py cuda -m pytest tests/test_gpu.py -n 0` rehearses it without one."""
import gc
import os
from dataclasses import replace

import pytest
import torch

from egrpo.models.policy import load_policy
from egrpo.models.recorder import record_attention_entropy
from egrpo.testing.pipelines import small_pipeline
from egrpo.train import cost
from egrpo.train.timing import highest_rise
from egrpo.train.trainer import TrainConfig, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8') # deterministic matrix products

SMALL = dict(prompts_per_iteration=2, num_generations=4, active_steps=4, iterations=3, eval_size=4, eval_every=0,
             reward='preference', dtype='fp32', device='cuda')


@pytest.fixture
def deterministic():
    "Algorithms that give the same bits each time, where torch has such."
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope='module')
def flux(tmp_path_factory):
    "The folder of a small FLUX pipeline."
    folder = tmp_path_factory.mktemp('flux')
    small_pipeline('flux-dev').save_pretrained(folder)
    return str(folder)


def trained(out, **changes):
    "A finished run."
    trainer = Trainer(TrainConfig(**SMALL | changes, out=str(out)))
    trainer.fit()
    return trainer


def stopped_and_resumed(out):
    "The same run, stopped after its second iteration."
    config = TrainConfig(**SMALL, out=str(out))
    Trainer(config).fit(callback=lambda trainer: trainer.iteration == 2)
    resumed = Trainer(replace(config, resume=True))
    assert resumed.fit() is not None and resumed.iteration == 3
    return resumed


def distance(a, b):
    "Largest difference of two runs' weights, by size of an update."
    pairs = [(p.detach().cpu(), b.parameters[n].detach().cpu()) for n, p in a.parameters.items()]
    return max(float((x - y).abs().max()) for x, y in pairs) / a.config.lr


def test_fp32_is_computed_in_fp32():
    "No TF32, whose products are off by 1e-3."
    load_policy(device='cuda', dtype='fp32', lora_rank=None)
    a, b = torch.randn(2, 512, 512)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    error = (a.cuda() @ b.cuda()).cpu().double() - a.double() @ b.double()
    assert error.abs().max() < 1e-3 * a.shape[0]**.5 / 10


def test_attention_is_not_cudnns():
    "Whose backward pass gave NaN in bf16."
    load_policy(device='cuda', lora_rank=None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_training_is_that_of_the_cpu(tmp_path, measured):
    "The first rollout's images and rewards, before anything is trained, and the ratio at the first update."
    runs = {device: Trainer(TrainConfig(**SMALL | dict(device=device), out=str(tmp_path/device))) for device in ('cpu', 'cuda')}
    (*_, a, ours), (*_, b, theirs) = (trainer.sample(0) for trainer in runs.values())
    here, there = (trainer.policy.decode(out.latents) for trainer, out in zip(runs.values(), (a, b)))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours['preference'], theirs['preference'], rtol=0, atol=1e-4)
    images, rewards = (float((a - b).abs().max()) for a, b in ((here, there), (ours['preference'], theirs['preference'])))
    metrics = {device: [trainer.step(i) for i in range(3)] for device, trainer in runs.items()}
    assert max(m['ratio_error'] for m in metrics['cuda']) < 2e-5
    for a, b in zip(*metrics.values()): assert abs(a['reward/preference'] - b['reward/preference']) < .01
    measured('largest difference of a GPU from the CPU', images=images, rewards=rewards, weights=distance(*runs.values()),
             ratio_error=max(m['ratio_error'] for m in metrics['cuda']))


def test_a_resumed_run_is_a_straight_one(tmp_path, measured, deterministic):
    "To the bit where two straight runs are; else no further from one than these are from each other, ten times."
    straight, again = (trained(tmp_path/name) for name in ('straight', 'again'))
    resumed = stopped_and_resumed(tmp_path/'resumed')
    between, from_straight = distance(straight, again), distance(straight, resumed)
    measured('runs on a GPU, weights by learning rate', straight_twice=between, resumed=from_straight)
    assert from_straight <= 10 * between


@pytest.mark.parametrize('lora_rank', [0, 4])
def test_bf16(flux, tmp_path, measured, lora_rank):
    "A small FLUX is trained in bf16; how far its first ratio is from 1 is reported."
    settings = dict(model=flux, lora_rank=lora_rank, dtype='bf16', prompts='shapes', reward='clip', eval_rewards='clip')
    trainer = Trainer(TrainConfig(**SMALL | settings, out=str(tmp_path)))
    metrics = [trainer.step(i) for i in range(2)]
    error = max(m['ratio_error'] for m in metrics)
    measured(f'bf16 on a GPU, LoRA of rank {lora_rank}, clip range {trainer.config.clip_range:g}', ratio_error=error)
    assert error < .01 and all(m['grad_norm'] > 0 for m in metrics)


def test_recorded_entropies_are_those_of_the_cpu(flux, measured):
    "Of every block, in fp32; in bf16 within what it rounds."
    found = {}
    for device, dtype in (('cpu', 'fp32'), ('cuda', 'fp32'), ('cuda', 'bf16')):
        policy = load_policy(flux, device=device, dtype=dtype, lora_rank=None)
        x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad(), record_attention_entropy(policy.transformer) as record:
            policy.velocity(x, torch.tensor([.3, .8], device=device), policy.encode(['a red circle', 'a blue square']))
        found[device, dtype] = record.entropy()
    torch.testing.assert_close(found['cuda', 'fp32'], found['cpu', 'fp32'], rtol=0, atol=1e-4)
    torch.testing.assert_close(found['cuda', 'bf16'], found['cpu', 'fp32'], rtol=0, atol=.03)
    errors = {dtype: float((found['cuda', dtype] - found['cpu', 'fp32']).abs().max()) for dtype in ('fp32', 'bf16')}
    measured('recorded attention entropy on a GPU', **errors)


def test_memory_beside_what_is_counted(flux, tmp_path, measured):
    "A small network's activations are few beside what libraries hold: reported, and no less than its weights."
    settings = dict(model=flux, lora_rank=0, dtype='bf16', prompts='shapes', reward='clip', eval_rewards='clip')
    config = TrainConfig(**SMALL | settings, out=str(tmp_path))
    def run():
        "An iteration, with all that it holds."
        trainer = Trainer(config)
        trainer.step(0)
        return sum(p.nbytes for p in trainer.parameters.values())
    gc.collect() # what earlier tests left
    weights, rise = highest_rise(run, torch.device('cuda'))
    measured('memory of a small run in KiB', held=rise / 1024, counted=sum(cost.run_memory(config).values()) / 1024)
    assert rise > 4 * weights # weights, gradients, two moments


def test_text_encoders_are_offloaded(flux):
    "They are on the GPU only while they embed, and embed as those that stay there."
    kept, offloaded = (load_policy(flux, device='cuda', lora_rank=None, text_encoders=o) for o in ('keep', 'offload'))
    ours, theirs = (policy.encode(['a red circle']) for policy in (kept, offloaded))
    for a, b in zip(ours.parts, theirs.parts): torch.testing.assert_close(a, b, rtol=0, atol=0)
    def place(policy): return {p.device.type for p in policy.pipeline.text_encoder_2.parameters()}
    assert place(kept) == {'cuda'} and place(offloaded) == {'cpu'}
