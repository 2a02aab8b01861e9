"Images that are not square: HEIGHTxWIDTH, from the command line to the network."
import json

import pytest
import torch
from parity import FAST, differences, fast_path, general_policy
from PIL import Image

from egrpo.cli.commands import main
from egrpo.models.policy import load_policy, model_sigmas
from egrpo.testing.pipelines import small_pipeline
from egrpo.train.config import TrainConfig, check_config
from egrpo.train.cost import activation_bytes, default_micro_batch, run_memory
from egrpo.train.run import cell_key
from egrpo.train.trainer import Trainer

SMALL = dict(num_steps=4, active_steps=2, tau=0., num_generations=2, prompts_per_iteration=2, iterations=2, eval_size=2, eval_every=0,
             device='cpu')


@pytest.mark.parametrize('name', FAST)
def test_classes_are_as_the_general_policy(name):
    assert fast_path(name, 1, '32x48')[0] < 5e-6
    policy = load_policy(small_pipeline(name), 'cpu', lora_rank=None, resolution='32x48')
    assert policy.decode(torch.zeros(1, *policy.latent_shape)).shape == (1, 3, 32, 48)


@pytest.mark.parametrize('name, resolution', [('lumina2', '64x96'), ('sana', '64x32'), ('wan2.1', '32x48')])
def test_the_general_policy_is_as_the_pipeline(name, resolution):
    policy = general_policy(name, resolution=resolution)
    assert max(filter(None, differences(policy, policy.pipeline)), default=0.) < 1e-6
    height, width = map(int, resolution.split('x'))
    assert policy.decode(torch.zeros(1, *policy.latent_shape)).shape[-2:] == (height, width)


@pytest.mark.parametrize('name', ['sd1.5', 'sdxl'])
def test_unets(name):
    "XL is told height before width, as its pipeline tells it."
    policy = load_policy(small_pipeline(name), 'cpu', lora_rank=None, resolution='32x48')
    cond = policy.encode(['a red circle'])
    x = torch.randn(1, *policy.latent_shape)
    with torch.no_grad(): assert policy.velocity(x, torch.tensor([.5]), cond).shape == x.shape
    assert policy.decode(x).shape == (1, 3, 32, 48)
    if name == 'sd1.5': return
    size = 32, 48
    width = policy.pipeline.text_encoder_2.config.projection_dim
    theirs = policy.pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, width)
    assert torch.equal(policy._size_and_text(cond)['time_ids'], theirs)


@pytest.mark.parametrize('resolution, says', [
    ('32x50', 'resolution must be a multiple of 4, got 32x50'), ('50x32', 'resolution must be a multiple of 4, got 50x32'),
    ('32*48', 'resolution must be a whole number of pixels, or HEIGHTxWIDTH such as 768x1344, got'),
    ('32x0', 'HEIGHTxWIDTH')])
def test_sizes_that_do_not_fit(resolution, says):
    with pytest.raises(ValueError, match=says): load_policy(small_pipeline('flux-dev'), 'cpu', lora_rank=None, resolution=resolution)


def test_a_run_of_wide_images(tmp_path):
    "Its images, its cost, its checkpoint."
    config = TrainConfig(**SMALL, resolution='32x64', out=str(tmp_path/'run'))
    trainer = Trainer(config, reward=lambda images, prompts: images.mean((1, 2, 3)) * (images.shape[-2:] == (32, 64)))
    assert default_micro_batch(config) == trainer.policy.micro_batch
    assert run_memory(config)['activations'] < run_memory(TrainConfig(**SMALL, resolution=64))['activations']
    assert activation_bytes('miniature', (4, 8), 'fp32') == activation_bytes('miniature', (8, 4), 'fp32')
    trainer.fit()
    metrics = [json.loads(line) for line in (tmp_path/'run/metrics.jsonl').read_text().splitlines()]
    assert max(m['ratio_error'] for m in metrics) < 1e-6
    turned = TrainConfig(**SMALL | dict(iterations=3), resolution='64x32', out=config.out, resume=True)
    with pytest.raises(ValueError, match="resolution was '32x64', is '64x32'"): Trainer(turned).fit()


def test_a_number_stays_a_number():
    "So do the names of runs that are kept."
    assert cell_key(TrainConfig(resolution=64)) != cell_key(TrainConfig(resolution='64x64'))
    assert torch.equal(model_sigmas('miniature', 4, '64x64'), model_sigmas('miniature', 4, 64))
    for resolution in (64, '64x128', None): check_config(TrainConfig(resolution=resolution))
    for resolution in ('64', 'wide', 0, '70000x64', 6.4):
        with pytest.raises(ValueError, match='resolution must be'): check_config(TrainConfig(resolution=resolution))


def test_wide_images_are_drawn(tmp_path, capsys):
    "`egrpo sample` makes them; a wrong size is one line."
    out = tmp_path/'wide.png'
    wide = ['--prompt', 'a red circle', '--num-steps', '2', '--device', 'cpu', '--out', str(out)]
    assert main(['sample', '--resolution', '32x96', *wide]) == 0
    width, height = Image.open(out).size
    assert width > height
    capsys.readouterr()
    for wrong in ('96X32', '32x', 'wide'):
        assert main(['sample', '--resolution', wrong, *wide]) == 2
        said = capsys.readouterr().err
        assert 'HEIGHTxWIDTH' in said and said.count('\n') == 1
