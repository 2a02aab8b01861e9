"On a GPU that nobody has here (`fake_device`): in a process of its own for each kind, where there is a compiler."
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from egrpo.cli.entry import explain
from egrpo.cli.shared import check_device
from egrpo.models.policy import load_policy
from egrpo.models.precision import DTYPES, default_dtype
from egrpo.paper.pool import own_gpu
from egrpo.testing.pipelines import small_pipeline
from egrpo.train.cost import free_bytes, network_dtype, policy_of, tune
from egrpo.train.run import cell_key
from egrpo.train.trainer import TrainConfig, Trainer

FAKE = Path(__file__).with_name('fake_device.py')
SMALL = dict(num_steps=6, num_generations=4, active_steps=2, prompts_per_iteration=2, iterations=1, eval_size=2)


@pytest.mark.parametrize('kind', ['cuda', 'mps'])
def test_on(kind, tmp_path):
    from fake_device import COMPILER
    if not COMPILER: pytest.skip('no C++ compiler')
    if torch.cuda.is_available(): pytest.skip('here is a real GPU')
    done = subprocess.run([sys.executable, FAKE, kind, __file__, kind, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def train(out, **settings):
    "A run: its trainer, what is planned for it compared with what it is."
    config = TrainConfig(**SMALL | settings, out=str(out))
    trainer = Trainer(config)
    trainer.fit()
    assert trainer.nfe > 0
    assert DTYPES[network_dtype(config)] == trainer.policy.dtype
    return trainer


def tuned(fake, count, **settings):
    "Tuning measures memory, and waits for the GPU."
    policy = policy_of(TrainConfig(**SMALL | settings))
    waits = []
    count(lambda *args: waits.append(args))
    (*_, (n, _, held)) = tune(policy, free_bytes(policy.device), 2)
    gradients = sum(p.nbytes for p in policy.parameters().values())
    assert n == 2 and gradients < held < fake.fake_peak(0)
    assert len(waits) >= 18 # twice three times three calls


def on_cuda(fake, out):
    "A whole network in bf16 on the second GPU, a LoRA in fp32 on the first, and too little memory."
    states = torch.cuda.get_rng_state_all()
    with patch.dict(os.environ, LOCAL_RANK='1'): check_device(None)
    assert torch.cuda.current_device() == 1, "a reward that is tried early is on another process's GPU"
    trainer = train(out/'whole', device='cuda:1', reward='clip', text_encoders='offload', beta=.1)
    assert trainer.policy.dtype == torch.bfloat16 and fake.fake_peak(1) > 0
    assert fake.fake_peak(0) == 0, 'something is on the first GPU that belongs on the second'
    torch.cuda.set_device(0)
    small_pipeline('sd3').save_pretrained(out/'sd3')
    torch.backends.cudnn.allow_tf32 = True # as it is when torch starts
    train(out/'lora', model=str(out/'sd3'), lora_rank=2, dtype='fp32', reward='clip', prompts='shapes')
    assert not torch.backends.cudnn.allow_tf32
    tuned(fake, lambda wait: setattr(torch.cuda, 'synchronize', wait))
    fake.fake_limit(0, fake.fake_used(0) + 2**24)
    with pytest.raises(RuntimeError) as e: train(out/'full', micro_batch=8)
    assert explain(e.value) == 'the device has not enough memory: lower --micro-batch or --resolution'
    fake.fake_limit(0, 0)
    untouched = map(torch.equal, states, torch.cuda.get_rng_state_all())
    assert all(untouched), "a GPU's generator was used"


def without_bf16():
    "A GPU that only emulates bf16 computes in fp32, and says so; workers have a GPU each."
    torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation
    assert default_dtype(torch.device('cuda')) == 'fp32'
    with pytest.warns(UserWarning, match='only emulates bf16'): assert load_policy(lora_rank=None).dtype == torch.float32
    config = TrainConfig()
    assert [own_gpu(config, i).device for i in range(3)] == ['cuda:0', 'cuda:1', 'cuda:0']
    assert cell_key(own_gpu(config, 1)) == cell_key(config)
    assert own_gpu(replace(config, device='cuda:1'), 0).device == 'cuda:1'


def on_mps(fake, out):
    "A whole network; float64 raises as on the real one."
    with pytest.raises(TypeError, match='float64'): torch.ones(1, device='mps').double()
    assert train(out/'whole', reward='clip').policy.dtype == torch.float32
    tuned(fake, lambda wait: setattr(torch.mps, 'synchronize', wait))


if __name__ == '__main__': # in the process that has the device, which `fake_device` has started
    import fake_device
    warnings.simplefilter('ignore')
    kind, out = sys.argv[1], Path(sys.argv[2])
    fake = fake_device.start(kind)
    if kind == 'mps': on_mps(fake, out)
    else:
        on_cuda(fake, out)
        without_bf16()
