"A network in int8 under a LoRA, with torchao, which lies apart: diffusers warns on every import where it is installed."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from egrpo.cli.commands import main
from egrpo.models.policy import load_policy
from egrpo.train.config import TrainConfig
from egrpo.train.cost import run_memory

APART = Path(sys.prefix)/'apart' # where `make` puts torchao
SMALL = dict(lora_rank=4, gradient_checkpointing=True, device='cpu')


def measure(folder):
    "What holds of quantized policies, in a process that finds torchao."
    import torch

    from egrpo.testing.pipelines import small_pipeline
    from egrpo.train.trainer import Trainer

    def size(p): return p.qdata.nbytes + p.scale.nbytes if hasattr(p, 'qdata') else p.nbytes
    def held(policy): return sum(map(size, policy.transformer.parameters()))

    found = {}
    for family in ('flux-dev', 'sana'):
        small_pipeline(family).save_pretrained(folder/family)
        plain, int8 = (load_policy(str(folder/family), quantize=q, resolution=32, **SMALL) for q in (None, 'int8'))
        x, sigma = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([.9, .4])
        with torch.no_grad(): one, other = (policy.velocity(x, sigma, policy.encode(['a', 'b c'])) for policy in (plain, int8))
        apart = float((one - other).abs().max() / one.abs().max())
        found[family] = dict(apart=apart, other_fingerprint=plain.fingerprint != int8.fingerprint)
        config = TrainConfig(model=str(folder/family), quantize='int8', resolution=32, num_steps=4, active_steps=1, num_generations=3,
                             prompts_per_iteration=1, iterations=2, eval_size=1, samples=0, shift=3., lr=1e-3, out=str(folder/'run'/family),
                             plan=dict(tau=1.), guidance=1., **SMALL)
        trainer = Trainer(config, reward=lambda images, prompts: images.mean((1, 2, 3)))
        trainer.fit()
        last = json.loads(trainer.run.metrics.read_text().splitlines()[-1])
        pipeline = small_pipeline(family)
        pipeline.load_lora_weights(folder/'run'/family/'model')
        found[family] |= dict(ratio_error=last['ratio_error'], moved=last['grad_norm'] > 0, loads=bool(pipeline.get_list_adapters()))
        found[family] |= dict(plain_bytes=held(plain), int8_bytes=held(int8))
    return found


@pytest.mark.skipif(not (APART/'torchao').exists(), reason='torchao is not there: make installs it apart')
def test_a_network_in_int8_trains_a_lora(tmp_path):
    "The velocity is that of rounded weights, the ratio 1, the LoRA one for plain diffusers, and the weights take far less than in fp32."
    path = os.pathsep.join([str(APART), os.environ.get('PYTHONPATH', '')])
    ran = subprocess.run([sys.executable, __file__, tmp_path], env=os.environ | dict(PYTHONPATH=path), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    for family, own in found.items():
        assert 0 < own['apart'] < .05 and own['other_fingerprint'], (family, own)
        assert own['ratio_error'] < 1e-6 and own['moved'] and own['loads'], (family, own)
        assert own['int8_bytes'] < .7 * own['plain_bytes'], (family, own)


@pytest.mark.parametrize('command', ['train', 'train --dry-run'])
def test_int8_without_torchao_is_one_line(command, tmp_path, monkeypatch, capsys):
    "Where the model is not there, either: it is not asked for."
    monkeypatch.setitem(sys.modules, 'torchao', None)
    words = f'{command} --model no/model --lora-rank 2 --gradient-checkpointing --quantize int8'.split()
    assert main([*words, '--out', str(tmp_path/'run')]) == 2
    said = capsys.readouterr()
    assert "quantize 'int8' needs the package torchao: pip install torchao" in said.err and not said.out


def test_a_plan_counts_int8_without_torchao(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torchao', None)
    assert main(['plan', 'flux_lora_24gb']) == 0
    assert '13.8' in capsys.readouterr().out


def test_a_policy_in_int8_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchao', None)
    with pytest.raises(ValueError, match='quantize needs torchao .pip install torchao., which cannot be imported'):
        load_policy(quantize='int8', **SMALL)


@pytest.mark.parametrize('changes, words', [
    (dict(lora_rank=0), 'give lora_rank, too'),
    (dict(gradient_checkpointing=None), 'saves nothing without gradient_checkpointing'),
    (dict(quantize='int3'), 'quantize must be one of int8'),
])
def test_what_int8_cannot_be_is_refused(changes, words):
    from egrpo.train.prepare import prepare
    with pytest.raises(ValueError, match=words): prepare(TrainConfig(**{**SMALL, 'quantize': 'int8', **changes}))


def test_int8_halves_the_frozen_weights_of_a_large_model():
    "Predicted for FLUX.1-dev: a byte for nearly every weight, and one block whole while it runs."
    config = dict(model='flux.1-dev', lora_rank=16, gradient_checkpointing=True, dtype='bf16')
    plain, int8 = (run_memory(TrainConfig(quantize=q, **config)) for q in (None, 'int8'))
    assert int8['frozen weights'] == pytest.approx(plain['frozen weights'] / 2, rel=.01)
    assert 0 < int8['weights of a block, whole'] < .05 * plain['frozen weights']


if __name__ == '__main__': print(json.dumps(measure(Path(sys.argv[1]))))
