"Settings of a LoRA and of a pipeline's call: from the command line, a recipe or Python to the policy."
import functools
import json

import pytest
import torch

from egrpo.cli.commands import main
from egrpo.models.policy import load_policy
from egrpo.testing.pipelines import small_pipeline
from egrpo.train.config import TrainConfig, check_config
from egrpo.train.recipes import load_recipe, to_yaml
from egrpo.train.trainer import Trainer

SMALL = dict(num_steps=4, active_steps=2, tau=0., num_generations=2, prompts_per_iteration=2, iterations=3, eval_size=2, eval_every=0,
             device='cpu')
CALL = dict(num_frames=5, negative_prompt='a dark room, no light', max_sequence_length=16)


def frames(images, prompts):
    "A reward of single frames."
    assert images.dim() == 4
    return images.mean((1, 2, 3))

frames.frames = 3


@pytest.fixture
def wan(tmp_path):
    "A folder with a small Wan 2.1."
    small_pipeline('wan2.1').save_pretrained(tmp_path/'wan')
    return tmp_path/'wan'


def test_a_video_model_trains(wan, tmp_path):
    "Three iterations by its frames, with arguments of the pipeline's call; resumed only with the same."
    (tmp_path/'prompts.txt').write_text('a red circle\na blue square\n')
    settings = SMALL | dict(model=str(wan), out=str(tmp_path/'run'), prompts=str(tmp_path/'prompts.txt'), resolution=32, guidance=1.)
    trainer = Trainer(TrainConfig(**settings, lora_rank=2, lr=1e-3, call=dict(num_frames=5)), reward=frames)
    began = {name: p.clone() for name, p in trainer.parameters.items()}
    history = trainer.fit()
    metrics = [json.loads(line) for line in (tmp_path/'run/metrics.jsonl').read_text().splitlines()]
    assert trainer.policy.frames == 5 and len(metrics) == 3 and set(history.iteration) == {0, 3}
    assert max(m['ratio_error'] for m in metrics) < 1e-6
    assert any(not torch.equal(p, began[name]) for name, p in trainer.parameters.items())
    other = TrainConfig(**settings | dict(iterations=4), lora_rank=2, lr=1e-3, call=dict(num_frames=9), resume=True)
    with pytest.raises(ValueError, match='call was .*5.*, is .*9'): Trainer(other, reward=frames).fit()


def test_a_call_is_read_from_everywhere(tmp_path, capsys):
    "Command line, recipe, Python."
    words = [f'{name}={value}' for name, value in CALL.items()]
    assert main(['train', '--print-config', *(word for pair in words for word in ('--call', pair))]) == 0
    recipe = tmp_path/'mine.yaml'
    recipe.write_text(capsys.readouterr().out)
    assert load_recipe(str(recipe))['call'] == CALL
    recipe.write_text(to_yaml(TrainConfig(call=CALL)))
    assert load_recipe(str(recipe))['call'] == CALL
    check_config(TrainConfig(call=CALL))
    with pytest.raises(ValueError, match='call must be names with values'): check_config(TrainConfig(call='num_frames=5'))
    assert main(['train', '--call', 'num_frames']) == 2
    assert "argument --call: invalid name=value value: 'num_frames'" in capsys.readouterr().err


@pytest.mark.parametrize('name', ['qwen-image', 'lumina2'])
def test_a_negative_prompt_reaches_the_encoder(name):
    "Of pipelines with either kind of guidance."
    pipeline, asked = small_pipeline(name), []
    encode_prompt = pipeline.encode_prompt
    @functools.wraps(encode_prompt)
    def watched(*args, **kwargs):
        "Note what is embedded."
        asked.append(str((args, kwargs)))
        return encode_prompt(*args, **kwargs)
    pipeline.encode_prompt = watched
    policy = load_policy(pipeline, 'cpu', lora_rank=None, resolution=32, guidance=4., call=dict(negative_prompt='a dark room'))
    del asked[:]
    policy.encode(['a lamp'])
    assert any('a dark room' in o for o in asked) and policy.nfe_per_velocity == 2


@pytest.mark.parametrize('name, call, says', [
    ('flux-dev', dict(num_frames=5), "num_frames is no argument of a FluxPipeline's call"),
    ('wan2.1', dict(num_frame=5), "num_frame is no argument of a WanPipeline's call"),
    ('wan2.1', dict(height=64), 'height has a setting of its own: give resolution'),
    ('wan2.1', dict(output_type='np'), 'output_type cannot be changed: leave it out'),
    ('flux-dev', dict(guidance_scale=2.), 'guidance_scale has a setting of its own: give guidance'),
    ('qwen-image', dict(true_cfg_scale=2.), 'true_cfg_scale has a setting of its own: give guidance'),
    ('sd1.5', dict(clip_skip=1), 'a StableDiffusionPipeline is not trained through its own call: leave it out'),
])
def test_a_call_that_means_nothing_is_refused(name, call, says):
    "In a line."
    with pytest.raises(ValueError, match=f'^call: {says}'): load_policy(small_pipeline(name), 'cpu', lora_rank=None, call=call)


def test_the_scale_that_guidance_does_not_feed_is_free():
    "FLUX.1's true scale takes a second evaluation, with a negative prompt."
    call = dict(true_cfg_scale=2., negative_prompt='a dark room')
    policy = load_policy(small_pipeline('flux-dev'), 'cpu', lora_rank=None, resolution=32, call=call)
    assert policy.nfe_per_velocity == 2
    load_policy(small_pipeline('qwen-image'), 'cpu', lora_rank=None, resolution=32, call=dict(guidance_scale=2.))


def test_a_lora_is_as_its_settings_say(tmp_path):
    "Layers and scale."
    config = TrainConfig(**SMALL, lora_rank=2, lora_alpha=1., lora_targets='to_q,to_v', out=str(tmp_path/'run'))
    policy = Trainer(config).policy
    assert all('.to_q.' in name or '.to_v.' in name for name in policy.parameters())
    layer = next(m for m in policy.transformer.modules() if hasattr(m, 'scaling'))
    assert layer.scaling == dict(default=.5)
    for settings, says in ((dict(lora_alpha=1.), 'give its lora_rank'), (dict(lora_rank=2, lora_alpha=-1.), 'lora_alpha must be > 0')):
        with pytest.raises(ValueError, match=says): check_config(TrainConfig(**settings))
